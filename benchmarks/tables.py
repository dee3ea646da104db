"""Rows of results as tables of text: the console, the Markdown files and the README show the same.

Ratios are another candidate's median over fastbert's: how many times as long it takes.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar

from benchmarks.results import FASTBERT, Row
from benchmarks.targets import targets_of

T = TypeVar("T")

# What a GPU tells of a step beside its time, and how it is written.
COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "peak_memory_bytes": ("peak memory", lambda size: f"{size / 2**30:.2f} GiB"),
    "host_syncs": ("host syncs", str),
    "kernel_launches": ("launches", str),
}


class Table(NamedTuple):
    header: tuple[str, ...]
    lines: list[tuple[str, ...]]

    def markdown(self) -> str:
        rule = tuple("---" for _ in self.header)
        return "\n".join(f"| {' | '.join(line)} |" for line in (self.header, rule, *self.lines))


def steps(rows: list[Row]) -> Table:
    costs = tuple(name for name in COSTS if any(name in t for r in rows for t in _timings(r)))
    header = ("model", "lengths", "filled", "by", "time", "real tokens/s", "MFU",
              *(COSTS[name][0] for name in costs), "over fastbert's")  # fmt: skip
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
                _time(timing),
                f"{timing['real_tokens_per_second']:,.0f}",
                f"{timing['utilisation']:.0%}",
                *(COSTS[cost][1](timing[cost]) for cost in costs),
                _ratio(row, name),
            )
            for what, (name, timing) in _once(about, row["timings"].items())
        ]
    return Table(header, lines)


def ablation(rows: list[Row]) -> Table:
    """With a last line for Hugging Face, whose step has none of the tricks."""
    full = _median(rows, "nothing")
    lines = []
    for row in rows:
        (name, timing), without = next(iter(row["timings"].items())), row["case"]["without"]
        what = name if name != FASTBERT else f"without {without}"
        what = "fastbert" if without == "nothing" else what
        lines.append((what, _time(timing), f"{timing['median_s'] / full:.2f}x"))
    return Table(("step", "time", "times fastbert's"), lines)


def convergence(rows: list[Row]) -> Table:
    """A line for each run and other candidate; and one for all seeds, if there are several.

    A curve ends at the mean of its last tenth. Differences that are no larger than what they vary
    by from seed to seed are noise.
    """
    lines = []
    for name in dict.fromkeys(name for row in rows for name in row["largest_gap"]):
        runs = [row for row in rows if name in row["largest_gap"]]
        ends = [[_end(row["curves"][by]) for by in (FASTBERT, name)] for row in runs]
        for row, (ours, theirs) in zip(runs, ends, strict=True):
            case = row["case"]
            about = (*(str(case[key]) for key in ("preset", "steps", "dropout", "seed")), name)
            gap = f"{row['largest_gap'][name]:.1e}"
            lines.append((*about, f"{ours:.4f}", f"{theirs:.4f}", f"{ours - theirs:+.4f}", gap))
        if len(runs) > 1:
            means = [statistics.fmean(side) for side in zip(*ends, strict=True)]
            apart = [ours - theirs for ours, theirs in ends]
            difference = f"{statistics.fmean(apart):+.4f} ±{statistics.stdev(apart):.4f}"
            about = ("", "", "", f"all {len(runs)}", name)
            lines.append((*about, *(f"{mean:.4f}" for mean in means), difference, ""))
    header = ("model", "steps", "dropout", "seed", "compared with", "final loss", "its final loss",
              "difference", "largest gap of a step")  # fmt: skip
    return Table(header, lines)


def _end(curve: list[float]) -> float:
    return statistics.fmean(curve[-max(len(curve) // 10, 1) :])


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
        lines.append((row["case"]["scheme"], str(row["case"]["length"]), _time(timing), rate))
    return Table(("masking", "tokens a sequence", "time of a batch", "tokens/s"), lines)


def tokenizing(rows: list[Row]) -> Table:
    lines = []
    for row in rows:
        about = (f"{row['case']['bytes'] / 1e6:,.0f} MB", str(row["case"]["cores"]))
        for what, (name, timing) in _once(about, row["timings"].items()):
            rates = [timing[f"{unit}_per_second"] / 1e6 for unit in ("bytes", "tokens")]
            figures = (f"{rates[1]:.2f} M", f"{timing['share']:.0%}")
            if name.startswith("hash"):  # which makes no tokens
                figures = ("-", "-")
            lines.append((*what, name, _time(timing), f"{rates[0]:,.2f} MB/s", *figures))
    header = ("corpus", "cores", "by", "time", "text", "tokens/s", "of encode_batch")
    return Table(header, lines)


def tokenizing_memory(rows: list[Row]) -> Table:
    lines = []
    for row in rows:
        size, memory = row["case"]["bytes"] / 1e6, row["peak_memory_bytes"] / 2**20
        processes = str(row["case"]["processes"])
        lines.append((f"{size:,.0f} MB", processes, f"{memory:,.0f} MiB", seconds(row["seconds"])))
    return Table(("corpus", "processes", "peak memory, all", "time from cold"), lines)


def noising(rows: list[Row]) -> Table:
    lines = []
    for scheme, runs in by_scheme(rows).items():
        finals, gamma = [run["final"] for run in runs], runs[0]["case"]["gamma"]
        lines.append(
            (
                scheme,
                "-" if gamma is None else f"{gamma:g}",
                str(len(runs)),
                f"{statistics.fmean(finals):.3f}",
                f"{min(finals):.3f} to {max(finals):.3f}",
                f"{statistics.fmean(run['seconds'] for run in runs):.0f} s",
            )
        )
    header = ("masking", "gamma", "seeds", "held-out loss (nats)", "smallest to largest", "a run")
    return Table(header, lines)


def chain(rows: list[Row]) -> Table:
    lines = []
    for is_trained in (True, False):
        runs = [row for row in rows if row["case"]["pre-trained"] is is_trained]
        accuracies = [run["accuracy"] for run in runs]
        lines.append(
            (
                "pre-trained" if is_trained else "not pre-trained",
                str(len(runs)),
                f"{statistics.fmean(accuracies):.1%}",
                f"{min(accuracies):.1%} to {max(accuracies):.1%}",
                f"{statistics.fmean(run['macro_f1'] for run in runs):.3f}",
            )
        )
    lines.append(("the most frequent module", "", f"{rows[0]['majority']:.1%}", "", ""))
    took = rows[0]["seconds"]
    lines += [(f"time: {name}", "", seconds(took[name]), "", "") for name in took]
    return Table(("model", "seeds", "right on test.csv", "from, to", "macro F1"), lines)


def large_batch(rows: list[Row]) -> Table:
    """A column for each place in the two lists of rates, the best of each optimizer in bold."""
    lines = []
    for optimizer in dict.fromkeys(row["case"]["optimizer"] for row in rows):
        mine = [row for row in rows if row["case"]["optimizer"] == optimizer]
        best = min(row["final"] for row in mine if row["final"] is not None)
        losses = ["diverged" if row["final"] is None else f"{row['final']:.3f}" for row in mine]
        lines.append((f"{optimizer}, learning rate",
                      *(f"{row['case']['learning_rate']:g}" for row in mine)))  # fmt: skip
        lines.append(
            (
                "held-out loss (nats)",
                *(
                    f"**{loss}**" if row["final"] == best else loss
                    for row, loss in zip(mine, losses, strict=True)
                ),
            )
        )
    case = rows[0]["case"]
    title = f"{case['preset']}, {case['steps']} steps of {case['batch_tokens']:,} tokens"
    return Table((title, *("" for _ in lines[0][1:])), lines)


def distillation(rows: list[Row]) -> Table:
    """The teacher's loss is that on the students' batches, which have one segment."""
    lines = []
    for scheme, runs in by_scheme(rows).items():
        finals, accuracies = ([run[name] for run in runs] for name in ("final", "accuracy"))
        if scheme == "teacher":
            students = [row for row in rows if row["teacher_final"] is not None]
            finals = list(dict.fromkeys(row["teacher_final"] for row in students))
            accuracies = list(dict.fromkeys(row["teacher_accuracy"] for row in students))
        lines.append(
            (
                scheme,
                f"{runs[0]['parameters'] / 1e6:.1f} M",
                str(runs[0]["case"]["steps"]),
                str(len(runs)),
                f"{statistics.fmean(finals):.3f}",
                f"{min(finals):.3f} to {max(finals):.3f}",
                f"{statistics.fmean(accuracies):.1%}",
                f"{statistics.fmean(run['seconds'] for run in runs):.0f} s",
            )
        )
    header = ("model", "parameters", "steps", "seeds", "held-out loss (nats)",
              "smallest to largest", "right", "a run")  # fmt: skip
    return Table(header, lines)


def by_scheme(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["case"]["scheme"], []).append(row)
    return found


def ceilings(rows: list[Row]) -> Table:
    lines = []
    for row in rows:
        scale, unit = (1e12, "TFLOP/s") if row["case"]["of"] == "product" else (1e9, "GB/s")
        lines.append((row["case"]["of"], f"{row['rate'] / scale:,.2f} {unit}"))
    return Table(("ceiling", "measured"), lines)


def kernels(rows: list[Row]) -> Table:
    header = ("operator", "size", "pass", "by", "time", "rate", "of ceiling", "over fastbert's")
    lines = []
    for row in rows:
        case = row["case"]
        about = (case["operator"], case["size"], case["direction"])
        scale, unit = (1e12, "TFLOP/s") if row["unit"] == "FLOP/s" else (1e9, "GB/s")
        lines += [
            (
                *what,
                f"{name} ({case['backend']})" if name == FASTBERT else name,
                _time(timing),
                f"{row['work'] / timing['median_s'] / scale:,.2f} {unit}",
                f"{timing['share']:.0%}",
                _ratio(row, name),
            )
            for what, (name, timing) in _once(about, row["timings"].items())
        ]
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


def targets(rows: list[Row]) -> Table:
    """What is wanted beside what was measured: of all rows of a file, its environment first."""
    lines = []
    for target in targets_of(rows):
        value = target.value(rows)
        bound = "at most" if target.is_limit else "at least"
        wanted = f"{bound} {_figure(target.goal, target.unit)}"
        measured, verdict = "-", "not measured"
        if value is not None:
            measured = _figure(value, target.unit)
            verdict = "met" if target.is_met(value) else "not met"
        lines.append((target.what, wanted, measured, verdict))
    return Table(("target", "wanted", "measured", ""), lines)


def _figure(value: float, unit: str) -> str:
    if unit == "s":
        return seconds(value)
    if not unit:
        return f"{value:.0%}"
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.2f}{unit}"


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
    "profile": profile,
    "pretraining": pretraining,
}


def seconds(value: float) -> str:
    """Three digits, in the unit that suits."""
    for scale, unit in ((1, "s"), (1e-3, "ms")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}" if value < 1000 * scale else f"{value:,.0f} s"
    return f"{value * 1e6:.3g} us"


def _timings(row: Row) -> list[Row]:
    return list(row["timings"].values())


def _once(about: tuple[str, ...], candidates: Iterable[T]) -> Iterator[tuple[tuple[str, ...], T]]:
    """What a group of lines is about, in its first line alone."""
    for number, candidate in enumerate(candidates):
        yield (tuple("" for _ in about) if number else about), candidate


def _time(timing: Row) -> str:
    return f"{seconds(timing['median_s'])} ±{timing['spread']:.0%}"


def _ratio(row: Row, name: str) -> str:
    if FASTBERT not in row["timings"]:
        return "-"
    return f"{row['timings'][name]['median_s'] / row['timings'][FASTBERT]['median_s']:.2f}x"


def _median(rows: list[Row], without: str) -> float:
    return next(r for r in rows if r["case"]["without"] == without)["timings"][FASTBERT]["median_s"]
