"""Tables of training runs: final losses and metrics, by scheme and over seeds."""

import statistics

from benchmarks.reporting.cells import Table, seconds
from benchmarks.results import FASTBERT, Row


def convergence(rows: list[Row]) -> Table:
    """A line for each run and each candidate that fastbert is compared with; with several seeds,
    also a line for all of them.

    A curve's final loss is the mean of its last tenth. A difference that does not exceed its
    standard deviation over seeds is noise.
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
    header = ("model", "steps", "dropout", "seed", "compared with", "fastbert's final loss",
              "the other's final loss", "difference", "largest gap at a step")  # fmt: skip
    return Table(header, lines)


def _end(curve: list[float]) -> float:
    return statistics.fmean(curve[-max(len(curve) // 10, 1) :])


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
    header = ("masking", "gamma", "seeds", "held-out loss (nats)", "range", "time per run")
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
    return Table(("model", "seeds", "accuracy on test.csv", "range", "macro F1"), lines)


def large_batch(rows: list[Row]) -> Table:
    """Two lines for each optimizer: its learning rates and the losses, the best loss in bold."""
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
    """A line for each scheme; the teacher's loss is measured on the students' held-out batches.

    These have one segment; the teacher was trained on sentence pairs.
    """
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
              "range", "accuracy", "time per run")  # fmt: skip
    return Table(header, lines)


def by_scheme(rows: list[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["case"]["scheme"], []).append(row)
    return found


def pretraining(rows: list[Row]) -> Table:
    """The table of a pre-training run's summary.json."""
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
        ("steps", "time", "held-out MLM loss (nats)", "unigram baseline", "difference"), lines
    )
