import pytest
import torch
import torch.nn.functional as F

from fastbert import backend
from fastbert.ops import attention_plain
from fastbert.ops.attention import attention, attention_qkvpacked
from fastbert.rng import for_batch
from tests.ops.attention.truth import (
    TAIL,
    assert_attends,
    attend,
    attend_all_at_once,
    boundaries,
    inputs,
    limits,
    plain,
    truth_and_pytorch,
)
from tests.oracle import gradients

LENGTHS = {"mixed": [5, 1, 0, 17, 3], "one": [9], "empty": [0, 0], "equal": [4, 4, 4], "none": []}
# lengths of queries, lengths of keys (None: the same), heads, head_dim
CASES = {
    "single-tile-64": ([5, 1, 0, 64], None, 2, 64),
    "single-tile-128": ([100, 3, 65], None, 1, 32),
    "two-tiles": ([130, 7], None, 1, 16),
    "whole-tiles": ([128, 64, 192], None, 1, 16),
    "dim-26": ([5, 70], None, 2, 26),
    "dim-80": ([33, 140], None, 1, 80),
    "dim-128": ([66, 2], None, 1, 128),
    "few-keys": ([1, 2, 3] * 10, None, 1, 64),
    "cross": ([5, 0, 3, 70, 2], [9, 2, 0, 140, 1], 2, 16),
    "cross-single-tile": ([5, 0, 3, 30, 2], [9, 2, 0, 40, 64], 2, 16),
    "no-keys": ([3, 2], [0, 0], 1, 16),
    "no-queries": ([0, 0], [3, 2], 1, 16),
    "no-sequence": ([], [], 1, 16),
    "bert-base": ([512, 1, 384, 77, 0, 128, 500], None, 12, 64),
    "bert-short": ([128, 1, 64, 77, 0, 128, 100], None, 12, 64),
}
GPU_ONLY = ("bert-base", "bert-short")


@pytest.mark.parametrize(
    "case",
    [pytest.param(k, marks=pytest.mark.gpu) if k in GPU_ONLY else k for k in CASES],
)
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
def test_what_is_not_finite_spreads_as_in_pytorch(place, number, dtype, device, triton):
    lengths = [5, 0, 70]
    *tensors, dout = inputs(lengths, lengths, 2, 16, dtype, device)
    tensors[place][2, 0, 3] = number
    cu = boundaries(lengths, device)
    actual = gradients(lambda *t: attention(*t, cu, cu, 70, 70), *tensors, dy=dout)
    expected = plain(attend, tensors, dout, lengths, lengths, 0.25)
    for a, e in zip(actual, expected, strict=True):
        # of the sequences: `attend` adds sums of all, for a graph even without sequences
        assert torch.equal(a[:75, :1].isnan().any(-1), e[:75, :1].isnan().any(-1))
        assert a[:, 1:].isfinite().all()


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


@pytest.mark.parametrize("case", [case for case in CASES if case not in GPU_ONLY])
def test_both_ways_of_writing_it_out_are_the_same(case):
    lengths_q, lengths_k, heads, head_dim = CASES[case]
    lengths_k = lengths_q if lengths_k is None else lengths_k
    *tensors, dout = inputs(lengths_q, lengths_k, heads, head_dim, torch.float64, "cpu")
    shape = (len(lengths_q), 1, max(lengths_q, default=0), max(lengths_k, default=0))
    mask = torch.rand(shape) < 0.7
    keep = torch.rand(heads, len(tensors[0]), shape[3]) < 0.8
    options = {"mask": mask, "keep": keep, "keep_scale": 1.25}
    for some in ({}, options, options | {"mask": torch.randn(shape)}):
        found = [
            plain(one, tensors, dout, lengths_q, lengths_k, 0.3, **some)
            for one in (attend, attend_all_at_once)
        ]
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_plain_bodies_equal_attention_written_out(lengths, scale, body):
    if body == "triton":
        pytest.skip("no float64")
    qkv = torch.randn(sum(lengths) + TAIL, 3, 3, 6, dtype=torch.float64)
    dout, cu = torch.randn_like(qkv[:, 0]), boundaries(lengths)
    actual = gradients(lambda t: attention_qkvpacked(t, cu, 20, softmax_scale=scale), qkv, dy=dout)
    expected, _ = truth_and_pytorch([qkv], dout, lengths, lengths, scale or 6**-0.5)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["cross", "no-keys", "no-queries"])
def test_plain_bodies_take_other_keys_than_queries(name, body):
    if body == "triton":
        pytest.skip("tested above")
    lengths_q, lengths_k, heads, head_dim = CASES[name]
    *tensors, dout = inputs(lengths_q, lengths_k, heads, head_dim, torch.float64, "cpu")
    arguments = (boundaries(lengths_q), boundaries(lengths_k), 70, 140)
    actual = gradients(lambda *t: attention(*t, *arguments), *tensors, dy=dout)
    expected, _ = truth_and_pytorch(tensors, dout, lengths_q, lengths_k, head_dim**-0.5)
    torch.testing.assert_close(actual, expected)


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


def test_a_second_derivative_is_refused(device, triton):
    qkv = torch.randn(5, 3, 1, 16, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        attention_qkvpacked(qkv, boundaries([5], device), 5).square().sum(), qkv, create_graph=True
    )
    with pytest.raises(RuntimeError, match=r'with fastbert\.backend\.use\("reference"\)'):
        gradient.sum().backward()


@pytest.mark.parametrize("body", ["by sequence", "padded", "short"], indirect=True)
def test_the_reference_is_differentiable_twice_in_float64(body):
    cu = boundaries([2, 0, 3])
    qkv = torch.randn(5, 3, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda t: attention_qkvpacked(t, cu, 3), qkv)
    x = torch.randn(5, 1, 2, dtype=torch.float64, requires_grad=True)
    key = torch.randn(5, 1, 2, dtype=torch.float64)
    for call in (
        lambda x: attention(x, x, x, cu, cu, 3, 3),
        lambda x: attention(x, key, x, cu, cu, 3, 3),
    ):
        assert torch.autograd.gradcheck(call, x)
        assert torch.autograd.gradgradcheck(call, x)


def test_a_forced_backend_names_what_it_cannot_do(device, triton):
    cu = boundaries([4], device)
    qkv = torch.ones(4, 3, 1, 16, device=device)
    mask = torch.zeros(4, 4, device=device, requires_grad=True)
    for message, call in {
        "float64": lambda: attention_qkvpacked(qkv.double(), cu, 4),
        "head_dim 160": lambda: attention_qkvpacked(qkv.repeat(1, 1, 1, 10), cu, 4),
        "softmax_scale -1": lambda: attention_qkvpacked(qkv, cu, 4, softmax_scale=-1.0),
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
        r"cu_seqlens_k of .*\(batch \+ 1,\)": lambda: attention(q, q, q, cu, cu[:1], 4, 4),
        r"dropout_p in \[0, 4095/4096\], got 1.0": lambda: attention_qkvpacked(
            qkv, cu, 4, dropout_p=1.0
        ),
        r"mask of dtype bool": lambda: attention_qkvpacked(qkv, cu, 4, mask=cu),
        r"broadcasting to \(1, 3, 4, 4\)": lambda: attention_qkvpacked(
            qkv, cu, 4, mask=torch.ones(5, 4, device=device)
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_scale_is_the_usual_one():
    q, k, v = torch.randn(3, 1, 2, 7, 8)
    qkv = torch.stack([q[0], k[0], v[0]]).permute(2, 0, 1, 3)  # (7, 3, 2, 8)
    output = attention_qkvpacked(qkv, torch.tensor([0, 7]).int(), 7)
    expected = F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)
    torch.testing.assert_close(output, expected)


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


@pytest.mark.parametrize(
    ("lengths", "heads", "dropout", "at_once"),
    [
        ([16] * 4, 2, True, True),
        ([64] * 8, 2, True, True),
        ([128] * 8, 12, True, False),  # 196,608 scores a sequence
        ([128] * 8, 12, False, True),  # by PyTorch's kernel
        ([16, 3] * 8, 2, True, True),
        ([16, 3] * 2, 2, True, False),
        ([64, 30] * 8, 2, True, False),
        ([16], 2, True, False),
        ([0, 0], 2, True, False),
        ([], 2, True, False),
    ],
)
def test_short_sequences_attend_at_once_on_a_cpu(lengths, heads, dropout, at_once, monkeypatch):
    runs = []
    for name in ("attend_padded", "attend_by_sequence"):
        monkeypatch.setattr(attention_plain, name, lambda *_, name=name: runs.append(name))
    qkv, cu = torch.zeros(sum(lengths), 3, heads, 4), boundaries(lengths)
    longest, p = max(lengths, default=0), 0.1 if dropout else 0.0
    with backend.use("reference"):
        attention_qkvpacked(qkv, cu, longest, dropout_p=p)
        attention(*qkv.unbind(1), cu, cu, longest, longest, dropout_p=p)
    assert runs == ["attend_padded" if at_once else "attend_by_sequence"] * 2


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


@pytest.mark.parametrize(
    ("cu", "longest", "message"),
    [
        (
            [0, 7, 5, 12],
            12,
            r"cu_seqlens that rise from 0 to at most the tokens, got \[0, 7, 5, 12\]",
        ),
        ([1, 5, 12], 12, "cu_seqlens that rise from 0"),
        ([0, 5, 13], 12, "cu_seqlens that rise from 0 .* for 12 tokens"),
        ([0, 5, 12], 6, "a max_seqlen of at least 7, got 6"),
    ],
)
def test_on_a_cpu_wrong_boundaries_are_refused(cu, longest, message):
    cu = torch.tensor(cu, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"attention: expected {message}"):
        attention_qkvpacked(torch.randn(12, 3, 2, 8), cu, longest)
