"""What changes after a recording is seen by the next call."""

import contextlib

import pytest
import torch
from torch import nn

from fastbert.modules import plan
from tests.modules.graphs.case import (
    Repeats,
    assert_same,
    batch,
    gradients,
    layers_of,
    logits,
    models,
    step,
    use,
)


def frozen(model):
    for parameter in layers_of(model)[0].parameters():
        parameter.requires_grad_(False)


def moved(model):
    weight = layers_of(model)[1].output.dense.weight
    weight.data = weight.data * 2


def narrowed(model):
    """Of other shapes at the same addresses, as pruning in place leaves them."""
    layer = layers_of(model)[1]
    for tensor in (layer.intermediate.dense.weight, layer.intermediate.dense.bias):
        tensor.data = tensor.data[:24]
    layer.output.dense.weight.data = layer.output.dense.weight.data[:, :24]


def shortened(model):
    """Still contiguous, with as few products."""
    layer = layers_of(model)[1]
    for tensor in (layer.intermediate.dense.bias, layer.intermediate.dense.weight):
        tensor.data = tensor.data[:24]
    layer.output.dense.weight.data = layer.output.dense.weight.data.view(-1)[: 32 * 24].view(32, 24)


def transposed(model):
    """In the same memory, of the same size."""
    weight = layers_of(model)[1].attention.output.dense.weight
    weight.data = weight.data.T


def replaced(model):
    layers_of(model)[1].output.dense.weight = nn.Parameter(torch.ones(32, 48))


def other_eps(model):
    layers_of(model)[1].output.LayerNorm.eps = 0.5


def without_affine(model):
    layers_of(model)[1].output.LayerNorm = nn.LayerNorm(32, elementwise_affine=False)


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
    frozen, moved, narrowed, shortened, transposed, replaced, other_activation, more_dropout,
    a_hook, a_watched_layer, another_leaf, wider, checkpointed, parametrized, other_eps,
    without_affine,
]  # fmt: skip


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


@pytest.mark.parametrize("kind", ["own", "Bert"])
def test_a_backward_has_the_gradients_that_its_forward_was_to_have(kind, monkeypatch):
    """What is frozen in between is frozen from the next forward on, as without graphs."""
    recorder = use(Repeats(again=False), monkeypatch)  # a graph has no autograd to refuse it
    found, inputs = [], batch([7, 3])
    for model in models(kind):
        torch.manual_seed(5)
        loss = model.train()(**inputs, labels=torch.tensor([0, 2])).loss
        frozen(model)
        loss.backward()
        found.append([gradient is None for gradient in gradients(model)])
    assert found[0] == found[1]
    assert recorder.replayed == 2


@pytest.mark.parametrize("kind", ["own", "Bert"])
def test_embeddings_that_are_trained_again_have_gradients(kind, recorder):
    plain, recorded = (model.train() for model in models(kind))
    inputs = batch([7, 3])
    for trained in (False, True, False):
        for model in (plain, recorded):
            model.bert.embeddings.requires_grad_(trained)
        assert_same(step(recorded, inputs), step(plain, inputs))


@pytest.mark.parametrize("change", [moved, transposed], ids=["moved", "transposed"])
@pytest.mark.parametrize("kind", ["own", "Bert"])
def test_a_backward_behind_a_change_of_weights_is_no_replay(kind, change, recorder):
    """Which would read what lies now where they were."""
    _, model = models(kind)
    loss = model.train()(**batch([7, 3]), labels=torch.tensor([0, 2])).loss
    change(model)
    loss.backward()
    assert recorder.replayed == 1  # the forward
    assert all(one.isfinite().all() for one in gradients(model))


def test_training_and_eval_mode_keep_their_graphs(recorder):
    plain, recorded = models("Bert")
    inputs = batch([7, 3])

    def in_both_modes(model):
        return [*step(model.train(), inputs), logits(model.eval(), inputs)]

    for _ in range(3):
        assert_same(in_both_modes(recorded), in_both_modes(plain))
    assert recorder.recorded == 3
    assert recorder.replayed == 9


def test_calls_with_a_dropout_state_and_without_have_their_graphs(recorder):
    """Embeddings that alone drop have one, which the layers get without a use for it."""
    _, model = models("own")
    model.eval()
    for is_given in (True, False, True):
        model.bert.embeddings.dropout.training = is_given
        step(model, batch([7, 3]))
    assert recorder.recorded == 4


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


@pytest.mark.parametrize("kind", ["own", "Bert"])
def test_each_dtype_of_the_stream_has_its_graphs(kind, recorder):
    both = [model.eval() for model in models(kind)]
    inputs = batch([7, 3])
    for number, in_fp32 in enumerate((True, False), start=1):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            found = []
            for model in both:
                object.__setattr__(model.config, "residual_in_fp32", in_fp32)
                embeds = model.get_input_embeddings()(inputs["input_ids"])
                mask = {"attention_mask": inputs["attention_mask"]}
                found.append(model(inputs_embeds=embeds, **mask).logits)
        torch.testing.assert_close(*found)
        assert recorder.recorded == number


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


@pytest.mark.parametrize("kind", ["own", "Bert"])
def test_layers_are_looked_at_while_their_graph_runs(kind, recorder, monkeypatch):
    plain, recorded = (model.eval() for model in models(kind, num_hidden_layers=3))
    inputs = batch([7, 3])
    logits(recorded, inputs)
    held, seen = plan.Plan.holds, []
    monkeypatch.setattr(
        plan.Plan, "holds", lambda self: seen.append((recorder.replayed, held(self))) or seen[-1][1]
    )
    assert_same([logits(recorded, inputs)], [logits(plain, inputs)])
    assert (recorder.replayed, True) in seen  # of two replays the second
    for model in (plain, recorded):
        del layers_of(model)[1]
    calls = []
    layers_of(recorded)[1].output.register_forward_hook(lambda *_: calls.append(1))
    layers_of(recorded)[1].output.dense.register_forward_hook(lambda *_: calls.append(2))
    seen.clear()
    assert_same([logits(recorded, inputs)], [logits(plain, inputs)])
    assert (recorder.replayed, False) in seen  # what it gave was given up
    assert sorted(calls) == [1, 2]
