"""Rows of results as tables of text: the console, the Markdown files and the README show the same.

Ratios are another candidate's median over fastbert's: how many times as long it takes.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from benchmarks.results import FASTBERT, Row


class Table(NamedTuple):
    header: tuple[str, ...]
    lines: list[tuple[str, ...]]

    def markdown(self) -> str:
        rule = tuple("---" for _ in self.header)
        return "\n".join(f"| {' | '.join(line)} |" for line in (self.header, rule, *self.lines))


def steps(rows: list[Row]) -> Table:
    others = _others(rows)
    header = ("model", "lengths", "batch filled", FASTBERT, "real tokens/s", *others)
    lines = []
    for row in rows:
        ours = row["timings"][FASTBERT]
        lines.append(
            (
                f"{row['case']['preset']}, {row['case']['sequences']} sequences",
                row["case"]["lengths"],
                f"{row['fill']:.0%}",
                f"{seconds(ours['median_s'])} ±{ours['spread']:.0%}",
                f"{ours['real_tokens_per_second']:,.0f}",
                *(_against(row, name) for name in others),
            )
        )
    return Table(header, lines)


def ablation(rows: list[Row]) -> Table:
    """With a last line for Hugging Face, whose step has none of the tricks."""
    full = _median(rows, "nothing")
    lines = []
    for row in rows:
        (name, timing), without = next(iter(row["timings"].items())), row["case"]["without"]
        what = name if name != FASTBERT else f"without {without}"
        what = "fastbert" if without == "nothing" else what
        time = f"{seconds(timing['median_s'])} ±{timing['spread']:.0%}"
        lines.append((what, time, f"{timing['median_s'] / full:.2f}x"))
    return Table(("step", "time", "times fastbert's"), lines)


def convergence(rows: list[Row]) -> Table:
    header = (
        "model",
        "steps",
        "compared with",
        "largest gap (nats)",
        "final loss",
        "its final loss",
    )
    lines = [
        (
            row["case"]["preset"],
            str(row["case"]["steps"]),
            name,
            f"{gap:.1e}",
            f"{row['curves'][FASTBERT][-1]:.4f}",
            f"{row['curves'][name][-1]:.4f}",
        )
        for row in rows
        for name, gap in row["largest_gap"].items()
    ]
    return Table(header, lines)


def sentence_encode(rows: list[Row]) -> Table:
    lines = []
    for row in rows:
        ours, theirs = (row["timings"][name]["median_s"] for name in (FASTBERT, "unpatched"))
        fill, ratio = f"{row['fill']:.0%}", f"{theirs / ours:.2f}x"
        lines.append((row["case"]["route"], fill, seconds(ours), seconds(theirs), ratio))
    return Table(("route", "filled", "patched", "unpatched", "ratio"), lines)


def ceilings(rows: list[Row]) -> Table:
    lines = []
    for row in rows:
        scale, unit = (1e12, "TFLOP/s") if row["case"]["of"] == "product" else (1e9, "GB/s")
        lines.append((row["case"]["of"], f"{row['rate'] / scale:,.2f} {unit}"))
    return Table(("ceiling", "measured"), lines)


def kernels(rows: list[Row]) -> Table:
    others = _others(rows)
    header = ("operator", "size", "pass", FASTBERT, "rate", "of ceiling", *others)
    lines = []
    for row in rows:
        case, ours = row["case"], row["timings"].get(FASTBERT)
        if ours is None:
            continue
        scale, unit = (1e12, "TFLOP/s") if row["unit"] == "FLOP/s" else (1e9, "GB/s")
        size = ", ".join(str(v) for k, v in case.items() if k not in ("operator", "direction"))
        lines.append(
            (
                case["operator"],
                size,
                case["direction"],
                f"{seconds(ours['median_s'])} ±{ours['spread']:.0%}",
                f"{row['work'] / ours['median_s'] / scale:,.2f} {unit}",
                f"{row['share']:.0%}",
                *(_against(row, name) for name in others),
            )
        )
    return Table(header, lines)


def profile(rows: list[Row]) -> Table:
    lines = [
        (row["case"]["preset"], name[:70], seconds(time), f"{row['share'][name]:.0%}")
        for row in rows
        for name, time in row["seconds"].items()
    ]
    return Table(("step of", "operator or kernel", "time", "share"), lines)


def pretraining(rows: list[Row]) -> Table:
    """Of a run's own summary.json."""
    lines = [
        (
            f"{row['steps']:,}",
            f"{row['seconds']:,.0f} s",
            f"{row['heldout_mlm_loss']:.2f}",
            f"{row['unigram_baseline']:.2f}",
            f"{row['unigram_baseline'] - row['heldout_mlm_loss']:.2f}",
        )
        for row in rows
    ]
    return Table(
        ("steps", "time", "held-out MLM loss (nats)", "unigram baseline", "below it"), lines
    )


PARTS: dict[str, Callable[[list[Row]], Table]] = {
    "ceilings": ceilings,
    "kernels": kernels,
    "steps": steps,
    "inference": steps,
    "ablation": ablation,
    "convergence": convergence,
    "sentence_encode": sentence_encode,
    "profile": profile,
    "pretraining": pretraining,
}


def seconds(value: float) -> str:
    """Three digits, in the unit that suits."""
    for scale, unit in ((1, "s"), (1e-3, "ms")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}" if value < 1000 * scale else f"{value:,.0f} s"
    return f"{value * 1e6:.3g} us"


def _others(rows: Iterable[Row]) -> tuple[str, ...]:
    names = dict.fromkeys(name for row in rows for name in (*row["timings"], *row["refused"]))
    return tuple(name for name in names if name != FASTBERT)


def _against(row: Row, name: str) -> str:
    if name not in row["timings"] or FASTBERT not in row["timings"]:
        return "-"
    other, ours = row["timings"][name], row["timings"][FASTBERT]
    return f"{seconds(other['median_s'])} ({other['median_s'] / ours['median_s']:.2f}x)"


def _median(rows: list[Row], without: str) -> float:
    return next(r for r in rows if r["case"]["without"] == without)["timings"][FASTBERT]["median_s"]
