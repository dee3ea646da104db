"""`python -m benchmarks.kernels`: each Triton operator against plain PyTorch, on an NVIDIA GPU.

Forward and backward of every workload are timed with CUDA events and shown as a share of what the
same run measures for a copy (bound by memory) or a matrix product (bound by arithmetic).
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks.operators import Workload, workloads
from benchmarks.timing import FLUSH_BYTES, summarize, timed
from fastbert import backend
from fastbert.train.report import environment

SETS = 4  # of inputs, taken in turn

console = Console(highlight=False, width=110, soft_wrap=True)


def measure(
    workload: Workload, rounds: int, flush: Tensor, names: tuple[str, ...] = ("fused", "plain")
) -> dict[str, dict[str, list[float]]]:
    """Seconds of forward and backward, of the bodies in turn, after two rounds to warm up."""
    sets = [workload.make() for _ in range(SETS)]
    for tensors in sets:
        for tensor in tensors:
            tensor.requires_grad_(tensor.is_floating_point())
    bodies = {name: getattr(workload, name) for name in names}
    times: dict[str, dict[str, list]] = {name: {"forward": [], "backward": []} for name in bodies}
    for number in range(rounds + 2):
        tensors = sets[number % SETS]
        leaves = [tensor for tensor in tensors if tensor.requires_grad]
        for name, body in bodies.items():
            y, forward = timed(flush, body, *tensors)
            dy = torch.randn_like(y)
            _, backward = timed(flush, torch.autograd.grad, y, leaves, dy)
            if flush.is_cuda:
                torch.cuda.synchronize()
            if number >= 2:
                times[name]["forward"].append(forward())
                times[name]["backward"].append(backward())
    return times


def ceilings(rounds: int, flush: Tensor) -> dict[str, float]:
    """What a copy (bytes a second) and a bf16 matrix product (operations a second) reach here."""
    source = torch.randn(1 << 28, device="cuda")
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    target, product = torch.empty_like(source), torch.empty_like(a)
    best = {}
    for name, work, amount in (
        ("copy", lambda: target.copy_(source), 2 * source.nbytes),
        ("product", lambda: torch.mm(a, b, out=product), 2 * 8192**3),
    ):
        seconds = []
        for _ in range(rounds):
            _, elapsed = timed(flush, work)
            torch.cuda.synchronize()
            seconds.append(elapsed())
        best[name] = amount / summarize(seconds[1:])["median_s"]
    return best


def main(
    tokens: Annotated[int, typer.Option(help="Tokens in a batch.", min=128)] = 32768,
    rounds: Annotated[int, typer.Option(help="Timed runs of each body.", min=4)] = 30,
    only: Annotated[str, typer.Option(help="One operator.")] = "",
    out: Annotated[
        Path | None, typer.Option(help="JSON Lines file, written to as it goes.")
    ] = None,
) -> None:
    """Times every operator that has a Triton body, at the sizes of BERT-base and BERT-large."""
    if not torch.cuda.is_available():
        console.print("benchmarks.kernels: needs an NVIDIA GPU, and PyTorch finds none")
        raise typer.Exit(2)
    torch.manual_seed(0)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    limits = ceilings(rounds, flush)
    _write(out, {"environment": environment(torch.device("cuda")), "ceilings": limits}, "w")
    console.print(
        f"copy {limits['copy'] / 1e9:,.0f} GB/s, product {limits['product'] / 1e12:,.0f} TFLOP/s"
    )
    for preset in ("base", "large"):
        for workload in workloads(preset, tokens, "cuda"):
            if only in ("", workload.operator.name):
                with backend.use("triton"):
                    times = measure(workload, rounds, flush)
                for direction in ("forward", "backward"):
                    row = compare(workload, direction, times, limits)
                    _write(out, row, "a")
                    console.print(describe(row))
    measured = {workload.operator.name for workload in workloads("tiny", 128, "cpu")}
    missing = {op.name for op in backend.OPS.values() if "triton" in op.backends} - measured
    if missing:
        console.print(f"no workload yet: {', '.join(sorted(missing))}")


def compare(workload: Workload, direction: str, times: dict, limits: dict) -> dict[str, Any]:
    fused, plain = (summarize(times[name][direction]) for name in ("fused", "plain"))
    amount = workload.forward if direction == "forward" else workload.backward
    return {
        "operator": workload.operator.name,
        "size": workload.label,
        "direction": direction,
        "fused": fused,
        "plain": plain,
        "unit": "FLOP/s" if workload.is_product else "B/s",
        "rate": amount / fused["median_s"],
        "share": amount / fused["median_s"] / limits["product" if workload.is_product else "copy"],
    }


def describe(row: dict[str, Any]) -> str:
    fused, plain = row["fused"], row["plain"]
    rate = row["rate"] / (1e12 if row["unit"] == "FLOP/s" else 1e9)
    unit = "TFLOP/s" if row["unit"] == "FLOP/s" else "GB/s"
    return (
        f"{row['operator']:<21}{row['size']:<26}{row['direction']:<9}"
        f"{fused['median_s'] * 1e6:8,.0f} us ±{fused['spread']:3.0%}"
        f"{rate:8,.0f} {unit} ({row['share']:.0%})"
        f"   plain {plain['median_s'] / fused['median_s']:.2f}x"
    )


def _write(out: Path | None, row: dict[str, Any], mode: str) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open(mode, encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    typer.run(main)
