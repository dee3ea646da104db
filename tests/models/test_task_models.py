"""Each model against transformers: outputs, loss and all gradients, on the same weights.

Hugging Face's model runs the right-padded batch; ours the same sequences padded right or left, or
packed. Its pooler and its span scores would read padding, which ours never do.
"""

import copy
import functools
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel

from fastbert.modules.sequences import Rows
from tests.models.parity import TOLERANCE, assert_same, assert_same_gradients
from tests.models.task_case import (
    CASES,
    LENGTHS,
    REAL,
    SINGLE,
    WIDTH,
    WORDS,
    in_form,
    make_inputs,
    make_models,
)
from tests.versions import IS_V4


def masked_span_loss(output, targets) -> torch.Tensor:
    """Hugging Face's loss, where padding cannot win."""
    losses = []
    for end in ("start", "end"):
        columns = targets[f"{end}_positions"].clamp(0, WIDTH)
        beyond = columns >= torch.tensor(LENGTHS)
        scores = output[f"{end}_logits"].masked_fill(~REAL, float("-inf"))
        losses.append(F.cross_entropy(scores, columns.where(~beyond, -100)))
    return sum(losses) / 2


@pytest.mark.parametrize("form", ["right", "left", "packed"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gives_hugging_faces_outputs_loss_and_gradients(name, dtype, form):
    theirs, ours = make_models(name, dtype)
    inputs, targets = make_inputs(), dict(CASES[name][2])
    if dtype == torch.float64:
        targets = {k: v.double() if v.is_floating_point() else v for k, v in targets.items()}
    given, _ = in_form("right", name, inputs, targets)
    expected = theirs(**given)
    loss = masked_span_loss(expected, targets) if name == "span" else expected.loss
    loss.backward()
    given, real = in_form(form, name, inputs, targets)
    output = ours(**given)
    output.loss.backward()

    assert_same(output.loss, loss, dtype, "loss")
    # all choices, or all places, share the bias
    shared = {
        "choice": ("classifier.bias",),
        "span": ("qa_outputs.bias", "layer.2.output.LayerNorm.bias"),
    }.get(name, ())
    assert_same_gradients(ours, theirs, dtype, shifts=("key.bias", *shared))
    output = ours.eval()(**given)
    keys = [key for key in expected if key != "hidden_states"]
    assert list(output.keys()) == keys
    for key in set(keys) - {"loss"}:
        a, b = output[key], expected[key]
        if b.shape[:2] == REAL.shape:
            a, b = real(a), b[REAL]
        assert_same(a, b, dtype, key)


def test_a_span_on_a_full_batch_has_hugging_faces_own_loss():
    theirs, ours = make_models("span", torch.float64)
    ids = torch.randint(1, 99, (4, 9))
    targets = {
        "start_positions": torch.tensor([3, -1, 12, 0]),
        "end_positions": torch.tensor([[8], [9], [2], [100]]),
    }
    expected, output = theirs(ids, **targets), ours(ids, **targets)
    assert_same(output.loss, expected.loss, torch.float64, "loss")


def test_padding_never_is_the_answer():
    _, ours = make_models("span")
    inputs = make_inputs()
    for output in (ours(**inputs).start_logits, ours(**inputs).end_logits):
        assert (output[~REAL] == torch.finfo(torch.float32).min).all()
        assert REAL[torch.arange(4), output.argmax(1)].all()
    loss = ours(
        **inputs, start_positions=torch.tensor([20, 1, 29, 7]), end_positions=torch.tensor([13] * 4)
    ).loss
    alone = ours(inputs["input_ids"][2:3], None, inputs["token_type_ids"][2:3])
    expected = F.cross_entropy(alone.end_logits, torch.tensor([13])) / 2
    torch.testing.assert_close(loss, expected)  # every other answer lies on padding


@pytest.mark.parametrize("name", CASES)
def test_state_dicts_and_forward_arguments_are_hugging_faces(name):
    theirs, ours = make_models(name)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_children()] == [n for n, _ in theirs.named_children()]

    def positional(model):
        parameters = inspect.signature(model.forward).parameters.values()
        return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    if not IS_V4:  # which has head_mask, and flags in their places
        assert positional(ours) == positional(theirs)


@pytest.mark.parametrize("name", CASES)
def test_losses_are_normalised_by_the_items_of_the_step(name):
    """The losses of a step's parts, each normalised by the items of all, add up to the whole's."""
    _, ours = make_models(name, torch.float64)
    inputs, targets = make_inputs(), CASES[name][2]
    if name == "pre-training":  # whose parts count by their masked tokens
        targets = {**targets, "next_sentence_label": torch.full((4,), -100)}
    given, _ = in_form("right", name, inputs, targets)
    whole = ours(**given).loss
    if name == "span":
        assert ours(**given, num_items_in_batch=3).loss != whole
        one = ours(**given, num_items_in_batch=1).loss
        torch.testing.assert_close(ours(**given, num_items_in_batch=torch.tensor(4)).loss * 4, one)
        return
    labels = given["labels"]
    items = int((labels != -100).sum())
    parts = [{k: v[rows] for k, v in given.items()} for rows in (slice(1), slice(1, None))]
    torch.testing.assert_close(ours(**given, num_items_in_batch=items).loss, whole)
    for count in (items, torch.tensor(items)):
        total = sum(ours(**part, num_items_in_batch=count).loss for part in parts)
        torch.testing.assert_close(total, whole)


def test_the_pair_loss_is_weighted_by_the_share_of_masked_tokens():
    _, ours = make_models("pre-training", torch.float64)
    given, _ = in_form("right", "pre-training", make_inputs(), CASES["pre-training"][2])
    count = int((given["labels"] != -100).sum())
    whole = ours(**given).loss
    torch.testing.assert_close(ours(**given, num_items_in_batch=count).loss, whole)
    torch.testing.assert_close(ours(**given, num_items_in_batch=4 * count).loss, whole / 4)


@pytest.mark.parametrize("kind", ["ignored", "empty"])
@pytest.mark.parametrize("name", CASES)
def test_nothing_to_learn_is_a_finite_zero(name, kind):
    _, ours = make_models(name)
    given, _ = in_form("right", name, make_inputs(), CASES[name][2])
    if kind == "empty":
        given = {k: v[:0] for k, v in given.items()}
    elif given.get("labels", SINGLE["labels"]).is_floating_point():
        pytest.skip("numbers have no value to ignore")
    else:
        beyond = WIDTH if name == "span" else -100
        given |= {k: torch.full_like(given[k], beyond) for k in CASES[name][2]}
    for items in (None, 0, torch.tensor(0)):
        ours.zero_grad()
        loss = ours(**given, num_items_in_batch=items).loss
        assert loss.item() == 0
        assert loss.dtype == torch.float32
        loss.backward()
        for parameter_name, parameter in ours.named_parameters():
            assert parameter.grad is not None, parameter_name
            assert not parameter.grad.any(), parameter_name


def test_labels_that_do_not_fit_are_refused():
    _, ours = make_models("regression")
    with pytest.raises(ValueError, match=r"labels: expected shape \(4, 3\) for regression"):
        ours(**make_inputs(), labels=torch.ones(4))
    _, ours = make_models("single label")
    with pytest.raises(ValueError, match=r"labels: expected shape \(4,\) for single_label"):
        ours(**make_inputs(), labels=torch.ones(4, 3, dtype=torch.long))
    _, ours = make_models("words")
    given, _ = in_form("packed", "words", make_inputs(), WORDS)
    with pytest.raises(ValueError, match="labels: expected None with a PackedBatch"):
        ours(**given, labels=WORDS["labels"])
    with pytest.raises(ValueError, match=r"labels: expected shape .*, got \(1, "):
        ours(**make_inputs(), labels=WORDS["labels"][:1])  # of one sequence, for all of them


def test_a_classifier_of_one_output_that_a_user_puts_in_is_scored_as_one():
    """By the squared error, whatever the configuration says of the classifier of before."""
    _, ours = make_models("single label")
    ours.config.problem_type, ours.classifier = None, torch.nn.Linear(32, 1)
    labels = torch.tensor([0.5, 2.0, 0.0, 1.0])
    output = ours.eval()(**make_inputs(), labels=labels)
    torch.testing.assert_close(output.loss, (output.logits[:, 0] - labels).square().mean())


@pytest.fixture
def process_group():
    """Of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["single label", "tokens", "span", "words", "pre-training"])
def test_trains_under_ddp_without_unused_parameters(name, process_group):
    _, ours = make_models(name)
    wrapped = DistributedDataParallel(ours)
    given, _ = in_form("right", name, make_inputs(), CASES[name][2])
    for _ in range(2):  # the second step raises if a parameter had no gradient in the first
        wrapped(**given).loss.backward()


def test_fsdp_of_torch_1_computes_layers_again_as_at_first(process_group):
    """Its parameters are tensors in forwards, and others of another place in backwards."""
    _, ours = make_models("pre-training")
    given, _ = in_form("right", "pre-training", make_inputs(), CASES["pre-training"][2])
    plain = copy.deepcopy(ours)
    kind = type(ours.bert.encoder.layer[0])
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={kind})
    wrapped = FullyShardedDataParallel(
        ours, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    )
    apply_activation_checkpointing(wrapped, check_fn=lambda module: isinstance(module, kind))
    for model in (plain, wrapped):
        model(**given).loss.backward()
    found = {name.replace("_fsdp_wrapped_module.", ""): p for name, p in wrapped.named_parameters()}
    for name, parameter in plain.named_parameters():
        parts = name.split(".")
        if "layer" in parts:
            parts.insert(parts.index("layer") + 2, "_checkpoint_wrapped_module")
        torch.testing.assert_close(found[".".join(parts)].grad, parameter.grad)


def test_the_last_layer_computes_only_what_is_read(monkeypatch):
    seen = []
    original = Rows.of

    def of(self, x):
        seen.append(len(self.index))
        return original(self, x)

    monkeypatch.setattr(Rows, "of", of)
    masked = int((WORDS["labels"] != -100).sum())
    tokens = sum(LENGTHS)
    for name, rows in (
        ("single label", 4), ("next sentence", 4), ("choice", 4), ("words", masked),
        ("pre-training", min(masked + 4, tokens)), ("tokens", None), ("span", None),
    ):  # fmt: skip
        _, ours = make_models(name)
        given, _ = in_form("right", name, make_inputs(), CASES[name][2])
        seen.clear()
        ours(**given)
        assert set(seen) == ({rows} if rows is not None else set()), name
        seen.clear()
        ours(**given, output_hidden_states=True)
        assert not seen, name
