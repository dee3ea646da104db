"""What a step costs beside time: arithmetic, memory, kernel launches, waits of the host."""

import warnings
from collections.abc import Callable

import torch

from benchmarks.workloads import VOCAB_SIZE, Batch
from fastbert.pretrain_config import PRESETS


def model_flops(preset: str, batch: Batch, *, training: bool) -> float:
    """Operations that the result needs: real tokens only, scores of masked tokens only.

    The backward is counted twice the forward; products of matrices alone are counted, as usual.
    """
    shape = PRESETS[preset].shape
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    weights = 4 * hidden**2 + 2 * hidden * inner
    layer = 2 * sum(batch.lengths) * weights + 4 * hidden * sum(n**2 for n in batch.lengths)
    encoder = shape["num_hidden_layers"] * layer
    if not training:
        return float(encoder)
    assert batch.packed.num_labels is not None
    head = 2 * batch.packed.num_labels * (hidden**2 + hidden * VOCAB_SIZE)
    return 3.0 * (encoder + head)


def of(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    """peak_memory_bytes, host_syncs and kernel_launches of one call; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    torch.cuda.reset_peak_memory_stats()
    work()
    peak = torch.cuda.max_memory_allocated()
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        work()
        torch.cuda.synchronize()
    launches = sum(
        event.count
        for event in profile.key_averages()
        if "LaunchKernel" in event.key or "GraphLaunch" in event.key  # a graph is one
    )
    return {
        "peak_memory_bytes": peak,
        "host_syncs": sum("synchroniz" in str(wait.message) for wait in waits),
        "kernel_launches": launches,
    }
