"""Progress of `fastbert embed`: a live bar on a terminal, elsewhere a line now and then."""

import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fastbert.system.console import console
from fastbert.train.distributed import Ranks

_SECONDS = 10  # between two plain lines


class RowsReporter:
    """Shows how many rows the first rank has embedded; each other rank has about as many."""

    def __init__(self, rows: int, ranks: Ranks) -> None:
        self.live = console.is_terminal and ranks.is_first
        self.others = f" on each of {ranks.size} ranks" if ranks.size > 1 else ""
        self.rows, self.done = rows, 0
        self.progress = Progress(
            TextColumn("embedding"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not self.live,
        )
        self.task = self.progress.add_task("", total=rows, speed="")

    def __enter__(self) -> "RowsReporter":
        self.started = self.shown = time.perf_counter()
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def advance(self, rows: int) -> None:
        """Counts `rows` more as embedded; off a terminal, prints a line now and then."""
        self.done += rows
        now = time.perf_counter()
        speed = f"{self.done / max(now - self.started, 1e-9):,.0f} rows/s{self.others}"
        self.progress.update(self.task, completed=self.done, speed=speed)
        if not self.live and now - self.shown > _SECONDS:
            self.shown = now
            console.print(f"{self.done:,} of {self.rows:,} rows, {speed}")
