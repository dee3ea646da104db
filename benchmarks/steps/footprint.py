"""What a step costs beside time: arithmetic, memory, launches and nodes, waits of the host."""

import gc
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

from benchmarks.workloads import VOCAB_SIZE, Batch
from fastbert.config.pretrain import PRESETS


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


class Memory:
    """What the card holds for a candidate: its model, optimizer and graph, and what a run needs.

    That is what PyTorch has reserved of the card, with the pool of a CUDA graph, which allocated
    memory leaves out. Made before the candidate is, so that what others hold does not count.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_measured = device.type == "cuda"
        self.before = self._reserved() if self.is_measured else 0

    def of(self, work: Callable[[], object]) -> dict[str, float]:
        """memory_held_bytes at the peak of a run; nothing on a CPU."""
        if not self.is_measured:
            return {}
        self._reserved()  # without what only making and recording it took
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return {"memory_held_bytes": torch.cuda.max_memory_reserved() - self.before}

    def _reserved(self) -> int:
        """After what nobody uses is given back to the card."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()


def of(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    """host_waits, kernel_launches and, of a graph, graph_nodes of a run; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    with warnings.catch_warnings(record=True) as told:
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
    # switching the mode on warns too, that it does not detect all synchronizing operations
    waits = sum("called a synchronizing" in str(warning.message) for warning in told)
    return {"host_waits": waits, **launches(profile.key_averages())}


def ran_on_gpu(event: Any) -> bool:
    """Whether this event of the profiler is work of a GPU, and not the span of a region of it."""
    on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
    return on_gpu and not event.is_user_annotation


def launches(events: Iterable[Any]) -> dict[str, int]:
    """kernel_launches by the host, of which a graph is one; and the graph_nodes, where it is all.

    events: of the profiler, summed by name. The nodes are what ran on the GPU: kernels, copies and
    fills.
    """
    graphs = kernels = nodes = 0
    for event in events:
        graphs += event.count * ("GraphLaunch" in event.key)
        kernels += event.count * ("LaunchKernel" in event.key)
        nodes += event.count * ran_on_gpu(event)
    counts = {"kernel_launches": graphs + kernels}
    if graphs and not kernels:
        counts["graph_nodes"] = nodes
    return counts
