"""The commands of `python -m benchmarks`; without a command it measures PARTS."""

import importlib
import os
import time
import traceback
from pathlib import Path
from typing import Annotated
from unittest import mock

import torch
import typer

from benchmarks import gpu_check
from benchmarks.compiling import report as compiling
from benchmarks.operators import kernels, once, tune
from benchmarks.reporting import compare, report
from benchmarks.reporting.console import console, show
from benchmarks.results import Options, Results
from benchmarks.serving import embed_kills
from benchmarks.steps import floor
from benchmarks.training import jump
from fastbert.check import InputError

# A part is a module with run(options, results). The parts in LONG take hours or need another
# server installed, so they run only if --only names them.
PARTS = {
    "kernels": "operators.kernels",
    "steps": "steps.steps",
    "ablation": "steps.ablation",
    "convergence": "training.convergence",
    "host": "host.host",
    "sentence_encode": "serving.sentence_encode",
    "masking": "training.masking",
    "tokenizing": "training.tokenizing",
    "step_profile": "steps.profile",
}
LONG = {
    "noising": "training.noising",
    "large_batch": "training.large_batch",
    "distillation": "training.distillation",
    "chain": "training.chain",
    "serve": "serving.serve",
}
NAMES = ", ".join((*PARTS, *LONG))
COMMANDS = {
    "report": report.main,
    "compare": compare.main,
    "kernels": kernels.main,
    "tune": tune.main,
    "once": once.main,
    "compile": compiling.main,
    "floor": floor.main,
    "jump": jump.main,
    "gpu-check": gpu_check.main,
    "embed-kills": embed_kills.main,
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
for name, command in COMMANDS.items():
    app.command(name)(command)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="Take minutes, with small sizes.")] = False,
    only: Annotated[list[str] | None, typer.Option(help=f"Parts: {NAMES}.")] = None,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16 (autocast).")] = "auto",
    out: Annotated[Path | None, typer.Option(help="JSON Lines file, written row by row.")] = None,
) -> None:
    """Time fastbert and its alternatives in turns; without a command, all parts."""
    if context.invoked_subcommand is not None:
        return
    for name in only or ():
        if name not in PARTS | LONG:
            raise InputError(f"--only: one of {NAMES}, got {name!r}")
    if precision not in ("auto", "fp32", "bf16"):
        raise InputError(f"--precision: auto, fp32 or bf16, got {precision!r}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    options = Options(device, precision, quick)
    failed = run_parts(tuple(only or PARTS), options, Results(options, out))
    raise typer.Exit(1 if failed else 0)


def run_parts(names: tuple[str, ...], options: Options, results: Results) -> list[str]:
    """Runs each part even if others fail; returns the names of those that failed."""
    failed = []
    for name in names:
        started, before = time.perf_counter(), len(results.rows)
        # only `host` lets models record graphs; other parts measure launches or record steps
        graphs = {"FASTBERT_GRAPHS": "auto" if name == "host" else "0"}
        try:
            with mock.patch.dict(os.environ, graphs):
                importlib.import_module(f"benchmarks.{(PARTS | LONG)[name]}").run(options, results)
        except Exception as error:
            failed.append(name)
            traceback.print_exc()
            results.add("failure", {"of": name}, error=repr(error))
        show(results.rows[before:])
        console.print(f"{name}: {time.perf_counter() - started:.0f} s")
    return failed
