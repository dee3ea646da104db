"""The contract of losses and outputs, every test of it over own and patched models.

All batches have labels at padding, which count for nothing; `contract_case` writes out the losses.
"""

import copy
import itertools

import pytest
import torch

from tests.hf.cases import FAMILIES, IS_V4
from tests.hf.contract_case import BERTS_OWN, BY_TOKEN, HEADS, WIDTH, Subject, gradients

MODELS = [
    *(("own", "Bert", head) for head in (*HEADS, *BERTS_OWN)),
    *(("patched", "Bert", head) for head in (*HEADS, *BERTS_OWN)),
    *(("patched", family, head) for family in ("Roberta", "DistilBert") for head in HEADS),
    *(("patched", family, head) for family in FAMILIES[2:5] for head in BY_TOKEN[:3]),
    ("patched", "Electra", "Discriminator"),
]
# no number is to be ignored, nor a label of ELECTRA's discriminator
CLASSES = [model for model in MODELS if model[2] not in (*HEADS[4:6], "Discriminator")]
WORDS = [model for model in MODELS if model[2] in ("MaskedLM", "PreTraining")]


def named(model) -> str:
    return " ".join(model)


def over(models):
    return pytest.mark.parametrize("model", models, ids=named)


def sides(models):
    """Left padding too, where what a head reads is not the first column."""
    for model in models:
        yield pytest.param(model, "right", id=f"{named(model)} right")
        pooled = model[1] == "Bert"
        if (pooled or model[2] in BY_TOKEN) and not (IS_V4 and model[1] == "DistilBert"):
            yield pytest.param(model, "left", id=f"{named(model)} left")


@pytest.mark.parametrize(("model", "side"), list(sides(MODELS)))
def test_loss_and_gradients_are_the_plain_ones(model, side):
    """In both modes, for no number of items, none and many, as int and as tensor."""
    subject = Subject(model, side)
    terms = subject.terms()
    modes = {None: (True, False), 0: (True,), torch.tensor(50): (True,), 50: (False,)}
    for items, trainings in modes.items():
        expected = subject.expected(terms, items)
        same = gradients(subject.theirs, expected)
        for training in trainings:
            subject.model.train(training)
            loss = subject(num_items_in_batch=items).loss
            subject.assert_near(loss, expected)
            subject.assert_same_gradients(subject.gradients(loss), same)


@over(CLASSES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_nothing_labelled_is_a_finite_zero(model, training):
    subject = Subject(model, training=training)
    for targets in subject.nothing():
        for items in (None, torch.tensor(0)) if training else (0, 7):
            loss = subject(targets=targets, num_items_in_batch=items).loss
            assert loss.item() == 0
            for name, gradient in subject.gradients(loss).items():
                assert not gradient.any(), name


@over([model for model in CLASSES if model[2] in (*BY_TOKEN, "PreTraining")])
@pytest.mark.skipif(IS_V4, reason="transformers 4.57 takes no 4-D mask")
def test_labels_at_the_padding_of_a_mask_of_four_dimensions_count_for_nothing(model):
    """A mask of booleans or of addends, for all queries at once or for each."""
    subject = Subject(model, "left")
    ways = list(itertools.product((True, False), (None, 9)))
    losses = [subject(num_items_in_batch=items).loss for _, items in ways]
    by_key = subject.real[:, None, None]
    for mask in (by_key, by_key.expand(-1, 1, WIDTH, -1)):
        addends = torch.zeros(mask.shape).double().masked_fill(~mask, -torch.inf)
        for form, seen in ((mask, True), (addends, 0.0)):
            subject.inputs["attention_mask"] = form
            for (training, items), loss in zip(ways, losses, strict=True):
                subject.model.train(training)
                subject.assert_near(subject(num_items_in_batch=items).loss, loss)
            general = form.expand(-1, 1, WIDTH, WIDTH).clone()  # whose labels all count
            general[..., 0, :] = seen
            subject.inputs["attention_mask"] = general
            assert not torch.isclose(subject(num_items_in_batch=9).loss, losses[1])


@over(MODELS)
def test_the_shares_of_a_batch_add_up(model):
    """In loss and gradients."""
    subject = Subject(model)
    if model[2] == "PreTraining":  # whose pairs count by the masked tokens of their share
        subject.targets["next_sentence_label"][:] = -100
    if "labels" in subject.targets and subject.targets["labels"].shape == subject.real.shape:
        subject.targets["labels"][~subject.real] = -100  # of which the shares have different parts
    for items in (11, torch.tensor(11)):
        whole = subject(num_items_in_batch=items).loss
        shares = [
            subject(rows, num_items_in_batch=items).loss for rows in (slice(1), slice(1, None))
        ]
        subject.assert_near(sum(shares), whole)
        expected = subject.gradients(whole)
        subject.assert_same_gradients(subject.gradients(sum(shares)), expected)


@over(MODELS)
def test_integers_of_either_width_are_labels(model):
    subject = Subject(model)
    narrow = {name: x if x.is_floating_point() else x.int() for name, x in subject.targets.items()}
    assert torch.equal(subject(targets=narrow).loss, subject().loss)


@over(WORDS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
def test_logits_are_there_as_asked(model, training, labelled):
    subject = Subject(model, training=training)
    name = "prediction_logits" if model[2] == "PreTraining" else "logits"
    targets = subject.targets if labelled else {}
    plain, scores = subject(targets=targets), subject.scores()
    for wanted, skipped in itertools.product((None, True, False), repeat=2):
        options = {"return_logits": wanted, "skip_logits": skipped}
        if wanted is not None and wanted == skipped:
            with pytest.raises(ValueError, match="return_logits and skip_logits that agree"):
                subject(targets=targets, **options)
            continue
        output = subject(targets=targets, **options)
        asked = wanted if skipped is None else not skipped
        assert (name in output) == (not (training and labelled) if asked is None else asked)
        assert list(output) == [key for key in ("loss", name, "seq_relationship_logits")
                                if key in output]  # fmt: skip
        if name in output:
            expected = torch.cat([s[name].flatten(0, 1) for s in scores])
            subject.assert_near(output[name][subject.real], expected, name)
        for key in plain.keys() & output.keys() - {name}:
            subject.assert_near(output[key], plain[key], key)
        row = subject(targets=targets, return_dict=False, **options)
        assert [tuple(x.shape) for x in row] == [tuple(x.shape) for x in output.values()]


@over(MODELS)
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
def test_hidden_states_and_tuples_change_nothing_else(model, labelled):
    subject = Subject(model)
    targets = None if labelled else {}
    plain = subject(targets=targets)
    output = subject(targets=targets, output_hidden_states=True)
    states = output.hidden_states
    assert [tuple(x.shape[:2]) for x in states] == [(4, WIDTH)] * 3
    assert list(output) == [*plain, "hidden_states"]
    for given in ({"return_dict": False}, {}):
        if not given:
            config = copy.deepcopy(subject.model.config).to_dict() | {"return_dict": False}
            subject.model.config = type(subject.model.config).from_dict(config)
        row = subject(targets=targets, output_hidden_states=True, **given)
        assert type(row) is tuple
        assert len(row) == len(output)
        for name, value, other in zip(output, output.values(), row, strict=True):
            if name != "hidden_states":
                subject.assert_near(other, value, name)
                subject.assert_near(value, plain[name], name)
