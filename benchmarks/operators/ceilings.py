"""Ceilings of this machine, measured in each run: rates of a large matrix product and copy."""

from collections.abc import Iterator

import torch

from benchmarks.results import Options, Results
from benchmarks.timing import flush_for, summarize, timed


def of(options: Options, results: Results) -> dict[str, float]:
    """FLOP/s of the "product" in the options' dtype, B/s of the "copy"; measured once per run."""
    if not results.of("ceilings"):
        for name, rate in _measure(options):
            results.add("ceilings", {"of": name, "dtype": str(options.dtype)}, rate=rate)
    return {row["case"]["of"]: row["rate"] for row in results.of("ceilings")}


def _measure(options: Options) -> Iterator[tuple[str, float]]:
    device, flush = options.device, flush_for(options.device)
    size, numbers = (8192, 1 << 28) if flush.is_cuda else (2048, 1 << 24)
    source = torch.randn(numbers, device=device)
    a, b = torch.randn(2, size, size, device=device, dtype=options.dtype)
    target, product = torch.empty_like(source), torch.empty_like(a)
    for name, work, amount in (
        ("product", lambda: torch.mm(a, b, out=product), 2 * size**3),
        ("copy", lambda: target.copy_(source), 2 * source.nbytes),
    ):
        seconds = []
        for _ in range(4 if options.quick else 10):
            _, elapsed = timed(flush, work)
            if flush.is_cuda:
                torch.cuda.synchronize()
            seconds.append(elapsed())
        yield name, amount / summarize(seconds[1:])["median_s"]
