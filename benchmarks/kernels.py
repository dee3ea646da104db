"""`python -m benchmarks.kernels`: each Triton operator against plain PyTorch, on an NVIDIA GPU.

Forward and backward of every workload are timed with CUDA events and shown as a share of what the
same run measures for a copy (bound by memory) or a matrix product (bound by arithmetic).
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor

from benchmarks.timing import summarize
from fastbert import backend, rng
from fastbert.config import PRESETS
from fastbert.ops import (
    attention_qkvpacked,
    bias_gelu,
    dropout_add_layer_norm,
    embedding_layer_norm,
    layer_norm,
    linear_cross_entropy,
)
from fastbert.train.report import environment

MASKED_SHARE = 0.15
SETS = 4  # of inputs, taken in turn
FLUSH_BYTES = 256 << 20  # written before each measurement: more than any cache holds
SLEEP_CYCLES = 1_000_000  # of the GPU, about half a millisecond, while the host queues the work

console = Console(highlight=False, width=110, soft_wrap=True)


class Workload(NamedTuple):
    """One operator at one size, beside the plain PyTorch that it replaces.

    make: draws the inputs; those of a floating-point dtype get gradients; forward, backward: the
    bytes that must be moved, or with `is_product` the floating-point operations.
    """

    operator: backend.Op
    label: str
    make: Callable[[], tuple[Tensor, ...]]
    fused: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    forward: float
    backward: float
    is_product: bool = False


def workloads(
    preset: str, tokens: int, device: str, dtype: torch.dtype = torch.bfloat16
) -> Iterator[Workload]:
    """Operators with a Triton body, at the sizes that a model of this preset has."""
    hidden = PRESETS[preset].shape["hidden_size"]
    inner, vocab = PRESETS[preset].shape["intermediate_size"], 30522
    size = torch.finfo(dtype).bits // 8

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    yield Workload(
        layer_norm,
        f"{preset} {tokens} x {hidden}",
        lambda: (normal(tokens, hidden), normal(hidden), normal(hidden)),
        layer_norm,
        lambda x, weight, bias: F.layer_norm(x, (hidden,), weight, bias, 1e-12),
        forward=2 * size * tokens * hidden,  # x; y
        backward=3 * size * tokens * hidden,  # dy, x; dx
    )
    for approximate in ("none", "tanh"):
        yield Workload(
            bias_gelu,
            f"{preset} {tokens} x {inner}{' tanh' * (approximate == 'tanh')}",
            lambda: (normal(tokens, inner), normal(inner)),
            lambda x, bias, a=approximate: bias_gelu(x, bias, approximate=a),
            lambda x, bias, a=approximate: F.gelu(x + bias, approximate=a),
            forward=2 * size * tokens * inner,  # x; y
            backward=3 * size * tokens * inner,  # dy, x; dx
        )
    numbers = rng.fresh(tokens, torch.device(device))
    for dropout_p in (0.0, 0.1):
        yield Workload(
            dropout_add_layer_norm,
            f"{preset} {tokens} x {hidden} dropout {dropout_p}",
            lambda: (normal(tokens, hidden), normal(tokens, hidden), *normal(3, hidden).unbind()),
            lambda x, residual, weight, bias, x_bias, p=dropout_p: dropout_add_layer_norm(
                x, residual, weight, bias, x_bias=x_bias, dropout_p=p, rng=numbers
            ),
            lambda x, residual, weight, bias, x_bias, p=dropout_p: F.layer_norm(
                residual + F.dropout(x + x_bias, p), (hidden,), weight, bias, 1e-12
            ),
            forward=4 * size * tokens * hidden,  # x, residual; z, y
            backward=(4 if dropout_p else 3) * size * tokens * hidden,  # dy, z; dx, dresidual
        )
    ids = torch.randint(30522, (tokens,), device=device)
    places = torch.arange(tokens, device=device) % 512
    yield Workload(
        embedding_layer_norm,
        f"{preset} {tokens} x {hidden}",
        lambda: (
            *(normal(count, hidden) for count in (30522, 512, 2)),
            *(normal(hidden) for _ in range(2)),
        ),
        lambda *tables: embedding_layer_norm(ids, places, None, *tables),
        lambda word, position, kind, weight, bias: F.layer_norm(
            F.embedding(ids, word) + F.embedding(places, position) + kind[0],
            (hidden,),
            weight,
            bias,
            1e-12,
        ),
        forward=3 * size * tokens * hidden,  # a row of each table but the last; y
        backward=size * (3 * tokens + 30522) * hidden,  # dy and both rows; the word table
    )
    for seqlen in (128, 512):
        yield from attention_workloads(preset, tokens, seqlen, device, normal)
    rows = round(tokens * MASKED_SHARE)
    yield Workload(
        linear_cross_entropy,
        f"{preset} {rows} x {hidden} x {vocab}",
        lambda: (
            normal(rows, hidden),
            normal(vocab, hidden) * hidden**-0.5,
            normal(vocab),
            torch.randint(vocab, (rows,), device=device),
        ),
        linear_cross_entropy,
        lambda x, weight, bias, y: F.cross_entropy(F.linear(x, weight, bias).float(), y),
        forward=2 * rows * hidden * vocab,
        backward=4 * rows * hidden * vocab,
        is_product=True,
    )


def attention_workloads(
    preset: str, tokens: int, seqlen: int, device: str, normal: Callable[..., Tensor]
) -> Iterator[Workload]:
    """Sequences of one length, which plain PyTorch's fused attention takes without padding."""
    heads = PRESETS[preset].shape["num_attention_heads"]
    batch = tokens // seqlen
    total = batch * seqlen
    cu_seqlens = torch.arange(batch + 1, device=device, dtype=torch.int32) * seqlen
    numbers = rng.for_batch(cu_seqlens, total)

    def plain(qkv: Tensor, dropout_p: float) -> Tensor:
        q, k, v = qkv.view(batch, seqlen, 3, heads, 64).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
        return out.transpose(1, 2).reshape(total, heads, 64)

    for dropout_p in (0.0, 0.1):
        yield Workload(
            attention_qkvpacked,
            f"{preset} {batch} x {seqlen} dropout {dropout_p}",
            lambda: (normal(total, 3, heads, 64),),
            lambda qkv, p=dropout_p: attention_qkvpacked(
                qkv, cu_seqlens, seqlen, dropout_p=p, rng=numbers
            ),
            lambda qkv, p=dropout_p: plain(qkv, p),
            forward=4 * total * seqlen * heads * 64,
            backward=10 * total * seqlen * heads * 64,
            is_product=True,
        )


def timed(flush: Tensor, work: Callable, *arguments: Any) -> tuple[Any, Callable[[], float]]:
    """Runs `work` behind a full queue; the second result reads its seconds once the GPU is done."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SLEEP_CYCLES)
    flush.zero_()
    start.record()
    result = work(*arguments)
    end.record()
    return result, lambda: start.elapsed_time(end) / 1e3


def measure(workload: Workload, rounds: int, flush: Tensor) -> dict[str, dict[str, list[float]]]:
    """Seconds of forward and backward, of both bodies in turn, after two rounds to warm up."""
    sets = [workload.make() for _ in range(SETS)]
    for tensors in sets:
        for tensor in tensors:
            tensor.requires_grad_(tensor.is_floating_point())
    bodies = {"fused": workload.fused, "plain": workload.plain}
    times: dict[str, dict[str, list]] = {name: {"forward": [], "backward": []} for name in bodies}
    for number in range(rounds + 2):
        tensors = sets[number % SETS]
        leaves = [tensor for tensor in tensors if tensor.requires_grad]
        for name, body in bodies.items():
            y, forward = timed(flush, body, *tensors)
            dy = torch.randn_like(y)
            _, backward = timed(flush, torch.autograd.grad, y, leaves, dy)
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
