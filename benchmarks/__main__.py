"""`python -m benchmarks`: measures this machine part by part, into a JSON Lines file."""

import importlib
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import compare, report
from benchmarks.results import Options, Results, Row
from benchmarks.tables import PARTS as TABLES
from fastbert.check import InputError

# A part is a module with run(options, results); the last ones take hours, or other servers to be
# installed, and run if named.
PARTS = (
    *("kernels", "steps", "ablation", "convergence"),
    *("host", "sentence_encode", "masking", "tokenizing", "step_profile"),
)
LONG = ("noising", "large_batch", "distillation", "chain", "serve")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command("compare")(compare.main)
app.command("report")(report.main)
console = Console(highlight=False, markup=False, width=120)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="Minutes, at small sizes.")] = False,
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(PARTS + LONG)}.")] = None,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16 (autocast).")] = "auto",
    out: Annotated[Path | None, typer.Option(help="JSON Lines file, written as it goes.")] = None,
) -> None:
    """Time fastbert against what else there is, all in turns; without a command, everything."""
    if context.invoked_subcommand is not None:
        return
    for name in only or ():
        if name not in PARTS + LONG:
            raise InputError(f"--only: one of {', '.join(PARTS + LONG)}, got {name!r}")
    if precision not in ("auto", "fp32", "bf16"):
        raise InputError(f"--precision: auto, fp32 or bf16, got {precision!r}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    options = Options(device, precision, quick)
    failed = run_parts(tuple(only or PARTS), options, Results(options, out))
    raise typer.Exit(1 if failed else 0)


def run_parts(names: tuple[str, ...], options: Options, results: Results) -> list[str]:
    """Runs each part, whatever becomes of the others; the names of those that failed."""
    failed = []
    for name in names:
        started, before = time.perf_counter(), len(results.rows)
        # other parts measure kernels as they are launched, or record whole steps themselves
        graphs = {"FASTBERT_GRAPHS": "auto" if name == "host" else "0"}
        try:
            with mock.patch.dict(os.environ, graphs):
                importlib.import_module(f"benchmarks.{name}").run(options, results)
        except Exception as error:
            failed.append(name)
            traceback.print_exc()
            results.add("failure", {"of": name}, error=repr(error))
        show(results.rows[before:])
        console.print(f"{name}: {time.perf_counter() - started:.0f} s")
    return failed


def show(rows: list[Row]) -> None:
    for part, make in TABLES.items():
        if found := [row for row in rows if row["part"] == part]:
            header, lines = make(found)
            table = Table(*header, title=part, title_justify="left")
            for line in lines:
                table.add_row(*line)
            console.print(table)


if __name__ == "__main__":
    try:
        app()
    except InputError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        sys.exit(2)
