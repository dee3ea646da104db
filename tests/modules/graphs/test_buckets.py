"""Layers replayed as CUDA graphs give what they give without; with a stand-in for the graphs."""

import contextlib
import copy
import gc
import threading

import pytest
import torch
from torch import nn

import fastbert
from fastbert import backend
from fastbert.modules import fp8
from fastbert.modules.graphs import buckets
from fastbert.modules.graphs.replays import Bucket, Precision, rounded
from tests.modules.graphs.case import (
    KINDS,
    Repeats,
    assert_same,
    batch,
    gradients,
    layers_of,
    logits,
    models,
    pool,
    step,
)


@pytest.fixture
def recorder(monkeypatch):
    return use(Repeats(), monkeypatch)


def use(recorder, monkeypatch, **options):
    shared = pool(recorder, **options)
    monkeypatch.setattr(buckets, "pool_of", lambda device: shared)
    monkeypatch.delenv("FASTBERT_GRAPHS", raising=False)
    return recorder


@pytest.mark.parametrize("size", [*range(1, 300), 512, 1000, 24152, 100000])
def test_a_bucket_has_at_most_an_eighth_to_spare(size):
    bucket = rounded(size, 16)
    assert size <= bucket
    assert bucket - size < max(16, size / 8)
    assert rounded(bucket, 16) == bucket


def test_buckets_of_up_to_a_thousand_tokens_are_few():
    assert len({rounded(size, 16) for size in range(1, 1025)}) <= 40


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", KINDS)
def test_replays_give_what_the_layers_give(kind, training, recorder):
    plain, recorded = (model.train(training) for model in models(kind))
    kept = []
    for number, lengths in enumerate([[7, 3, 5, 6], [9, 2, 6], [6, 4, 4, 4], [130, 20], [1]]):
        inputs = batch(lengths, number)
        kept.append((logits(recorded, inputs), logits(plain, inputs)))
    assert recorder.recorded == 3  # the first three batches share a bucket
    assert recorder.replayed == 5
    for actual, expected in kept:  # no later replay has written to what was given out
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_training_steps_have_the_same_losses_and_gradients(kind, recorder):
    plain, recorded = (model.train() for model in models(kind))
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (plain, recorded)]
    for number, lengths in enumerate([[7, 3, 5, 6], [9, 8, 2], [130, 20], [7, 7, 5]]):
        inputs = batch(lengths, number)
        assert_same(step(recorded, inputs), step(plain, inputs))
        for optimizer in optimizers:
            optimizer.step()
    assert recorder.recorded == 4  # a forward and a backward of two buckets
    assert recorder.replayed == 8


@pytest.mark.parametrize("kind", ["own", "Bert", "Roberta"])
def test_a_masked_lm_whose_last_layer_computes_the_wanted_rows(kind, recorder):
    plain, recorded = (model.train() for model in models(kind, "ForMaskedLM"))
    for number, lengths in enumerate([[7, 3, 5, 6], [9, 8, 1]]):
        inputs = batch(lengths, number)
        labels = inputs["input_ids"].masked_fill(torch.rand(len(lengths), max(lengths)) > 0.4, -100)
        assert_same(step(recorded, inputs, labels), step(plain, inputs, labels))
    assert recorder.replayed == 4


def test_gradients_accumulate_and_are_nobodys_buffers(recorder):
    plain, recorded = (model.train() for model in models("Bert"))
    for model in (plain, recorded):
        for number in range(3):
            torch.manual_seed(number)
            inputs = batch([7, 3, 5, 6], number)
            model(**inputs, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    assert_same(gradients(recorded), gradients(plain))
    assert recorder.replayed == 6


@pytest.mark.parametrize("kind", ["own", "Bert", "DistilBert"])
def test_hidden_states_and_gradients_are_the_callers_own(kind, recorder):
    _, recorded = models(kind, "Model")
    ids = batch([16])["input_ids"]
    with torch.no_grad():
        first = recorded.eval()(ids).last_hidden_state
        before = first.clone()
        recorded(ids + 1)
    assert torch.equal(first, before)
    trained = list(layers_of(recorded).parameters())

    def states_and_gradients(ids):
        states = recorded.train()(ids).last_hidden_state
        return [states, *torch.autograd.grad(states.sin().sum(), trained)]

    given = states_and_gradients(ids)
    kept = [x.detach().clone() for x in given]
    states_and_gradients(ids + 1)
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))
    assert recorder.replayed == 6


def test_two_forwards_before_a_backward_as_contrastive_losses_have_them(recorder):
    found = []
    for model in models("Bert"):
        model.train()
        torch.manual_seed(3)
        inputs = batch([7, 3, 5, 6])
        first, second = model(**inputs).logits, model(**inputs).logits
        (first * second).sum().backward()
        found.append(gradients(model))
    assert_same(*found)
    assert recorder.replayed == 2  # the second forward ran without a graph


def test_a_forward_whose_output_is_gone_holds_up_no_other(recorder):
    _, recorded = models("Bert")
    inputs = batch([7, 3])
    for _ in range(3):
        recorded.train()(**inputs)
    assert recorder.replayed == 3


def test_a_second_backward_through_the_same_call(recorder):
    found = []
    for model in models("Bert"):
        torch.manual_seed(3)
        loss = model.train()(**batch([7, 3, 5, 6])).logits.square().sum()
        loss.backward(retain_graph=True)
        logits(model, batch([7, 3, 5, 6], 1))  # a replay in between
        loss.backward()
        found.append(gradients(model))
    assert_same(*found)


def test_the_gradient_of_a_gradient(recorder, monkeypatch):
    # as under backend.use("reference"), which runs without graphs
    found = []
    for model in models("Bert", hidden_act="tanh"):
        model.eval()
        embedding = model.get_input_embeddings()(batch([6, 6])["input_ids"]).detach()
        embedding.requires_grad_()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss = model(inputs_embeds=embedding).logits.square().sum()
            (slope,) = torch.autograd.grad(loss, embedding, create_graph=True)
            slope.square().sum().backward()
        found.append(gradients(model))
    assert_same(*found)


def test_a_weight_changed_between_forward_and_backward_is_refused_as_ever(monkeypatch):
    use(Repeats(again=False), monkeypatch)
    _, recorded = models("Bert")
    loss = recorded.train()(**batch([7, 3])).logits.sum()
    with torch.no_grad():
        layers_of(recorded)[0].output.dense.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def frozen(model):
    for parameter in layers_of(model)[0].parameters():
        parameter.requires_grad_(False)


def moved(model):
    weight = layers_of(model)[1].output.dense.weight
    weight.data = weight.data * 2


def replaced(model):
    layers_of(model)[1].output.dense.weight = nn.Parameter(torch.ones(32, 48))


def other_activation(model):
    intermediate = layers_of(model)[1].intermediate
    intermediate.__dict__.pop("intermediate_act_fn", None)
    intermediate.intermediate_act_fn = nn.Tanh()


def more_dropout(model):
    layers_of(model)[1].output.dropout.p = 0.5


def a_hook(model):
    layers_of(model)[1].output.dense.register_forward_hook(lambda module, args, out: out * 2)


def a_watched_layer(model):
    layers_of(model)[0].register_forward_hook(lambda module, args, out: None)


def another_leaf(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layers_of(model)[0].output.dense.__class__ = Doubled


def wider(model):
    model.double()


def checkpointed(model):
    model.gradient_checkpointing_enable()


def parametrized(model):
    torch.nn.utils.parametrizations.weight_norm(layers_of(model)[1].output.dense)


CHANGES = [
    *(frozen, moved, replaced, other_activation, more_dropout, a_hook, a_watched_layer),
    *(another_leaf, wider, checkpointed, parametrized),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("kind", ["own", "Bert"])
def test_what_changes_after_a_recording_is_seen_by_the_next_call(kind, change, recorder):
    both = [model.train() for model in models(kind)]
    inputs = batch([7, 3, 5, 6])
    for model in both:
        step(model, inputs)
        logits(model.eval(), inputs)
        change(model.train())
    plain, recorded = both
    assert_same(step(recorded, inputs), step(plain, inputs))
    assert_same([logits(recorded.eval(), inputs)], [logits(plain.eval(), inputs)])


def test_training_and_eval_mode_keep_their_graphs(recorder):
    plain, recorded = models("Bert")
    inputs = batch([7, 3])

    def in_both_modes(model):
        return [*step(model.train(), inputs), logits(model.eval(), inputs)]

    for _ in range(3):
        assert_same(in_both_modes(recorded), in_both_modes(plain))
    assert recorder.recorded == 3
    assert recorder.replayed == 9


def test_spare_tokens_forget_the_batch_before(recorder):
    """What was there may not be a number, and a gradient of 0 times that is none either."""
    plain, recorded = (model.train() for model in models("Bert"))
    embeddings = recorded.get_input_embeddings()
    with torch.no_grad():
        before = embeddings.weight[7].clone()
        embeddings.weight[7] = float("nan")
    spoilt = batch([7, 3, 6])
    spoilt["input_ids"][0, 6] = spoilt["input_ids"][2, 5] = 7
    step(recorded, spoilt)
    with torch.no_grad():
        embeddings.weight[7] = before
    inputs = batch([5, 4, 3])
    assert_same(step(recorded, inputs), step(plain, inputs))
    assert recorder.recorded == 2


@pytest.mark.parametrize("kind", ["own", "Bert"])
def test_each_precision_has_its_graphs(kind, recorder):
    plain, recorded = (model.eval() for model in models(kind))
    inputs = batch([7, 3])
    for mode in (
        contextlib.nullcontext(),
        torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode(),
        contextlib.nullcontext(),
    ):
        with mode:
            torch.testing.assert_close(logits(recorded, inputs), logits(plain, inputs))
    assert recorder.recorded == 2
    assert recorder.replayed == 4


def test_a_recording_neither_reads_nor_keeps_the_copies_that_autocast_makes():
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.is_autocast_cache_enabled()
        with Precision.of(torch.ones(1)).restored():
            assert torch.is_autocast_enabled("cpu")
            assert not torch.is_autocast_cache_enabled()


def test_a_gradient_under_autocast(recorder):
    found = []
    for model in models("Bert"):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.train()(**batch([7, 3]), labels=torch.tensor([0, 2])).loss
        loss.backward()
        found.append(gradients(model))
        torch.manual_seed(5)
    assert recorder.replayed == 2
    assert [g.dtype for g in found[0]] == [g.dtype for g in found[1]]


REFUSALS = {
    "hidden states": lambda model, inputs: model(**inputs, output_hidden_states=True).logits,
    "a general mask": lambda model, inputs: (
        model(inputs["input_ids"], attention_mask=torch.ones(2, 1, 7, 7).tril().bool()).logits
    ),
    "a forced backend": lambda model, inputs: _forced(model, inputs),
    "a dispatch mode": lambda model, inputs: _counted(model, inputs),
}


def _forced(model, inputs):
    with backend.use("reference"):
        return model(**inputs).logits


def _counted(model, inputs):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        return model(**inputs).logits


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("kind", ["own", "Bert"])
def test_what_no_graph_does_runs_as_it_is(kind, name, recorder):
    plain, recorded = (model.eval() for model in models(kind))
    inputs = batch([7, 3])
    actual, expected = (REFUSALS[name](model, inputs) for model in (recorded, plain))
    torch.testing.assert_close(actual, expected)
    assert recorder.recorded == 0


def test_the_least_recently_used_graph_goes_first(recorder, monkeypatch):
    monkeypatch.setattr(buckets, "MOST_GRAPHS", 2)
    plain, recorded = (model.eval() for model in models("Bert"))
    short, middle, long = batch([5]), batch([20]), batch([40])
    for inputs in (short, middle, short, long, short):
        torch.testing.assert_close(logits(recorded, inputs), logits(plain, inputs))
    assert recorder.recorded == 3  # the short batch was recorded once
    logits(recorded, middle)
    assert recorder.recorded == 4


def test_a_pool_that_has_outgrown_its_bound_begins_anew(monkeypatch):
    recorder = use(Repeats(taken=10), monkeypatch, most_memory=15)
    plain, recorded = (model.eval() for model in models("Bert"))
    for lengths in ([5], [20], [5], [20]):
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
    for number in range(2 * buckets.MOST_CHANGES):
        inputs = batch([5], number)
        for model in (plain, recorded):
            weight = layers_of(model)[0].output.dense.weight
            weight.data = weight.data * 1.01
        torch.testing.assert_close(logits(recorded, inputs), logits(plain, inputs))
    assert recorder.recorded == buckets.MOST_CHANGES


def routes(model, inputs):
    return {route.module: route for route in fastbert.explain(model, **inputs, show=False).routes}


@pytest.mark.parametrize("kind", ["own", "Bert"])
def test_layers_in_fp8_are_recorded_in_eval_mode_alone(kind, recorder, monkeypatch):
    monkeypatch.setattr(fp8, "multiplies_fp8", lambda device: True)  # which is then emulated
    plain, recorded = models(kind)
    fp8.enable(recorded)
    inputs = batch([7, 3])
    for _ in range(2):
        step(recorded.train(), inputs)
    assert recorder.replayed == 0
    assert "FP8" in routes(recorded, inputs)["CUDA graph"].reason
    for _ in range(2):
        torch.testing.assert_close(logits(recorded.eval(), inputs), logits(plain.eval(), inputs))
    assert recorder.replayed > 0


def test_explain_names_the_graph_or_the_reason(recorder, monkeypatch):
    plain, recorded = (model.eval() for model in models("Bert"))
    inputs = batch([7, 3])
    assert routes(recorded, inputs)["CUDA graph"][1:] == (
        "of 16 tokens, 2 sequences of up to 64",
        "to be recorded at its first use",
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
    recorder.inside = True
    logits(recorded.eval(), batch([5]))
    assert recorder.recorded == 0


def test_without_a_gpu_nothing_is_recorded():
    assert buckets.pool_of(torch.device("cpu")) is None


def test_buckets_tell_rows_from_all_tokens():
    assert Bucket(16, 1, 64) != Bucket(16, 1, 64, 16, 64)
