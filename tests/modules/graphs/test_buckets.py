"""Layers replayed as CUDA graphs give what they give without; with a stand-in for the graphs."""

import pytest
import torch

from fastbert import backend
from fastbert.modules import request, sequences
from fastbert.modules.graphs import buckets
from fastbert.modules.graphs.call import Bucket, copies_of, rounded
from fastbert.ops.attention import attention_qkvpacked
from tests.modules.graphs.case import (
    KINDS,
    Counter,
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


@pytest.mark.parametrize("size", [*range(1, 300), 512, 1000, 24152, 100000])
def test_a_bucket_has_at_most_an_eighth_to_spare(size):
    bucket = rounded(size, 16)
    assert size <= bucket
    assert bucket - size < max(16, size / 8)
    assert rounded(bucket, 16) == bucket


def test_buckets_of_up_to_a_thousand_tokens_are_few():
    assert len({rounded(size, 16) for size in range(1, 1025)}) <= 40


@pytest.mark.parametrize("alone", [False, True], ids=["", "first tokens alone"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", KINDS)
def test_replays_give_what_the_layers_give(kind, training, alone, recorder, monkeypatch):
    monkeypatch.setattr(sequences, "FIRST_ALONE", {"cpu": 0 if alone else float("inf")})
    plain, recorded = (model.train(training) for model in models(kind))
    kept = []
    for number, lengths in enumerate([[7, 3, 5, 6], [9, 2, 6], [6, 4, 4, 4], [130, 20], [1]]):
        inputs = batch(lengths, number)
        kept.append((logits(recorded, inputs), logits(plain, inputs)))
    assert recorder.recorded == 3  # the first three batches share a bucket
    assert recorder.replayed == 5
    for actual, expected in kept:  # no later replay has written to what was given out
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("alone", [False, True], ids=["", "first tokens alone"])
def test_filler_tokens_are_in_no_sequence(alone, recorder, monkeypatch):
    """Those of a batch whose tokens nobody counted are more than the longest sequence has."""
    monkeypatch.setattr(sequences, "FIRST_ALONE", {"cpu": 0 if alone else float("inf")})
    monkeypatch.setattr(request, "_waits", lambda *_: False)
    plain, recorded = (model.eval() for model in models("own"))
    for number, lengths in enumerate([[40, 2, 4], [1, 40, 1], [3, 3, 40]]):
        inputs = batch(lengths, number)
        torch.testing.assert_close(logits(recorded, inputs), logits(plain, inputs))
    assert (recorder.recorded, recorder.replayed) == (1, 3)


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


def test_buckets_tell_rows_from_all_tokens():
    assert Bucket(16, 1, 64) != Bucket(16, 1, 64, 16, 64)


@pytest.mark.skipif(not backend.INTERPRETED, reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("kind", ["own", "Bert"])
def test_steps_whose_operators_are_kernels(kind, recorder, monkeypatch):
    """As on a GPU, but in the interpreter."""
    monkeypatch.setitem(backend.PREFERENCE, "cpu", backend.PREFERENCE["cuda"])
    with backend.use(None):  # so that choices of before are forgotten
        plain, recorded = (model.train() for model in models(kind, num_hidden_layers=1))
        assert attention_qkvpacked.chosen("cpu").backend == "triton"
        for number, lengths in enumerate([[7, 3], [6, 5]]):
            inputs = batch(lengths, number)
            assert_same(step(recorded, inputs), step(plain, inputs))
    assert recorder.replayed == 2 * 2


def test_copies_of_several_dtypes_are_made_dtype_by_dtype():
    """PyTorch copies a list of mixed dtypes one by one."""
    tensors = [torch.randn(3), torch.randn(2, 2).bfloat16(), torch.randn(4), torch.randn(1).half()]
    with Counter() as counter:
        copies = copies_of(tensors)
    assert counter.calls == {"_foreach_mul": 3}
    for a, e in zip(copies, tensors, strict=True):
        assert torch.equal(a, e)
        assert a.dtype == e.dtype
        assert a.data_ptr() != e.data_ptr()
    assert copies_of([]) == []


def test_the_environments_value_is_checked_on_every_machine(monkeypatch):
    monkeypatch.setenv("FASTBERT_GRAPHS", "1")
    with pytest.raises(ValueError, match='FASTBERT_GRAPHS: expected "auto" or "0", got \'1\''):
        buckets.allow(torch.nn.Linear(1, 1), "auto")  # as `patch` does
