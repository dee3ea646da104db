"""A step's cost besides time: FLOPs, memory, launches, graph nodes, and waits of the host."""

import gc
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

from benchmarks.workloads import VOCAB_SIZE, Batch
from fastbert.config.presets import PRESETS


def model_flops(preset: str, batch: Batch, *, training: bool) -> float:
    """FLOPs that the result needs, for real tokens and for vocabulary scores of masked tokens only.

    training: counts forward and backward (twice the forward); otherwise only the encoder's forward.
    As usual, only matrix products count.
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
    """Measures GPU memory held for a candidate: model, optimizer, graph, and what a run needs.

    It measures the memory that PyTorch has reserved, because allocated memory does not include the
    pool of a CUDA graph. Create it before the candidate, so that other memory is not counted.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_measured = device.type == "cuda"
        self.before = self._reserved() if self.is_measured else 0

    def of(self, work: Callable[[], object]) -> dict[str, float]:
        """{"memory_held_bytes": ...} at the peak of a run of `work`; empty on a CPU."""
        if not self.is_measured:
            return {}
        self._reserved()  # frees what was only needed to make and record the candidate
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return {"memory_held_bytes": torch.cuda.max_memory_reserved() - self.before}

    def _reserved(self) -> int:
        """Bytes reserved, after unused memory is given back to the GPU."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()


def of(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    """host_waits, kernel_launches and, for a graph, graph_nodes of a run; empty on a CPU."""
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
    # switching the mode on also warns, that it does not detect all synchronizing operations
    waits = sum("called a synchronizing" in str(warning.message) for warning in told)
    return {"host_waits": waits, **launches(profile.key_averages())}


def ran_on_gpu(event: Any) -> bool:
    """Whether a profiler event is work on the GPU, not the span of an annotated region."""
    on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
    return on_gpu and not event.is_user_annotation


def launches(events: Iterable[Any]) -> dict[str, int]:
    """kernel_launches by the host, and graph_nodes if it launched nothing but graphs.

    events: the profiler's, summed by name. A graph is one launch; its nodes are the kernels, copies
    and fills that ran on the GPU.
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
