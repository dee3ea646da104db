"""`python -m benchmarks tune --op X`: times block shapes of the operator's kernels.

A table of block shapes is an attribute, constant or function, of the module that launches the
kernel; a sweep replaces it with each candidate. Every candidate is compared with the reference
before it is timed. The fastest are printed as entries to commit, beside the present one.

Triton would spend most of a sweep compiling, so separate processes first run each candidate once,
which leaves the compiled kernels in Triton's cache.

Needs an NVIDIA GPU. With TRITON_INTERPRET=1 it runs anywhere, to show that it works; its times then
mean nothing.
"""

import contextlib
import functools
import importlib
import itertools
import json
import multiprocessing
import os
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks.operators.bodies import Body, Workload
from benchmarks.operators.candidates import TABLES, Table
from benchmarks.operators.kernels import measure
from benchmarks.operators.workloads import workloads
from benchmarks.results import FASTBERT
from benchmarks.timing import first_line, flush_for, summarize
from benchmarks.workloads import sequence_lengths
from fastbert import backend
from fastbert.check import InputError
from fastbert.config.presets import PRESETS
from fastbert.train.report import environment

AHEAD_TOKENS = 4096  # of a run that only compiles; many processes share one GPU
TOLERANCE = 0.05  # of the largest element: above bfloat16's rounding, below any wrong block's error

PROCESSES = min(os.cpu_count() or 1, 8)

console = Console(highlight=False, width=110, soft_wrap=True)


@contextlib.contextmanager
def forced(table: Table, entry: Any) -> Iterator[None]:
    """In the block, the table has only `entry`; None leaves the table as it is."""
    module = importlib.import_module(f"fastbert.kernels.{table.unit}")
    original = getattr(module, table.name)
    if entry is not None:
        setattr(module, table.name, (lambda *_, **__: entry) if callable(original) else entry)
    try:
        yield
    finally:
        setattr(module, table.name, original)


class Check:
    """Compares the kernels' result and gradients with the reference's on one set of inputs."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.tensors = [t.requires_grad_(t.is_floating_point()) for t in workload.make()]
        with backend.use("reference"):
            y = workload.fused(*self.tensors)
            self.dy = torch.randn_like(y) if y.is_floating_point() else None
            self.expected = self.gradients(y)

    def gradients(self, y: Tensor) -> list[Tensor]:
        if self.dy is None:  # row numbers, which have no gradients
            return [y]
        leaves = [t for t in self.tensors if t.requires_grad]
        return [y.detach(), *torch.autograd.grad(y, leaves, self.dy)]

    def passes(self) -> bool:
        actual = self.gradients(self.workload.fused(*self.tensors))
        return all(
            bool((a - e).abs().max() <= TOLERANCE * e.abs().max())  # False if a is NaN
            for a, e in zip(actual, self.expected, strict=True)
        )


def sweep(
    workload: Workload, table: Table, entries: Iterable[Any], rounds: int, flush: Tensor
) -> Iterator[dict]:
    """Yields a row for each entry: its time, or why it was refused."""
    check = Check(workload)
    direction = "backward" if table.backward else "forward"
    for entry in entries:
        row: dict = {
            "operator": workload.operator.name,
            "size": workload.label,
            "table": f"{table.unit}.{table.name}",
            "entry": entry,
        }
        try:
            with backend.use("triton"), forced(table, entry):
                if check.passes():
                    fused = {FASTBERT: Body(workload.fused)}
                    times, refused = measure(workload, fused, rounds, flush)
                    if refused:
                        raise RuntimeError(refused[FASTBERT])
                    row |= summarize(times[FASTBERT][direction])
                else:
                    row["refused"] = "wrong result"
        except Exception as error:  # a block that does not fit is a result too
            row["refused"] = first_line(error)
        yield row


class Sizes(NamedTuple):
    """The arguments of `workloads`."""

    preset: str
    tokens: int
    device: str
    dtype: torch.dtype


def compile_ahead(pool: Executor, sizes: Sizes, number: int, place: int, count: int) -> None:
    """Compiles the candidates of a table, the `place`-th of its operator, in the pool.

    number: the workload's, among those of these sizes; count: the number of candidates.
    """
    few = sizes._replace(tokens=min(sizes.tokens, AHEAD_TOKENS))
    list(pool.map(_run_once, *zip(*((few, number, place, n) for n in range(count)), strict=True)))


def _run_once(sizes: Sizes, number: int, place: int, candidate: int) -> None:
    check, table = _check(sizes, number), TABLES[_name(sizes, number)][place]
    entry = list(table.candidates(columns_of(check.workload)))[candidate]
    # a candidate that fails here fails again when it is measured, where the reason is reported
    with contextlib.suppress(Exception), backend.use("triton"), forced(table, entry):
        check.passes()


@functools.lru_cache(maxsize=1)
def _check(sizes: Sizes, number: int) -> Check:
    return Check(next(itertools.islice(workloads(*sizes), number, None)))


def _name(sizes: Sizes, number: int) -> str:
    return _check(sizes, number).workload.operator.name


def describe(rows: list[dict], best: int = 3) -> Iterator[str]:
    """Lines with the fastest entries, as they would be committed, and the present one's time."""
    present, timed = rows[0], [row for row in rows if "median_s" in row]
    for row in sorted(timed, key=lambda row: row["median_s"])[:best]:
        entry = "as it is" if row["entry"] is None else repr(row["entry"])
        micro, spread = row["median_s"] * 1e6, row["spread"]
        line = f"{row['table']} = {entry}  # {row['size']}: {micro:,.1f} us ±{spread:.0%}"
        if "median_s" in present:
            line += f", {present['median_s'] / row['median_s']:.2f}x the present speed"
        yield line
    yield f"{present['table']}: {len(timed)} of {len(rows)} entries ran and were right"


def main(
    op: Annotated[str, typer.Option(help=f"One of {', '.join(TABLES)}; by default all.")] = "",
    table: Annotated[
        list[str] | None, typer.Option(help="A table to sweep, as printed: unit.name. Repeatable.")
    ] = None,
    preset: Annotated[
        str, typer.Option(help="tiny, mini, base, large; by default the last two.")
    ] = "",
    sequences: Annotated[int, typer.Option(help="Sequences in the packed batch.", min=1)] = 128,
    rounds: Annotated[int, typer.Option(help="Timed runs of each entry.", min=2)] = 20,
    processes: Annotated[int, typer.Option(help="They compile ahead.", min=1)] = PROCESSES,
    out: Annotated[Path | None, typer.Option(help="JSON Lines file, appended to.")] = None,
) -> None:
    """Sweep the tables of block shapes, at the sizes of BERT-base and BERT-large."""
    if op and op not in TABLES:
        raise typer.BadParameter(f"expected one of {', '.join(TABLES)}, got {op!r}")
    if preset and preset not in PRESETS:
        raise InputError(f"--preset: one of {', '.join(PRESETS)}, got {preset!r}")
    known = {f"{one.unit}.{one.name}" for name in ([op] if op else TABLES) for one in TABLES[name]}
    for name in table or ():
        if name not in known:
            raise InputError(f"--table: one of {', '.join(sorted(known))}, got {name!r}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not backend.INTERPRETED:
        console.print("tune: needs an NVIDIA GPU, but PyTorch finds none")
        raise typer.Exit(2)
    torch.manual_seed(0)
    write = functools.partial(_append, out)
    write({"environment": environment(torch.device(device))})
    flush = flush_for(torch.device(device))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # the interpreter has no bfloat16
    tokens = sum(sequence_lengths("wikipedia", sequences))
    spawn = multiprocessing.get_context("spawn")  # a process that has used the GPU cannot fork
    with ProcessPoolExecutor(processes, spawn) as pool:
        for size in [preset] if preset else ["base", "large"]:
            sizes = Sizes(size, tokens, device, dtype)
            for number, workload, place, swept in chosen(sizes, op, table or ()):
                entries = [None, *swept.candidates(columns_of(workload))]
                if device == "cuda":
                    compile_ahead(pool, sizes, number, place, len(entries) - 1)
                rows = []
                for row in sweep(workload, swept, entries, rounds, flush):
                    rows.append(row)
                    write(row)
                for line in describe(rows):
                    console.print(line)


def chosen(
    sizes: Sizes, op: str, names: Collection[str]
) -> Iterator[tuple[int, Workload, int, Table]]:
    """(number, workload, place, table) for each workload and each table that it measures.

    op: an operator, "" for all; names: of tables, empty for all.
    """
    for number, workload in enumerate(workloads(*sizes)):
        operator = workload.operator.name
        for place, table in enumerate(TABLES.get(operator, ()) if op in ("", operator) else ()):
            is_named = not names or f"{table.unit}.{table.name}" in names
            if is_named and table.where in workload.label:
                yield number, workload, place, table


def columns_of(workload: Workload) -> int:
    """The row width for which a table is read: the first input's."""
    return workload.make()[0].shape[-1]


def _append(out: Path | None, row: dict) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
