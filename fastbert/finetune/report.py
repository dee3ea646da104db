"""Prints the report that ends a fine-tuning run."""

from typing import Any

from rich.table import Table as Printed

from fastbert.finetune.metrics import Report
from fastbert.system.console import console

_WIDEST = 12  # the most columns that fit a terminal


def print_report(report: Report) -> None:
    """Prints the report's tables; a table too wide for a terminal is only in summary.json."""
    for table in report.tables:
        if len(table.header) > _WIDEST:
            console.print(f"{table.title}: {len(table.rows)} labels, see summary.json")
            continue
        printed = Printed(*table.header, title=table.title, title_justify="left")
        for row in table.rows:
            printed.add_row(*map(_shown, row))
        console.print(printed)


def shown(report: Report) -> list[str]:
    """Each metric as "name value", with four decimals."""
    return [f"{name} {value:.4f}" for name, value in report.metrics.items()]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value == int(value) and abs(value) > 1 else f"{value:.3f}"
    return str(value)
