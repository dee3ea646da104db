"""Timing side by side: candidates take turns, so that what the machine does hits all of them."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastbert.modules.graphs.recorder import WARM_UP, CudaGraphs, Work

FLUSH_BYTES = 256 << 20  # written before each measurement: more than any cache holds
SLEEP_CYCLES = 1_000_000  # of the GPU, about half a millisecond, while the host queues the work


def interleaved(
    candidates: dict[str, Callable[[], object]], rounds: int, every: dict[str, int] | None = None
) -> dict[str, list[float]]:
    """Seconds of each call, `rounds` of each candidate after one unmeasured call to warm up.

    every: candidates that take part in every n-th round only.
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
    """Runs `work` behind a full queue; the second result reads its seconds once the GPU is done."""
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
    """What `timed` writes over a GPU's cache; nothing on a CPU."""
    size = FLUSH_BYTES if device.type == "cuda" else 0
    return torch.empty(size, dtype=torch.uint8, device=device)


def recorded(work: Work) -> tuple[Work, str | None]:
    """The work as a CUDA graph that replays it; or as it is, and why it could not be recorded."""
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
    """Gives PyTorch's generators on GPUs a state as before where a recording in here fails.

    The one they have then still counts as being recorded, and refuses whoever draws next.
    """
    states = [generator.clone_state() for generator in torch.cuda.default_generators]
    try:
        yield
    except BaseException:
        for generator, state in zip(torch.cuda.default_generators, states, strict=True):
            generator.graphsafe_set_state(state)
        raise


def why_not_recorded(error: BaseException) -> str:
    """Of the error behind this one, if any: a recording that has failed then fails to end too."""
    return first_line(error.__context__ or error)


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200] or repr(error)


def summarize(seconds: list[float]) -> dict[str, float]:
    """median_s, rounds, and spread: the distance of the quartiles as a share of the median."""
    median = statistics.median(seconds)
    low, high = median, median
    if len(seconds) > 1:
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median_s": median, "spread": (high - low) / median, "rounds": len(seconds)}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
