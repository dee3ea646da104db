"""Shows rows of results as tables in the console."""

from rich.console import Console
from rich.table import Table

from benchmarks.reporting.tables import PARTS
from benchmarks.results import Row

console = Console(highlight=False, markup=False, width=120)


def show(rows: list[Row]) -> None:
    """Prints a table for each part that has rows."""
    for part, make in PARTS.items():
        if found := [row for row in rows if row["part"] == part]:
            header, lines = make(found)
            table = Table(*header, title=part, title_justify="left")
            for line in lines:
                table.add_row(*line)
            console.print(table)
