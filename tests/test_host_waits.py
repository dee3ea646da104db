"""The host of a GPU waits nowhere in a packed step, and twice, before all work, in a padded one."""

import dataclasses
import functools

import pytest
import torch

import fastbert
from fastbert import rng
from fastbert.modules.products import fp8
from fastbert.ops import attention_plain
from fastbert.ops.mlm_gather import mlm_gather
from fastbert.packing import IGNORE_INDEX
from fastbert.train.distill.objective import DistillationObjective, Teacher, Weights
from fastbert.train.objective import PretrainingObjective
from fastbert.train.optimizer import make_optimizer
from fastbert.train.step import EagerStep
from tests.hf.cases import FAMILIES, Case, build, inputs
from tests.host_waits import HostWaits, NoHostWaits, tensors_of
from tests.models.pretraining_case import SHAPE, make_batch, make_model
from tests.train.step_case import BUCKET, CONFIG, CPU, counts_of


@pytest.fixture(autouse=True)
def lengths_stay_on_the_device(monkeypatch):
    """As on a GPU; on a CPU attention reads them, as nobody waits there."""
    monkeypatch.setattr(attention_plain, "reads_lengths", lambda call: False)


TEACHER = make_model(num_hidden_layers=3)


def distilled(model):
    return DistillationObjective(model, Teacher(TEACHER), Weights(5.0, 2.0, 1.0), 2.0)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize(
    "objective", [PretrainingObjective, distilled], ids=["bert", "distillation"]
)
def test_a_packed_step_makes_the_host_wait_for_nothing(
    objective, precision, optimizer, monkeypatch
):
    """Forward, backward, clipping and optimizer, on a batch as a graph has it."""
    model = objective(make_model())
    if precision == "fp8":
        monkeypatch.setattr(fp8, "multiplies_fp8", lambda device: True)  # which is then emulated
        fp8.enable(model)
    step = EagerStep(
        model,
        make_optimizer(model, 0.01, optimizer),
        dataclasses.replace(CONFIG, precision=precision),
        CPU,
    )
    step.use_rate_on_device()
    step.set_learning_rate(1)
    batch = make_batch([5, 16, 1, 9]).padded_to(BUCKET)
    step.compute([batch], *counts_of([batch]))  # which makes the optimizer's state
    scales = [x for one in fp8.scales_of(model) for x in (one.history, one.amax)]
    assert bool(scales) == (precision == "fp8")
    copies = [] if step.copies is None else [step.copies.memory]
    present = tensors_of(model, TEACHER, step.optimizer, batch, [step.rate, *scales, *copies])
    before = next(model.parameters()).detach().clone()
    with NoHostWaits(present) as waits:
        metrics = step.compute([batch], *counts_of([batch]))
    assert metrics.isfinite().all()
    assert waits.seen == []
    assert not torch.equal(next(model.parameters()), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_step_of_a_patched_model_waits_before_all_work(family):
    """To count the labels and the tokens: both numbers are sizes of what follows."""
    case = Case(family, "ForMaskedLM")
    model = build(case)[1].train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    batch, _ = inputs(case, model)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)

    def step():
        model(**batch).loss.backward()
        optimizer.zero_grad()

    step()
    with NoHostWaits(tensors_of(model, batch), allowed=("unpad", "on_host")) as waits:
        step()
    assert waits.seen == ["on_host", "unpad"]


def test_a_patched_pretraining_step_waits_no_more_than_that():
    import transformers

    torch.manual_seed(0)
    model = fastbert.patch(transformers.BertForPreTraining(transformers.BertConfig(**SHAPE)))
    mask = torch.arange(12) < torch.tensor([12, 7, 0, 3])[:, None]
    ids = torch.randint(1, 61, mask.shape)
    batch = {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "labels": ids.where(torch.rand(mask.shape) < 0.4, IGNORE_INDEX),
        "next_sentence_label": torch.tensor([0, 1, 1, 0]),
    }
    model(**batch)  # the buffer of segments is read once
    with NoHostWaits(tensors_of(model, batch), allowed=("unpad", "on_host")) as waits:
        model(**batch).loss.backward()
    assert waits.seen == ["on_host", "unpad"]


@pytest.mark.parametrize("head", ["TokenClassification", "QuestionAnswering"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_patched_heads_step_waits_for_the_count_of_tokens_alone(family, head):
    """That labels at padding do not count is found out on the device."""
    case = Case(family, f"For{head}")
    model = build(case)[1]
    batch, _ = inputs(case, model)
    batch["num_items_in_batch"] = torch.tensor(9)
    model(**batch)  # the buffer of segments is read once
    with NoHostWaits(tensors_of(model, batch), allowed=("unpad",)) as waits:
        model(**batch).loss.backward()
    assert waits.seen == ["unpad"]


def test_own_models_in_packed_form_wait_for_nothing():
    for kind in ("BertForPreTraining", "BertForMaskedLM", "BertForNextSentencePrediction",
                 "BertForSequenceClassification", "BertForTokenClassification",
                 "BertForMultipleChoice", "BertForQuestionAnswering"):  # fmt: skip
        model = getattr(fastbert, kind)(fastbert.BertConfig(**SHAPE)).train()
        batch = make_batch([5, 16, 1, 9])
        labels = {}
        if kind == "BertForQuestionAnswering":
            labels = {name: torch.tensor([0, 3, 0, 2]) for name in
                      ("start_positions", "end_positions")}  # fmt: skip
        elif kind in ("BertForSequenceClassification", "BertForMultipleChoice"):
            count = 4 if kind == "BertForSequenceClassification" else 2
            labels = {"labels": torch.tensor([0, 1, 1, 0])[:count]}
            labels |= {"num_choices": 2} if count == 2 else {}
        elif kind == "BertForTokenClassification":
            batch = dataclasses.replace(batch, labels=batch.labels.clamp(max=1))
        with NoHostWaits(tensors_of(model, batch, labels)):
            model(batch, **labels).loss.backward()


@pytest.mark.parametrize("draw", ["hidden_keep_mask", "attention_keep_mask"])
def test_plain_masks_are_drawn_without_the_host(draw):
    """The operators around them hide what they do inside."""
    state = torch.tensor([3, 4])
    drawn = rng.fresh(12, CPU)
    drawn = dataclasses.replace(drawn, state=state)
    sizes = (40,) if draw == "hidden_keep_mask" else (2, 3)
    with NoHostWaits([state, drawn.token_key]):
        getattr(rng, draw)(drawn.at(5), *sizes, 0.1)


@pytest.mark.parametrize("draw", [rng.token_keys, rng.row_keys])
def test_keys_are_made_without_the_host(draw):
    first, ids = torch.tensor([0, 3, 3, 7], dtype=torch.int32), torch.tensor([4, 9, 2])
    arguments = (first, 9, ids) if draw is rng.token_keys else (ids, 9)
    with NoHostWaits([first, ids]):
        draw(*arguments)


def writes_a_number(x, index):
    x[index] = 1.0


def writes_by_a_mask(x, index):
    x.index_put_((x > 0,), x.new_zeros(()))


@pytest.mark.parametrize(
    "work",
    [
        pytest.param(
            writes_a_number,
            marks=pytest.mark.skipif(torch.__version__ >= (2, 14), reason="copies no number"),
        ),
        writes_by_a_mask,
        lambda x, index: x[x > 0],
        lambda x, index: x * torch.tensor([1.0, 2.0, 3.0]),
        lambda x, index: x.new_tensor([1.0]),
        lambda x, index: x[[0, 1]],
        lambda x, index: index.repeat_interleave(index),
        lambda x, index: x.sum().item(),
        lambda x, index: x.tolist(),
        lambda x, index: bool((x > 0).all()),
        lambda x, index: x.nonzero(),
        lambda x, index: torch.equal(x, x),
        lambda x, index: mlm_gather(x[:, None], index),
    ],
)
def test_the_stand_in_refuses(work):
    x, index = torch.arange(3.0), torch.tensor([2, 0, 1])
    with pytest.raises(HostWaits), NoHostWaits([x, index]):
        work(x, index)


def test_the_stand_in_lets_through_what_a_gpu_does_alone():
    x, index = torch.arange(3.0, requires_grad=True), torch.tensor([2, 0, 1])
    with NoHostWaits([x, index]):
        y = torch.where(index > 1, x * 2 + 1, 0.0)[index].index_fill(0, index[:1], 3.0)
        y = y + torch.arange(3) + torch.zeros(3).index_select(0, index)
        functools.reduce(torch.add, y.unbind()).backward()
