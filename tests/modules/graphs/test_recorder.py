"""What a recorded CUDA graph needs of the host, with stand-ins for CUDA's streams and graphs."""

import collections
import contextlib
import gc
import itertools
import warnings
import weakref

import pytest
import torch

from fastbert.modules.graphs import recorder
from fastbert.modules.graphs.recorder import CudaGraphs
from tests.models.pretraining_case import make_batch, make_model


class Graph:
    """Holds no tensor, as a CUDA graph holds addresses alone."""

    replays = 0

    def replay(self):
        self.replays += 1


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())


def recorded_step():
    """A replay, and all that its step reads and writes, by weak references alone."""
    model, batch = make_model(), make_batch([3, 5])
    optimizer = torch.optim.AdamW(model.parameters(), capturable=False)

    def step():
        loss = model(batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    step()
    moments = next(iter(optimizer.state.values()))["exp_avg"]
    watched = (model, *model.parameters(), batch, batch.input_ids, optimizer, moments)
    return CudaGraphs().record(step), [weakref.ref(one) for one in watched]


@pytest.mark.usefixtures("without_gpu")
def test_a_replay_keeps_alive_what_its_graph_reads():
    replay, watched = recorded_step()
    gc.collect()
    assert all(one() is not None for one in watched)
    before = replay()
    assert replay() is before  # the place that the graph writes to
    assert replay.graph.replays == 2
    del replay
    gc.collect()
    assert all(one() is None for one in watched)


@pytest.mark.usefixtures("without_gpu")
def test_memory_is_that_of_the_shared_pool_alone(monkeypatch):
    segments = [
        {"segment_pool_id": (0, 0), "total_size": 1},
        {"segment_pool_id": (0, 7), "total_size": 20},
        {"segment_pool_id": (0, 7), "total_size": 300},
        {"segment_pool_id": (0, 8), "total_size": 4000},
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    graphs = CudaGraphs(shares_memory=True)
    assert graphs.memory() == 0
    graphs.pools.append((0, 7))
    assert graphs.memory() == 320
    graphs.pools.append((0, 8))  # of recordings after a failed one
    assert graphs.memory() == 4320


@pytest.mark.usefixtures("without_gpu")
def test_gradient_nodes_of_another_stream_are_nothing_to_warn_of():
    """PyTorch's warning, as where a loop's last loss is alive; any other warning stays."""

    def work():
        warnings.warn("The AccumulateGrad node's stream does not match the stream", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    graphs = CudaGraphs()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        graphs.warm_up(work)
        graphs.record(work)
    assert [str(one.message) for one in seen] == ["something else"] * 2


@pytest.mark.gpu
def test_recordings_that_share_memory_tell_how_much_it_is():
    graphs = CudaGraphs(shares_memory=True)
    x = torch.ones(1 << 24, device="cuda")
    before = graphs.memory()
    graphs.warm_up(lambda: (x + 1) * 2)
    replay = graphs.record(lambda: (x + 1) * 2)
    assert graphs.memory() - before >= 2 * x.nbytes
    assert replay()[0] == 4
    graphs.begin_anew()
    assert graphs.memory() == 0


@pytest.mark.gpu
def test_a_replay_outlives_every_other_reference():
    def work_of(value):
        x = torch.full((1 << 20,), value, device="cuda")
        return lambda: x.sum() / len(x)

    graphs = recorder.CudaGraphs()
    graphs.warm_up(work_of(1.0))
    replay = graphs.record(work_of(3.0))
    gc.collect()
    torch.cuda.empty_cache()
    spoilt = [torch.full((1 << 20,), 7.0, device="cuda") for _ in range(8)]
    assert replay().item() == 3.0
    assert len(spoilt) == 8


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize(
    ("is_capturing", "allocator", "reason"),
    [
        (False, "native", ""),
        (True, "native", "a recording of the caller's own"),
        (False, "cudaMallocAsync", "cudaMallocAsync, an allocator that is not PyTorch's own"),
    ],
)
def test_it_says_why_nothing_can_be_recorded(is_capturing, allocator, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: allocator)
    assert CudaGraphs().refusal() == reason


class Allocators:
    """PyTorch's two: each records in a pool until it is told to end, which a failure does not.

    A pool is given up with the last of its graphs, and refused from then on.
    """

    def __init__(self):
        self.device, self.pinned, self.users = set(), set(), collections.Counter()
        self.handles = itertools.count()
        self.failures = 0  # of captures that are yet to fail at their end

    def begin(self, pool):
        if pool in self.users and not self.users[pool]:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        self.users[pool] += 1
        for recording in (self.device, self.pinned):
            if pool in recording:
                raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
            recording.add(pool)

    def end(self, pool):
        if pool not in self.device:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.device.remove(pool)

    def release(self, pool):
        self.users[pool] -= 1


@pytest.fixture
def allocators(without_gpu, monkeypatch):
    found = Allocators()

    class Captured(Graph):
        pool = None

        def __del__(self):
            if self.pool is not None:
                found.release(self.pool)

    class Capture:
        def __init__(self, graph, pool, **_):
            self.graph, self.pool = graph, pool

        def __enter__(self):
            found.begin(self.pool)

        def __exit__(self, kind, error, trace):
            found.failures -= 1
            if found.failures >= 0 or (error is not None and "capturing" in str(error)):
                raise RuntimeError("operation failed due to a previous error during capture")
            self.graph.pool = self.pool
            found.end(self.pool)
            found.pinned.remove(self.pool)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Captured)

    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(found.handles))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: None)
    for name, function in (
        ("_cuda_endAllocateToPool", lambda device, pool: found.end(pool)),
        ("_cuda_releasePool", lambda device, pool: found.release(pool)),
    ):
        monkeypatch.setattr(torch._C, name, function, raising=False)
    return found


@pytest.mark.parametrize("shares_memory", [False, True])
def test_after_a_recording_that_cuda_gives_up_there_are_others(shares_memory, allocators):
    """`test_on_a_gpu.py` has what else would come of it."""
    graphs = CudaGraphs(shares_memory=shares_memory)

    def waits():
        raise RuntimeError("operation not permitted when stream is capturing")

    for _ in range(3):
        with pytest.raises(RuntimeError, match="a previous error during capture"):
            graphs.record(waits)
        assert not allocators.device  # else it would keep all memory that is allocated from now on
    assert not any(allocators.users[pool] for pool in allocators.pinned)  # so memory comes back
    gc.collect()
    pools = list(graphs.pools)
    assert graphs.record(lambda: 5)() == 5
    with pytest.raises(ZeroDivisionError):
        graphs.record(lambda: 1 // 0)  # PyTorch ends that one
    assert graphs.pools == pools


def test_a_recording_may_fail_that_ends_a_failed_one(allocators):
    """PyTorch's generator may have it fail: then the next recording begins another pool."""
    graphs = CudaGraphs(shares_memory=True)
    graphs.record(lambda: 5)
    allocators.failures = 2
    with pytest.raises(RuntimeError, match="a previous error during capture"):
        graphs.record(lambda: 5)
    assert graphs.record(lambda: 5)() == 5
    assert len(graphs.pools) == 2


def test_a_pool_outlives_the_graphs_in_it(allocators):
    graphs = CudaGraphs(shares_memory=True)
    for _ in range(3):  # each replay is gone before the next recording
        assert graphs.record(lambda: 5)() == 5
    assert len(graphs.pools) == 1
    graphs.begin_anew()
    assert not any(allocators.users.values())
    assert graphs.record(lambda: 5)() == 5


@pytest.mark.gpu
def test_on_a_gpu_a_pool_outlives_the_graphs_in_it():
    graphs = CudaGraphs(shares_memory=True)
    x = torch.ones(1 << 20, device="cuda")
    for _ in range(3):
        kept = graphs.record(lambda: x + 1)()  # memory of the pool, whose graph is gone
        gc.collect()
    torch.cuda.synchronize()
    assert kept.shape == x.shape
