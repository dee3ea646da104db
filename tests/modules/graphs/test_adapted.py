"""Graphs of layers with LoRA's adapters."""

import copy
import gc

import pytest
import torch

import fastbert
from fastbert.modules.graphs import buckets, pool, replays
from fastbert.modules.plan import MOST_PLANS
from tests.modules.graphs.case import (
    assert_same,
    batch,
    layers_of,
    logits,
    models,
    step,
)

peft = pytest.importorskip("peft", reason="adapters need peft")

EVERYWHERE = ["query", "key", "value", "dense"]


def adapted(kind, targets, dropout=0.3):
    """The same model with two adapters twice, the first of which runs without graphs."""
    found = []
    for model in models(kind):
        torch.manual_seed(1)
        config = peft.LoraConfig(
            r=4, target_modules=targets, lora_dropout=dropout, init_lora_weights=False
        )
        model = peft.get_peft_model(model, config)
        model.add_adapter("other", copy.deepcopy(config))
        model.base_model.set_adapter("default")
        model.classifier.requires_grad_(True)
        found.append(model)
    buckets.allow(found[0], False)
    return found


@pytest.mark.parametrize("targets", [["query", "value"], EVERYWHERE], ids="-".join)
@pytest.mark.parametrize("kind", ["own", "Bert"])
def test_a_replay_gives_the_loss_and_the_gradients_of_the_adapters(kind, targets, recorder):
    plain, recorded = (model.train() for model in adapted(kind, targets))
    for lengths in ([7, 3, 5, 6], [6, 3, 7, 1]):
        inputs = batch(lengths, seed=len(lengths))
        assert_same(step(recorded, inputs), step(plain, inputs))
    assert recorder.recorded == 2
    assert recorder.replayed == 4
    inputs = batch([7, 3])
    for model in (plain, recorded):
        model.eval()
    for _ in range(2):
        assert_same([logits(recorded, inputs)], [logits(plain, inputs)])
    assert recorder.replayed == 6


@pytest.mark.parametrize("targets", [["query", "value"], EVERYWHERE], ids="-".join)
def test_processes_that_exchange_gradients_have_those_of_some_layers_each(
    targets, recorder, monkeypatch
):
    for module in (pool, replays):
        monkeypatch.setattr(module, "num_segments", lambda: 2)
    plain, recorded = (model.train() for model in adapted("Bert", targets))
    inputs = batch([7, 3, 5, 6])
    for _ in range(2):
        assert_same(step(recorded, inputs), step(plain, inputs))
    assert (recorder.recorded, recorder.replayed) == (3, 6)


def test_a_second_backward_without_the_graph_draws_what_the_forward_did(recorder):
    """The layers then run again: their adapters' dropout must be the same."""
    plain, recorded = (model.train() for model in adapted("Bert", EVERYWHERE))
    inputs, found = batch([7, 3, 5, 6]), []
    for model in (plain, recorded):
        torch.manual_seed(5)
        loss = model(**inputs, labels=torch.tensor([0, 2, 1, 1])).loss
        loss.backward(retain_graph=model is recorded)
        if model is recorded:
            model.zero_grad()
            loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert_same(*found)
    assert recorder.replayed == 2


def other_adapter(model):
    model.base_model.set_adapter("other")


def no_adapter(model):
    model.base_model.disable_adapter_layers()


def scaled(model):
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(2.0)


def less_dropout(model):
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"].p = 0.1


def merged(model):
    model.merge_adapter()


def moved(model):
    weight = layers_of(model)[1].attention.self.query.lora_B["default"].weight
    weight.data = weight.data * 2


def hooked(model):
    query = layers_of(model)[1].attention.self.query
    query.lora_B["default"].register_forward_hook(lambda module, args, out: out * 2)


CHANGES = [other_adapter, no_adapter, scaled, less_dropout, merged, moved, hooked]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("kind", ["own", "Bert"])
def test_what_changes_after_a_recording_is_seen_by_the_next_call(kind, change, recorder):
    both = [model.train() for model in adapted(kind, ["query", "value"])]
    inputs = batch([7, 3, 5, 6])
    before = [step(model, inputs)[0] for model in both]
    for model in both:
        logits(model.eval(), inputs)
        change(model.train())
    plain, recorded = both
    after = step(recorded, inputs)
    assert_same(after, step(plain, inputs))
    assert not torch.equal(after[0], before[1])
    assert_same([logits(recorded.eval(), inputs)], [logits(plain.eval(), inputs)])


def test_states_that_are_long_gone_keep_no_graphs(recorder):
    _, model = adapted("Bert", ["query"])
    inputs = batch([7, 3])
    for number in range(3 * MOST_PLANS):
        for module in model.modules():
            if hasattr(module, "scale_layer"):
                module.scaling["default"] = 1.0 + number
        logits(model.eval(), inputs)
    assert recorder.recorded == 3 * MOST_PLANS
    gc.collect()
    assert len(buckets.pool_of(torch.device("cpu")).used) == MOST_PLANS


def test_explain_says_that_a_graph_runs(recorder):
    _, recorded = adapted("Bert", ["query", "value"])
    inputs = batch([7, 3])
    logits(recorded.eval(), inputs)
    with torch.no_grad():
        told = fastbert.explain(recorded, **inputs, show=False)
    (route,) = [route for route in told.routes if route.module == "CUDA graph"]
    assert route.reason == "recorded"


def test_variants_run_without_a_graph(recorder):
    _, model = models("Bert")
    config = peft.LoraConfig(target_modules=["query"], use_dora=True)
    model = peft.get_peft_model(model, config).eval()
    logits(model, batch([7, 3]))
    assert not recorder.recorded


def test_each_adapter_keeps_its_graphs(recorder):
    plain, recorded = (model.eval() for model in adapted("Bert", ["query", "value"]))
    inputs = batch([7, 3])
    for _ in range(3):
        for name in ("default", "other"):
            for model in (plain, recorded):
                model.base_model.set_adapter(name)
            assert_same([logits(recorded, inputs)], [logits(plain, inputs)])
    assert recorder.recorded == 2


@pytest.mark.gpu
@pytest.mark.parametrize("targets", [["query", "value"], EVERYWHERE], ids="-".join)
@pytest.mark.parametrize("is_low", [False, True], ids=["float32", "autocast"])
def test_on_a_gpu_replays_give_what_the_layers_give(is_low, targets, monkeypatch):
    monkeypatch.setattr(pool, "RECORDED_AT", 1)
    plain, recorded = (model.cuda().train() for model in adapted("Bert", targets))
    before = len(buckets.pool_of(torch.device("cuda", 0)).used)
    for lengths in ([7, 3, 5, 6], [6, 3, 7, 1]):
        inputs = {name: x.cuda() for name, x in batch(lengths, seed=len(lengths)).items()}
        with torch.autocast("cuda", torch.bfloat16, enabled=is_low):
            found = [
                step(model, inputs, (torch.arange(4) % 3).cuda()) for model in (recorded, plain)
            ]
        for a, e in zip(*found, strict=True):
            assert (a is None) == (e is None)
            worst = 2e-2 if is_low else 1e-4
            assert a is None or (a - e).abs().max() <= worst * (1 + e.abs().max())
    assert len(buckets.pool_of(torch.device("cuda", 0)).used) == before + 1
