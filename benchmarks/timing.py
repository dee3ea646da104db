"""Timing side by side: candidates take turns, so that what the machine does hits all of them."""

import statistics
import time
from collections.abc import Callable

import torch


def interleaved(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, `rounds` of each candidate after one unmeasured call to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, call in candidates.items():
            _synchronize()
            start = time.perf_counter()
            call()
            _synchronize()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summarize(seconds: list[float]) -> dict[str, float]:
    """median_s, and spread: the distance between the quartiles as a share of the median."""
    median = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median_s": median, "spread": (high - low) / median}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
