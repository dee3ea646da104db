"""`fastbert.explain`: how each operator of a model runs on a batch, and why not faster."""

import collections
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from fastbert import events
from fastbert.rng import threshold


class Row(NamedTuple):
    """One line of the table of operators: `calls` calls of one operator that ran the same way.

    kernel: names of the kernels, for operators with several; shape, dtype: of the call's first
    tensor; dropout: its probability and where the masks are made, "" without dropout; note: why no
    faster body ran.
    """

    operator: str
    calls: int
    backend: str
    kernel: str
    shape: str
    dtype: str
    dropout: str
    note: str


class Explanation(NamedTuple):
    """What `explain` returns; `str` gives two tables: how modules ran, and how operators ran."""

    routes: list[events.Route]
    rows: list[Row]

    def __str__(self) -> str:
        console = Console(width=160)
        with console.capture() as captured:
            for table in self._tables():
                console.print(table)
        return captured.get()

    def _tables(self) -> list[Table]:
        paths = Table("module", "runs", "why", title="modules", title_justify="left")
        for route in self.routes:
            paths.add_row(*route)
        # on many machines no row has a dropout, or the name of a kernel
        filled = [name for name in Row._fields if any(getattr(row, name) for row in self.rows)]
        operators = Table(*filled, title="operators", title_justify="left")
        for row in self.rows:
            operators.add_row(*(str(getattr(row, name)) for name in filled))
        return [paths, operators]


def explain(model: nn.Module, /, *args: Any, show: bool = True, **batch: Any) -> Explanation:
    """Reports how each operator of `model` runs on this batch; prints it, unless show=False.

    Calls model(*args, **batch) once without gradients, in the model's current mode (training or
    eval) and under the caller's autocast, and restores torch's generators. An operator's backward
    runs on the backend of its forward. Raises ValueError if the model runs no operator of fastbert.
    """
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with (
        torch.random.fork_rng(devices=[device.index for device in devices]),
        torch.no_grad(),
        events.listen() as heard,
    ):
        model(*args, **batch)
    if not heard:
        raise ValueError(
            f"explain: expected a fastbert model or a patched one, got {type(model).__name__}, "
            "which runs no operator of fastbert; call fastbert.patch(model) first"
        )
    routes = dict.fromkeys(event for event in heard if isinstance(event, events.Route))
    explanation = Explanation(list(routes), _rows(heard))
    if show:
        print(explanation)
    return explanation


def _rows(heard: list[events.Event]) -> list[Row]:
    calls = collections.Counter(
        _row(event) for event in heard if isinstance(event, events.OperatorRun)
    )
    return [row._replace(calls=count) for row, count in calls.items()]


def _row(run: events.OperatorRun) -> Row:
    x, call = run.call[0], run.call
    dropout_p = getattr(call, "dropout_p", 0.0)
    dropout = ""
    if threshold(dropout_p):
        dropout = f"{dropout_p:g} in the kernel" if run.backend == "triton" else f"{dropout_p:g}"
    kernel = run.variant
    if getattr(call, "mask", None) is not None:
        kernel = f"{kernel}, general mask".removeprefix(", ")
    return Row(
        operator=run.operator,
        calls=1,
        backend=run.backend,
        kernel=kernel,
        shape="x".join(map(str, x.shape)),
        dtype=str(x.dtype).removeprefix("torch."),
        dropout=dropout,
        note="" if run.reason == "preferred" else run.reason,
    )
