"""Hidden states that a graph gives beside the last layer's output; with a stand-in for graphs."""

import pytest
import torch

from fastbert.modules.sequences import Rows
from tests.modules.graphs.case import (
    KINDS,
    Repeats,
    assert_near,
    assert_same,
    batch,
    layers_of,
    models,
    use,
)

WANTED = [
    *((kind, True) for kind in KINDS),
    *(("own", numbers) for numbers in ([0], [1], [-1], [0, 2], [])),
]
NUM_LAYERS = {"num_hidden_layers": 3}


def states_of(model, wanted, number=0, lengths=(7, 3, 5, 6)):
    torch.manual_seed(3)
    output = model(**batch(list(lengths), number), output_hidden_states=wanted)
    return output.last_hidden_state, output.hidden_states


def existing(states):
    return [state for state in states or () if state is not None]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("kind", "wanted"), WANTED, ids=str)
def test_they_are_those_of_the_layers_and_the_callers_own(kind, wanted, training, recorder):
    plain, recorded = (m.train(training) for m in models(kind, "Model", **NUM_LAYERS))
    kept = []
    with torch.no_grad():
        for number, lengths in enumerate([(7, 3, 5, 6), (9, 2, 6, 1), (7, 3, 5, 6)]):
            (last, states), (expected, theirs) = (
                states_of(model, wanted, number, lengths) for model in (recorded, plain)
            )
            assert (states is None) == (theirs is None)
            assert [s is None for s in states or ()] == [s is None for s in theirs or ()]
            kept.append(([last, *existing(states)], [expected, *existing(theirs)]))
    for actual, expected in kept:
        assert_same(actual, expected)
    assert recorder.recorded == 1
    assert recorder.replayed == 3


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_all_of_some_and_of_one_of_them(kind, recorder):
    plain, recorded = (model.train() for model in models(kind, "Model", **NUM_LAYERS))
    used = [range(4), [0, 2], [1], [3], [2]]
    for number, numbers in enumerate(used):
        found = []
        for model in (recorded, plain):
            model.zero_grad()
            last, states = states_of(model, True, number)
            loss = sum(states[one].sin().sum() for one in numbers)
            (loss + last.cos().sum() if number % 2 else loss).backward()
            found.append([p.grad for p in model.parameters()])
        assert_near(*found)
    # a backward for each layer, as each has a state; not where all behind it has no gradient
    assert recorder.recorded == 1 + 3
    assert recorder.replayed == len(used) + 3 + 3 + 1 + 3 + 2


@pytest.mark.parametrize("lengths", [(7, 3, 5, 6), (6, 6)], ids=["padded", "full"])
@pytest.mark.parametrize("head", ["Model", "ForMaskedLM"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_what_follows_reaches_them(kind, head, lengths, recorder):
    """As tools that explain models by the gradients of hidden states ask for."""
    found = []
    for model in models(kind, head, **NUM_LAYERS):
        inputs = batch(list(lengths), 1)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        if head == "Model":
            output = model.eval()(**inputs, output_hidden_states=True)
            pooled = getattr(output, "pooler_output", None)
            states = (*output.hidden_states, output.last_hidden_state)
            loss = output.last_hidden_state.sin().sum()
            loss = loss if pooled is None else loss + pooled.cos().sum()
        else:
            output = model.eval()(**inputs, labels=labels, output_hidden_states=True)
            states, loss = output.hidden_states, output.loss
        for state in states:
            state.retain_grad()
        loss.backward()
        real = inputs["attention_mask"].bool()
        found.append([state.grad[real] for state in states])
        assert all(gradient.any() for gradient in found[-1])
    assert_near(*found)
    assert recorder.replayed == 4


def test_a_gradient_of_before_is_forgotten(recorder):
    """The buffer of a state that has no gradient now still has the one of the step before."""
    plain, recorded = (model.train() for model in models("Bert", "Model", **NUM_LAYERS))
    for index in (1, 2):
        found = []
        for model in (recorded, plain):
            model.zero_grad()
            last, states = states_of(model, True)
            (last.cos().sum() + states[index].sin().mul(1e3).sum()).backward()
            found.append([p.grad for p in model.parameters()])
        assert_near(*found)


@pytest.mark.parametrize("kind", ["own", "Bert"])
def test_a_second_backward_and_the_gradient_of_a_gradient(kind, recorder):
    found = []
    for model in models(kind, "Model", hidden_act="tanh", **NUM_LAYERS):
        model.eval()
        embedding = model.get_input_embeddings()(batch([6, 6])["input_ids"]).detach()
        embedding.requires_grad_()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            states = model(inputs_embeds=embedding, output_hidden_states=True).hidden_states
            loss = states[1].square().mean() + states[2].sin().mean()
            loss.backward(retain_graph=True)
            (slope,) = torch.autograd.grad(loss, embedding, create_graph=True)
            slope.square().sum().backward()
        found.append([embedding.grad, *[p.grad for p in model.parameters()]])
    assert_near(*found)


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dout):
        return None


@pytest.mark.parametrize("wanted", [False, True])
def test_a_gradient_that_does_not_arrive_is_none_for_all(wanted, recorder):
    for model in models("own", "Model"):
        sizes = {"cu_seqlens": torch.tensor([0, 7], dtype=torch.int32), "max_seqlen": 7}
        x = torch.randn(7, 32, requires_grad=True)
        output = model.train().encoder(x, **sizes, output_hidden_states=wanted)
        (NoGradient.apply(output.last_hidden_state).sum() + 0 * x.sum()).backward()
        assert all(p.grad is None for p in model.parameters())
        assert x.grad.count_nonzero() == 0
    assert recorder.replayed >= 1


def test_states_and_the_last_output_alone_have_graphs_of_their_own(recorder):
    _, model = (model.eval() for model in models("own", "Model", **NUM_LAYERS))
    with torch.no_grad():
        for _ in range(2):
            for wanted in (False, True, [1]):
                states_of(model, wanted)
    assert recorder.recorded == 3
    assert recorder.replayed == 6


def test_rows_alone_have_no_states_with_a_graph_as_without(monkeypatch):
    recorder = use(Repeats(), monkeypatch)
    _, model = models("own", "Model")
    encoder, layers = model.encoder, layers_of(model)
    sizes = {"cu_seqlens": torch.tensor([0, 7], dtype=torch.int32), "max_seqlen": 7}
    rows = Rows(torch.tensor([0]), torch.tensor([0, *[-1] * 6]), torch.tensor([0, 1]), 1)
    for wanted in (True, [len(layers) - 1]):
        with pytest.raises(ValueError, match="no output_hidden_states where only some rows"):
            encoder(torch.zeros(7, 32), **sizes, output_hidden_states=wanted, rows=rows)
    assert recorder.recorded == 0
