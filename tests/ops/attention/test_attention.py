"""Attention's kernels beside PyTorch's in the same dtype, and what both bodies refuse."""

import pytest
import torch

from fastbert import backend
from fastbert.ops.attention import attention, attention_qkvpacked
from fastbert.rng import for_batch
from tests.ops.attention.truth import (
    CASES,
    GPU_ONLY,
    TAIL,
    assert_attends,
    attend,
    boundaries,
    inputs,
    limits,
    marked,
    plain,
    truth_and_pytorch,
)
from tests.oracle import gradients


@pytest.mark.parametrize("case", marked(CASES))
def test_kernels_are_as_accurate_as_pytorch(case, dtype, device, triton_either_way):
    if case in GPU_ONLY and device == "cpu":
        pytest.skip("too large for the interpreter")
    lengths_q, lengths_k, heads, head_dim = CASES[case]
    lengths_k = lengths_q if lengths_k is None else lengths_k
    *tensors, dout = inputs(lengths_q, lengths_k, heads, head_dim, dtype, device)
    cu_q, cu_k = boundaries(lengths_q, device), boundaries(lengths_k, device)
    longest = (max(lengths_q, default=0), max(lengths_k, default=0))
    arguments = (cu_q, cu_k, *longest)
    actual = gradients(lambda *t: attention(*t, *arguments, softmax_scale=0.3), *tensors, dy=dout)
    about = (tensors, dout, lengths_q, lengths_k, 0.3)
    truth, expected = truth_and_pytorch(*about)
    assert_attends(actual, expected, truth, **limits(*about))


@pytest.mark.parametrize("longest", [70, 90, 200])  # an upper bound may be loose
def test_a_packed_tensor_gives_one_gradient(longest, dtype, device, triton):
    lengths = [5, 1, 0, 70]
    qkv = torch.randn(sum(lengths) + TAIL, 3, 2, 32, device=device).to(dtype)
    dout = torch.randn_like(qkv[:, 0])
    cu = boundaries(lengths, device)
    actual = gradients(lambda t: attention_qkvpacked(t, cu, longest), qkv, dy=dout)
    truth, expected = truth_and_pytorch([qkv], dout, lengths, lengths, 32**-0.5)
    assert_attends(actual, expected, truth, packed=True)
    assert actual[1].is_contiguous()


@pytest.mark.parametrize("number", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("place", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize(
    ("token", "head_dim"), [(2, 16), (12, 24)], ids=["last-tile", "behind-a-head-of-a-whole-tile"]
)
def test_what_is_not_finite_spreads_as_in_pytorch(
    token, head_dim, place, number, dtype, device, triton
):
    lengths = [5, 0, 70]
    *tensors, dout = inputs(lengths, lengths, 2, head_dim, dtype, device)
    tensors[place][token, 0, 3] = number
    cu = boundaries(lengths, device)
    actual = gradients(lambda *t: attention(*t, cu, cu, 70, 70), *tensors, dy=dout)
    expected = plain(attend, tensors, dout, lengths, lengths, head_dim**-0.5)
    for a, e in zip(actual, expected, strict=True):
        # of the sequences: `attend` adds sums of all, for a graph even without sequences
        assert torch.equal(a[:75, :1].isnan().any(-1), e[:75, :1].isnan().any(-1))
        assert a[:, 1:].isfinite().all()


def test_keys_of_no_query_have_no_gradient(body, device):
    q, k, v = (torch.randn(n, 2, 16, device=device) for n in (0, 3, 3))
    none, keys = boundaries([0], device), boundaries([3], device)
    out, dq, dk, dv = gradients(lambda *t: attention(*t, none, keys, 0, 3), q, k, v, dy=q)
    assert out.shape == dq.shape == q.shape
    assert dk.abs().max() == dv.abs().max() == 0


def test_nothing_attends_to_nothing(body, device):
    qkv = torch.randn(0, 3, 2, 16, device=device)
    cu = boundaries([], device)
    out, dqkv = gradients(lambda t: attention_qkvpacked(t, cu, 0), qkv, dy=qkv[:, 0])
    assert (out.shape, dqkv.shape) == ((0, 2, 16), (0, 3, 2, 16))


def test_queries_without_a_key_beside_others(body, device):
    q, k = torch.randn(10, 2, 16, device=device), torch.randn(9, 2, 16, device=device)
    cu_q, cu_k = boundaries([3, 2, 4], device), boundaries([0, 2, 5], device)
    found = gradients(lambda *t: attention(*t, cu_q, cu_k, 4, 5), q, k, k.flip(0), dy=q)
    assert all(x.isfinite().all() for x in found)
    out, dq, *_ = found
    assert out[:3].abs().max() == dq[:3].abs().max() == out[9].abs().max() == 0
    assert out[3:9].abs().min() > 0


def test_rows_behind_the_last_sequence_may_differ_in_number(body, device):
    q, k = torch.randn(8, 2, 16, device=device), torch.randn(11, 2, 16, device=device)
    cu = boundaries([2, 5], device)
    found = gradients(lambda *t: attention(*t, cu, cu, 5, 5), q, k, k.flip(0), dy=q)
    alone = gradients(lambda *t: attention(*t, cu, cu, 5, 5), q[:7], k[:7], k.flip(0)[:7], dy=q[:7])
    for a, e in zip(found, alone, strict=True):
        torch.testing.assert_close(a[:7], e)
        assert a[7:].abs().max() == 0


def test_boundaries_that_lie_apart(body, device):
    qkv = torch.randn(75, 3, 1, 16, device=device)
    cu = boundaries([5, 70], device)
    apart = torch.stack([cu, torch.full_like(cu, 9)], 1)[:, 0]
    expected = attention_qkvpacked(qkv, cu, 70)
    torch.testing.assert_close(attention_qkvpacked(qkv, apart, 70), expected)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(("longest", "is_one_tile"), [(128, True), (129, False)])
def test_the_variant_names_the_backward(longest, is_one_tile, mask, device, triton):
    from fastbert.kernels import attention as kernels

    q = torch.empty(9, 1, 64, dtype=torch.float16, device=device)
    named = kernels.variant(q, longest, mask=mask, dropout=False)
    assert ("backward in one tile" in named) == (is_one_tile and not mask)


@pytest.mark.parametrize("longest", [20, 200])
def test_a_long_tail_behind_the_last_sequence_is_zero(longest, dtype, body, device):
    qkv = torch.randn(725, 3, 1, 16, device=device).to(dtype)
    cu = boundaries([5, 20], device)
    out, dqkv = gradients(lambda t: attention_qkvpacked(t, cu, longest), qkv, dy=qkv[:, 0])
    assert torch.isfinite(dqkv).all()
    assert out[25:].abs().max() == dqkv[25:].abs().max() == 0
    assert out[:25].abs().min() > 0


@pytest.mark.parametrize("capability", [80, 89, 100, 120])
def test_the_tiles_of_other_gpus(capability, monkeypatch, device, triton):
    from fastbert.kernels import attention as kernels

    monkeypatch.setattr(kernels, "capability", lambda x: capability)
    for head_dim in (16, 64, 128):
        qkv = torch.randn(75, 3, 1, head_dim, device=device).half()
        dout, cu = torch.randn_like(qkv[:, 0]), boundaries([5, 70], device)
        actual = gradients(lambda t, cu=cu: attention_qkvpacked(t, cu, 70), qkv, dy=dout)
        truth, expected = truth_and_pytorch([qkv], dout, [5, 70], [5, 70], head_dim**-0.5)
        assert_attends(actual, expected, truth, packed=True)


def test_reads_tensors_that_lie_apart(device, triton):
    wide = torch.randn(2, 75, 3, 40, device=device)
    q, k, v = wide[0, :, 0:2, :24], wide[1, :, 1:3, 8:32], wide.transpose(2, 3)[0, :, 3:27, :2].mT
    k = k.transpose(1, 2).contiguous().transpose(1, 2)  # heads innermost: copied
    cu = boundaries([5, 70], device)
    arguments = (cu, cu, 70, 70)
    dout = torch.randn(1, device=device).expand(75, 2, 24)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, *arguments)
    actual = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    expected = gradients(
        lambda *t: attend(*t, [5, 70], [5, 70], 24**-0.5), q, k, v, dy=dout.contiguous()
    )
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("choice", ["triton", "reference"])
def test_fullgraph_compile_gives_the_eager_result(choice, device):
    cu = boundaries([5, 1, 17], device)
    qkv = torch.randn(23, 3, 2, 16, device=device)
    mask = torch.rand(3, 1, 17, 17, device=device) < 0.9

    def packed(qkv):
        return attention_qkvpacked(qkv, cu, 17) + attention_qkvpacked(qkv, cu, 17, mask=mask)

    def separate(qkv):
        return attention(*qkv.unbind(1), cu, cu, 17, 17)

    with backend.use(choice):
        for function in (packed, separate):
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            expected = gradients(function, qkv, dy=qkv[:, 0])
            for a, e in zip(gradients(compiled, qkv, dy=qkv[:, 0]), expected, strict=True):
                torch.testing.assert_close(a, e)


@pytest.mark.parametrize("longest", [70, 150])
def test_very_low_scores_do_not_leak_through_padding(longest, dtype, device, triton):
    """exp2(-lse) is infinite here, and infinity times the zeros behind the last key is NaN."""
    lengths = [5, 70]
    qkv = torch.randn(75, 3, 1, 16, device=device)
    qkv[:, 0] += 20
    qkv[:, 1] -= 20
    qkv, dout = qkv.to(dtype), torch.randn(75, 1, 16, device=device).to(dtype)
    cu = boundaries(lengths, device)
    actual = gradients(lambda t: attention_qkvpacked(t, cu, longest), qkv, dy=dout)
    truth, _ = truth_and_pytorch([qkv], dout, lengths, lengths, 0.25)
    # scores of -1600 have few digits left, and the keys' common -20 cancels in the sums of dq
    tolerance = max(1e-2, 60 * torch.finfo(dtype).eps)
    for a, t in zip(actual, truth, strict=True):
        assert (a - t).abs().max() < tolerance * t.abs().max()


@pytest.mark.parametrize(
    "lengths", [[5, 70], [5, 60], pytest.param([512, 77, 0, 384] * 20, marks=pytest.mark.gpu)]
)
def test_the_same_bits_each_time(lengths, device, triton):
    qkv = torch.randn(sum(lengths), 3, 2, 32, device=device).half()
    dout, cu = torch.randn_like(qkv[:, 0]), boundaries(lengths, device)
    runs = [
        gradients(lambda t: attention_qkvpacked(t, cu, max(lengths)), qkv, dy=dout)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("longest", [64, 150])
def test_numbers_that_are_not_finite_stay_in_their_sequence(longest, device, triton):
    lengths = [30, 9, 25]
    qkv = torch.randn(sum(lengths) + TAIL, 3, 2, 32, device=device).half()
    dout, cu = torch.randn_like(qkv[:, 0]), boundaries(lengths, device)
    expected = gradients(lambda t: attention_qkvpacked(t, cu, longest), qkv, dy=dout)
    qkv[30:39:4], dout[31:39:4] = float("inf"), float("nan")
    actual = gradients(lambda t: attention_qkvpacked(t, cu, longest), qkv, dy=dout)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a[:30], e[:30])
        assert torch.equal(a[39:], e[39:])
        assert a[30:39].isnan().any()


def test_a_forced_backend_names_what_it_cannot_do(device, triton):
    cu = boundaries([4], device)
    qkv = torch.ones(4, 3, 1, 16, device=device)
    mask = torch.zeros(4, 4, device=device, requires_grad=True)
    for message, call in {
        "float64": lambda: attention_qkvpacked(qkv.double(), cu, 4),
        "head_dim 160": lambda: attention_qkvpacked(qkv.repeat(1, 1, 1, 10), cu, 4),
        "head_dim 0": lambda: attention_qkvpacked(qkv[..., :0], cu, 4, softmax_scale=1.0),
        "softmax_scale -1": lambda: attention_qkvpacked(qkv, cu, 4, softmax_scale=-1.0),
        "softmax_scale 0": lambda: attention_qkvpacked(qkv, cu, 4, softmax_scale=0.0),
        "on different devices": lambda: attention_qkvpacked(
            qkv, cu, 4, mask=mask.detach().to("meta")
        ),
        "tensors on different devices": lambda: attention_qkvpacked(
            qkv, cu, 4, qkv_bias=torch.zeros(48, device="meta")
        ),
        "gradient of the mask": lambda: attention_qkvpacked(qkv, cu, 4, mask=mask),
        "65535 sequences": lambda: attention_qkvpacked(qkv, cu[:1].expand(65536), 4),
    }.items():
        with pytest.raises(backend.BackendUnavailable, match=message):
            call()


def test_wrong_arguments_are_named(body, device):
    cu, qkv = boundaries([4], device), torch.ones(4, 3, 3, 8, device=device)
    q = qkv[:, 0]
    for message, call in {
        r"attention_qkvpacked: expected qkv of shape": lambda: attention_qkvpacked(q, cu, 4),
        r"expected k of shape .* \(4, 3, 8\)": lambda: attention(q, q[:, :1], q, cu, cu, 4, 4),
        r"expected v of shape": lambda: attention(q, q, q[:3], cu, cu, 4, 4),
        r"k of q's dtype": lambda: attention(q, q.half(), q, cu, cu, 4, 4),
        r"cu_seqlens_q of dtype int32": lambda: attention_qkvpacked(qkv, cu.long(), 4),
        r"cu_seqlens_q of .*\(batch \+ 1,\)": lambda: attention_qkvpacked(qkv, cu[:0], 4),
        r"cu_seqlens_k of .*\(batch \+ 1,\)": lambda: attention(q, q, q, cu, cu[:1], 4, 4),
        r"dropout_p in \[0, 4095/4096\], got 1.0": lambda: attention_qkvpacked(
            qkv, cu, 4, dropout_p=1.0
        ),
        r"mask of dtype bool": lambda: attention_qkvpacked(qkv, cu, 4, mask=cu),
        r"broadcasting to \(1, 3, 4, 4\)": lambda: attention_qkvpacked(
            qkv, cu, 4, mask=torch.ones(5, 4, device=device)
        ),
        r"a mask of .*\(1, 1, 3, 4, 4\)": lambda: attention_qkvpacked(
            qkv, cu, 4, mask=torch.ones(1, 1, 3, 4, 4, device=device)
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.gpu
def test_float32_on_tensor_cores():
    lengths, cu = [512, 130, 77], boundaries([512, 130, 77], "cuda")
    qkv = torch.randn(sum(lengths), 3, 12, 64, device="cuda")
    dout = torch.randn_like(qkv[:, 0])
    with backend.use("triton"):
        actual = gradients(lambda t: attention_qkvpacked(t, cu, 512), qkv, dy=dout)
    truth, _ = truth_and_pytorch([qkv], dout, lengths, lengths, 0.125)
    for a, t in zip(actual, truth, strict=True):
        assert (a - t).abs().max() < 1e-5 * t.abs().max()


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    lengths = [512] * 1400 + [300]  # 2.2e9 elements of qkv
    qkv = torch.randn(sum(lengths), 3, 16, 64, device="cuda", dtype=torch.bfloat16)
    cu = boundaries(lengths, "cuda")
    dout = torch.randn_like(qkv[:, 0])
    with backend.use("triton"):
        out, dqkv = gradients(lambda t: attention_qkvpacked(t, cu, 512), qkv, dy=dout)
    last = slice(len(qkv) - 300, None)
    truth, expected = truth_and_pytorch([qkv[last]], dout[last], [300], [300], 0.125)
    assert_attends((out[last], dqkv[last]), expected, truth, packed=True)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_under_autocast_the_result_has_the_dtype_of_q(low, dropout_p, body, device):
    *tensors, dout = inputs([5, 9], [5, 9], 2, 16, torch.float32, device)
    cu = boundaries([5, 9], device)
    rng = for_batch(cu, len(dout))
    arguments = cu, cu, 9, 9

    def function(*t, autocast=False):
        with torch.autocast(device, low, enabled=autocast):
            return attention(*t, *arguments, dropout_p=dropout_p, rng=rng)

    expected = gradients(function, *tensors, dy=dout)
    actual = gradients(lambda *t: function(*t, autocast=True), *tensors, dy=dout)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, e)
    if body == "triton" or not dropout_p:  # PyTorch's own backward of a product is under autocast
        with torch.autocast(device, low):
            whole = gradients(lambda *t: function(*t, autocast=True), *tensors, dy=dout)
        assert all(torch.equal(w, e) for w, e in zip(whole, expected, strict=True))


@pytest.mark.parametrize("far", range(3))
def test_rows_of_a_sequence_that_32_bits_do_not_reach_are_refused(far):
    pytest.importorskip("triton")
    from fastbert.kernels.attention import attention_fwd

    rows = [2**30 if place == far else 16 for place in range(3)]
    q, k, v = (torch.empty_strided((3, 1, 16), (row, 16, 1), device="meta") for row in rows)
    cu = torch.empty(2, dtype=torch.int32, device="meta")
    arguments = q, k, v, cu, cu, 3, 3, 0.25, None, None, 1.0, False
    with pytest.raises(ValueError, match=r"within 2\*\*31 elements, got up to 3 rows"):
        attention_fwd(*arguments)
