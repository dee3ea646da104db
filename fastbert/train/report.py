"""The reports on a run: one live line, TensorBoard scalars, and a plot of the losses."""

import contextlib
import itertools
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastbert._version import __version__
from fastbert.system.console import bar, console
from fastbert.system.files import new_file

PARTS = ("soft", "cosine")  # terms of the distillation loss, shown beside it
LIBRARIES = ("tensorboard", "matplotlib")  # the extra `train`, to log and plot a run


class Reporter:
    """Shows a run's progress on one live line, or on plain lines if the output is not a terminal.

    Scalars are also written for TensorBoard. What an earlier process wrote after step `start`, its
    last checkpoint, is discarded. `training` takes a `recipe.training_row`, `validation` the result
    of `evaluate`.
    """

    def __init__(self, run: Path, start: int, steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # needs the extra `train`

        self.steps = steps
        self.live = console.is_terminal
        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)
        self.progress = bar("step {task.completed:.0f}/{task.total:.0f}")
        self.task = self.progress.add_task("", total=steps, completed=start, line="")

    def __enter__(self) -> "Reporter":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        self.writer.close()

    def advance(self) -> None:
        self.progress.advance(self.task)

    def training(self, row: dict[str, float], seconds_left: float) -> None:
        speed = f"{row['real_tokens_per_second']:,.0f} tokens/s"
        parts = "".join(f"{n} {row[n + '_loss']:.3f}  " for n in PARTS if n + "_loss" in row)
        line = f"loss {row['loss']:.3f}  {parts}{_accuracies(row)}  {speed}"
        if row["skipped_steps"]:
            line += f"  {row['skipped_steps']:.0f} step(s) skipped"
        self.progress.update(self.task, line=line)
        if not self.live:
            minutes, seconds = divmod(round(seconds_left), 60)
            console.print(f"step {row['step']}/{self.steps}  {line}  {minutes}:{seconds:02d} left")
        self._scalars("train", row)

    def validation(self, row: dict[str, float]) -> None:
        console.print(
            f"step {row['step']}/{self.steps}  held out: mlm loss {row['heldout_mlm_loss']:.3f}  "
            f"{_accuracies(row)}"
        )
        self._scalars("heldout", row)

    def _scalars(self, group: str, row: dict[str, float]) -> None:
        for name, value in row.items():
            if name != "step":
                self.writer.add_scalar(f"{group}/{name}", value, row["step"])


class TokenizingReporter:
    """Shows the progress of `tokenize_corpus`: a live bar, or a plain line every ten seconds.

    bytes_total: size of the corpus, 0 if unknown. Shows nothing if the cache is complete.
    """

    SECONDS = 10  # between two plain lines

    def __init__(self, bytes_total: int) -> None:
        self.bytes_total = bytes_total
        self.live = console.is_terminal
        self.progress = bar("tokenising")
        self.line = self.printed = ""

    def __enter__(self) -> "TokenizingReporter":
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        if self.line != self.printed:
            console.print(self.line)

    def __call__(self, documents: int, tokens: int, bytes_read: int) -> None:
        now = time.perf_counter()
        if not self.progress.tasks:  # the first call, with the progress of an earlier run
            self.started = self.shown = now
            self.tokens_before = tokens
            self.progress.start()
            total = self.bytes_total or None
            self.task = self.progress.add_task("", total=total, line="")
        line = f"{documents:,} documents, {tokens:,} tokens"
        if self.bytes_total:
            line += f", {bytes_read / self.bytes_total:.0%} of {self.bytes_total / 1e6:,.1f} MB"
        if tokens > self.tokens_before and now > self.started:
            line += f", {(tokens - self.tokens_before) / (now - self.started):,.0f} tokens/s"
        self.progress.update(self.task, completed=bytes_read, line=line)
        if documents:
            self.line = f"tokenised {line}"
        if not self.live and now - self.shown > self.SECONDS:
            self.shown, self.printed = now, self.line
            console.print(self.line)


class Nothing(contextlib.nullcontext[Any]):
    """Replaces a reporter or a profiler if none is wanted: its methods do nothing."""

    def __enter__(self) -> "Nothing":
        return self

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


def _accuracies(row: dict[str, float]) -> str:
    found = ((name, row.get(f"{name}_accuracy")) for name in ("mlm", "nsp"))
    return "  ".join(f"{name} {share:.1%}" for name, share in found if share is not None)


def plot_losses(
    history: list[dict[str, float]], levels: dict[str, float], path: Path, title: str
) -> None:
    """Writes the loss curves as a PNG, with horizontal lines at the held-out losses `levels`.

    history: rows of `recipe.training_row` and of `evaluate`. Raises Unwritable.
    """
    import matplotlib.pyplot as plt  # slow to import, and only needed at the end of a run
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    train = [row for row in history if "loss" in row]
    heldout = [row for row in history if "heldout_mlm_loss" in row]
    line = "." if len(train) == 1 else "-"  # a line through one point is invisible
    steps = [row["step"] for row in train]
    axes.plot(steps, [row["mlm_loss"] for row in train], line, label="MLM, training")
    axes.plot(
        [r["step"] for r in heldout],
        [r["heldout_mlm_loss"] for r in heldout],
        "o-",
        label="MLM, held out",
    )
    pairs = [row for row in train if "nsp_loss" in row]
    if pairs:
        steps = [row["step"] for row in pairs]
        axes.plot(steps, [row["nsp_loss"] for row in pairs], line, label="NSP, training")
    for (name, level), style in zip(levels.items(), itertools.cycle(("--", ":"))):
        axes.axhline(level, color="gray", linestyle=style, label=f"{name}, held out")
    axes.set(xlabel="step", ylabel="loss (nats)", title=title)
    if pairs:  # their loss is the only one near 0
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        with new_file(path) as beside:
            figure.savefig(beside, format="png", dpi=150)
    finally:
        plt.close(figure)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device, threads and commit, to record with a measurement."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "fastbert": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "commit": _commit(),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str | None:
    here = Path(__file__).parent
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            env={**os.environ, "GIT_CEILING_DIRECTORIES": str(here.parents[2])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
