"""The kernel benchmark compares equals, measures every operator, and outlives what cannot run."""

import pytest
import torch

from benchmarks.operators import kernels
from benchmarks.operators.attention import Sequences
from benchmarks.operators.bodies import EAGER, Body
from benchmarks.operators.workloads import workloads
from benchmarks.results import FASTBERT, Options, Results
from fastbert import backend

# What dropout draws, inside the operators that have dropout, is timed as a part of these.
PARTS_OF_OTHERS = {"hidden_keep_mask", "attention_keep_mask"}


def small():
    return workloads("tiny", 600, "cpu", torch.float32)


@pytest.mark.parametrize(
    "workload",
    [workload for workload in small() if "dropout 0.1" not in workload.label],
    ids=lambda workload: f"{workload.operator.name} {workload.label}",
)
def test_compares_the_same_mathematics(workload):
    tensors = workload.make()
    leaves = [tensor.requires_grad_() for tensor in tensors if tensor.is_floating_point()]
    fused, plain = workload.fused(*tensors), workload.plain(*tensors)
    if workload.operator.name.startswith("fp8"):  # whose casts are wrong by their own
        assert 0.01 < (fused - plain).norm() / plain.norm() < 0.08
        return
    torch.testing.assert_close(fused, plain)
    if workload.backward:
        grads = [torch.autograd.grad(y.sum(), leaves) for y in (fused, plain)]
        for a, e in zip(*grads, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [[7, 20, 13], [20, 20]])
def test_padded_and_flat_attention_is_the_same_mathematics(lengths):
    case = Sequences("tiny", lengths, 0.0, "cpu", torch.float32)
    q, k, v = torch.randn(3, sum(lengths), case.heads, 64)
    expected = case.plain(q, k, v)
    padded = [torch.zeros(len(lengths), 20, case.heads, 64) for _ in range(3)]
    for x, packed in zip(padded, (q, k, v), strict=True):
        x[case.is_real] = packed
    bodies = case.alternatives()
    out = bodies["SDPA math"].run(*(x.transpose(1, 2) for x in padded))
    torch.testing.assert_close(out.transpose(1, 2)[case.is_real], expected)


def test_every_operator_has_a_workload():
    assert {w.operator.name for w in small()} == backend.OPS.keys() - PARTS_OF_OTHERS


def test_what_cannot_run_is_recorded_and_the_rest_is_timed():
    workload = next(w for w in small() if w.operator.name == "attention")

    def broken(*tensors):
        raise RuntimeError("no body for this\nand a stack")

    bodies = {
        FASTBERT: Body(workload.fused),
        "broken": Body(broken),
        EAGER: workload.alternatives[EAGER],
    }
    flush = torch.empty(0, dtype=torch.uint8)
    times, refused = kernels.measure(workload, bodies, 3, flush)
    assert refused == {"broken": "no body for this"}
    assert times.keys() == {FASTBERT, EAGER}
    for found in times.values():
        assert [len(found[direction]) for direction in ("forward", "backward")] == [3, 3]


class Repeats:
    """In place of CUDA graphs: the work is done anew."""

    def warm_up(self, work):
        return work()

    def record(self, work):
        return work


@pytest.mark.parametrize("workload", list(small()), ids=lambda w: f"{w.operator.name} {w.label}")
def test_a_recorded_operator_has_both_directions(workload, monkeypatch):
    monkeypatch.setattr(kernels, "CudaGraphs", Repeats)
    tensors = kernels._with_gradients(workload.make())
    passes = kernels.direct(workload, Body(workload.fused), tensors)
    again = kernels.recorded(workload, passes)
    y = passes.forward()
    torch.testing.assert_close(again.forward(), y)
    if workload.backward:
        torch.testing.assert_close(again.backward(y), passes.backward(y))


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["base"])
def test_operators_are_recorded_on_a_gpu(preset):
    flush = torch.empty(1, dtype=torch.uint8, device="cuda")
    for workload in workloads(preset, 600, "cuda", torch.bfloat16):
        _, refused = kernels.measure(workload, {FASTBERT: Body(workload.fused)}, 2, flush)
        assert not refused, workload.label


@pytest.mark.parametrize(
    ("device", "quick", "presets"),
    [
        ("cuda", True, ["large", "base"]),
        ("cuda", False, ["large", "base"]),
        ("cpu", True, ["base"]),
        ("cpu", False, ["large", "base"]),
    ],
)
def test_bert_large_is_measured_wherever_there_is_time(device, quick, presets, monkeypatch):
    asked = []
    monkeypatch.setattr(kernels, "workloads", lambda preset, *_: asked.append(preset) or [])
    monkeypatch.setattr(kernels.ceilings, "of", lambda *_: {})
    kernels.run(Options(torch.device(device), "bf16", quick), None)
    assert asked == presets


def test_adds_a_row_for_each_direction(monkeypatch):
    monkeypatch.setattr(kernels, "workloads", lambda *_: small())
    options = Options(torch.device("cpu"), quick=True)
    results = Results(options)
    kernels.run(options, results, "layer_norm")
    assert [row["case"]["of"] for row in results.of("ceilings")] == ["product", "copy"]
    rows = results.of("kernels")
    assert [row["case"]["direction"] for row in rows] == ["forward", "backward"]
    copy = results.of("ceilings")[1]["rate"]
    for row in rows:
        for timing in row["timings"].values():
            assert timing["share"] * copy == pytest.approx(row["work"] / timing["median_s"])
        assert set(row["timings"]) | set(row["refused"]) == {FASTBERT, EAGER, "Liger"}
