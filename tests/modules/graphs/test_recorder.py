"""What a recorded CUDA graph needs of the host, with stand-ins for CUDA's streams and graphs."""

import contextlib
import gc
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
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    segments = [
        {"segment_pool_id": (0, 0), "total_size": 1},
        {"segment_pool_id": (0, 7), "total_size": 20},
        {"segment_pool_id": (0, 7), "total_size": 300},
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert CudaGraphs(shares_memory=True).memory() == 320


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


@pytest.mark.usefixtures("without_gpu")
def test_a_recording_that_cuda_gives_up_is_ended_for_pytorch_too(monkeypatch):
    """Else its generator draws nothing any more; `test_on_a_gpu.py` has what that leads to."""
    seen = []

    class Capture:
        def __init__(self, graph, pool=None, **_):
            self.pool = pool

        def __enter__(self):
            seen.append(f"began {self.pool}")

        def __exit__(self, *_):
            if self.pool == "pool":
                raise RuntimeError("operation failed due to a previous error during capture")
            seen.append("ended")

    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: seen.append(str(device)))
    monkeypatch.setattr(
        torch._C, "_cuda_endAllocateToPool", lambda *a: seen.append(a), raising=False
    )
    for graphs in (CudaGraphs(), CudaGraphs(shares_memory=True)):
        seen.clear()
        with pytest.raises(RuntimeError, match="a previous error during capture"):
            graphs.record(lambda: None)
        assert seen == ["began pool", (0, "pool"), "began None", "cuda", "ended"]
