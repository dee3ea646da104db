"""What a step costs is counted alike for a graph and without one; on a card made of stand-ins."""

import contextlib
import warnings
from types import SimpleNamespace

import pytest
import torch

from benchmarks import timing
from benchmarks.steps import footprint

GPU = SimpleNamespace(type="cuda")
ON_GPU, ON_HOST = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU


class Card:
    """PyTorch's allocator: memory in use, of which a graph's pool is a part, and memory kept."""

    def __init__(self):
        self.used = self.kept = self.peak = 0

    def use(self, size):
        """For good; what is kept may be used again."""
        self.kept -= min(self.kept, size)
        self.used += size
        self.peak = max(self.peak, self.memory_reserved())

    def borrow(self, size):
        """For the time of a run, and kept after it."""
        self.use(size)
        self.used -= size
        self.kept += size

    def empty_cache(self):
        self.kept = 0

    def memory_reserved(self):
        return self.used + self.kept

    def reset_peak_memory_stats(self):
        self.peak = self.memory_reserved()

    def max_memory_reserved(self):
        return self.peak

    def synchronize(self):
        pass


@pytest.fixture
def card(monkeypatch):
    card = Card()
    for name in (
        *("empty_cache", "memory_reserved", "max_memory_reserved", "reset_peak_memory_stats"),
        "synchronize",
    ):
        monkeypatch.setattr(torch.cuda, name, getattr(card, name))
    return card


def test_memory_is_what_the_card_holds_with_and_without_a_graph(card):
    card.use(500)  # of others
    card.borrow(70)
    memory = footprint.Memory(GPU)
    card.use(3)  # a model
    card.borrow(40)  # warming up
    assert memory.of(lambda: card.borrow(9)) == {"memory_held_bytes": 12}
    memory = footprint.Memory(GPU)
    card.use(3)
    card.borrow(40)
    card.use(9)  # the pool of a graph, whose replay takes nothing more
    assert memory.of(lambda: None) == {"memory_held_bytes": 12}


def test_nothing_is_counted_on_a_cpu():
    device = torch.device("cpu")
    assert footprint.Memory(device).of(lambda: None) == {} == footprint.of(lambda: None, device)


def event(key, count=1, where=ON_HOST, is_region=False):
    return SimpleNamespace(key=key, count=count, device_type=where, is_user_annotation=is_region)


def test_nodes_of_a_graph_are_what_ran_on_the_gpu():
    ran = [event("gemm", 7, ON_GPU), event("Memcpy DtoD", 2, ON_GPU), event("Memset", 1, ON_GPU)]
    ran.append(event("Optimizer.step", 1, ON_GPU, is_region=True))
    found = footprint.launches([event("cudaGraphLaunch"), event("cudaDeviceSynchronize"), *ran])
    assert found == {"kernel_launches": 1, "graph_nodes": 10}
    found = footprint.launches([event("cudaLaunchKernel", 5), event("cuLaunchKernelEx", 2), *ran])
    assert found == {"kernel_launches": 7}


@pytest.mark.filterwarnings("ignore:called a synchronizing")
def test_a_wait_is_told_from_the_notice_that_waits_are_looked_for(monkeypatch):
    def set_sync_debug_mode(mode):
        if mode == "warn":
            warnings.warn(
                "Synchronization debug mode is a prototype feature and does not yet detect all "
                "synchronizing operations",
                stacklevel=1,
            )

    @contextlib.contextmanager
    def profile(activities):
        yield SimpleNamespace(key_averages=lambda: [event("cudaLaunchKernel", 3)])

    def work():
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_sync_debug_mode)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.profiler, "profile", profile)
    assert footprint.of(work, GPU) == {"host_waits": 1, "kernel_launches": 3}
    assert footprint.of(lambda: None, GPU) == {"host_waits": 0, "kernel_launches": 3}


@pytest.mark.gpu
def test_a_graph_holds_what_the_same_work_holds_without_one():
    device = torch.device("cuda")
    found = []
    for record in (False, True):
        memory = footprint.Memory(device)
        x = torch.ones(64 << 20, device=device)

        def work(x=x):
            return (x * 2 + 1).sin()

        again = timing.recorded(work)[0] if record else work
        again()
        found.append({**memory.of(again), **footprint.of(again, device)})
        del again, work, x
    eager, graph = found
    assert graph["memory_held_bytes"] == pytest.approx(eager["memory_held_bytes"], rel=0.5)
    assert graph["memory_held_bytes"] >= 2 * (256 << 20)  # x and what is made of it
    assert eager["kernel_launches"] == graph["graph_nodes"] == 3
    assert graph["kernel_launches"] == 1
    assert "graph_nodes" not in eager
