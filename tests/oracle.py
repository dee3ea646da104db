"""What tests compare with: `from tests.oracle import ...` works however pytest is started."""

import torch

from fastbert.backend import INTERPRETED


def gradients(function, *tensors, dy):
    """[output, one gradient a tensor] of `function`, for the upstream gradient `dy`."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def assert_as_accurate(actual, same_dtype, truth, *, names, worst=2.0, rms=1.5, other=None):
    """`actual` is about as near to the float64 `truth` as plain PyTorch in the same dtype is.

    other: the same by PyTorch in another arrangement, where one result may be exact by luck; the
    larger of both errors counts as PyTorch's.

    Its worst error is at most `worst` times PyTorch's plus one rounding of the result's dtype,
    and, from 256 elements up, its root-mean-square error at most `rms` times PyTorch's plus a
    hundredth of a rounding, for where PyTorch happens to be exact.
    """
    for name, a, s, o, t in zip(names, actual, same_dtype, other or same_dtype, truth, strict=True):
        assert a.shape == t.shape, f"{name}: shape {tuple(a.shape)}, not {tuple(t.shape)}"
        assert a.dtype == s.dtype, f"{name}: {a.dtype}, not {s.dtype}"
        if a.numel() == 0:
            continue
        assert torch.isfinite(a).all(), f"{name}: non-finite values"
        # the Triton interpreter truncates to bfloat16 where a GPU rounds to nearest
        coarser = 2.0 if INTERPRETED and a.dtype == torch.bfloat16 else 1.0
        error, *plain = ((x.double() - t).abs() for x in (a, s, o))
        allowed = max(x.max() for x in plain)
        rounding = torch.finfo(a.dtype).eps * t.abs().max()
        assert error.max() <= coarser * (worst * allowed + rounding), (
            f"{name}: worst error {error.max():.3g}, PyTorch's is {allowed:.3g}"
        )
        error, *plain = (x.square().mean().sqrt() for x in (error, *plain))
        allowed = max(plain)
        assert a.numel() < 256 or error <= coarser * (rms * allowed + rounding / 100), (
            f"{name}: rms error {error:.3g}, PyTorch's is {allowed:.3g}"
        )
