"""Rows of results as tables of text, for the console, the Markdown files and the README alike.

A ratio is a candidate's median time divided by fastbert's; for host time, divided by Hugging
Face's.
"""

from collections.abc import Callable

from benchmarks.reporting.cells import Table, once, seconds, time_of
from benchmarks.reporting.host_tables import drop_in, host, host_layers, host_operators
from benchmarks.reporting.run_tables import (
    chain,
    convergence,
    distillation,
    large_batch,
    noising,
    pretraining,
)
from benchmarks.reporting.serve_tables import serve, serve_latency
from benchmarks.results import FASTBERT, Row

# What a step on a GPU costs besides time: the column's title, and the format of its figures.
COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "memory_held_bytes": ("memory held", lambda size: f"{size / 2**30:.2f} GiB"),
    "host_waits": ("host waits", str),
    "kernel_launches": ("launches", "{:,}".format),
    "graph_nodes": ("nodes of the graph", "{:,}".format),
}


def steps(rows: list[Row]) -> Table:
    costs = tuple(name for name in COSTS if any(name in t for r in rows for t in _timings(r)))
    header = ("model", "lengths", "filled", "run by", "time", "real tokens/s", "MFU",
              *(COSTS[name][0] for name in costs), "time relative to fastbert")  # fmt: skip
    lines = []
    for row in rows:
        case = row["case"]
        about = (
            f"{case['preset']}, {case['sequences']} sequences",
            case["lengths"],
            f"{row['fill']:.0%}",
        )
        lines += [
            (
                *what,
                name,
                time_of(timing),
                f"{timing['real_tokens_per_second']:,.0f}",
                f"{timing['utilisation']:.0%}",
                *(COSTS[cost][1](timing[cost]) if cost in timing else "-" for cost in costs),
                _ratio(row, name),
            )
            for what, (name, timing) in once(about, row["timings"].items())
        ]
    return Table(header, lines)


def ablation(rows: list[Row]) -> Table:
    """A line for each optimization; the last is Hugging Face's step, which has none of them."""
    full = _median(rows, "nothing")
    lines = []
    for row in rows:
        (name, timing), without = next(iter(row["timings"].items())), row["case"]["without"]
        what = name if name != FASTBERT else f"without {without}"
        what = "fastbert" if without == "nothing" else what
        lines.append((what, time_of(timing), f"{timing['median_s'] / full:.2f}x"))
    return Table(("step", "time", "time relative to fastbert"), lines)


def sentence_encode(rows: list[Row]) -> Table:
    lines = []
    for row in rows:
        ours, theirs = (row["timings"][name]["median_s"] for name in (FASTBERT, "unpatched"))
        fill, ratio = f"{row['fill']:.0%}", f"{theirs / ours:.2f}x"
        lines.append((row["case"]["route"], fill, seconds(ours), seconds(theirs), ratio))
    return Table(("route", "filled", "patched", "unpatched", "ratio"), lines)


def masking(rows: list[Row]) -> Table:
    lines = []
    for row in rows:
        timing = row["timings"][FASTBERT]
        rate = f"{timing['tokens_per_second'] / 1e6:.1f} M"
        lines.append((row["case"]["scheme"], str(row["case"]["length"]), time_of(timing), rate))
    return Table(("masking", "tokens per sequence", "time per batch", "tokens/s"), lines)


def tokenizing(rows: list[Row]) -> Table:
    lines = []
    for row in rows:
        about = (f"{row['case']['bytes'] / 1e6:,.0f} MB", str(row["case"]["cores"]))
        for what, (name, timing) in once(about, row["timings"].items()):
            rates = [timing[f"{unit}_per_second"] / 1e6 for unit in ("bytes", "tokens")]
            figures = (f"{rates[1]:.2f} M", f"{timing['share']:.0%}")
            if name.startswith("hash"):  # a hash makes no tokens
                figures = ("-", "-")
            lines.append((*what, name, time_of(timing), f"{rates[0]:,.2f} MB/s", *figures))
    header = ("corpus", "cores", "run by", "time", "text", "tokens/s", "rate over encode_batch's")
    return Table(header, lines)


def tokenizing_memory(rows: list[Row]) -> Table:
    lines = []
    for row in rows:
        size, memory = row["case"]["bytes"] / 1e6, row["peak_memory_bytes"] / 2**20
        processes = str(row["case"]["processes"])
        lines.append((f"{size:,.0f} MB", processes, f"{memory:,.0f} MiB", seconds(row["seconds"])))
    return Table(("corpus", "processes", "peak memory of all", "time from a cold start"), lines)


def ceilings(rows: list[Row]) -> Table:
    lines = []
    for row in rows:
        scale, unit = (1e12, "TFLOP/s") if row["case"]["of"] == "product" else (1e9, "GB/s")
        lines.append((row["case"]["of"], f"{row['rate'] / scale:,.2f} {unit}"))
    return Table(("ceiling", "measured"), lines)


def kernels(rows: list[Row]) -> Table:
    header = ("operator", "size", "pass", "run by", "time", "rate", "share of ceiling",
              "time relative to fastbert")  # fmt: skip
    lines = []
    for row in rows:
        case = row["case"]
        about = (case["operator"], case["size"], case["direction"])
        scale, unit = (1e12, "TFLOP/s") if row["unit"] == "FLOP/s" else (1e9, "GB/s")
        lines += [
            (
                *what,
                f"{name} ({case['backend']})" if name == FASTBERT else name,
                time_of(timing),
                f"{row['work'] / timing['median_s'] / scale:,.2f} {unit}",
                f"{timing['share']:.0%}",
                _ratio(row, name),
            )
            for what, (name, timing) in once(about, row["timings"].items())
        ]
    return Table(header, lines)


def profile(rows: list[Row]) -> Table:
    lines = [
        (row["case"]["preset"], name[:70], seconds(time), f"{row['share'][name]:.0%}")
        for row in rows
        for name, time in row["seconds"].items()
    ]
    return Table(("step of", "operator or kernel", "time", "share"), lines)


def step_parts(rows: list[Row]) -> Table:
    lines = []
    for row in rows:
        total = row["total_s"]
        times = {**row["seconds"], "all kernels": total}
        for what, (name, time) in once((row["case"]["preset"],), times.items()):
            lines.append((*what, name, seconds(time), f"{time / total:.0%}"))
    return Table(("step of", "part", "time", "share"), lines)


PARTS: dict[str, Callable[[list[Row]], Table]] = {
    "ceilings": ceilings,
    "kernels": kernels,
    "steps": steps,
    "inference": steps,
    "ablation": ablation,
    "convergence": convergence,
    "sentence_encode": sentence_encode,
    "masking": masking,
    "tokenizing": tokenizing,
    "tokenizing_memory": tokenizing_memory,
    "noising": noising,
    "large_batch": large_batch,
    "chain": chain,
    "distillation": distillation,
    "serve": serve,
    "serve_latency": serve_latency,
    "profile": profile,
    "step_parts": step_parts,
    "host": host,
    "host_layers": host_layers,
    "host_operators": host_operators,
    "drop_in": drop_in,
    "pretraining": pretraining,
}


def _timings(row: Row) -> list[Row]:
    return list(row["timings"].values())


def _ratio(row: Row, name: str) -> str:
    if FASTBERT not in row["timings"]:
        return "-"
    return f"{row['timings'][name]['median_s'] / row['timings'][FASTBERT]['median_s']:.2f}x"


def _median(rows: list[Row], without: str) -> float:
    return next(r for r in rows if r["case"]["without"] == without)["timings"][FASTBERT]["median_s"]
