"""Attention written out, sequence by sequence: the truth that tests compare with."""

import pytest
import torch

from tests.oracle import assert_as_accurate, gradients

TAIL = 3  # rows behind the last sequence
# lengths of queries, lengths of keys (None: the same), heads, head_dim
CASES = {
    "single-tile-64": ([5, 1, 0, 64], None, 2, 64),
    "single-tile-128": ([100, 3, 65], None, 1, 32),
    "two-tiles": ([130, 7], None, 1, 16),
    "whole-tiles": ([128, 64, 192], None, 1, 16),
    "65": ([65], None, 1, 16),
    "129": ([129], None, 1, 16),
    "dim-26": ([5, 70], None, 2, 26),
    "dim-80": ([33, 140], None, 1, 80),
    "dim-128": ([66, 2], None, 1, 128),
    "few-keys": ([1, 2, 3] * 10, None, 1, 64),
    "cross": ([5, 0, 3, 70, 2], [9, 2, 0, 140, 1], 2, 16),
    "cross-single-tile": ([5, 0, 3, 30, 2], [9, 2, 0, 40, 64], 2, 16),
    "cross-more-queries": ([70, 3], [9, 2], 1, 16),
    "no-keys": ([3, 2], [0, 0], 1, 16),
    "no-queries": ([0, 0], [3, 2], 1, 16),
    "no-sequence": ([], [], 1, 16),
    "bert-base": ([512, 1, 384, 77, 0, 128, 500], None, 12, 64),
    "bert-short": ([128, 1, 64, 77, 0, 128, 100], None, 12, 64),
}
GPU_ONLY = ("bert-base", "bert-short")  # too large for the interpreter


def marked(cases):
    """The names of cases for `parametrize`."""
    return [pytest.param(k, marks=pytest.mark.gpu) if k in GPU_ONLY else k for k in cases]


def boundaries(lengths, device="cpu"):
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def inputs(lengths_q, lengths_k, heads, head_dim, dtype, device):
    """q, k, v and a gradient of the output."""
    rows = [sum(lengths_q) + TAIL, *[sum(lengths_k) + TAIL] * 2, sum(lengths_q) + TAIL]
    return [torch.randn(n, heads, head_dim, device=device).to(dtype) for n in rows]


def attend(q, k, v, lengths_q, lengths_k, scale, mask=None, keep=None, keep_scale=1.0):
    """mask: (B, N, S_q, S_k) bool or addends; keep: (N, T_q, S_k) bool, what dropout keeps."""
    out, first_q, first_k = 0 * (q + k.sum() + v.sum()), 0, 0  # a graph even without sequences
    for number, (n_q, n_k) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        rows, cols = slice(first_q, first_q + n_q), slice(first_k, first_k + n_k)
        first_q, first_k = rows.stop, cols.stop
        scores = (q[rows].transpose(0, 1) @ k[cols].permute(1, 2, 0)) * scale
        has_key = torch.ones_like(scores, dtype=torch.bool).any(-1, keepdim=True)
        if mask is not None:
            one = mask[number, :, :n_q, :n_k].to(q.device)
            if one.dtype == torch.bool:
                one = torch.zeros_like(scores).masked_fill(~one, float("-inf"))
            has_key = (one > -1e30).any(-1, keepdim=True) & (scores == scores).any(-1, keepdim=True)
            scores = torch.where(has_key, scores + one.to(scores.dtype), 0.0)
        p = scores.softmax(-1) * has_key
        if keep is not None:
            p = p * keep[:, rows, :n_k] * keep_scale
        # without in-place writes: autograd has to see every piece
        piece = (p @ v[cols].transpose(0, 1)).transpose(0, 1)
        out = torch.cat([out[: rows.start], piece, out[rows.stop :]])
    return out


def attend_all_at_once(q, k, v, lengths_q, lengths_k, scale, mask=None, keep=None, keep_scale=1.0):
    """`attend` as one product over all sequences, padded, with rows of zeros behind each."""
    shape = len(lengths_q), max(lengths_q, default=0), max(lengths_k, default=0)

    def padded(x, lengths, longest):
        pieces = x[: sum(lengths)].split(lengths)
        rows = [torch.cat([one, one.new_zeros(longest - len(one), *x.shape[1:])]) for one in pieces]
        return torch.stack(rows).transpose(1, 2)  # (B, N, S, ...)

    tail = 0 * (q[sum(lengths_q) :] + k.sum() + v.sum())
    if not all(shape):
        return torch.cat([0 * (q[: sum(lengths_q)] + k.sum() + v.sum()), tail])
    q, k, v = (
        padded(q, lengths_q, shape[1]),
        padded(k, lengths_k, shape[2]),
        padded(v, lengths_k, shape[2]),
    )
    columns = torch.arange(shape[2], device=q.device)
    is_key = columns < torch.tensor(lengths_k, device=q.device)[:, None, None, None]
    added = torch.zeros_like(is_key, dtype=q.dtype).masked_fill(~is_key, float("-inf"))
    if mask is not None:
        mask = mask.to(q.device)
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
        added = added + mask.to(q.dtype)
    has_key = (added > -1e30).any(-1, keepdim=True)
    scores = torch.where(has_key, (q @ k.mT) * scale + added, 0.0)
    p = scores.softmax(-1) * has_key
    if keep is not None:
        p = p * padded(keep.transpose(0, 1), lengths_q, shape[1]) * keep_scale
    out = (p @ v).transpose(1, 2)
    return torch.cat([*(one[:n] for one, n in zip(out, lengths_q, strict=True)), tail])


def plain(attend, tensors, dout, *arguments, **options):
    """[output, gradients] of q, k and v, or of one tensor of all three."""

    def function(*leaves):
        q, k, v = leaves if len(leaves) == 3 else leaves[0].unbind(1)
        return attend(q, k, v, *arguments, **options)

    return gradients(function, *tensors, dy=dout)


def truth_and_pytorch(tensors, dout, *arguments, **options):
    """[output, gradients] in float64 and in the tensors' dtype."""
    exact = plain(attend, [x.double() for x in tensors], dout, *arguments, **options)
    return exact, plain(attend, tensors, dout, *arguments, **options)


def assert_attends(actual, expected, truth, *, packed=False, **limits):
    """As accurate as plain PyTorch: [output, gradients]."""
    names = ("out", "dqkv") if packed else ("out", "dq", "dk", "dv")
    assert_as_accurate(actual, expected, truth, names=names, **limits)


def limits(tensors, dout, *arguments, **options):
    """Of `assert_attends` in float32 on a GPU, {} elsewhere.

    cuBLAS sums float32 in another order for each shape: on an H200 PyTorch's own products over
    padded sequences miss the limits that its products sequence by sequence set. So both count. The
    products of three tf32 on the tensor cores are allowed eight times PyTorch's error.
    """
    from fastbert.kernels import attention_common

    if not (dout.is_cuda and dout.dtype == torch.float32):
        return {}
    other = plain(attend_all_at_once, tensors, dout, *arguments, **options)
    if attention_common.FLOAT32_PRECISION == "ieee":
        return {"other": other}
    return {"other": other, "worst": 8.0, "rms": 8.0}
