"""The random bits of dropout: their definition, their statistics, and who else gives the same."""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fastbert import backend, rng
from fastbert.data.masking.philox import philox as numpy_philox
from fastbert.kernels import philox as device_philox
from fastbert.ops.dropout import attention_keep_mask, dropout, hidden_keep_mask

SEED = 7 << 40 | 5  # uses both halves of the key


def state_of(lengths, seed=SEED, step=3, site=0, ids=None):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    ids = None if ids is None else torch.tensor(ids)
    keys = rng.token_keys(cu_seqlens, int(cu_seqlens[-1]), ids)
    return rng.DropoutState(torch.tensor([seed, step]), keys, site)


@pytest.fixture(params=["ext", "reference"])
def implementation(request):
    try:
        backend.load(request.param, "hidden_keep_mask", "cpu")
    except backend.BackendUnavailable as reason:
        pytest.skip(str(reason))
    with backend.use(request.param):
        yield request.param


def test_philox_is_the_published_one_with_seven_rounds(monkeypatch):
    monkeypatch.setattr(rng, "ROUNDS", 10)  # the masking's twin has ten, and its own known answers
    counter = (3, 2**32 - 1, 123456789, 0)
    words = rng.philox(tuple(torch.tensor(c) for c in counter), torch.tensor(SEED))
    assert [int(word) for word in words] == [int(word) for word in numpy_philox(counter, SEED)]


@triton.jit
def _keep_kernel(state_ptr, key_ptr, out_ptr, threshold, site, COL: tl.constexpr, N: tl.constexpr):
    keys = tl.load(key_ptr + tl.arange(0, 4))
    keep = device_philox.keep_mask(state_ptr, keys, threshold, site, COL, N)
    places = tl.arange(0, 4)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + places, keep.to(tl.int8))


def test_a_kernel_draws_the_same_bits(device):
    keys = torch.tensor([3 << 32 | 77, 5 << 32 | 65535, (2**31 - 1) << 32, 1 << 32 | 4])
    drawn = rng.DropoutState(torch.tensor([SEED, 2**35 + 9]), keys, site=9)
    expected = rng.hidden_keep_mask(drawn, 40, 0.1)[:, 8:]
    out = torch.empty(4, 32, dtype=torch.int8, device=device)
    state, keys = drawn.state.to(device), keys.to(device)
    _keep_kernel[(1,)](state, keys, out, rng.threshold(0.1), 9, COL=8, N=32)
    assert torch.equal(out.cpu().bool(), expected)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("num_cols", [1, 7, 96, 130, 1030])
def test_hidden_masks_are_the_definition(num_cols):
    drawn = state_of([3, 0, 30], site=65535, ids=[2**31 - 1, 4, 9])
    expected = rng.hidden_keep_mask(drawn, num_cols, 0.1)
    assert torch.equal(hidden_keep_mask(drawn, num_cols, 0.1), expected)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("num_keys", [0, 1, 32, 150, 530, 4100])
def test_attention_masks_are_the_definition(num_keys):
    drawn = state_of([2, 5], site=7)
    expected = rng.attention_keep_mask(drawn, 3, num_keys, 0.3)
    assert torch.equal(attention_keep_mask(drawn, 3, num_keys, 0.3), expected)


def test_an_attention_word_is_twelve_digits_compared_with_the_threshold():
    drawn = state_of([1])
    place = torch.zeros((), dtype=torch.int64)
    digits = [
        int(word)
        for call in range(3)
        for word in rng.philox((place, place + call, place, place + 3), torch.tensor(SEED))
    ]
    numbers = [sum((digit >> j & 1) << i for i, digit in enumerate(digits)) for j in range(32)]
    expected = [4095 - number >= rng.threshold(0.3) for number in numbers]
    assert rng.attention_keep_mask(drawn, 1, 32, 0.3)[0, 0].tolist() == expected


@pytest.mark.parametrize("dropout_p", [1 / 4096, 0.1, 0.5, 0.999])
def test_masks_drop_the_exact_share(dropout_p):
    drawn = state_of([256])
    share = rng.threshold(dropout_p) / 4096
    hidden = rng.hidden_keep_mask(drawn, 512, dropout_p)
    attention = rng.attention_keep_mask(drawn, 4, 128, dropout_p)
    for keep in (hidden, attention):
        sigma = math.sqrt(share * (1 - share) / keep.numel())
        assert abs((~keep).double().mean() - share) < 4 * sigma


def test_masks_of_other_places_are_independent():
    base = rng.hidden_keep_mask(state_of([64]), 256, 0.5).double() * 2 - 1
    others = [state_of([64], site=1), state_of([64], step=4), state_of([64], seed=SEED + 1)]
    others += [state_of([64], seed=SEED + (1 << 32)), state_of([64], ids=[1])]
    masks = [rng.hidden_keep_mask(other, 256, 0.5).double() * 2 - 1 for other in others]
    masks += [base.roll(1, 0), base.roll(1, 1), base.roll(8, 1)]
    for mask in masks:
        assert abs((mask * base).mean()) < 4 / math.sqrt(base.numel())
    heads = rng.attention_keep_mask(state_of([64]), 2, 256, 0.5)
    assert abs((heads[0] == heads[1]).double().mean() - 0.5) < 4 * 0.5 / math.sqrt(64 * 256)


def test_a_sequence_keeps_its_masks_wherever_it_stands():
    ids = [11, 12, 13]
    first, second = state_of([3, 4, 2], ids=ids), state_of([2, 3, 4], ids=[13, 11, 12])
    a = rng.hidden_keep_mask(first, 64, 0.3).split([3, 4, 2])
    b = rng.hidden_keep_mask(second, 64, 0.3).split([2, 3, 4])
    assert torch.equal(a[0], b[1])
    assert torch.equal(a[1], b[2])
    assert torch.equal(a[2], b[0])
    some = torch.tensor([5, 0, 8])
    assert torch.equal(rng.hidden_keep_mask(first.rows(some), 64, 0.3), torch.cat(a)[some])


def test_keys_name_sequence_and_position_and_rows_of_no_sequence():
    keys = rng.token_keys(torch.tensor([0, 2, 2, 3], dtype=torch.int32), 4)
    assert keys.tolist() == [0, 1, 2 << 32, 3 << 32]
    keys = rng.token_keys(torch.tensor([0, 1], dtype=torch.int32), 2, torch.tensor([40]))
    assert keys.tolist() == [40 << 32, (2**31 - 1) << 32]
    keys = rng.row_keys(torch.zeros(2, dtype=torch.int64), 65538)
    assert keys[[0, 65535, 65536, 65537]].tolist() == [0, 65535, 1 << 32, 1 << 32 | 1]


def test_dropout_scales_by_the_exact_inverse_and_draws_afresh_without_a_state():
    x = torch.ones(50, 80, requires_grad=True)
    y = dropout(x, 0.1, state_of([50]))
    assert set(np.unique(y.detach().numpy())) == {0.0, np.float32(4096 / (4096 - 410))}
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, y.detach())
    torch.manual_seed(1)
    first, second = dropout(x, 0.1), dropout(x, 0.1)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(dropout(x, 0.1), first)
    assert dropout(x, 1e-5) is x  # below the resolution


def test_dropout_has_derivatives_of_either_mode_and_of_second_order():
    torch.manual_seed(0)
    x, v, drawn = torch.randn(5, 8).double(), torch.randn(5, 8).double(), state_of([5])
    scaled = dropout(torch.ones_like(x), 0.3, drawn)

    def function(x):
        return dropout(x, 0.3, drawn)

    assert torch.equal(torch.func.jvp(function, (x,), (v,))[1], scaled * v)
    with torch.autograd.forward_ad.dual_level():
        dual = function(torch.autograd.forward_ad.make_dual(x, v))
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(dual).tangent, scaled * v)
    y = x.requires_grad_()
    (first,) = torch.autograd.grad((function(y) ** 3).sum(), y, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), y)
    torch.testing.assert_close(second, 6 * scaled**3 * x)


def test_which_probabilities_keep_anything():
    """A module's may be any by now: torch looks at them only where it makes or runs a dropout."""
    probabilities = {-0.1: False, 0.0: True, 0.9998: True, 0.9999: False, 1.0: False, 2.0: False}
    probabilities |= {float("inf"): False, float("nan"): False}
    assert {p: rng.keeps_some(p) for p in probabilities} == probabilities
