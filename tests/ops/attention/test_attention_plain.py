"""Attention in plain PyTorch, in each of its strategies, is attention written out."""

import pytest
import torch
import torch.nn.functional as F

from fastbert import backend
from fastbert.ops import attention_plain
from fastbert.ops.attention import attention, attention_qkvpacked
from tests.ops.attention.truth import (
    CASES,
    GPU_ONLY,
    TAIL,
    attend,
    attend_all_at_once,
    boundaries,
    inputs,
    plain,
    truth_and_pytorch,
)
from tests.oracle import gradients

LENGTHS = {"mixed": [5, 1, 0, 17, 3], "one": [9], "empty": [0, 0], "equal": [4, 4, 4], "none": []}


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


def test_scale_is_the_usual_one():
    q, k, v = torch.randn(3, 1, 2, 7, 8)
    qkv = torch.stack([q[0], k[0], v[0]]).permute(2, 0, 1, 3)  # (7, 3, 2, 8)
    output = attention_qkvpacked(qkv, torch.tensor([0, 7]).int(), 7)
    expected = F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)
    torch.testing.assert_close(output, expected)


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
