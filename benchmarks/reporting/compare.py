"""`python -m benchmarks compare A B`: which timings are slower in B than in A, beyond noise."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.table import Table

from benchmarks.reporting.cells import is_one_round, seconds
from benchmarks.reporting.console import console
from benchmarks.results import Row, read

ENVIRONMENT = ("device", "threads", "torch", "triton", "transformers", "driver", "precision")


class Change(NamedTuple):
    """One timing in A and B.

    before, after: medians in seconds; ratio: after / before; noise: the sum of both spreads, each
    relative to its median, or None if either has only one round, whose noise is not known
    """

    part: str
    case: str
    candidate: str
    before: float
    after: float
    noise: float | None

    @property
    def ratio(self) -> float:
        return self.after / self.before

    @property
    def verdict(self) -> str:
        if self.noise is None:
            return "one round"
        if abs(self.ratio - 1) <= self.noise:
            return "same within noise"
        return "slower" if self.ratio > 1 else "faster"


def main(
    a: Annotated[Path, typer.Argument(help="Results to compare with.")],
    b: Annotated[Path, typer.Argument(help="Results to judge.")],
) -> None:
    """Show what became slower from A to B; exit code 1 if anything did, beyond the noise."""
    before, after = read(a), read(b)
    for name in ENVIRONMENT:
        old, new = before[0].get(name), after[0].get(name)
        if old != new:
            console.print(f"{name} differs: {old} in {a.name}, {new} in {b.name}")
    found = sorted(changes(before, after), key=lambda change: -change.ratio)
    table = Table("part", "case", "candidate", a.name, b.name, "ratio", "noise", "")
    for change in found:
        table.add_row(
            change.part,
            change.case,
            change.candidate,
            seconds(change.before),
            seconds(change.after),
            f"{change.ratio:.2f}x",
            "-" if change.noise is None else f"±{change.noise:.0%}",
            change.verdict,
        )
    if found:
        console.print(table)
    old, new = timings(before), timings(after)
    for path, keys in ((a, old.keys() - new.keys()), (b, new.keys() - old.keys())):
        for key in sorted(keys):
            console.print(f"only in {path.name}: {', '.join(key)}")
    slower = sum(change.verdict == "slower" for change in found)
    console.print(f"{len(found)} timings compared, {slower} slower beyond the noise")
    raise typer.Exit(1 if slower else 0)


def changes(before: list[Row], after: list[Row]) -> Iterator[Change]:
    old, new = timings(before), timings(after)
    for key in old.keys() & new.keys():
        both = (old[key], new[key])
        noise = None
        if not any(map(is_one_round, both)):
            noise = sum(timing.get("spread", 0.0) for timing in both)
        yield Change(*key, *(timing["median_s"] for timing in both), noise)


def timings(rows: list[Row]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Timings by part, case and candidate."""
    return {
        (row["part"], _named(row["case"]), name): timing
        for row in rows[1:]
        for name, timing in row["timings"].items()
    }


def _named(case: Row) -> str:
    return ", ".join(
        f"{name} {value if isinstance(value, str) else json.dumps(value)}"
        for name, value in case.items()
    )
