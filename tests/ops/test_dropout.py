"""Dropout by itself; `tests/test_rng.py` has the random bits."""

import dataclasses

import pytest
import torch

from fastbert import rng
from fastbert.backend import INTERPRETED
from fastbert.ops.dropout import dropout


def state_of(rows, device):
    torch.manual_seed(3)
    sequences = torch.randint(2**31, (rows,), device=device) << 32
    fresh = rng.fresh(rows, torch.device(device)).at(5)
    return dataclasses.replace(fresh, token_key=fresh.token_key | sequences)


@pytest.mark.parametrize("p", [0.1, 0.75])
@pytest.mark.parametrize("shape", [(1, 8), (13, 300), (3, 7, 64), (40, 1)], ids=str)
def test_dropout_follows_its_definition(shape, p, body, device, dtype):
    state = state_of(torch.Size(shape[:-1]).numel(), device)
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    keep = rng.hidden_keep_mask(state, shape[-1], p).view(shape)
    wide = x.detach().float() * keep * rng.keep_scale(p)
    y = dropout(x, p, state)
    # Triton's interpreter truncates to bfloat16 where a GPU rounds to nearest
    is_coarse = INTERPRETED and body == "triton" and dtype == torch.bfloat16
    torch.testing.assert_close(y, wide.to(dtype), rtol=2**-7 if is_coarse else 0, atol=0)
    dy = torch.randn(shape, device=device).to(dtype)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(dx, dropout(dy, p, state))


def test_its_gradient_can_be_differentiated_again(body, device):
    state, x = state_of(6, device), torch.randn(6, 32, device=device, requires_grad=True)
    kept = dropout(torch.ones_like(x), 0.3, state).detach()
    (first,) = torch.autograd.grad((dropout(x, 0.3, state) ** 3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 6 * kept**3 * x)


@pytest.mark.parametrize("view", [torch.t, lambda x: x[:, ::2], lambda x: x[2:, 3:]])
def test_rows_may_be_strided(view, body, device):
    x = view(torch.randn(24, 24, device=device))
    state = state_of(len(x), device)
    assert torch.equal(dropout(x, 0.5, state), dropout(x.contiguous(), 0.5, state))


def test_nothing_is_nothing(body, device):
    assert dropout(torch.ones(0, 8, device=device), 0.5).shape == (0, 8)
    x = torch.ones(2, 8, device=device)
    assert dropout(x, 0.0) is x


def test_what_the_kernel_does_not_take_is_dropped_by_pytorch(device):
    y = dropout(torch.ones(4, 80, dtype=torch.float64, device=device), 0.5)
    assert y.dtype == torch.float64
    assert set(y.flatten().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_number_without_a_row_is_refused(p, body, device):
    with pytest.raises(
        ValueError, match=r"dropout: expected x of shape \(\.\.\., hidden\), got \(\)"
    ):
        dropout(torch.ones((), device=device), p)


@pytest.mark.parametrize("size", [1, 3])
def test_a_state_that_is_not_a_seed_and_a_step_is_refused(size, body, device):
    """The kernels read two numbers, whatever is there."""
    own = state_of(4, device)
    wrong = rng.DropoutState(torch.zeros(size, dtype=torch.int64, device=device), own.token_key)
    with pytest.raises(ValueError, match=rf"an rng whose state has shape \(2,\), got \({size},\)"):
        dropout(torch.ones(4, 16, device=device), 0.5, wrong)


@pytest.mark.parametrize("p", [1.0, -0.1, float("inf"), float("nan")])
def test_what_is_no_probability_is_refused(p, body, device):
    with pytest.raises(ValueError, match=rf"a dropout_p in \[0, 4095/4096\], got {p}"):
        dropout(torch.ones(4, 16, device=device), p)


@pytest.mark.parametrize("name", ["state", "token_key"])
def test_a_state_of_another_dtype_is_refused(name, body, device):
    own = state_of(4, device)
    wrong = dataclasses.replace(own, **{name: getattr(own, name).int()})
    with pytest.raises(ValueError, match="an rng of int64 tensors"):
        dropout(torch.ones(4, 16, device=device), 0.5, wrong)


@pytest.mark.parametrize("name", ["state", "token_key"])
def test_a_state_that_lies_apart(name, body, device):
    own, x = state_of(5, device), torch.ones(5, 64, device=device)
    apart = dataclasses.replace(own, **{name: torch.stack([getattr(own, name)] * 2, 1)[:, 0]})
    assert torch.equal(dropout(x, 0.5, apart), dropout(x, 0.5, own))
