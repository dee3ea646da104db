"""Plots of results, one PNG for each part."""

import statistics
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.reporting.run_tables import by_scheme
from benchmarks.results import FASTBERT, Row


def write(rows: list[Row], path: Path) -> list[Path]:
    """Writes NAME-PART.png beside NAME.jsonl for parts that have a plot; returns the paths."""
    written = []
    for part, draw in PLOTS.items():
        if found := [row for row in rows if row["part"] == part]:
            target = path.with_name(f"{path.stem}-{part}.png")
            figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
            draw(axes, found)
            beside = target.with_name(f".{target.name}")
            figure.savefig(beside, format="png", dpi=130, metadata={"Software": None})
            beside.replace(target)
            plt.close(figure)
            written.append(target)
    return written


def steps(axes: plt.Axes, rows: list[Row]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row["timings"]))
    height = 0.8 / len(names)
    for number, name in enumerate(names):
        places = [place for place, row in enumerate(rows) if name in row["timings"]]
        timings = [rows[place]["timings"][name] for place in places]
        bars = axes.barh(
            [place + number * height for place in places],
            [timing["real_tokens_per_second"] for timing in timings],
            height,
            label=name,
        )
        axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
    labels = [f"{row['case']['preset']}, {row['case']['lengths']}" for row in rows]
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(rows))], labels)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    kind = "Pre-training step" if rows[0]["part"] == "steps" else "Forward pass"
    axes.set(xlabel="real tokens a second", title=f"{kind}: the same batches, in turns")
    axes.figure.legend(loc="outside lower center", ncols=min(len(names), 4), fontsize=8)


def ablation(axes: plt.Axes, rows: list[Row]) -> None:
    full = next(r for r in rows if r["case"]["without"] == "nothing")["timings"][FASTBERT]
    names, ratios = [], []
    for row in rows:
        (name, timing), without = next(iter(row["timings"].items())), row["case"]["without"]
        names.append("fastbert" if without == "nothing" else
                     f"without {without}" if name == FASTBERT else name)  # fmt: skip
        ratios.append(timing["median_s"] / full["median_s"])
    bars = axes.barh(names, ratios)
    axes.bar_label(bars, fmt="{:.2f}x", padding=3)
    axes.axvline(1, color="gray", linestyle="--", linewidth=1)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set(xlabel="time of a pre-training step, over fastbert's", title="Each trick switched off")


def convergence(axes: plt.Axes, rows: list[Row]) -> None:
    """A colour for each candidate, a curve for each seed."""
    names = list(dict.fromkeys(name for row in rows for name in row["curves"]))
    for row in rows:
        for number, (name, losses) in enumerate(row["curves"].items()):
            label = name if row is rows[0] else None
            style = ("-", "--", ":", "-.")[number]
            steps = range(1, len(losses) + 1)
            axes.plot(steps, losses, style, label=label, color=f"C{names.index(name)}", linewidth=1)
    case, gap = rows[0]["case"], max(gap for row in rows for gap in row["largest_gap"].values())
    apart = f"seeds {', '.join(str(row['case']['seed']) for row in rows)}"
    if not case["dropout"]:
        apart = f"largest gap {gap:.1e} nats"
    axes.set(
        xlabel="step",
        ylabel="training loss (nats)",
        title=f"BERT-{case['preset']}, the same weights and batches: {apart}",
    )
    axes.grid(alpha=0.3)
    axes.legend()


def noising(axes: plt.Axes, rows: list[Row]) -> None:
    _heldout(axes, rows)
    axes.set_title("Maskings compared: mean and range of the seeds")


def distillation(axes: plt.Axes, rows: list[Row]) -> None:
    students = [row for row in rows if row["case"]["scheme"] != "teacher"]
    _heldout(axes, students)
    taught = [row["teacher_final"] for row in students if row["teacher_final"] is not None]
    axes.axhline(statistics.fmean(taught), color="gray", linestyle=":", label="teachers")
    axes.set_title("A student of half the layers: mean and range of the seeds")
    axes.legend()


def _heldout(axes: plt.Axes, rows: list[Row]) -> None:
    """Draws the held-out losses of runs: a curve for each scheme."""
    for scheme, runs in by_scheme(rows).items():
        steps = [step for step, _ in runs[0]["heldout"]]
        curves = [[loss for _, loss in run["heldout"]] for run in runs]
        (line,) = axes.plot(steps, [statistics.fmean(at) for at in zip(*curves, strict=True)])
        line.set_label(scheme)
        lowest, highest = (list(map(f, zip(*curves, strict=True))) for f in (min, max))
        axes.fill_between(steps, lowest, highest, color=line.get_color(), alpha=0.2, linewidth=0)
    axes.axhline(rows[0]["baseline"], color="gray", linestyle="--", label="unigram baseline")
    axes.set(
        xlabel="step",
        ylabel="held-out MLM loss under BERT's masking (nats)",
    )
    axes.grid(alpha=0.3)
    axes.legend()


def large_batch(axes: plt.Axes, rows: list[Row]) -> None:
    for optimizer in dict.fromkeys(row["case"]["optimizer"] for row in rows):
        mine = [r for r in rows if r["case"]["optimizer"] == optimizer and r["final"] is not None]
        rates = [row["case"]["learning_rate"] for row in mine]
        axes.semilogx(rates, [row["final"] for row in mine], "o-", label=optimizer)
    axes.axhline(rows[0]["baseline"], color="gray", linestyle="--", label="unigram baseline")
    case = rows[0]["case"]
    axes.set(
        xlabel="peak learning rate",
        ylabel="held-out MLM loss (nats)",
        title=f"{case['steps']} steps of {case['batch_tokens']:,} tokens",
    )
    axes.grid(alpha=0.3)
    axes.legend()


def kernels(axes: plt.Axes, rows: list[Row]) -> None:
    rows = [row for row in rows if FASTBERT in row["timings"]]
    labels = [
        " ".join(str(value) for value in row["case"].values() if value not in ("", None))
        for row in rows
    ]
    axes.figure.set_size_inches(9, 1 + 0.22 * len(rows))
    bars = axes.barh(labels, [100 * row["timings"][FASTBERT]["share"] for row in rows])
    axes.bar_label(bars, fmt="{:.0f}", padding=2, fontsize=7)
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="% of the ceiling measured in the same run", title="Operators of fastbert")


def serve_latency(axes: plt.Axes, rows: list[Row]) -> None:
    """A colour for each server: its median solid, its 99th percentile dashed."""
    for number, name in enumerate(dict.fromkeys(name for row in rows for name in row["timings"])):
        timings = [row["timings"][name] for row in rows if name in row["timings"]]
        rates = [timing["rate"] for timing in timings]
        for what, style, key in (("median", "o-", "median_s"), ("99 %", "o--", "p99_s")):
            values = [1e3 * timing[key] for timing in timings]
            axes.semilogy(rates, values, style, color=f"C{number}", label=f"{name}, {what}")
    shares = ", ".join(f"{row['case']['share']:.0%}" for row in rows)
    axes.set(
        xlabel="requests a second",
        ylabel="latency (ms)",
        title=f"Latency at {shares} of each server's own throughput",
        xlim=(0, None),
    )
    for axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis("{x:,.0f}")
    axes.tick_params(axis="y", which="minor", labelsize=8)
    axes.grid(alpha=0.3, which="both")
    axes.figure.legend(loc="outside lower center", ncols=3, fontsize=8)


PLOTS: dict[str, Callable[[plt.Axes, list[Row]], None]] = {
    "kernels": kernels,
    "steps": steps,
    "inference": steps,
    "ablation": ablation,
    "convergence": convergence,
    "noising": noising,
    "large_batch": large_batch,
    "distillation": distillation,
    "serve_latency": serve_latency,
}
