"""Attention written out, sequence by sequence: the truth that tests compare with."""

import torch

from tests.oracle import assert_as_accurate, gradients

TAIL = 3  # rows behind the last sequence


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


def truth_and_pytorch(tensors, dout, *arguments, **options):
    """[output, gradients] in float64 and in the tensors' dtype."""

    def function(*leaves):
        q, k, v = leaves if len(leaves) == 3 else leaves[0].unbind(1)
        return attend(q, k, v, *arguments, **options)

    exact = gradients(function, *(x.double() for x in tensors), dy=dout)
    return exact, gradients(function, *tensors, dy=dout)


def assert_attends(actual, expected, truth, *, packed=False):
    """As accurate as plain PyTorch: [output, gradients]."""
    names = ("out", "dqkv") if packed else ("out", "dq", "dk", "dv")
    assert_as_accurate(actual, expected, truth, names=names)
