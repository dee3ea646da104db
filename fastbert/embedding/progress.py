"""Progress of `fastbert embed`: a live bar on a terminal, otherwise a line every ten seconds."""

import time

from fastbert.system.console import bar, console
from fastbert.train.distributed import Ranks

_SECONDS = 10  # between two plain lines


class RowsReporter:
    """Shows how many rows the first rank has embedded; every other rank has about as many."""

    def __init__(self, rows: int, ranks: Ranks) -> None:
        self.live = console.is_terminal
        self.others = f" on each of {ranks.size} ranks" if ranks.size > 1 else ""
        self.rows, self.done = rows, 0
        self.progress = bar("embedding {task.completed:,.0f}/{task.total:,.0f}")
        self.task = self.progress.add_task("", total=rows, line="")

    def __enter__(self) -> "RowsReporter":
        self.started = self.shown = time.perf_counter()
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def advance(self, rows: int) -> None:
        """Counts `rows` more embedded rows, and prints a line from time to time off a terminal."""
        self.done += rows
        now = time.perf_counter()
        speed = f"{self.done / max(now - self.started, 1e-9):,.0f} rows/s{self.others}"
        self.progress.update(self.task, completed=self.done, line=speed)
        if not self.live and now - self.shown > _SECONDS:
            self.shown = now
            console.print(f"{self.done:,} of {self.rows:,} rows, {speed}")
