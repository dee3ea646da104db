import pytest
import torch

from fastbert.modules.request import document_boundaries


def boundaries(*arguments, **kwargs):
    found = document_boundaries(*arguments, **kwargs)
    return found and (found[0].tolist(), found[1])


def test_documents_are_told_by_their_boundaries():
    cu_seqlens = torch.tensor([0, 2, 5])
    assert boundaries(1, 5, cu_seq_lens_q=cu_seqlens, max_length_q=4) == ([0, 2, 5], 4)
    assert boundaries(1, 5, cu_seq_lens_q=cu_seqlens) == ([0, 2, 5], 3)
    lengths = {"max_length_q": 3, "max_length_k": 5}  # the kernels want an upper bound of both
    assert boundaries(1, 5, cu_seq_lens_q=cu_seqlens, **lengths) == ([0, 2, 5], 5)
    for wrong in (
        {"cu_seq_lens_k": cu_seqlens},
        {"cu_seq_lens_q": cu_seqlens, "attention_mask": torch.ones(1, 5)},
        {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": torch.tensor([0, 3, 5])},
    ):
        with pytest.raises(ValueError, match="cu_seq_lens_"):
            document_boundaries(1, 5, **wrong)
    with pytest.raises(ValueError, match="a batch of 1"):
        document_boundaries(2, 5, cu_seq_lens_q=cu_seqlens)


FALSE_BOUNDARIES = {
    "not from 0": [1, 2, 5],
    "falling": [0, 3, 2, 5],
    "not to the end": [0, 2, 4],
    "beyond the end": [0, 2, 6],
    "no document": [0],
    "empty": torch.tensor([], dtype=torch.int32),
    "no dimension": torch.tensor(5),
    "two dimensions": torch.tensor([[0, 2, 5]]),
    "numbers": torch.tensor([0.0, 2.0, 5.0]),
    "booleans": torch.tensor([False, True, True]),
    "of another place": torch.tensor([0, 2, 5], device="meta"),
    "a list": (0, 2, 5),
}


@pytest.mark.parametrize("max_length", [None, 3], ids=["", "and the longest"])
@pytest.mark.parametrize("kind", FALSE_BOUNDARIES)
def test_boundaries_that_do_not_fit_the_row_are_refused(kind, max_length):
    bounds = FALSE_BOUNDARIES[kind]
    bounds = torch.tensor(bounds, dtype=torch.int32) if isinstance(bounds, list) else bounds
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected"):
        document_boundaries(1, 5, cu_seq_lens_q=bounds, max_length_q=max_length)


def test_boundaries_with_gaps_in_memory_are_made_contiguous():
    bounds = torch.tensor([0, 9, 2, 9, 5, 9], dtype=torch.int32)[::2]
    found, _ = document_boundaries(1, 5, cu_seq_lens_q=bounds, max_length_q=3)
    assert found.is_contiguous()
    assert found.tolist() == [0, 2, 5]


def test_a_longest_length_below_a_documents_is_refused():
    with pytest.raises(ValueError, match="max_length_q: expected at least 3, the longest"):
        document_boundaries(1, 5, cu_seq_lens_q=torch.tensor([0, 2, 5]), max_length_q=2)


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ([0, 1, 0, 1, 2], ([0, 2, 5], 3)),
        ([0, 0, 1, 0], ([0, 1, 3, 4], 2)),
        ([0, 1, 2, 3], None),
        ([0, 0, 0, 0], None),
        ([2, 3, 0, 1], None),
        ([0, 1, 1, 0], None),
    ],
    ids=["two", "of one token", "one document", "no positions at all", "shifted", "the user's own"],
)
def test_documents_are_told_by_positions_that_restart(positions, expected):
    position_ids = torch.tensor([positions])
    assert boundaries(1, len(positions), position_ids=position_ids) == expected
    mask = torch.ones(1, len(positions))
    assert boundaries(1, len(positions), mask, position_ids=position_ids) is None
    two = position_ids.expand(2, -1)
    assert boundaries(2, len(positions), position_ids=two) is None
