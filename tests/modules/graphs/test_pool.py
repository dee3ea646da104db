"""How long graphs are kept, who asks for them, and what is told of them; by a stand-in."""

import copy
import gc
import threading

import pytest
import torch
from torch import nn

import fastbert
from fastbert.modules.graphs import buckets, pool
from tests.modules.graphs.case import (
    Repeats,
    assert_same,
    batch,
    layers_of,
    logits,
    models,
    step,
    use,
)


def test_the_least_recently_used_graph_goes_first(recorder, monkeypatch):
    monkeypatch.setattr(pool, "MOST_GRAPHS", 2)
    plain, recorded = (model.eval() for model in models("Bert"))
    short, middle, long = batch([5]), batch([70]), batch([140])
    for inputs in (short, middle, short, long, short):
        torch.testing.assert_close(logits(recorded, inputs), logits(plain, inputs))
    assert recorder.recorded == 3  # the short batch was recorded once
    logits(recorded, middle)
    assert recorder.recorded == 4


def test_a_bucket_is_recorded_when_it_is_met_again(monkeypatch):
    recorder = use(Repeats(), monkeypatch, recorded_at=pool.RECORDED_AT)
    plain, recorded = (model.train() for model in models("Bert"))
    for number, lengths in enumerate(([5], [20], [40], [20], [20], [5])):
        inputs = batch(lengths, number)
        assert_same(step(recorded, inputs), step(plain, inputs))
        assert recorder.recorded == [0, 0, 0, 2, 2, 4][number]
    assert recorder.replayed == 2 * 3
    shared = buckets.pool_of(None)
    next(iter(shared.used)).drop(shared)
    step(recorded, batch([20]))  # what was dropped has been met before
    assert recorder.recorded == 6


def test_a_pool_that_has_outgrown_its_bound_begins_anew(monkeypatch):
    recorder = use(Repeats(taken=10), monkeypatch, most_memory=15)
    plain, recorded = (model.eval() for model in models("Bert"))
    for lengths in ([5], [70], [5], [70]):
        inputs = batch(lengths)
        torch.testing.assert_close(logits(recorded, inputs), logits(plain, inputs))
    assert recorder.begun >= 1
    assert recorder.memory() <= 15


def test_a_graph_that_is_too_large_by_itself_is_not_tried_again(monkeypatch):
    recorder = use(Repeats(taken=10), monkeypatch, most_memory=5)
    _, recorded = (model.eval() for model in models("Bert"))
    for _ in range(3):
        logits(recorded, batch([5]))
    assert recorder.recorded == 1
    assert recorder.replayed == 0
    assert "memory" in routes(recorded, batch([5]))["CUDA graph"][2]


def test_graphs_go_with_their_model(recorder):
    _, recorded = models("Bert")
    logits(recorded.eval(), batch([5]))
    shared = buckets.pool_of(None)
    assert len(shared.used) == 1
    del recorded
    gc.collect()
    assert len(shared.used) == 0


def test_parameters_that_move_in_each_call_are_not_recorded_for_ever(recorder):
    plain, recorded = (model.eval() for model in models("Bert"))
    for number in range(2 * pool.MOST_CHANGES):
        inputs = batch([5], number)
        for model in (plain, recorded):
            weight = layers_of(model)[0].output.dense.weight
            weight.data = weight.data * 1.01
        torch.testing.assert_close(logits(recorded, inputs), logits(plain, inputs))
    assert recorder.recorded == pool.MOST_CHANGES


def routes(model, inputs):
    return {route.module: route for route in fastbert.explain(model, **inputs, show=False).routes}


def test_explain_names_the_graph_or_the_reason(recorder, monkeypatch):
    plain, recorded = (model.eval() for model in models("Bert"))
    inputs = batch([7, 3])
    assert routes(recorded, inputs)["CUDA graph"][1:] == (
        "of 64 tokens, 2 sequences of up to 64",
        "to be recorded when it is met again",
    )
    logits(recorded, inputs)
    assert routes(recorded, inputs)["CUDA graph"].reason == "recorded"
    assert routes(plain, inputs)["CUDA graph"][1:] == ("none", "graphs=False")
    torch.nn.utils.parametrizations.weight_norm(layers_of(recorded)[1].output.dense)
    reason = routes(recorded, inputs)["CUDA graph"].reason
    assert reason == "a ParametrizedLinear in the layers"
    monkeypatch.setenv("FASTBERT_GRAPHS", "0")
    assert routes(recorded, inputs)["CUDA graph"].reason == "FASTBERT_GRAPHS"


def test_a_recording_that_fails_leaves_the_model_as_it_is(monkeypatch):
    recorder = use(Repeats(error="CUDA error: not permitted"), monkeypatch)
    plain, recorded = (model.train() for model in models("Bert"))
    inputs = batch([7, 3])
    for _ in range(2):
        assert_same(step(recorded, inputs), step(plain, inputs))
        assert_same([logits(recorded, inputs)], [logits(plain, inputs)])
    reason = routes(recorded, inputs)["CUDA graph"].reason
    assert reason == "recording failed: CUDA error: not permitted"
    assert recorder.replayed == 0


def test_a_host_that_reads_a_tensor_cannot_be_recorded(recorder):
    def waits(x):
        return torch.nn.functional.gelu(x) * (1 + 0 * x.sum().item())

    plain, recorded = (model.train() for model in models("own", hidden_act=waits))
    inputs = batch([7, 3])
    for _ in range(2):
        assert_same(step(recorded, inputs), step(plain, inputs))
        assert_same([logits(recorded, inputs)], [logits(plain, inputs)])
    reason = routes(recorded, inputs)["CUDA graph"].reason
    assert reason.startswith("recording failed: _local_scalar_dense")
    assert recorder.replayed == 0


@pytest.mark.parametrize("value", ["0", "off", "False"])
def test_the_environment_switches_graphs_off(value, recorder, monkeypatch):
    monkeypatch.setenv("FASTBERT_GRAPHS", value)
    logits(models("Bert")[1].eval(), batch([7, 3]))
    assert recorder.recorded == 0


def test_values_that_mean_nothing_are_refused(recorder, monkeypatch):
    monkeypatch.setenv("FASTBERT_GRAPHS", "perhaps")
    with pytest.raises(
        ValueError, match='FASTBERT_GRAPHS: expected "auto" or "0", got \'perhaps\''
    ):
        logits(models("Bert")[1].eval(), batch([7, 3]))
    with pytest.raises(ValueError, match='graphs: expected "auto" or False, got True'):
        buckets.allow(nn.Linear(1, 1), True)


def test_patch_allows_or_forbids_them_and_unpatch_leaves_no_trace(recorder):
    _, recorded = models("Bert")
    before = {name: dict(vars(module)) for name, module in recorded.named_modules()}
    fastbert.patch(recorded, graphs=False)
    logits(recorded.eval(), batch([5]))
    assert recorder.recorded == 0
    logits(copy.deepcopy(recorded), batch([5]))
    assert recorder.recorded == 0
    fastbert.patch(recorded)
    logits(recorded, batch([5]))
    assert recorder.recorded == 1
    fastbert.unpatch(fastbert.patch(recorded, graphs=False))
    after = {name: dict(vars(module)) for name, module in recorded.train().named_modules()}
    assert [vars_.keys() for vars_ in before.values()] == [vars_.keys() for vars_ in after.values()]


def test_threads_take_turns(recorder):
    plain, recorded = (model.eval() for model in models("Bert"))
    inputs = [batch([7, 3], number) for number in range(8)]
    with torch.no_grad():
        expected = [plain(**one).logits for one in inputs]
    found = [None] * len(inputs)

    def run(number):
        with torch.no_grad():
            for _ in range(5):
                found[number] = recorded(**inputs[number]).logits

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same(found, expected)


def test_the_newer_interface_of_products_precision_is_a_setting_too(recorder):
    """PyTorch's older one raises where a user has set the newer one."""
    _, recorded = (model.eval() for model in models("Bert"))
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32", "ieee"):
            matmul.fp32_precision = precision
            logits(recorded, batch([5]))
    finally:
        matmul.fp32_precision = before
    assert recorder.recorded == 2


def test_inside_a_recording_of_the_callers_own_nothing_is_recorded(recorder):
    _, recorded = models("Bert")
    recorder.refusal = "a recording of the caller's own"
    logits(recorded.eval(), batch([5]))
    assert recorder.recorded == 0
    assert routes(recorded, batch([5]))["CUDA graph"].reason == recorder.refusal


def test_without_a_gpu_nothing_is_recorded():
    assert buckets.pool_of(torch.device("cpu")) is None
