"""Tables of host time: whole calls, layers and operators, and earlier results of patched models."""

import itertools

from benchmarks.reporting.cells import Table, once, seconds, time_of
from benchmarks.results import FASTBERT, SDPA, Row


def host(rows: list[Row]) -> Table:
    header = ("model", "call", "batch", "mask", "filled", "run by", "time",
              "time relative to Hugging Face")  # fmt: skip
    lines = []
    for row in rows:
        case, theirs = row["case"], row["timings"].get(SDPA)
        about = (
            f"{case['preset']} {case['model']}, {case['device']}",
            case["of"],
            f"{case['sequences']} x {case['length']}",
            "given" if case["has_mask"] else "none",
            f"{row['fill']:.0%}",
        )
        for what, (name, timing) in once(about, row["timings"].items()):
            ratio = f"{timing['median_s'] / theirs['median_s']:.2f}x" if theirs else "-"
            lines.append((*what, name, time_of(timing), ratio))
    return Table(header, lines)


def host_layers(rows: list[Row]) -> Table:
    lines = []
    for row in rows:
        products = row["products"]["median_s"]
        for what, (name, timing) in once((row["case"]["of"],), row["timings"].items()):
            rest = seconds(timing["median_s"] - products)
            lines.append((*what, name, time_of(timing), seconds(products), rest))
    header = ("call", "run by", "a layer without kernels", "its matrix products", "the rest")
    return Table(header, lines)


def host_operators(rows: list[Row]) -> Table:
    lines = [
        (row["case"]["operator"], *(time_of(timing) for timing in row["timings"].values()))
        for row in rows
    ]
    return Table(("operator without its kernels", *rows[0]["timings"]), lines)


def drop_in(rows: list[Row]) -> Table:
    """The table of results older than the part "host", in which FASTBERT means a patched model."""
    header = ("BERT-base", "batch", "filled", "Hugging Face (SDPA)", "patched", "ratio")
    lines = []
    for what, group in itertools.groupby(rows, lambda row: row["case"]["of"]):
        for about, row in once((what,), group):
            batch = f"{row['case']['sequences']} x {row['case']['length']}"
            theirs, ours = (row["timings"][name]["median_s"] for name in (SDPA, FASTBERT))
            times = (seconds(theirs), seconds(ours), f"{theirs / ours:.2f}x")
            lines.append((*about, batch, f"{row['fill']:.0%}", *times))
    return Table(header, lines)
