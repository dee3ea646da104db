"""A table of text, and the format of figures in the console, in files and in the README."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Table(NamedTuple):
    header: tuple[str, ...]
    lines: list[tuple[str, ...]]

    def markdown(self) -> str:
        rule = tuple("---" for _ in self.header)
        return "\n".join(f"| {' | '.join(line)} |" for line in (self.header, rule, *self.lines))


def seconds(value: float) -> str:
    """A time with three digits, in s, ms or us."""
    for scale, unit in ((1, "s"), (1e-3, "ms")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}" if value < 1000 * scale else f"{value:,.0f} s"
    return f"{value * 1e6:.3g} us"


def time_of(timing: dict[str, Any]) -> str:
    """The median, and the interquartile range as a percentage of it."""
    return f"{seconds(timing['median_s'])}{spread_of(timing)}"


def spread_of(timing: dict[str, Any]) -> str:
    """A timing's spread, to be written after its figure; empty if it is not known."""
    if "spread" not in timing or is_one_round(timing):
        return ""
    return f" ±{timing['spread']:.0%}"


def is_one_round(timing: dict[str, Any]) -> bool:
    """Whether a timing has one round only; older results give such a timing a spread of 0."""
    return timing.get("rounds") == 1 or timing.get("spread", 0.0) is None


def once(about: tuple[str, ...], candidates: Iterable[T]) -> Iterator[tuple[tuple[str, ...], T]]:
    """Pairs each candidate with `about`, which is blank after a group's first line."""
    for number, candidate in enumerate(candidates):
        yield (tuple("" for _ in about) if number else about), candidate
