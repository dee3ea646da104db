import dataclasses
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastbert.ops.unpad import Unpadding, unpad
from tests.oracle import gradients

MASKS = {
    "right": [[1, 1, 0, 0], [1, 1, 1, 0]],
    "left": [[0, 0, 1, 1], [0, 1, 1, 1]],
    "holes": [[1, 0, 1, 0], [0, 1, 0, 1]],
    "an empty row": [[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]],
    "no token": [[0, 0], [0, 0]],
    "no padding": [[1, 1], [1, 1]],
    "one": [[1]],
}


def check(mask, shape=(3,), dtype=torch.float32):
    """Against boolean indexing, both ways, with gradients."""
    is_real = mask != 0
    padding = unpad(mask)
    lengths = is_real.sum(1)
    assert padding.cu_seqlens.dtype == torch.int32
    assert padding.cu_seqlens.tolist() == [0, *lengths.cumsum(0).tolist()]
    assert type(padding.max_seqlen) is int
    assert padding.max_seqlen == max(lengths.tolist(), default=0)
    assert padding.batch_shape == tuple(mask.shape)
    if is_real.numel() and is_real.all():  # packed as it lies
        assert padding.positions is padding.slots is None
    else:
        assert padding.positions.tolist() == is_real.flatten().nonzero().flatten().tolist()

    x = torch.randn(*mask.shape, *shape, device=mask.device).to(dtype)
    tokens = x[is_real]
    padded = torch.zeros_like(x)
    padded[is_real] = tokens
    dy = torch.randn_like(tokens)
    zero_elsewhere = torch.zeros_like(x)
    zero_elsewhere[is_real] = dy
    packed, grad = gradients(padding.pack, x, dy=dy)
    assert torch.equal(packed, tokens)
    assert torch.equal(grad, zero_elsewhere)
    dy = torch.randn_like(x)
    restored, grad = gradients(padding.pad, tokens, dy=dy)
    assert torch.equal(restored, padded)
    assert torch.equal(grad, dy[is_real])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS.keys())
def test_unpad_finds_the_tokens_of(implementation, device, rows, dtype):
    check(torch.tensor(rows).to(device, dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool], ids=str)
@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS.keys())
def test_ids_are_packed_without_a_gather_of_rows(implementation, device, rows, dtype):
    mask = torch.tensor(rows, device=device)
    ids = torch.randint(1, 9, mask.shape, device=device).to(dtype)
    padding = unpad(mask)
    assert torch.equal(padding.pack(ids), ids[mask != 0])
    # sequences in more places than they have tokens: what belongs to none is 0
    size = padding.num_tokens + 3
    back = Unpadding.from_cu_seqlens(padding.cu_seqlens, mask.shape[1], size)
    lengths = (mask != 0).sum(1, keepdim=True)
    columns = torch.arange(mask.shape[1], device=device)
    expected = torch.cat([ids[columns < lengths], ids.new_zeros(3)])
    assert torch.equal(back.pack(ids), expected)


@given(
    batch=st.integers(0, 5),
    seqlen=st.integers(0, 9),
    share=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    shape=st.sampled_from([(), (1,), (5,), (3, 2, 4)]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_unpad_is_boolean_indexing(
    implementation, device, batch, seqlen, share, shape, dtype, seed
):
    torch.manual_seed(seed)
    check((torch.rand(batch, seqlen) < share).to(device), shape, dtype)


def test_token_ids_are_packed_too(implementation, device):
    ids = torch.tensor([[101, 7, 0], [101, 0, 0]], device=device)
    padding = unpad(ids)  # an integer mask may hold any number that is not 0
    assert padding.pack(ids).tolist() == [101, 7, 101]
    assert torch.equal(padding.pad(padding.pack(ids)), ids)
    columns = torch.arange(3, device=device).expand(2, 3)
    assert padding.pack(columns).tolist() == [0, 1, 0]


def test_pack_of_a_transposed_tensor(implementation, device):
    mask = torch.tensor(MASKS["right"], device=device)
    x = torch.randn(2, 5, 4, 3, device=device).transpose(1, 2)
    assert torch.equal(unpad(mask).pack(x), x[mask != 0])


@pytest.mark.parametrize(("batch", "seqlen"), [(2, 3), (2, 0), (0, 3), (0, 0)])
def test_a_dense_batch_begins_a_sequence_at_each_row(batch, seqlen):
    padding = Unpadding.dense(batch, seqlen)
    assert padding.cu_seqlens.dtype == torch.int32
    assert padding.cu_seqlens.tolist() == [row * seqlen for row in range(batch + 1)]


def test_a_dense_batch_is_only_reshaped(device):
    x = torch.randn(2, 3, 4, device=device)
    padding = Unpadding.dense(2, 3, device=device)
    assert padding.pack(x).data_ptr() == padding.pad(padding.pack(x)).data_ptr() == x.data_ptr()
    assert torch.equal(padding.pack(x), x.flatten(0, 1))
    assert torch.equal(padding.pad(padding.pack(x)), x)
    assert padding.cu_seqlens.dtype == torch.int32
    assert (padding.cu_seqlens.tolist(), padding.max_seqlen) == ([0, 3, 6], 3)


def test_a_row_is_a_sequence_unless_documents_share_it():
    padding = Unpadding.dense(2, 4)
    documents = torch.tensor([0, 1, 4, 8], dtype=torch.int32)
    assert padding.is_by_row
    assert not dataclasses.replace(padding, cu_seqlens=documents).is_by_row


@pytest.mark.parametrize("lengths", [[2, 0, 3], [2, 1], [0, 0], []], ids=str)
@pytest.mark.parametrize("extra", [0, 2], ids=["longest", "upper bound"])
def test_from_cu_seqlens_agrees_with_a_mask(implementation, device, lengths, extra):
    max_seqlen = max(lengths, default=0) + extra
    mask = torch.arange(max_seqlen) < torch.tensor(lengths, dtype=torch.int64)[:, None]
    by_mask = unpad(mask.to(device))
    tokens = sum(lengths)
    given_lengths = Unpadding.from_cu_seqlens(by_mask.cu_seqlens, max_seqlen, tokens)
    for name in ("positions", "slots"):
        x, y = getattr(given_lengths, name), getattr(by_mask, name)
        assert x.dtype == torch.int32
        assert torch.equal(x, y)
    assert given_lengths.batch_shape == by_mask.batch_shape


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (torch.ones(3).long(), r"\(3,\) torch.int64"),
        (torch.ones(1, 3), r"\(1, 3\) torch.float32"),
        (torch.ones(1, 3, dtype=torch.complex64), r"\(1, 3\) torch.complex64"),
    ],
    ids=["1-D", "float", "complex"],
)
def test_unpad_refuses(mask, got):
    with pytest.raises(ValueError, match=f"unpad: expected attention_mask .* integer, got {got}"):
        unpad(mask)


@pytest.mark.parametrize("rows", [MASKS["holes"], MASKS["no token"], MASKS["no padding"]], ids=str)
def test_places_beyond_the_tokens_hold_filler(implementation, device, rows):
    mask = torch.tensor(rows, device=device)
    count = int(mask.sum())
    padding = unpad(mask, count + 2)
    assert padding.has_filler
    assert padding.num_tokens == count + 2
    ids = torch.arange(1, 1 + mask.numel(), device=device).view(mask.shape)
    for numbers in (ids, ids.float()):
        expected = numbers[mask != 0].tolist()
        assert padding.pack(numbers).tolist() == [*expected, 0, 0]
        assert padding.pack(numbers, 7).tolist() == [*expected, 7, 7]
        assert torch.equal(padding.pad(padding.pack(numbers, 7)), numbers * mask)


def test_unpad_refuses_a_negative_capacity(implementation, device):
    with pytest.raises(ValueError, match="unpad: expected a capacity of at least 0, got -1"):
        unpad(torch.ones(1, 3, device=device).long(), -1)


@pytest.mark.parametrize("padding", [unpad(torch.tensor([[1, 0]])), Unpadding.dense(1, 2)])
def test_a_tensor_of_another_batch_is_refused(padding):
    with pytest.raises(ValueError, match=r"Unpadding.pack: expected shape \(1, 2\) .*got \(2, 1"):
        padding.pack(torch.zeros(2, 1, 4))
    with pytest.raises(ValueError, match=r"Unpadding.pad: expected shape \([12],\) .*got \(3, 4"):
        padding.pad(torch.zeros(3, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_unpad_makes_the_host_wait_once(implementation, device):
    mask = torch.randint(2, (8, 512), device=device)
    unpad(mask)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            padding = unpad(mask)
            padding.pad(padding.pack(mask))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchroniz" in str(w.message)]) == 1
