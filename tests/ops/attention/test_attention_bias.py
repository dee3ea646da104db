"""The gradient of a bias that is part of qkv: the sums of qkv's gradient over the tokens."""

import pytest
import torch

from fastbert import backend, rng
from fastbert.ops.attention import attention_qkvpacked
from tests.ops.attention.truth import GPU_ONLY, TAIL, boundaries, marked, truth_and_pytorch
from tests.oracle import assert_as_accurate, gradients

SITE, P = 5, 0.3
NAMES = "query", "key", "value"
# lengths, an upper bound of them, heads, head_dim
CASES = {
    "single-tile-64": ([5, 1, 0, 64], 64, 2, 64),
    "single-tile-128": ([100, 0, 65], 128, 2, 32),
    "two-tiles": ([130, 0, 7], 140, 2, 16),
    "whole-tiles": ([128, 64, 192], 192, 1, 16),
    "tiles-that-none-has": ([5, 70, 0], 300, 2, 26),
    "dim-80": ([33, 140], 140, 1, 80),
    "dim-128": ([66, 2], 66, 2, 128),
    "all-empty": ([0, 0], 70, 1, 16),
    "no-sequence": ([], 0, 1, 16),
    "bert-base": ([512, 1, 384, 77, 0, 128, 500], 512, 12, 64),
    "bert-short": ([128, 1, 64, 77, 0, 128, 100], 128, 12, 64),
}


def inputs(lengths, heads, head_dim, dtype, device):
    """qkv and a gradient of the output, both with numbers behind the last sequence too."""
    qkv = torch.randn(sum(lengths) + TAIL, 3, heads, head_dim, device=device).to(dtype)
    return qkv, torch.randn_like(qkv[:, 0])


def sums(of_qkv, dtype):
    """[of the queries, of the keys, of the values] over the tokens."""
    return [*of_qkv.sum(0).flatten(1).to(dtype)]


@pytest.mark.pairs
@pytest.mark.parametrize("dropout", [False, True], ids=["plain", "dropout"])
@pytest.mark.parametrize("case", marked(CASES))
def test_it_is_as_accurate_as_pytorchs(case, dropout, dtype, device, triton_either_way):
    if case in GPU_ONLY and device == "cpu":
        pytest.skip("too large for the interpreter")
    lengths, longest, heads, head_dim = CASES[case]
    qkv, dout = inputs(lengths, heads, head_dim, dtype, device)
    cu, drops, kept = boundaries(lengths, device), {}, {}
    if dropout:
        state = torch.tensor([2**62 - 12345, 2**35 + 7], device=device)
        state = rng.DropoutState(state, rng.token_keys(cu, len(qkv)), SITE)
        keep = rng.attention_keep_mask(state, heads, longest, P)
        kept = {"keep": keep, "keep_scale": rng.keep_scale(P)}
        drops = {"dropout_p": P, "rng": state}
    bias = torch.randn(3 * heads * head_dim, device=device)  # in float32, as under autocast
    out, dqkv, dbias = gradients(
        lambda *t: attention_qkvpacked(t[0], cu, longest, qkv_bias=t[1], **drops),
        qkv, bias, dy=dout,
    )  # fmt: skip
    without = gradients(lambda t: attention_qkvpacked(t, cu, longest, **drops), qkv, dy=dout)
    for a, b in zip((out, dqkv), without, strict=True):
        torch.testing.assert_close(a, b)
    truth, pytorch = truth_and_pytorch([qkv], dout, lengths, lengths, head_dim**-0.5, **kept)
    wide = sums(truth[1], torch.float64), sums(pytorch[1], torch.float32)
    limits = {"worst": 8.0, "rms": 8.0} if device == "cuda" and dtype == torch.float32 else {}
    assert_as_accurate([*dbias.view(3, -1)], *reversed(wide), names=NAMES, **limits)
    if sum(lengths):
        assert wide[0][0].abs().max() > 100 * wide[0][1].abs().max()  # the keys' is 0


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("body", ["triton", "by sequence"], indirect=True)
def test_it_has_the_dtype_of_the_bias(bias_dtype, body, device):
    qkv, dout = inputs([5, 20], 1, 16, torch.float16, device)
    cu, bias = boundaries([5, 20], device), torch.zeros(48, device=device, dtype=bias_dtype)
    _, dqkv, dbias = gradients(
        lambda *t: attention_qkvpacked(t[0], cu, 20, qkv_bias=t[1]), qkv, bias, dy=dout
    )
    assert dbias.dtype == bias_dtype
    torch.testing.assert_close(dbias.double(), dqkv.double().sum(0).flatten(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("capability", [80, 89, 100, 120])
def test_the_tiles_of_other_gpus(capability, monkeypatch, device, triton):
    """Some have as many programs for the queries as for the keys, some twice as many."""
    from fastbert.kernels import attention as kernels

    monkeypatch.setattr(kernels, "capability", lambda x: capability)
    for head_dim, dtype in ((16, torch.float16), (128, torch.float16), (16, torch.float32)):
        qkv, dout = inputs([5, 150], 1, head_dim, dtype, device)
        cu, bias = boundaries([5, 150], device), torch.zeros(3 * head_dim, device=device)
        _, dqkv, dbias = gradients(
            lambda *t, cu=cu: attention_qkvpacked(t[0], cu, 150, qkv_bias=t[1]), qkv, bias, dy=dout
        )
        of_q, of_k, of_v = dqkv.double().sum(0)
        expected = torch.stack([of_q, torch.zeros_like(of_k), of_v]).flatten()
        torch.testing.assert_close(dbias.double(), expected, rtol=1e-4, atol=1e-4)


def test_what_would_be_infinite_behind_the_last_key_is_not_counted(device, triton):
    """exp2(-lse) is infinite here, and is what a key behind the last one would be given."""
    qkv, dout = inputs([5, 70], 1, 16, torch.float32, device)
    qkv[:, 0] += 20
    qkv[:, 1] -= 20
    cu, bias = boundaries([5, 70], device), torch.zeros(48, device=device)
    _, dqkv, dbias = gradients(
        lambda *t: attention_qkvpacked(t[0], cu, 150, qkv_bias=t[1]), qkv, bias, dy=dout
    )
    expected = dqkv.sum(0)
    expected[1] = 0
    torch.testing.assert_close(dbias, expected.flatten(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("longest", [75, 150])
def test_with_a_mask(longest, body, device):
    qkv, dout = inputs([5, 70], 2, 16, torch.float32, device)
    mask = torch.rand(2, 2, longest, longest, device=device) < 0.7
    mask[0, :, 2] = False  # a query without a key
    cu, bias = boundaries([5, 70], device), torch.zeros(96, device=device)
    _, dqkv, dbias = gradients(
        lambda *t: attention_qkvpacked(t[0], cu, longest, qkv_bias=t[1], mask=mask),
        qkv, bias, dy=dout,
    )  # fmt: skip
    torch.testing.assert_close(dbias, dqkv.sum(0).flatten(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("longest", [64, 150])
def test_the_same_bits_each_time(longest, device, triton):
    lengths = [5, 64, 3] if longest == 64 else [5, 140, 3]
    qkv, dout = inputs(lengths, 2, 32, torch.float16, device)
    cu, bias = boundaries(lengths, device), torch.zeros(192, device=device)
    first, second = (
        gradients(
            lambda *t: attention_qkvpacked(t[0], cu, longest, qkv_bias=t[1]), qkv, bias, dy=dout
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("longest", [64, 150])
def test_its_gradient_alone(longest, body, device):
    """As where all else is frozen."""
    qkv, dout = inputs([5, 64], 2, 16, torch.float32, device)
    cu, bias = boundaries([5, 64], device), torch.zeros(96, device=device, requires_grad=True)
    out = attention_qkvpacked(qkv, cu, longest, qkv_bias=bias)
    (alone,) = torch.autograd.grad(out, bias, dout)
    both = gradients(
        lambda *t: attention_qkvpacked(t[0], cu, longest, qkv_bias=t[1]), qkv, bias, dy=dout
    )
    torch.testing.assert_close(alone, both[2])
    with torch.no_grad():
        assert torch.equal(attention_qkvpacked(qkv, cu, longest, qkv_bias=bias), out)


def test_the_values_of_the_bias_are_not_read(body, device):
    qkv, dout = inputs([5, 64], 1, 16, torch.float32, device)
    cu, bias = boundaries([5, 64], device), torch.randn(48, device=device)
    found = [
        gradients(lambda *t: attention_qkvpacked(t[0], cu, 64, qkv_bias=t[1]), qkv, b, dy=dout)
        for b in (bias, 0 * bias)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_plain_bodies_sum_the_gradient_of_qkv_by_any_derivative(body):
    if body == "triton":
        pytest.skip("no float64")
    cu = boundaries([2, 0, 3])
    qkv = torch.randn(5, 3, 1, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(6, dtype=torch.float64, requires_grad=True)

    def attend(qkv, bias):
        return attention_qkvpacked(qkv, cu, 3, qkv_bias=bias)

    def added(qkv, bias):
        return attention_qkvpacked(qkv + bias.view(3, 1, 2), cu, 3)

    dout = torch.randn(5, 1, 2, dtype=torch.float64)
    for a, b in zip(*(gradients(f, qkv, bias, dy=dout) for f in (attend, added)), strict=True):
        torch.testing.assert_close(a, b)
    tangents = torch.randn_like(qkv), torch.randn_like(bias)
    forward, expected = (
        torch.func.jvp(f, (qkv.detach(), bias.detach()), tangents) for f in (attend, added)
    )
    torch.testing.assert_close(forward, expected)
    hessian, expected = (
        torch.func.jacrev(torch.func.grad(lambda q, b, f=f: f(q, b).square().sum(), 1), 1)(
            qkv.detach(), bias.detach()
        )
        for f in (attend, added)
    )
    torch.testing.assert_close(hessian, expected)


def test_fullgraph_compile_gives_the_eager_result(device, triton):
    cu = boundaries([5, 1, 17], device)
    qkv, bias = torch.randn(23, 3, 2, 16, device=device), torch.zeros(96, device=device)

    def attend(qkv, bias):
        return attention_qkvpacked(qkv, cu, 17, qkv_bias=bias)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    expected = gradients(attend, qkv, bias, dy=qkv[:, 0])
    for a, e in zip(gradients(compiled, qkv, bias, dy=qkv[:, 0]), expected, strict=True):
        torch.testing.assert_close(a, e)


def test_wrong_biases_are_named(body, device):
    qkv, cu = torch.ones(4, 3, 3, 8, device=device), boundaries([4], device)
    for bias in (torch.ones(3, 3, 8), torch.ones(24), torch.ones(72).long()):
        with pytest.raises(ValueError, match=r"qkv_bias of a floating dtype and .*\(72,\), got"):
            attention_qkvpacked(qkv, cu, 4, qkv_bias=bias.to(device))
    if body == "triton":
        bias = torch.ones(72, device=device, dtype=torch.float64)
        with pytest.raises(backend.BackendUnavailable, match="a bias of torch"):
            attention_qkvpacked(qkv, cu, 4, qkv_bias=bias)
