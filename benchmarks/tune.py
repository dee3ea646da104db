"""`python -m benchmarks.tune`: times tiles of attention on an NVIDIA GPU, for the kernels' tables.

Every candidate is compared with the plain body before it is timed; the fastest of each kernel are
printed as the table entry to commit, and all of them are written as JSON Lines.
"""

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.timing import summarize
from fastbert import backend, rng
from fastbert.kernels import attention as launchers
from fastbert.kernels.attention_common import Tile
from fastbert.ops import attention_qkvpacked
from fastbert.train.report import environment

# what is swept: the launcher's name for the table, and whether it belongs to the backward
TABLES = {"fwd_tile": False, "dq_tile": True, "dkdv_tile": True, "single_tile": True}
SETS = 4  # of inputs, taken in turn, so that no cache holds them

console = Console(highlight=False, width=110)


def candidates(table: str) -> Iterator[Tile]:
    if table == "single_tile":
        yield from (Tile(size, size, warps, 1) for size in (64, 128) for warps in (4, 8))
        return
    for rows, cols in itertools.product((64, 128), (32, 64, 128)):
        for warps, stages in itertools.product((4, 8), (1, 2, 3)):
            if not (warps == 8 and rows == 64):  # which doubles the work of each score
                yield Tile(rows, cols, warps, stages)


@contextlib.contextmanager
def forced(table: str, tile: Tile | None) -> Iterator[None]:
    original = getattr(launchers, table)
    setattr(launchers, table, lambda *_, **__: tile)
    try:
        yield
    finally:
        setattr(launchers, table, original)


class Problem:
    """Sequences of one length, so that what is tuned does not hang on how they are mixed."""

    def __init__(self, seqlen: int, tokens: int, heads: int, head_dim: int, dropout: float) -> None:
        batch = max(tokens // seqlen, 1)
        self.seqlen, self.dropout = seqlen, dropout
        self.cu_seqlens = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * seqlen
        shape = (SETS, batch * seqlen, 3, heads, head_dim)
        self.inputs = torch.randn(shape, device="cuda", dtype=torch.bfloat16).unbind()
        self.rng = rng.for_batch(self.cu_seqlens, batch * seqlen)
        self.dout = torch.randn_like(self.inputs[0][:, 0])
        for qkv in self.inputs:
            qkv.requires_grad_()
        with backend.use("reference"):
            self.expected = self.step(self.inputs[0])

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        return attention_qkvpacked(
            qkv, self.cu_seqlens, self.seqlen, dropout_p=self.dropout, rng=self.rng
        )

    def step(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.forward(qkv)
        return out.detach(), torch.autograd.grad(out, qkv, self.dout)[0]

    def is_right(self) -> bool:
        pairs = zip(self.step(self.inputs[0]), self.expected, strict=True)
        return all(
            bool((actual - expected).abs().max() <= 0.05 * expected.abs().max())
            for actual, expected in pairs
        )

    def seconds(self, backward: bool, rounds: int) -> dict[str, float]:
        """Median and spread of one forward, or of one backward, by CUDA events."""
        seconds = []
        for number in range(rounds + 2):
            qkv = self.inputs[number % SETS]
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            out = self.forward(qkv) if backward else None
            torch.cuda._sleep(1_000_000)  # the host queues the work meanwhile
            start.record()
            if out is None:
                self.forward(qkv)
            else:
                torch.autograd.grad(out, qkv, self.dout)
            end.record()
            torch.cuda.synchronize()
            if number >= 2:
                seconds.append(start.elapsed_time(end) / 1e3)
        return summarize(seconds)


def sweep(problem: Problem, table: str, rounds: int) -> Iterator[dict]:
    for tile in candidates(table):
        row: dict = {"table": table, "tile": list(tile)}
        try:
            with backend.use("triton"), forced(table, tile):
                if problem.is_right():
                    row |= problem.seconds(TABLES[table], rounds)
                else:
                    row["refused"] = "wrong result"
        except Exception as error:  # a tile that does not fit is a result too
            row["refused"] = str(error).strip().partition("\n")[0] or repr(error)
        yield row


def main(
    seqlen: Annotated[int, typer.Option(help="Tokens of each sequence.")] = 512,
    tokens: Annotated[int, typer.Option(help="Tokens in the batch.")] = 32768,
    heads: Annotated[int, typer.Option()] = 16,
    head_dim: Annotated[int, typer.Option()] = 64,
    dropout: Annotated[float, typer.Option()] = 0.1,
    rounds: Annotated[int, typer.Option(help="Timed runs of each tile.", min=4)] = 20,
    only: Annotated[str, typer.Option(help=f"One of {', '.join(TABLES)}.")] = "",
    out: Annotated[Path | None, typer.Option(help="JSON Lines file, appended to.")] = None,
) -> None:
    """Sweeps the tiles of attention's kernels at one shape."""
    if not torch.cuda.is_available():
        console.print("benchmarks.tune: needs an NVIDIA GPU, and PyTorch finds none")
        raise typer.Exit(2)
    torch.manual_seed(0)
    problem = Problem(seqlen, tokens, heads, head_dim, dropout)
    shape = {"seqlen": seqlen, "head_dim": head_dim, "dropout": dropout}
    _append(out, {"environment": environment(torch.device("cuda")), **shape})
    # one tile for all gradients takes the place of the two other backward kernels where it fits
    tables = ["fwd_tile", "single_tile"] if seqlen <= 128 else ["fwd_tile", "dq_tile", "dkdv_tile"]
    for table in [only] if only else tables:
        rows = []
        for row in sweep(problem, table, rounds):
            rows.append(row)
            _append(out, row)
        timed = sorted((r for r in rows if "median_s" in r), key=lambda r: r["median_s"])
        for row in timed[:3]:
            micro, spread = row["median_s"] * 1e6, row["spread"]
            console.print(f"{table}: Tile{tuple(row['tile'])}  {micro:.1f} us  spread {spread:.0%}")
        console.print(f"{table}: {len(timed)} of {len(rows)} tiles ran and were right")


def _append(out: Path | None, row: dict) -> None:
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    typer.run(main)
