"""A packed batch that is filled up to the sizes of a bucket."""

import dataclasses

import pytest
import torch

from fastbert.packing import IGNORE_INDEX
from fastbert.train.objective import PretrainingObjective
from tests.models.pretraining_case import make_batch, make_model
from tests.train.step_case import BUCKET, counts_of, prepared


def test_padding_changes_neither_loss_nor_gradient():
    model = make_model(dropout=0.3)
    model.double()
    batch = prepared(make_batch([5, 16, 1, 9]))
    batch = dataclasses.replace(batch, dropout_state=torch.tensor([5, 9]))
    found = []
    for one in (batch, batch.padded_to(BUCKET)):
        result = PretrainingObjective(model)(one, *counts_of([batch]))
        found.append((result, torch.autograd.grad(result.loss, list(model.parameters()))))
    (a, a_grads), (b, b_grads) = found
    torch.testing.assert_close(b.loss, a.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(b.sums, a.sums)
    for x, y in zip(b_grads, a_grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


def test_a_padded_batch_has_the_sizes_of_its_bucket():
    batch = prepared(make_batch([5, 16, 1, 9]))
    padded = batch.padded_to(BUCKET)
    assert padded.num_tokens == BUCKET.num_tokens
    assert padded.num_sequences == BUCKET.num_sequences
    assert padded.max_seqlen == BUCKET.max_seqlen
    assert padded.cu_seqlens.tolist() == [0, 5, 21, 22, 31, 47, 63, 64, 64, 64]
    assert padded.cu_seqlens.dtype == torch.int32
    assert padded.position_ids[31:].tolist() == [*range(16), *range(16), 0]
    assert set(padded.labels[31:].tolist()) == {IGNORE_INDEX}
    full = prepared(make_batch([16] * 4))
    assert full.padded_to(BUCKET).cu_seqlens.tolist() == [0, 16, 32, 48, *[64] * 6]


@pytest.mark.parametrize(
    ("lengths", "name"),
    [([16, 16, 16, 16, 1], "num_tokens"), ([1] * 8, "num_sequences"), ([17], "max_seqlen")],
)
def test_a_batch_that_does_not_fit_is_refused(lengths, name):
    batch = prepared(make_batch(lengths))
    assert name in batch.misfit(BUCKET)
    with pytest.raises(ValueError, match=f"padded_to.*{name}"):
        batch.padded_to(BUCKET)


def test_a_batch_with_nothing_to_predict_is_refused():
    batch = dataclasses.replace(prepared(make_batch([3])), labels=None, num_labels=None)
    with pytest.raises(ValueError, match="padded_to: expected a batch with labels, got none"):
        batch.padded_to(BUCKET)


@pytest.mark.parametrize("state", [torch.tensor([7]), torch.zeros(3).long(), torch.zeros(2)])
def test_a_dropout_state_that_is_no_seed_and_step_is_refused(state):
    """A kernel would read beyond one that is too short."""
    batch = make_batch([5, 16])
    with pytest.raises(ValueError, match=r"expected a dropout_state \(2,\) int64, a seed and a"):
        dataclasses.replace(batch, dropout_state=state)
