import pytest
import torch

from fastbert import backend, rng
from fastbert.ops.attention import attention, attention_qkvpacked
from tests.ops.attention.truth import (
    GPU_ONLY,
    TAIL,
    assert_attends,
    boundaries,
    limits,
    marked,
    truth_and_pytorch,
)
from tests.oracle import gradients

SITE, P = 5, 0.3


def dropout_state(cu_seqlens, num_tokens):
    state = torch.tensor([2**62 - 12345, 2**35 + 7], device=cu_seqlens.device)
    return rng.DropoutState(state, rng.token_keys(cu_seqlens, num_tokens), SITE)


def options_of_truth(state, heads, longest_k, p=P):
    keep = rng.attention_keep_mask(state, heads, longest_k, p)
    return {"keep": keep, "keep_scale": rng.keep_scale(p)}


@pytest.mark.parametrize(
    ("p", "capability"), [(1 / 4096, 90), (0.1, 90), (0.1, 80), (0.5, 90), (0.999, 90)]
)
def test_the_kernel_draws_the_bits_that_rng_defines(p, capability, monkeypatch, device):
    from fastbert.kernels import dropout
    from fastbert.kernels.attention import attention_drop_words

    monkeypatch.setattr(dropout, "capability", lambda x: capability)  # tiles of 4 words and of 16

    try:
        backend.load("triton", "attention", device)
    except backend.BackendUnavailable as reason:
        pytest.skip(str(reason))
    lengths_q, lengths_k = [5, 0, 40, 33, 1], [70, 3, 0, 600, 32]
    cu_q, cu_k = boundaries(lengths_q, device), boundaries(lengths_k, device)
    state = dropout_state(cu_q, sum(lengths_q) + TAIL)
    longest = (max(lengths_q), max(lengths_k))
    threshold = rng.threshold(p)
    words = attention_drop_words(
        state.token_key, state.state, cu_q, cu_k, *longest, 3, SITE, threshold
    )
    assert words.shape == (3, len(state.token_key), 20)  # a multiple of 16 bytes
    expected = rng.attention_drop_words(state, 3, 20, p)
    first = 0
    for n_q, n_k in zip(lengths_q, lengths_k, strict=True):
        rows, used = slice(first, first + n_q), -(-n_k // 32)
        assert torch.equal(words[:, rows, :used], expected[:, rows, :used])
        first += n_q


CASES = {
    "single-tile-64": ([5, 1, 0, 64], None, 2, 64),
    "single-tile-128": ([100, 65], None, 1, 32),
    "two-tiles": ([130, 7], None, 2, 16),
    "dim-80": ([33, 70], None, 1, 80),
    "dim-128": ([66, 2], None, 1, 128),
    "cross": ([5, 0, 3, 70], [9, 2, 0, 140], 2, 16),
    "bert-base": ([512, 1, 384, 77, 0, 128, 500], None, 12, 64),
    "bert-short": ([128, 1, 64, 77, 0, 128, 100], None, 12, 64),
}


@pytest.mark.parametrize("case", marked(CASES))
def test_the_exact_mask_is_applied(case, dtype, body, device):
    if body != "triton" and (dtype != torch.float32 or case in GPU_ONLY):
        pytest.skip("plain PyTorch is as accurate as itself")
    if case in GPU_ONLY and device == "cpu":
        pytest.skip("too large for the interpreter")
    lengths_q, lengths_k, heads, head_dim = CASES[case]
    lengths_k = lengths_q if lengths_k is None else lengths_k
    cu_q, cu_k = boundaries(lengths_q, device), boundaries(lengths_k, device)
    rows_q, rows_k = sum(lengths_q) + TAIL, sum(lengths_k) + TAIL
    q, k, v, dout = (
        torch.randn(n, heads, head_dim, device=device).to(dtype)
        for n in (rows_q, rows_k, rows_k, rows_q)
    )
    longest = (max(lengths_q), max(lengths_k))
    state = dropout_state(cu_q, rows_q)

    def dropped(*tensors):
        return attention(*tensors, cu_q, cu_k, *longest, dropout_p=P, rng=state)

    actual = gradients(dropped, q, k, v, dy=dout)
    about = ([q, k, v], dout, lengths_q, lengths_k, head_dim**-0.5)
    options = options_of_truth(state, heads, longest[1])
    truth, expected = truth_and_pytorch(*about, **options)
    assert_attends(actual, expected, truth, **limits(*about, **options))


def test_with_a_mask_and_packed(body, device):
    lengths = [5, 70]
    qkv = torch.randn(75 + TAIL, 3, 2, 16, device=device)
    dout, cu = torch.randn_like(qkv[:, 0]), boundaries(lengths, device)
    mask = torch.rand(2, 2, 70, 70, device=device) < 0.7
    state = dropout_state(cu, len(qkv))

    def dropped(qkv):
        return attention_qkvpacked(qkv, cu, 70, dropout_p=P, rng=state, mask=mask)

    actual = gradients(dropped, qkv, dy=dout)
    options = options_of_truth(state, 2, 70)
    truth, expected = truth_and_pytorch([qkv], dout, lengths, lengths, 0.25, mask=mask, **options)
    assert_attends(actual, expected, truth, packed=True)


def test_words_that_are_larger_than_the_tensors_are_made_again(monkeypatch, device, triton):
    from fastbert.kernels import attention as kernels

    calls = []

    def counting(*arguments, make=kernels.attention_drop_words):
        calls.append(arguments)
        return make(*arguments)

    monkeypatch.setattr(kernels, "attention_drop_words", counting)
    lengths = [140]
    cu = boundaries(lengths, device)
    state = dropout_state(cu, 140)
    for head_dim, times in ((4, 2), (16, 1)):
        calls.clear()
        qkv = torch.randn(140, 3, 1, head_dim, device=device).half()
        dout = torch.randn_like(qkv[:, 0])
        actual = gradients(
            lambda t: attention_qkvpacked(t, cu, 140, dropout_p=P, rng=state), qkv, dy=dout
        )
        assert len(calls) == times
        options = options_of_truth(state, 1, 140)
        truth, expected = truth_and_pytorch(
            [qkv], dout, lengths, lengths, head_dim**-0.5, **options
        )
        assert_attends(actual, expected, truth, packed=True)


def test_a_sequence_keeps_its_mask_in_another_order_and_among_fewer_queries(body, device):
    qkv = torch.randn(48, 3, 2, 16, device=device)
    cu, ids = boundaries([7, 41], device), torch.tensor([3, 1], device=device)
    keys = rng.token_keys(cu, 48, ids)
    state = rng.DropoutState(torch.tensor([11, 3], device=device), keys, SITE)
    out = attention_qkvpacked(qkv, cu, 41, dropout_p=P, rng=state)

    order = torch.cat([torch.arange(7, 48), torch.arange(7)]).to(device)
    swapped = boundaries([41, 7], device)
    other = attention_qkvpacked(qkv[order], swapped, 41, dropout_p=P, rng=state.rows(order))
    torch.testing.assert_close(other, out[order])

    some = torch.tensor([2, 6, 7, 30, 47], device=device)
    few = attention(
        qkv[some, 0], qkv[:, 1], qkv[:, 2], boundaries([2, 3], device), cu, 3, 41,
        dropout_p=P, rng=state.rows(some),
    )  # fmt: skip
    torch.testing.assert_close(few, out[some])


def test_without_a_state_torchs_generator_decides(body, device):
    qkv = torch.zeros(120, 3, 2, 16, device=device)
    qkv[:, 2] = 1.0  # every output is the sum of the kept probabilities
    cu = boundaries([30, 90], device)

    def attend(p):
        return attention_qkvpacked(qkv, cu, 90, dropout_p=p)

    torch.manual_seed(3)
    first, second = attend(0.25), attend(0.25)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    torch.testing.assert_close(attend(0.25), first)
    assert abs(first.mean() - 1) < 0.03
    torch.testing.assert_close(attend(1e-5), torch.ones(120, 2, 16, device=device))  # drops nothing


@pytest.mark.parametrize("choice", ["triton", "reference"])
def test_fullgraph_compile_gives_the_eager_result(choice, device):
    cu = boundaries([5, 18], device)
    qkv = torch.randn(23, 3, 2, 16, device=device)
    state = dropout_state(cu, 23)

    def attend(qkv, token_key, counter):
        one = rng.DropoutState(counter, token_key, SITE)
        return attention_qkvpacked(qkv, cu, 18, dropout_p=P, rng=one)

    with backend.use(choice):
        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        expected, actual = (
            gradients(lambda t, f=f: f(t, state.token_key, state.state), qkv, dy=qkv[:, 0])
            for f in (attend, compiled)  # in this order: a backend is not chosen while tracing
        )
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_wrong_states_are_named(body, device):
    qkv, cu = torch.ones(4, 3, 1, 16, device=device), boundaries([4], device)
    state = dropout_state(cu, 4)
    away = rng.DropoutState(state.state.to("meta"), state.token_key)
    for wrong, size in ((dropout_state(cu, 3), 3), (away, 4)):
        with pytest.raises(ValueError, match=rf"token_key of shape \(4,\).*got \({size},\)"):
            attention_qkvpacked(qkv, cu, 4, dropout_p=0.1, rng=wrong)
