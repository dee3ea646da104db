"""Functions of transformers and torch that a user has replaced run as in the unpatched model."""

import functools
import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastbert
from fastbert.hf.replaced import has_usual_loss, replaced_function
from tests.hf.promises_case import FAMILIES, MASK, REAL, ids, pair, states
from tests.versions import IS_V4, needs_v5

ATTENTION = "eager" if IS_V4 else "sdpa"


def modeling(family):
    name = family.lower()
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def turned(function):
    """A function that looks like `function`, and gives the last dimension in reverse."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        found = function(*args, **kwargs)
        return (found[0].flip(-1), *found[1:]) if isinstance(found, tuple) else found.flip(-1)

    return call


def nearer(function):
    """A maker of masks whose tokens attend to their neighbours alone."""

    def call(*args, **kwargs):
        mask = function(*args, **kwargs)
        far = (torch.arange(mask.shape[-2])[:, None] - torch.arange(mask.shape[-1])).abs() > 1
        lowest = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return mask.masked_fill(far, lowest)

    return call


def assert_both_change(pair, run, replace):
    """What `run` returns changes with `replace()`, after a call, and in the patched model too."""
    theirs, ours = pair
    before = run(ours)
    replace()
    expected = run(theirs)
    assert not torch.allclose(before, expected, atol=1e-4)
    torch.testing.assert_close(run(ours), expected, rtol=1e-4, atol=1e-5)


@needs_v5
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["registered", "as an item"])
def test_an_attention_that_looks_like_the_built_in_one(family, how, monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as ATTENTIONS

    def replace():
        function, places = turned(ATTENTIONS["sdpa"]), ATTENTIONS._local_mapping
        places = type(ATTENTIONS)._global_mapping if how == "registered" else places
        monkeypatch.setitem(places, "sdpa", function)

    models = pair(family, attn_implementation="sdpa")
    with torch.no_grad():
        assert_both_change(models, states, replace)
    reason = fastbert.explain(models[1], ids(), attention_mask=MASK, show=False).routes[0].reason
    assert reason == "the attention function of 'sdpa' is the user's own"


@needs_v5
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_mask_function_of_the_users_own(family, attention, monkeypatch):
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS

    def replace():
        monkeypatch.setitem(type(MASKS)._global_mapping, attention, nearer(MASKS[attention]))

    with torch.no_grad():
        assert_both_change(pair(family, attn_implementation=attention), states, replace)


@needs_v5
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("name", "attention", "change"),
    [
        ("eager_attention_forward", "eager", turned),
        ("create_bidirectional_mask", "sdpa", nearer),
        ("apply_chunking_to_forward", "sdpa", turned),
    ],
)
def test_a_function_of_the_modeling_file(family, name, attention, change, monkeypatch):
    file = modeling(family)
    with torch.no_grad():
        assert_both_change(
            pair(family, attn_implementation=attention),
            states,
            lambda: monkeypatch.setattr(file, name, change(getattr(file, name))),
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["layer_norm", "embedding", "dropout", "linear"])
def test_a_function_of_torch(family, name, monkeypatch):
    models = pair(family, attn_implementation=ATTENTION)
    with torch.no_grad():
        assert_both_change(
            models, states, lambda: monkeypatch.setattr(F, name, turned(getattr(F, name)))
        )
    reason = fastbert.explain(models[1], ids(), attention_mask=MASK, show=False).routes[0].reason
    assert reason == f"{name} is the user's own"


def test_torchs_attention_replaced_as_sageattention_asks(monkeypatch):
    """On a CPU the packed path calls it, too; on a GPU it has kernels of its own."""
    _, ours = pair(attn_implementation=ATTENTION)
    cls = type(ours)
    assert replaced_function(cls, ATTENTION) is None
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **others: v)
    assert replaced_function(cls, ATTENTION) == "scaled_dot_product_attention"
    monkeypatch.undo()
    assert replaced_function(cls, ATTENTION) is None


def test_roberta_counts_positions_as_the_user_does(monkeypatch):
    file = modeling("Roberta")
    place = file if IS_V4 else file.RobertaEmbeddings
    name = "create_position_ids_from_input_ids"

    def replace():
        def count(input_ids, *args):
            return torch.full_like(input_ids, 5)

        monkeypatch.setattr(place, name, count if IS_V4 else staticmethod(count))

    with torch.no_grad():
        assert_both_change(pair("Roberta"), states, replace)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_activations_class_whose_forward_is_replaced(family, monkeypatch):
    from transformers.activations import GELUActivation

    def replace():
        monkeypatch.setattr(GELUActivation, "forward", turned(GELUActivation.forward))

    with torch.no_grad():
        assert_both_change(pair(family), states, replace)


class Focal(nn.CrossEntropyLoss):
    """The focal loss (Lin et al. 2017, https://arxiv.org/abs/1708.02002) with gamma 2."""

    def forward(self, scores, labels):
        loss = F.cross_entropy(scores, labels, reduction="none")
        return ((1 - (-loss).exp()) ** 2 * loss).sum() / (labels != -100).sum()


@pytest.mark.parametrize("kind", ["ForMaskedLM", "ForPreTraining", "ForQuestionAnswering"])
@pytest.mark.parametrize("of", ["the modeling file", "torch"])
def test_a_loss_of_the_users_own(kind, of, monkeypatch):
    theirs, ours = pair("Bert", kind, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    labels = {"labels": ids().masked_fill(~REAL, -100)}
    if kind == "ForPreTraining":
        labels["next_sentence_label"] = torch.tensor([0, 1, 1])
    batch = {"input_ids": ids(), "attention_mask": MASK}
    if kind == "ForQuestionAnswering":  # without padding, whose scores differ on purpose
        batch["attention_mask"] = torch.ones_like(MASK)
        labels = {f"{end}_positions": torch.tensor([1, 2, 3]) for end in ("start", "end")}

    def run(model):
        return model.train()(**batch, **labels).loss.detach()

    def replace():
        if of == "torch":
            monkeypatch.setattr(nn.CrossEntropyLoss, "forward", Focal.forward)
        else:
            monkeypatch.setattr(modeling("Bert"), "CrossEntropyLoss", Focal)

    assert_both_change((theirs, ours), run, replace)


def test_torchs_cross_entropy_replaced_as_ligers_is(monkeypatch):
    """On a CPU the packed path calls it, too; on a GPU it has kernels of its own."""
    theirs, ours = pair("Bert", "ForMaskedLM")
    cls = type(theirs)
    assert has_usual_loss(cls)
    own, shapes = F.cross_entropy, []

    def cross_entropy(scores, labels, **others):
        shapes.append(scores.shape)
        return own(scores, labels, **others)

    monkeypatch.setattr(F, "cross_entropy", cross_entropy)
    assert not has_usual_loss(cls)
    ours.train()(ids(), attention_mask=MASK, labels=ids())
    assert shapes == [(ids().numel(), ours.config.vocab_size)]  # all places, as in Hugging Face
    monkeypatch.undo()
    assert has_usual_loss(cls)


def test_a_masked_lm_head_too_calls_a_function_of_torch(monkeypatch):
    theirs, ours = pair("Bert", "ForMaskedLM", hidden_dropout_prob=0.0)
    labels = ids().masked_fill(~REAL, -100)

    def run(model):
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model.train()(ids(), attention_mask=MASK, labels=labels).loss.detach()

    def replace():
        monkeypatch.setattr(F, "layer_norm", turned(F.layer_norm))

    assert_both_change((theirs, ours), run, replace)
