import pytest
import torch
from transformers.masking_utils import eager_mask, sdpa_mask

from fastbert.modules.masks import read_mask, real_tokens
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
