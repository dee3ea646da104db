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
