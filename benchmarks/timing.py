"""Timing in turns, so that other load on the machine affects all candidates."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastbert import check
from fastbert.modules.graphs.recorder import WARM_UP, CudaGraphs, Work

FLUSH_BYTES = 256 << 20  # overwritten before each measurement: larger than any cache
SLEEP_CYCLES = 1_000_000  # GPU cycles, about half a millisecond, in which the host queues the work


def interleaved(
    candidates: dict[str, Callable[[], object]], rounds: int, every: dict[str, int] | None = None
) -> dict[str, list[float]]:
    """Seconds of each of `rounds` calls per candidate, after one unmeasured call to warm up.

    every: n for a candidate that takes part in every n-th round only
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, call in candidates.items():
            if number % (every or {}).get(name, 1):
                continue
            _synchronize()
            start = time.perf_counter()
            call()
            _synchronize()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def timed(flush: Tensor, work: Callable, *arguments: Any) -> tuple[Any, Callable[[], float]]:
    """Runs `work`; returns its result, and a function that reads its seconds on the device.

    On a GPU the work is queued after a sleep and a flush of the cache, so that no launch gap is
    timed; the caller must synchronise before it reads the seconds.
    """
    if not flush.is_cuda:
        before = time.perf_counter()
        result = work(*arguments)
        seconds = time.perf_counter() - before
        return result, lambda: seconds
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SLEEP_CYCLES)
    flush.zero_()
    start.record()
    result = work(*arguments)
    end.record()
    return result, lambda: start.elapsed_time(end) / 1e3


def flush_for(device: torch.device) -> Tensor:
    """The tensor that `timed` overwrites to flush a GPU's cache; empty on a CPU."""
    size = FLUSH_BYTES if device.type == "cuda" else 0
    return torch.empty(size, dtype=torch.uint8, device=device)


def recorded(work: Work) -> tuple[Work, str | None]:
    """(the work as a CUDA graph, None), or (the work, the reason why recording failed)."""
    graphs = CudaGraphs()
    for _ in range(WARM_UP):
        graphs.warm_up(work)
    try:
        with generators_kept():
            return graphs.record(work), None
    except RuntimeError as error:
        return work, why_not_recorded(error)


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Restores the state of PyTorch's GPU generators if a recording in the block fails.

    After a failed recording the generators would still count as being recorded and refuse to draw.
    """
    states = [generator.clone_state() for generator in torch.cuda.default_generators]
    try:
        yield
    except BaseException:
        for generator, state in zip(torch.cuda.default_generators, states, strict=True):
            generator.graphsafe_set_state(state)
        raise


def why_not_recorded(error: BaseException) -> str:
    """The reason: the error's context, because ending a failed recording raises another error."""
    return first_line(error.__context__ or error)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters."""
    return check.first_line(error)[:200]


def summarize(seconds: list[float]) -> dict[str, Any]:
    """median_s in seconds, rounds, and spread: the interquartile range divided by the median.

    With one round the spread is None.
    """
    median, spread = statistics.median(seconds), None
    if len(seconds) > 1:
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        spread = (high - low) / median
    return {"median_s": median, "spread": spread, "rounds": len(seconds)}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
