import pytest
import torch
from transformers.masking_utils import eager_mask, sdpa_mask

from fastbert.modules.request import document_boundaries, read_mask, real_tokens
from tests.versions import needs_v5

REAL = torch.tensor([[True, True, False], [False, True, True]])
LOWEST = torch.finfo(torch.float32).min


def padding_of(mask):
    padding, general = read_mask(mask, 2, 3)
    return general is None and torch.equal(padding, REAL)


@pytest.mark.parametrize(
    "mask",
    [
        REAL,
        REAL.long(),
        REAL.float(),
        REAL[:, None, None],
        REAL[:, None, None].expand(2, 1, 3, 3),
        REAL[:, None, None].expand(2, 4, 3, 3),
        torch.zeros(2, 1, 1, 3).masked_fill(~REAL[:, None, None], LOWEST),
        torch.zeros(2, 1, 3, 3).masked_fill(~REAL[:, None, None], float("-inf")),
        (1 - REAL[:, None, None].float()) * -10000,
    ],
    ids=["bool", "int", "float", "4-D bool", "S x S", "heads", "lowest", "-inf", "-10000"],
)
def test_every_form_of_key_padding_is_read(mask):
    assert padding_of(mask)
    assert torch.equal(real_tokens(mask).expand(2, 3), REAL)


def test_no_mask_means_every_token_is_real():
    assert read_mask(None, 2, 3) == (None, None)


@needs_v5
@pytest.mark.parametrize("build", [sdpa_mask, eager_mask], ids=["sdpa", "eager"])
def test_what_hugging_face_hands_to_its_encoder_is_read(build):
    mask = build(
        batch_size=2,
        q_length=3,
        kv_length=3,
        attention_mask=REAL,
        mask_function=lambda *_: torch.tensor(True),
        allow_is_bidirectional_skip=False,
        allow_is_causal_skip=False,
    )
    assert mask.ndim == 4
    assert padding_of(mask)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (REAL[:, None, None].long(), "4-D mask of dtype bool"),
        (torch.full((2, 3), -10000.0), "zeros and ones"),
        (torch.ones(2, 4), r"shape \(2, 3\)"),
        (torch.ones(3, 1, 1, 3).bool(), "shape"),
        (torch.ones(2, 3, 3), "shape"),
    ],
    ids=["int 4-D", "additive 2-D", "length", "batch", "3-D"],
)
def test_what_is_no_mask_is_refused(mask, message):
    with pytest.raises(ValueError, match=f"attention_mask: expected.*{message}"):
        read_mask(mask, 2, 3)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 1, 3, 3).tril().bool(),
        torch.ones(1, 4, 3, 3).tril().bool(),
        torch.full((2, 1, 1, 3), -2.5),
        torch.tensor([0.0, 1.0, LOWEST]).expand(2, 1, 3, 3),
        torch.tensor([0.0, 0.0, LOWEST]).repeat(2, 1, 3, 1).requires_grad_(),
    ],
    ids=["causal", "one for all sequences", "bias by key", "bias and padding", "learnt"],
)
def test_any_other_4_d_mask_is_kept_for_the_attention(mask):
    padding, general = read_mask(mask, 2, 3)
    assert padding is None
    assert general is mask
    is_real = real_tokens(mask)  # the labels of all tokens are read
    assert is_real is None or is_real.all()


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
