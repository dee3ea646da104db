"""Heads that read first tokens alone: the last layer computes these, if nobody sees the others."""

import contextlib
import copy
import sys

import pytest
import torch
from torch import nn

import fastbert
from fastbert.hf import encode
from fastbert.hf.first_tokens import called_by, reads_first_tokens
from fastbert.modules import sequences
from fastbert.ops.unpad import Unpadding
from tests.hf.cases import FAMILIES, Case, build, inputs
from tests.hf.compare import compare
from tests.versions import IS_V4

HEADS = [
    *((family, "ForSequenceClassification") for family in FAMILIES),
    *((family, "ForMultipleChoice") for family in FAMILIES if family != "Electra"),
    ("Bert", "ForNextSentencePrediction"),
]
OTHERS = [
    ("Electra", "ForMultipleChoice"),  # reads a summary, of the last token or of all if so set
    *(("Bert", kind) for kind in ("Model", "ForTokenClassification", "ForQuestionAnswering")),
]


def computed(model, batch):
    """How many tokens the last layer computes, by `explain`; None for all."""
    notes = [route.reason for route in fastbert.explain(model, show=False, **batch).routes]
    found = [note for note in notes if "the last layer computes" in note]
    return int(found[0].partition("computes ")[2].split()[0]) if found else None


def without_rows(monkeypatch):
    monkeypatch.setattr(sequences, "FIRST_ALONE", {"cpu": float("inf")})


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("family", "kind"), HEADS)
def test_they_are_computed_alone_and_the_same_as_hugging_faces(family, kind, training):
    case = Case(family, kind, training=training)
    compare(case)
    _, ours = build(case)
    assert computed(ours, inputs(case, ours)[0]) == len(case.lengths)


@pytest.mark.parametrize(("family", "kind"), OTHERS)
def test_other_heads_read_more(family, kind):
    case = Case(family, kind, lengths=(5, 5, 5), mask="none")
    compare(case)
    _, ours = build(case)
    assert computed(ours, inputs(case, ours)[0]) is None


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lengths", [(7, 3, 5), (4, 0, 6), (0, 0, 3), (5, 5)], ids=str)
@pytest.mark.parametrize(("family", "kind"), HEADS)
def test_dropout_padding_and_empty_rows_are_as_where_all_are_computed(
    family, kind, lengths, side, monkeypatch
):
    case = Case(family, kind, lengths=lengths, side=side)
    _, ours = build(case)
    for module in ours.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    batch, _ = inputs(case, ours)
    found = []
    for change in (lambda _: None, without_rows):
        change(monkeypatch)
        ours.zero_grad()
        torch.manual_seed(5)
        output = ours(**batch)
        output.loss.backward()
        found.append([output.logits, *[p.grad for p in ours.parameters()]])
    for a, e in zip(*found, strict=True):
        assert (a is None) == (e is None)
        assert a is None or torch.allclose(a, e, rtol=1e-9, atol=1e-12)


class Mean(nn.Module):
    """A head of the user's own, which reads all tokens."""

    def __init__(self, hidden_size):
        super().__init__()
        self.out = nn.Linear(hidden_size, 3).double()

    def forward(self, states):
        return self.out(states.mean(-2))


def a_head_of_all_tokens(model):
    torch.manual_seed(9)
    model.classifier = Mean(model.config.hidden_size)


def a_pooler_beside_it(model):
    a_head_of_all_tokens(model)
    torch.manual_seed(8)
    base = model.base_model
    base.pooler = sys.modules[type(base).__module__].RobertaPooler(base.config).double()


def a_hook_on_the_model(model):
    model.base_model.register_forward_hook(lambda module, args, out: out)


def a_hook_on_the_head(model):
    model.classifier.register_forward_pre_hook(lambda module, args: args)


def a_hook_on_the_pooler(model):
    model.base_model.pooler.register_forward_pre_hook(lambda module, args: args)


CHANGES = [
    ("Roberta", a_head_of_all_tokens),
    ("Electra", a_head_of_all_tokens),
    ("Roberta", a_pooler_beside_it),
    *((family, a_hook_on_the_model) for family in ("Bert", "Roberta", "DistilBert")),
    ("Roberta", a_hook_on_the_head),
    ("Bert", a_hook_on_the_pooler),
]


@pytest.mark.parametrize(("family", "change"), CHANGES)
def test_who_may_see_the_others_sees_them(family, change):
    case = Case(family, "ForSequenceClassification", lengths=(5, 5, 5), mask="none")
    theirs, ours = build(case)
    change(theirs)
    change(ours)
    batch, _ = inputs(case, ours)
    torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits)
    assert computed(ours, batch) is None


@pytest.mark.parametrize("family", ["Bert", "Roberta", "DistilBert"])
def test_hidden_states_and_global_hooks_see_all_tokens(family):
    case = Case(family, "ForSequenceClassification")
    _, ours = build(case)
    batch, real = inputs(case, ours)
    states = ours(**batch, output_hidden_states=True).hidden_states
    assert all(state[real].count_nonzero(-1).all() for state in states)
    seen = []

    def watch(module, args, output):
        if module is ours.base_model:
            seen.append(output.last_hidden_state.shape[:2])

    handle = nn.modules.module.register_module_forward_hook(watch)
    try:
        ours(**batch)
    finally:
        handle.remove()
    assert seen == [real.shape]


def test_a_model_of_ones_own_around_the_bare_model_gets_all_tokens():
    _, ours = build(Case("Bert", "ForSequenceClassification"))
    batch, real = inputs(Case("Bert"), ours.bert)
    call = called_by(copy.deepcopy(ours), ours.bert)  # another model's head
    assert call(**batch).last_hidden_state.shape[:2] == real.shape

    def fail():
        raise ValueError

    with contextlib.suppress(ValueError):
        called_by(ours, fail)()
    assert ours.bert(**batch).last_hidden_state.shape[:2] == real.shape


@pytest.mark.skipif(IS_V4, reason="4.57 takes no documents in this head")
def test_documents_in_one_row_are_computed_whole():
    case = Case("Bert", "ForSequenceClassification", lengths=(9,), mask="none")
    _, ours = build(case)
    batch, _ = inputs(case, ours)
    boundaries = torch.tensor([0, 4, 9], dtype=torch.int32)
    packed = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries}
    del batch["labels"]
    assert computed(ours.eval(), {**batch, **packed, "max_length_q": 5, "max_length_k": 5}) is None


def test_small_batches_compute_all_tokens(monkeypatch):
    case = Case("Bert", "ForSequenceClassification", lengths=(7, 3))
    _, ours = build(case)
    batch, _ = inputs(case, ours)
    size = 10 * ours.config.hidden_size**2
    for least, count in ((size, 2), (size + 1, None)):
        monkeypatch.setattr(sequences, "FIRST_ALONE", {"cpu": least})
        assert computed(ours, batch) == count


def test_a_model_without_a_patched_bare_model_is_left_alone():
    _, ours = build(Case("Bert", "ForSequenceClassification"))
    ours.bert = fastbert.unpatch(copy.deepcopy(ours.bert))
    assert not reads_first_tokens(ours)


POOLED = ["ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction"]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", POOLED)
def test_a_small_batch_is_padded_for_nobody_where_a_pooler_is_read(kind, side, monkeypatch):
    monkeypatch.setattr(sequences, "FIRST_ALONE", {"cpu": float("inf")})
    case = Case("Bert", kind, lengths=(7, 3, 5), side=side)
    if side == "right":
        compare(case)
    _, ours = build(case)
    batch, _ = inputs(case, ours)
    padded, pad = [], Unpadding.pad
    monkeypatch.setattr(Unpadding, "pad", lambda self, x: padded.append(1) or pad(self, x))
    alone = ours(**batch)
    assert not padded
    ours(**batch, output_hidden_states=True)
    assert padded
    monkeypatch.setattr(encode, "reads_pooler", lambda *_: False)
    torch.testing.assert_close(alone.logits, ours(**batch).logits)


def test_who_may_see_a_small_batch_sees_it_padded(monkeypatch):
    monkeypatch.setattr(sequences, "FIRST_ALONE", {"cpu": float("inf")})
    case = Case("Bert", "ForSequenceClassification", lengths=(7, 3, 5))
    for name in ("bert", "bert.pooler"):
        _, ours = build(case)
        batch, real = inputs(case, ours)
        shapes = []
        ours.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kwargs, shapes=shapes: shapes.append(
                (*args, *kwargs.values())[0].shape[:2]
            ),
            with_kwargs=True,
        )
        ours(**batch)
        assert shapes == [real.shape]


def test_a_classifier_that_reads_the_first_column_gets_it_padded(monkeypatch):
    """Though its model has a pooler, too; under left padding column 0 is no first token."""
    monkeypatch.setattr(sequences, "FIRST_ALONE", {"cpu": float("inf")})
    case = Case("Roberta", "ForSequenceClassification", lengths=(7, 3, 5), side="left")
    _, ours = build(case)
    base = ours.eval().base_model
    base.pooler = sys.modules[type(base).__module__].RobertaPooler(base.config).double()
    assert reads_first_tokens(ours)
    batch, _ = inputs(case, ours)
    logits = ours(**batch).logits
    monkeypatch.setattr(encode, "reads_pooler", lambda *_: False)
    torch.testing.assert_close(logits, ours(**batch).logits)


def test_a_module_inside_a_head_that_calls_the_model_once_more_gets_all_tokens():
    class MeanToo(nn.Module):
        """Scores the pooler's output and the mean of a second, masked view of the batch."""

        def __init__(self, bare, batch, classifier):
            super().__init__()
            self.others, self.classifier = (bare, batch), classifier

        def forward(self, pooled):
            bare, batch = self.others
            states = bare(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
            real = batch["attention_mask"][..., None]
            return self.classifier(pooled + (states * real).sum(1) / real.sum(1))

    case = Case("Bert", "ForSequenceClassification", training=False)
    models, logits = build(case), []
    batch, _ = inputs(case, models[0])
    for model in models:
        model.classifier = MeanToo(model.bert, batch, model.classifier)
        logits.append(model(**batch).logits)
    torch.testing.assert_close(*logits)
