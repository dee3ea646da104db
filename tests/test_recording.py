"""A recording that fails is told and disturbs nothing that comes after it; with stand-ins."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import timing
from benchmarks.operators import kernels
from benchmarks.operators.attention import Sequences
from benchmarks.operators.bodies import EAGER, Body
from benchmarks.operators.workloads import workloads
from benchmarks.results import FASTBERT


class Generator:
    """As PyTorch's on a GPU: its state, which others may share, is marked by a recording.

    is_capturing: what is run now is recorded, as a GPU's stream knows by itself.
    """

    def __init__(self, offset=0):
        self.state = {"offset": offset, "is_marked": False}
        self.is_capturing = False

    def clone_state(self):
        return Generator(self.state["offset"])

    def graphsafe_set_state(self, other):
        self.state = other.state

    def draw(self):
        if self.is_capturing != self.state["is_marked"]:
            raise RuntimeError("Offset increment outside graph capture")
        self.state["offset"] += 4
        return torch.zeros(1)


class Graphs:
    """As CUDA graphs: the end of a recording that failed fails too, and leaves its mark."""

    def __init__(self, generator):
        self.generator = generator

    def warm_up(self, work):
        return work()

    def record(self, work):
        self.generator.state["is_marked"] = self.generator.is_capturing = True
        try:
            work()
        except RuntimeError as error:
            raise RuntimeError("operation failed due to a previous error") from error
        finally:
            self.generator.is_capturing = False
        self.generator.state["is_marked"] = False
        return work


@pytest.fixture
def generator(monkeypatch):
    generator = Generator()
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    for module in (timing, kernels):
        monkeypatch.setattr(module, "CudaGraphs", lambda: Graphs(generator))
    return generator


def broken_when_recorded(generator):
    def work():
        if generator.is_capturing:
            raise RuntimeError("not permitted when stream is capturing\nand more")
        return torch.zeros(1)

    return work


def test_what_cannot_be_recorded_runs_as_it_is(generator):
    work = broken_when_recorded(generator)
    again, reason = timing.recorded(work)
    assert again is work
    assert reason == "not permitted when stream is capturing"


def test_after_a_failed_recording_dropout_goes_on(generator):
    generator.draw()
    assert timing.recorded(broken_when_recorded(generator))[1]
    generator.draw()
    assert generator.state == {"offset": 8, "is_marked": False}


def test_a_recording_that_succeeds_keeps_the_generators_state(generator):
    """Which the graph shares and moves on at each replay."""
    state = generator.state
    work = lambda: torch.zeros(1)  # noqa: E731
    assert timing.recorded(work) == (work, None)
    assert generator.state is state


class OnGpu:
    """What tells the kernel benchmark to record; timing itself goes by a CPU's clock."""

    is_cuda = True


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    real, nothing = timing.timed, torch.empty(0, dtype=torch.uint8)
    monkeypatch.setattr(kernels, "timed", lambda _, *work: real(nothing, *work))
    return OnGpu()


def forward_alone(workload):
    """As the stand-in's replay of a backward would need its forward anew."""
    return workload._replace(backward=0.0)


def test_an_operator_that_fails_to_record_stops_no_other(generator, on_gpu):
    workload = forward_alone(next(workloads("tiny", 600, "cpu", torch.float32)))
    was_recorded = []

    def broken(*tensors):
        if generator.is_capturing:
            raise RuntimeError("not permitted")
        return workload.plain(*tensors)

    def with_dropout(*tensors):
        was_recorded.append(generator.is_capturing)
        generator.draw()
        return workload.fused(*tensors)

    bodies = {"broken": Body(broken), FASTBERT: Body(with_dropout)}
    times, refused = kernels.measure(workload, bodies, 2, on_gpu)
    assert refused == {"broken, as a CUDA graph": "not permitted"}
    assert {name: len(found["forward"]) for name, found in times.items()} == {
        "broken": 2,
        FASTBERT: 2,
    }
    assert True in was_recorded


@pytest.mark.parametrize("lengths", [[7, 20, 13], [20, 20]])
def test_attention_that_pads_by_a_mask_is_not_recorded(lengths, generator, on_gpu):
    for workload in Sequences("tiny", lengths, 0.0, "cpu", torch.float32).workloads("tiny"):
        bodies = {EAGER: workload.alternatives[EAGER]}
        _, refused = kernels.measure(forward_alone(workload), bodies, 1, on_gpu)
        waits = len(set(lengths)) > 1
        told = {f"{EAGER}, as a CUDA graph": "makes the host wait"}
        assert refused == (told if waits else {})


def test_counting_labels_by_nonzero_is_not_recorded():
    (workload,) = (
        w for w in workloads("tiny", 600, "cpu", torch.float32) if w.operator.name == "compact"
    )
    assert workload.alternatives[EAGER].waits


@pytest.mark.gpu
def test_on_a_gpu_dropout_goes_on_after_a_failed_recording():
    x = torch.ones(1000, device="cuda")

    def waits():
        return F.dropout(x, 0.5) * x.sum().item()

    assert timing.recorded(waits)[1]
    assert 0 < F.dropout(x, 0.5).count_nonzero() < 1000
    replay, reason = timing.recorded(lambda: F.dropout(x, 0.5))
    assert reason is None
    first = replay().clone()
    assert not torch.equal(first, replay())
