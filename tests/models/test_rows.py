"""A last layer that computes some rows only: the same loss, gradients and dropout as all rows."""

import dataclasses

import pytest
import torch

import fastbert
from fastbert.models.losses import score_classes, score_sequences
from fastbert.models.request import wanted_rows
from fastbert.modules import sequences
from fastbert.modules.sequences import Rows
from fastbert.packing import IGNORE_INDEX
from fastbert.train.objective import PretrainingObjective
from tests.hf.changes import give_another_kind_of_weight
from tests.models.pretraining_case import SHAPE, make_batch, make_model

LENGTHS = [9, 1, 30, 4]


def gradients(loss, model):
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def make_classifier(name):
    torch.manual_seed(0)
    config = fastbert.BertConfig(
        **SHAPE, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2, num_labels=3
    )
    return getattr(fastbert, f"BertFor{name}")(config).double().train()


def without_masked_first_tokens(batch):
    first = batch.cu_seqlens[:-1].long()
    labels = batch.labels.index_fill(0, first[::2], IGNORE_INDEX)
    return dataclasses.replace(batch, labels=labels, num_labels=int((labels >= 0).sum()))


@pytest.mark.parametrize("spare", [0, 3, 100])
@pytest.mark.parametrize("name", ["PreTraining", "MaskedLM"])
def test_pre_training_with_dropout_has_the_loss_and_gradients_of_all_rows(name, spare):
    model = make_model().double() if name == "PreTraining" else make_classifier(name)
    batch = without_masked_first_tokens(make_batch(LENGTHS))
    expected = gradients(model(batch, output_hidden_states=True).loss, model)
    batch = dataclasses.replace(batch, num_labels=batch.num_labels + spare)
    for a, b in zip(gradients(model(batch).loss, model), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["PreTraining", "MaskedLM"])
def test_a_small_batch_computes_all_rows(name, monkeypatch):
    model = make_model().double() if name == "PreTraining" else make_classifier(name)
    batch, found, chosen = make_batch(LENGTHS), [], []
    choose = Rows.read_by_losses
    monkeypatch.setattr(Rows, "read_by_losses", lambda *a, **k: chosen.append(1) or choose(*a, **k))
    size = batch.num_tokens * model.config.hidden_size**2
    for least in (size, size + 1):
        monkeypatch.setattr(sequences, "LABELLED_ALONE", {"cpu": least})
        found.append(gradients(model(batch).loss, model))
    assert len(chosen) == 1
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["SequenceClassification", "NextSentencePrediction"])
@pytest.mark.parametrize("lengths", [LENGTHS, [3, 0, 5, 0]], ids=str)
def test_classifiers_with_dropout_have_the_loss_and_gradients_of_all_rows(name, lengths):
    model, batch = make_classifier(name), make_batch(lengths)
    batch = dataclasses.replace(batch, next_sentence_label=None)
    results = []
    for hidden_states in (True, False):
        torch.manual_seed(7)  # of the head's own dropout
        output = model(batch, labels=torch.tensor([0, 1, 1, 0]), output_hidden_states=hidden_states)
        results.append([output.logits, *gradients(output.loss, model)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_the_objective_is_the_models_own_loss_over_all_rows():
    model, batch = make_model().double(), make_batch(LENGTHS)
    expected = gradients(model(batch, output_hidden_states=True).loss, model)
    loss = PretrainingObjective(model)(batch, batch.num_labels, batch.num_sequences).loss
    for a, b in zip(gradients(loss, model), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_the_masks_of_the_wanted_rows_are_the_same_bits():
    """With another mask, half of all activations would be others."""
    model, batch = make_model(dropout=0.5).double(), make_batch(LENGTHS)
    rows = wanted_rows(batch, first=True, labelled=True)
    index = rows.index[rows.index >= 0].long()
    all_rows = model.bert(batch).last_hidden_state[index]
    some_rows = model.bert(batch, rows=rows).last_hidden_state[: len(index)]
    assert ((all_rows - some_rows).abs() < 1e-9).all()


def test_a_general_mask_and_rows_go_together():
    model = make_model().double()
    batch = make_batch(LENGTHS)
    causal = torch.ones(30, 30).tril().bool()[None, None]
    batch = dataclasses.replace(batch, attention_mask=causal)
    expected = gradients(model(batch, output_hidden_states=True).loss, model)
    for a, b in zip(gradients(model(batch).loss, model), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def test_which_rows_are_wanted():
    batch = make_batch([3, 0, 4, 2])
    labels = torch.tensor([-100, 5, -100, 7, -100, -100, 9, -100, -100])
    batch = dataclasses.replace(batch, labels=labels, num_labels=3)
    rows = wanted_rows(batch, first=True, labelled=True)
    assert rows.index.tolist() == [0, 1, 3, 6, 7, -1, -1]
    assert rows.cu_seqlens.tolist() == [0, 2, 2, 4, 5]
    assert rows.take(labels, -100).tolist() == [-100, 5, 7, 9, -100, -100, -100]
    rows = wanted_rows(batch, first=True, labelled=False)
    assert (rows.index.tolist(), rows.max_seqlen) == ([0, 3, 7, -1], 1)
    rows = wanted_rows(dataclasses.replace(batch, num_labels=None), first=False, labelled=True)
    assert rows.index.tolist() == [1, 3, 6]
    # a number of labels that is too low loses rows, but stays inside the memory of those there are
    rows = wanted_rows(dataclasses.replace(batch, num_labels=1), first=False, labelled=True)
    assert (rows.index.tolist(), rows.cu_seqlens.tolist()) == ([1], [0, 1, 1, 1, 1])


def test_rows_need_packed_input():
    model, batch = make_model(), make_batch(LENGTHS)
    rows = wanted_rows(batch, first=True, labelled=False)
    with pytest.raises(ValueError, match="rows with a PackedBatch"):
        model.bert(torch.ones(2, 3, dtype=torch.long), rows=rows)


def test_losses_of_logits_in_low_precision_are_summed_in_float32():
    logits = torch.arange(12.0).div(7).view(4, 3).bfloat16()
    classes, numbers = torch.tensor([0, 2, IGNORE_INDEX, 1]), torch.linspace(0, 1, 12).view(4, 3)
    for score, labels in ((score_classes, classes), (score_sequences, numbers)):
        kind = () if score is score_classes else ("multi_label_classification",)
        of_rounded, of_wide = (score(x, labels, *kind).loss_sum for x in (logits, logits.float()))
        assert of_rounded.dtype == torch.float32
        assert of_rounded == of_wide


def test_a_decoder_whose_weight_only_its_module_knows_is_called():
    model, batch = make_model(dropout=0.0), make_batch(LENGTHS)
    expected = model(batch).loss
    give_another_kind_of_weight(model.cls.predictions.decoder)
    torch.testing.assert_close(model(batch).loss, expected)
