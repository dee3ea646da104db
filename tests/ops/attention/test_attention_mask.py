import pytest
import torch

from fastbert import backend
from fastbert.ops.attention import attention, attention_qkvpacked
from tests.ops.attention.truth import (
    assert_attends,
    boundaries,
    inputs,
    limits,
    truth_and_pytorch,
)
from tests.oracle import gradients


def make_mask(kind, shape, device):
    if kind == "boolean":
        return torch.rand(shape, device=device) < 0.7
    mask = torch.randn(shape, device=device)
    return mask.masked_fill(torch.rand(shape, device=device) < 0.3, torch.finfo(torch.float32).min)


BROADCASTS = {
    "full": (4, 2, 70, 75),
    "keys": (4, 1, 1, 75),
    "heads": (2, 70, 75),
    "queries": (4, 1, 70, 1),
    "pairs": (70, 75),
}


@pytest.mark.pairs(within="body")
@pytest.mark.parametrize("shape", BROADCASTS.values(), ids=BROADCASTS)
@pytest.mark.parametrize("kind", ["boolean", "addends"])
def test_a_mask_broadcasts(kind, shape, body, device):
    lengths_q, lengths_k = [5, 1, 0, 70], [5, 75, 3, 66]
    *tensors, dout = inputs(lengths_q, lengths_k, 2, 16, torch.float32, device)
    mask = make_mask(kind, shape, device)
    full = mask.expand(4, 2, 70, 75).clone()
    arguments = (boundaries(lengths_q, device), boundaries(lengths_k, device), 70, 75)
    actual = gradients(lambda *t: attention(*t, *arguments, mask=mask), *tensors, dy=dout)
    about = (tensors, dout, lengths_q, lengths_k, 0.25)
    truth, expected = truth_and_pytorch(*about, mask=full)
    assert_attends(actual, expected, truth, **limits(*about, mask=full))


@pytest.mark.parametrize(("longest_q", "longest_k"), [(20, 30), (30, 20), (20, 20)])
@pytest.mark.parametrize("has_mask", [False, True], ids=["", "mask"])
def test_bounds_may_differ_for_queries_and_keys_of_the_same_sequences(
    longest_q, longest_k, has_mask, body, device
):
    lengths, dtype = [5, 1, 0, 20], torch.float32 if body == "triton" else torch.float64
    *tensors, dout = inputs(lengths, lengths, 2, 16, dtype, device)
    mask = make_mask("boolean", (4, 1, longest_q, longest_k), device) if has_mask else None
    full = None if mask is None else mask.expand(4, 2, longest_q, longest_k)
    cu = boundaries(lengths, device)
    arguments = cu, cu, longest_q, longest_k
    actual = gradients(lambda *t: attention(*t, *arguments, mask=mask), *tensors, dy=dout)
    about = (tensors, dout, lengths, lengths, 0.25)
    truth, expected = truth_and_pytorch(*about, mask=full)
    if body == "triton":
        assert_attends(actual, expected, truth, **limits(*about, mask=full))
    else:
        torch.testing.assert_close(actual, truth)


@pytest.mark.parametrize("low", [None, float("-inf"), -1.001e30], ids=str)
def test_a_row_without_a_key_gives_zeros(low, body, device):
    qkv = torch.randn(75, 3, 2, 16, device=device)
    dout, cu = torch.randn(75, 2, 16, device=device), boundaries([5, 70], device)
    mask = torch.ones(2, 1, 70, 70, dtype=torch.bool, device=device)
    mask[0, :, 2] = False
    mask[1, :, :, 7] = False
    if low is not None:
        mask = torch.zeros(mask.shape, device=device).masked_fill(~mask, low)
    out, dqkv = gradients(lambda t: attention_qkvpacked(t, cu, 70, mask=mask), qkv, dy=dout)
    assert out[2].abs().max() == 0
    assert dqkv[2, 0].abs().max() == 0  # its query
    assert dqkv[12, 1:].abs().max() == 0  # a key that nobody sees
    assert torch.isfinite(dqkv).all()
    assert (out[[0, 1, 3, 4]] != 0).all()


def test_masks_that_lie_apart(device, triton):
    qkv = torch.randn(75, 3, 2, 16, device=device)
    cu = boundaries([5, 70], device)
    mask = torch.rand(2, 70, 70, 2, device=device).permute(0, 3, 2, 1) < 0.5
    actual = attention_qkvpacked(qkv, cu, 70, mask=mask)
    torch.testing.assert_close(actual, attention_qkvpacked(qkv, cu, 70, mask=mask.contiguous()))
    with backend.use("reference"):
        expected = attention_qkvpacked(qkv, cu, 70, mask=mask)
    torch.testing.assert_close(actual, expected)


def test_a_mask_may_have_a_gradient_in_plain_pytorch(body):
    if body == "triton":
        pytest.skip("refused")
    mask = torch.zeros(4, 4, requires_grad=True)
    attention_qkvpacked(torch.randn(4, 3, 1, 16), boundaries([4]), 4, mask=mask)[0].sum().backward()
    assert mask.grad is not None
    assert mask.grad[0].abs().sum() > 0


@pytest.mark.parametrize("number", [-1e9, -1e30])
def test_a_row_of_large_addends_attends_to_all_its_keys(number, dtype, body, device):
    qkv = torch.randn(75, 3, 2, 16, device=device).to(dtype)
    cu, dout = boundaries([5, 70], device), torch.zeros(75, 2, 16, device=device, dtype=dtype)
    mask = torch.zeros(2, 1, 70, 70, device=device)
    mask[:, :, 2] = number
    dout[[2, 7]] = 1
    out, dqkv = gradients(lambda t: attention_qkvpacked(t, cu, 70, mask=mask), qkv, dy=dout)
    assert torch.isfinite(out).all()
    assert out[[2, 7]].abs().amax((1, 2)).min() > 0
    # its probabilities add up to 1, in the backward too
    for rows in (slice(5), slice(5, 75)):
        total = dqkv[rows, 2].float().sum(0)
        torch.testing.assert_close(total, torch.ones_like(total), atol=0.01, rtol=0)


def test_large_addends_differ_down_to_65536(body, device):
    qkv = torch.zeros(70, 3, 1, 16, device=device)
    qkv[:, 2] = torch.randn(70, 1, 16, device=device)
    mask = torch.full((70, 70), -65535.0, device=device)
    mask[:, 9] = -65515.0
    out = attention_qkvpacked(qkv, boundaries([70], device), 70, mask=mask)
    torch.testing.assert_close(out, qkv[9:10, 2].expand(70, 1, 16))


def test_a_mask_that_was_changed_before_the_backward_is_refused(device, triton):
    qkv = torch.randn(12, 3, 2, 16, device=device).requires_grad_()
    mask = torch.rand(2, 1, 7, 7, device=device) < 0.8
    out = attention_qkvpacked(qkv, boundaries([5, 7], device), 7, mask=mask)
    mask.fill_(True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
