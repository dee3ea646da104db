"""The training loss: shares of a batch add up to the batch, and to Hugging Face's loss."""

import dataclasses

import pytest
import torch
from torch import nn

import fastbert
from fastbert.packing import PackedBatch
from fastbert.train.distill.objective import DistillationMetrics
from fastbert.train.objective import Metrics, PretrainingObjective
from fastbert.train.optimizer import linear_schedule, make_optimizer

CONFIG = fastbert.BertConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=30,
)


def make_batch(lengths: list[int], seed: int) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    ids = torch.randint(5, 40, (tokens,), generator=generator)
    masked = torch.rand(tokens, generator=generator) < 0.3
    return PackedBatch(
        input_ids=ids,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        max_seqlen=max(lengths),
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        labels=ids.where(masked, -100),
        num_labels=int(masked.sum()),
        next_sentence_label=torch.randint(0, 2, (len(lengths),), generator=generator),
    )


def joined(parts: list[PackedBatch]) -> PackedBatch:
    lengths = [n for part in parts for n in part.cu_seqlens.diff().tolist()]
    fields = ("input_ids", "position_ids", "labels", "next_sentence_label")
    return PackedBatch(
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in fields},
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        max_seqlen=max(lengths),
        num_labels=sum(part.num_labels for part in parts),
    )


@pytest.fixture
def model():
    torch.manual_seed(0)
    return fastbert.BertForPreTraining(CONFIG).double().eval()


def test_shares_add_up_to_the_batch(model):
    objective = PretrainingObjective(model)
    parts = [make_batch([9, 3, 14], 1), make_batch([5], 2), make_batch([1, 20], 3)]
    whole = joined(parts)
    counts = (whole.num_labels, whole.num_sequences)
    expected = objective(whole, *counts)
    model(whole).loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    results = [objective(part, *counts) for part in parts]
    assert not any(r.sums.requires_grad for r in results)  # or a log of them would keep graphs
    sum(result.loss for result in results).backward()
    torch.testing.assert_close(sum(r.loss for r in results), model(whole).loss)
    torch.testing.assert_close(sum(r.sums for r in results), expected.sums)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_metrics_are_those_of_the_logits(model):
    batch = make_batch([9, 3, 14], 1)
    metrics = Metrics(*PretrainingObjective(model)(batch, 1, 1).sums.tolist())
    output = model(batch)
    masked = batch.labels != -100
    hits = (output.prediction_logits.argmax(-1) == batch.labels)[masked]
    assert metrics.num_targets == masked.sum()
    assert metrics.mlm_accuracy == pytest.approx(hits.double().mean().item())
    assert metrics.mlm_loss + metrics.nsp_loss == pytest.approx(output.loss.item())


def test_the_next_sentence_loss_has_its_weight(model):
    batch = make_batch([9, 3, 14], 1)
    mlm, both, much = (PretrainingObjective(model, w)(batch, 1, 1).loss.item() for w in (0, 1, 3))
    assert both - mlm == pytest.approx((much - mlm) / 3)
    assert both > mlm


def test_a_batch_with_nothing_to_predict_is_a_finite_zero(model):
    batch = make_batch([9, 3], 1)
    nothing = {"labels": torch.full_like(batch.labels, -100)}
    nothing["next_sentence_label"] = torch.full_like(batch.next_sentence_label, -100)
    fields = {name: getattr(batch, name) for name in ("input_ids", "position_ids", "cu_seqlens")}
    for num_labels in (0, None):
        loss = model(PackedBatch(**fields, **nothing, max_seqlen=9, num_labels=num_labels)).loss
        assert loss.item() == 0
        loss.backward()
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("bounds", [torch.zeros(0).int(), torch.zeros(1, 2).int(), torch.zeros(2)])
def test_a_batch_refuses_bounds_of_another_form(bounds):
    batch = make_batch([9, 3], 1)
    with pytest.raises(ValueError, match=r"PackedBatch: expected cu_seqlens of .*\(batch \+ 1,\)"):
        dataclasses.replace(batch, cu_seqlens=bounds)


def test_only_matrices_decay(model):
    decayed, kept = make_optimizer(model, 0.01).param_groups
    names = {p: name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.01
    assert kept["weight_decay"] == 0
    for name in map(names.get, decayed["params"]):
        assert name.endswith("weight")
        assert "LayerNorm" not in name
    for name in map(names.get, kept["params"]):
        assert name.endswith("bias") or "LayerNorm" in name
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_linear_schedule_rises_and_falls():
    rates = [linear_schedule(s, peak=2.0, warmup=4, total=12) for s in range(12)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[8:] == [1.0, 0.75, 0.5, 0.25]
    assert linear_schedule(0, peak=2.0, warmup=0, total=1) == 2.0


def test_the_objective_trains_every_parameter(model):
    batch = make_batch([9, 3, 14], 1)
    PretrainingObjective(model)(batch, 1, 1).loss.backward()
    assert all(isinstance(p, nn.Parameter) and p.grad is not None for p in model.parameters())


def test_without_pairs_it_is_the_masked_lm_loss():
    torch.manual_seed(0)
    model = fastbert.BertForMaskedLM(CONFIG).double().eval()
    batch = dataclasses.replace(make_batch([9, 3, 14], 1), next_sentence_label=None)
    result = PretrainingObjective(model)(batch, batch.num_labels, 0)
    torch.testing.assert_close(result.loss, model(batch).loss)
    metrics = Metrics(*result.sums.tolist())
    assert metrics.mlm_loss == pytest.approx(model(batch).loss.item(), rel=1e-6)
    assert (metrics.nsp_loss_sum, metrics.num_pairs) == (0, 0)
    result.loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_without_numbers_of_sequences_every_token_is_real():
    assert PackedBatch.from_sequences([[1, 2], [3]]).is_real().tolist() == [True] * 3


@pytest.mark.parametrize("kind", [Metrics, DistillationMetrics])
def test_metrics_of_words_are_means_over_them(kind):
    """An untrained model, as above, hits none of them, so that any divisor would do."""
    metrics = kind(mlm_loss_sum=6.0, mlm_correct=3.0, num_targets=4.0)
    assert (metrics.mlm_loss, metrics.mlm_accuracy) == (1.5, 0.75)
    assert (kind().mlm_loss, kind().mlm_accuracy) == (0.0, 0.0)
