"""Each operator of fastbert beside the alternatives that a user has, forward and backward.

On a GPU by CUDA events behind a full queue, so that no launch gap is timed, on inputs that change
and with the cache flushed. Rates are shares of what the same run measures for a copy (operators
bound by memory) or a matrix product (those bound by arithmetic).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.bodies import Body, Workload
from benchmarks.operators import workloads
from benchmarks.results import FASTBERT, Options, Results
from benchmarks.timing import FLUSH_BYTES, summarize, timed
from fastbert import backend

SETS = 4  # of inputs, taken in turn

Times = dict[str, dict[str, list[float]]]


def run(options: Options, results: Results, only: str = "") -> None:
    """The parts "ceilings" and "kernels"."""
    device, on_gpu = options.device, options.device.type == "cuda"
    tokens = (8192 if options.quick else 32768) if on_gpu else 512 if options.quick else 2048
    rounds = (12 if options.quick else 30) if on_gpu else 4 if options.quick else 10
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    torch.manual_seed(0)
    flush = torch.empty(FLUSH_BYTES if on_gpu else 0, dtype=torch.uint8, device=device)
    ceilings = dict(measure_ceilings(rounds, flush, dtype))
    for name, rate in ceilings.items():
        results.add("ceilings", {"of": name, "dtype": str(dtype)}, rate=rate)
    for preset in ("base",) if options.quick else ("base", "large"):
        for workload in workloads(preset, tokens, device.type, dtype):
            if only in ("", workload.operator.name):
                bodies = {FASTBERT: Body(workload.fused), **workload.alternatives}
                if not options.quick:
                    bodies["torch.compile"] = Body(torch.compile(workload.plain))
                times, refused = measure(workload, bodies, rounds, flush)
                add_rows(results, workload, times, refused, ceilings)


def measure(
    workload: Workload, bodies: dict[str, Body], rounds: int, flush: Tensor
) -> tuple[Times, dict[str, str]]:
    """Seconds of forward and backward of the bodies in turn, after two rounds to warm up.

    A body that fails is left out from then on; the second result says why.
    """
    times: Times = {name: {"forward": [], "backward": []} for name in bodies}
    refused: dict[str, str] = {}
    own = [_with_gradients(workload.make()) for _ in range(SETS)]
    others = {
        name: [_with_gradients(body.make()) for _ in range(2)]
        for name, body in bodies.items()
        if body.make is not None
    }
    for number in range(rounds + 2):
        for name, body in bodies.items():
            if name in refused:
                continue
            sets = others.get(name, own)
            tensors = sets[number % len(sets)]
            try:
                elapsed = _time_once(workload, body, tensors, flush)
            except Exception as error:
                refused[name] = str(error).strip().partition("\n")[0][:200] or repr(error)
                continue
            if number >= 2:
                for direction, seconds in elapsed.items():
                    times[name][direction].append(seconds)
    return {name: found for name, found in times.items() if name not in refused}, refused


def _with_gradients(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.requires_grad_(tensor.is_floating_point()) for tensor in tensors)


def _time_once(
    workload: Workload, body: Body, tensors: tuple[Tensor, ...], flush: Tensor
) -> dict[str, float]:
    y, forward = timed(flush, body.run, *tensors)
    readers = {"forward": forward}
    if workload.backward:
        leaves = [tensor for tensor in tensors if tensor.requires_grad]
        _, readers["backward"] = timed(flush, torch.autograd.grad, y, leaves, torch.randn_like(y))
    if flush.is_cuda:
        torch.cuda.synchronize()
    return {direction: read() for direction, read in readers.items()}


def measure_ceilings(rounds: int, flush: Tensor, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """What a matrix product (operations a second) and a copy (bytes a second) reach here."""
    device = flush.device
    size, numbers = (8192, 1 << 28) if flush.is_cuda else (1024, 1 << 24)
    source = torch.randn(numbers, device=device)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    target, product = torch.empty_like(source), torch.empty_like(a)
    for name, work, amount in (
        ("product", lambda: torch.mm(a, b, out=product), 2 * size**3),
        ("copy", lambda: target.copy_(source), 2 * source.nbytes),
    ):
        seconds = []
        for _ in range(rounds + 1):
            _, elapsed = timed(flush, work)
            if flush.is_cuda:
                torch.cuda.synchronize()
            seconds.append(elapsed())
        yield name, amount / summarize(seconds[1:])["median_s"]


def add_rows(
    results: Results,
    workload: Workload,
    times: Times,
    refused: dict[str, str],
    ceilings: dict[str, float],
) -> None:
    """A row for each direction."""
    for direction, work in (("forward", workload.forward), ("backward", workload.backward)):
        if not work:
            continue
        timings = {name: summarize(found[direction]) for name, found in times.items()}
        ceiling = ceilings["product" if workload.is_product else "copy"]
        ours = timings.get(FASTBERT)
        results.add(
            "kernels",
            {
                "operator": workload.operator.name,
                "size": workload.label,
                "direction": direction,
                "backend": workload.operator.choice(results.device).backend,
            },
            timings,
            work=work,
            unit="FLOP/s" if workload.is_product else "B/s",
            share=work / ours["median_s"] / ceiling if ours else None,
            refused=refused,
        )


def main(
    only: Annotated[str, typer.Option(help="One operator, by name; by default all.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds, BERT-base alone.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON Lines file, written as it goes.")] = None,
) -> None:
    """Time the operators alone, at the sizes of BERT-base and BERT-large."""
    from benchmarks.__main__ import show

    if only not in ("", *backend.OPS):
        raise typer.BadParameter(f"expected one of {', '.join(backend.OPS)}, got {only!r}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = Options(device, "bf16" if device.type == "cuda" else "fp32", quick)
    results = Results(options, out)
    run(options, results, only)
    show(results.rows)


if __name__ == "__main__":
    typer.run(main)
