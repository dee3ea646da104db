"""Times each operator of fastbert beside the alternatives that a user has, forward and backward.

On a GPU, CUDA events time the replay of a graph after a full queue, so that no launch gap counts;
inputs alternate and the cache is flushed. A rate is given as a share of the ceiling that the same
run measures: a copy's rate for memory-bound operators, a matrix product's for compute-bound ones.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from torch import Tensor

from benchmarks.operators import ceilings
from benchmarks.operators.bodies import EAGER, Body, Workload
from benchmarks.operators.workloads import workloads
from benchmarks.reporting.console import show
from benchmarks.results import FASTBERT, Options, Results
from benchmarks.timing import (
    first_line,
    flush_for,
    generators_kept,
    summarize,
    timed,
    why_not_recorded,
)
from fastbert import backend
from fastbert.modules.graphs.recorder import WARM_UP, CudaGraphs

SETS = 3  # sets of inputs, used in turn

Times = dict[str, dict[str, list[float]]]


class Passes(NamedTuple):
    """Both directions of a body on one set of inputs; backward takes the output of forward."""

    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], Tensor]


def run(options: Options, results: Results, only: str = "") -> None:
    """Measures the parts "ceilings" and "kernels"; only: the name of one operator."""
    device, on_gpu = options.device, options.device.type == "cuda"
    # with --quick about as many tokens as a step's batch in benchmarks/steps
    tokens = (24576 if options.quick else 32768) if on_gpu else 512 if options.quick else 2048
    rounds = (12 if options.quick else 30) if on_gpu else 4 if options.quick else 10
    torch.manual_seed(0)
    ceilings.of(options, results)
    for preset in ("base",) if options.quick and not on_gpu else ("large", "base"):
        for workload in workloads(preset, tokens, device.type, options.dtype):
            if only in ("", workload.operator.name):
                bodies = {FASTBERT: Body(workload.fused), **workload.alternatives}
                if options.quick:  # leaves out bodies that take long to compile
                    bodies.pop("flex attention", None)
                else:
                    plain = workload.alternatives[EAGER]
                    bodies["torch.compile"] = plain._replace(run=torch.compile(plain.run))
                times, refused = measure(workload, bodies, rounds, flush_for(device))
                add_rows(options, results, workload, times, refused)


def measure(
    workload: Workload, bodies: dict[str, Body], rounds: int, flush: Tensor
) -> tuple[Times, dict[str, str]]:
    """Times forward and backward of the bodies in turns, after two rounds to warm up.

    Returns the seconds, and by name the reasons why bodies failed; these are dropped.
    """
    own = [_with_gradients(workload.make()) for _ in range(SETS)]
    passes: dict[str, list[Passes]] = {}
    refused: dict[str, str] = {}
    for name, body in bodies.items():
        try:
            sets = own if body.make is None else [_with_gradients(body.make()) for _ in own]
            passes[name] = [direct(workload, body, tensors) for tensors in sets]
        except Exception as error:
            refused[name] = first_line(error)
            continue
        if flush.is_cuda and body.waits:
            refused[f"{name}, as a CUDA graph"] = "makes the host wait"
        elif flush.is_cuda:
            try:
                passes[name] = [recorded(workload, each) for each in passes[name]]
            except RuntimeError as error:
                refused[f"{name}, as a CUDA graph"] = why_not_recorded(error)
    times: Times = {name: {"forward": [], "backward": []} for name in passes}
    for number in range(rounds + 2):
        for name in tuple(passes):
            try:
                elapsed = _time_once(workload, passes[name][number % SETS], flush)
            except Exception as error:
                refused[name] = first_line(error)
                del passes[name], times[name]
                continue
            if number >= 2:
                for direction, seconds in elapsed.items():
                    times[name][direction].append(seconds)
    return times, refused


def direct(workload: Workload, body: Body, tensors: tuple[Tensor, ...]) -> Passes:
    """Both directions without a graph. Runs the forward once, which compiles kernels."""
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    y = body.run(*tensors)
    dy = torch.randn_like(y) if workload.backward else y

    def backward(y: Tensor) -> Tensor:
        return torch.autograd.grad(y, leaves, dy)[0]

    return Passes(lambda: body.run(*tensors), backward)


def recorded(workload: Workload, passes: Passes) -> Passes:
    """Both directions as CUDA graphs; raises RuntimeError if one cannot be recorded."""
    graphs = CudaGraphs()

    def both() -> Tensor:
        y = passes.forward()
        return passes.backward(y) if workload.backward else y

    for _ in range(WARM_UP):
        graphs.warm_up(both)
    with generators_kept():
        forward = graphs.record(passes.forward)
        if not workload.backward:
            return Passes(forward, passes.backward)
        y = forward()  # keeps what the backward reads, in the first graph's memory
        backward = graphs.record(lambda: passes.backward(y))
    return Passes(forward, lambda _: backward())


def _with_gradients(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.requires_grad_(tensor.is_floating_point()) for tensor in tensors)


def _time_once(workload: Workload, passes: Passes, flush: Tensor) -> dict[str, float]:
    y, forward = timed(flush, passes.forward)
    readers = {"forward": forward}
    if workload.backward:
        _, readers["backward"] = timed(flush, passes.backward, y)
    if flush.is_cuda:
        torch.cuda.synchronize()
    return {direction: read() for direction, read in readers.items()}


def add_rows(
    options: Options,
    results: Results,
    workload: Workload,
    times: Times,
    refused: dict[str, str],
) -> None:
    """Adds a row for each direction."""
    ceiling = ceilings.of(options, results)["product" if workload.is_product else "copy"]
    case = {
        "operator": workload.operator.name,
        "size": workload.label,
        "backend": workload.operator.chosen(options.device.type).backend,
    }
    for direction, work in (("forward", workload.forward), ("backward", workload.backward)):
        if not work:
            continue
        timings = {name: summarize(found[direction]) for name, found in times.items()}
        for timing in timings.values():
            timing["share"] = work / timing["median_s"] / ceiling
        unit = "FLOP/s" if workload.is_product else "B/s"
        where = {**case, "direction": direction}
        results.add("kernels", where, timings, work=work, unit=unit, refused=refused)


def main(
    only: Annotated[str, typer.Option(help="Name of one operator; by default all.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds, less compilation.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON Lines file, written row by row.")] = None,
) -> None:
    """Time the operators alone, at the sizes of BERT-base and BERT-large."""
    if only not in ("", *backend.OPS):
        raise typer.BadParameter(f"expected one of {', '.join(backend.OPS)}, got {only!r}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = Options(device, "bf16" if device.type == "cuda" else "fp32", quick)
    results = Results(options, out)
    run(options, results, only)
    show(results.rows)
