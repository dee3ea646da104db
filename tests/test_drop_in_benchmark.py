"""What the drop-in benchmark times is the same work, once patched and once not."""

import copy

import pytest
import torch
import transformers

import fastbert
from benchmarks import drop_in
from benchmarks.drop_in import Case
from benchmarks.results import FASTBERT, SDPA, Options, Results
from benchmarks.tables import PARTS
from fastbert.pretrain_config import PRESETS

QUICK = Options(torch.device("cpu"), "fp32", quick=True)


@pytest.fixture
def models():
    torch.manual_seed(0)
    config = transformers.BertConfig(**PRESETS["tiny"].shape, hidden_dropout_prob=0.0,
                                     attention_probs_dropout_prob=0.0)  # fmt: skip
    theirs = transformers.BertForSequenceClassification(config)
    ours = copy.deepcopy(theirs)
    fastbert.patch(ours)
    return theirs, ours


def test_both_models_compute_the_same(models):
    batch = drop_in.batch_of(Case(False, 5, 40), QUICK.device)
    theirs, ours = (drop_in.forward_pass(model, batch, QUICK)() for model in models)
    lengths = batch["attention_mask"].sum(1)
    alone = [
        models[0](ids[None, :n]).logits[0]
        for ids, n in zip(batch["input_ids"], lengths, strict=True)
    ]
    for logits in (theirs, ours):
        torch.testing.assert_close(logits, torch.stack(alone), rtol=1e-4, atol=1e-5)


def test_a_step_trains_all_weights_of_either_model_alike(models):
    batch = drop_in.batch_of(Case(True, 4, 24), QUICK.device)
    before = {name: value.clone() for name, value in models[0].named_parameters()}
    for model in models:
        drop_in.training_step(model, batch, QUICK)()
    for (name, theirs), ours in zip(
        models[0].named_parameters(), models[1].parameters(), strict=True
    ):
        assert not torch.equal(theirs, before[name]), name
        torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-5)  # a first step is of 1e-5


def test_batches_are_as_wide_as_they_say_and_filled_so():
    for case, fill in ((Case(True, 32, 128), 0.5), (Case(True, 32, 128, True), 1.0)):
        mask = drop_in.batch_of(case, QUICK.device)["attention_mask"]
        assert mask.shape == (32, 128)
        assert mask.sum(1).max() == 128
        assert mask.float().mean() == pytest.approx(fill, abs=0.02)


def test_adds_a_row_for_each_batch(monkeypatch):
    monkeypatch.setattr(drop_in, "CPU_CASES", (Case(True, 2, 8), Case(False, 1, 8, True)))
    monkeypatch.setitem(PRESETS, "mini", PRESETS["tiny"])
    patch, patched = fastbert.patch, []
    monkeypatch.setattr(fastbert, "patch", lambda model: patched.append(model) or patch(model))
    results = Results(QUICK)
    drop_in.run(QUICK, results)
    rows = results.of("drop_in")
    assert len(patched) == 2
    assert [row["timings"].keys() for row in rows] == [{SDPA, FASTBERT}] * 2
    lines = PARTS["drop_in"](rows).lines
    assert [line[:2] for line in lines] == [
        ("fine-tuning step, autocast", "2 x 8"),
        ("inference, fp32 weights", "1 x 8"),
    ]
