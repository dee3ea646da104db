"""A table of text and how figures are written in it, alike in the console, files and README."""

from typing import NamedTuple


class Table(NamedTuple):
    header: tuple[str, ...]
    lines: list[tuple[str, ...]]

    def markdown(self) -> str:
        rule = tuple("---" for _ in self.header)
        return "\n".join(f"| {' | '.join(line)} |" for line in (self.header, rule, *self.lines))


def seconds(value: float) -> str:
    """Three digits, in the unit that suits."""
    for scale, unit in ((1, "s"), (1e-3, "ms")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}" if value < 1000 * scale else f"{value:,.0f} s"
    return f"{value * 1e6:.3g} us"
