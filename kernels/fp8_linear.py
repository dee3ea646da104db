"""Casts to FP8, each with its transposed copy, and the product of two casts.

A product reads both operands along its inner dimension, so the three products of a linear layer
(one in the forward, two in the backward) read each operand once as it is and once transposed. One
kernel writes both copies and the largest absolute value in one pass over the operand, as NVIDIA's
TransformerEngine does. GELU and its backward cast their own results, which reach memory only in
FP8. The products are cuBLAS's, through `torch._scaled_mm`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.bias_gelu import gelu_gate
from fastbert.kernels.partial_sums import add_partials
from fastbert.kernels.runtime import IS_INTERPRETED, begin, cdiv, kernel, launcher, like

# Rows and columns of a tile, and warps. Chosen by register use: they have not been swept on a GPU
# since the kernels transpose words. The transposed copy gets 64 bytes of each column at once.
CAST_BLOCK = 64, 128, 8
GELU_CAST_BLOCK = 64, 128, 8
GELU_BWD_CAST_BLOCK = 64, 128, 8
MULTIPLE = 16  # cuBLAS needs inner dimensions to be multiples of it; the operator refuses others

_INTERPRETED = tl.constexpr(IS_INTERPRETED)
_INF = tl.constexpr(float("inf"))


@triton.jit
def _rounded(y, E5M2: tl.constexpr):
    """y rounded to the nearest FP8 value, ties to even, in float32; too large values saturate.

    Only the interpreter needs this: its casts to FP8 do neither.
    """
    LARGEST: tl.constexpr = 57344.0 if E5M2 else 448.0
    y = tl.minimum(tl.maximum(y, -LARGEST), LARGEST)
    DROPPED: tl.constexpr = 21 if E5M2 else 20  # mantissa bits that FP8 lacks
    LEAST: tl.constexpr = 6.103515625e-05 if E5M2 else 0.015625  # the smallest normal number
    MAGIC: tl.constexpr = 192.0 if E5M2 else 24576.0  # its last bit is the smallest subnormal
    bits = y.to(tl.int32, bitcast=True)
    bits = (bits + ((1 << (DROPPED - 1)) - 1) + ((bits >> DROPPED) & 1)) & (-(1 << DROPPED))
    normal = bits.to(tl.float32, bitcast=True)
    return tl.where(tl.abs(y) < LEAST, (y + MAGIC) - MAGIC, normal)


@kernel(do_not_specialize=["n_rows"])
def _cast_transpose_kernel(
    x_ptr, bias_ptr, dy_ptr,  # (M, N), (N,) or None, (M, N) or None
    scale_ptr, cast_ptr, transposed_ptr, amax_ptr,  # (), (P, N), (N, P / 4) int32, ()
    dbias_ptr,  # (programs along the rows, N): partial sums; None without dy
    x_row_stride, dy_row_stride,
    n_padded, n_rows,  # P >= M, and M
    N_COLS: tl.constexpr, E5M2: tl.constexpr, TANH: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Casts x; with a bias, gelu(x + bias); with dy too, the gradient dy * gelu'(x + bias).

    Transposing byte by byte took longer than everything else, because a thread holds bytes of one
    row and has to write bytes of one column. So four rows are packed into words of four bytes, and
    a quarter as many elements go through shared memory.
    """
    begin()
    strips: tl.constexpr = (N_COLS + COLS - 1) // COLS
    part = tl.program_id(0) // strips
    fours = part.to(tl.int64) * ROWS + 4 * tl.arange(0, ROWS // 4)  # the first of each four rows
    cols = tl.program_id(0) % strips * COLS + tl.arange(0, COLS)
    in_row = cols < N_COLS
    words = tl.zeros((ROWS // 4, COLS), tl.int32)
    most = tl.zeros((ROWS // 4, COLS), tl.float32)
    dbias = tl.zeros((ROWS // 4, COLS), tl.float32)
    for number in tl.static_range(4):
        rows = fours + number
        mask = (rows < n_rows)[:, None] & in_row[None, :]
        y = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=mask, other=0.0)
        y = y.to(tl.float32)
        if bias_ptr is not None:
            z = y + tl.load(bias_ptr + cols, mask=in_row, other=0.0).to(tl.float32)[None, :]
            gate, slope = gelu_gate(z, TANH, EXACT)
            if dy_ptr is None:
                y = tl.where(mask, z * gate, 0.0)  # gelu(bias) is not 0 in rows beyond the end
            else:  # 0 beyond the end, because dy is
                dy = dy_ptr + rows[:, None] * dy_row_stride + cols[None, :]
                dy = tl.load(dy, mask=mask, other=0.0).to(tl.float32)
                y = dy * (gate + z * slope)
                dbias += y
        size = tl.abs(y)
        y *= tl.load(scale_ptr)
        if _INTERPRETED:
            y = _rounded(y, E5M2)
        cast = y.to(tl.float8e5) if E5M2 else y.to(tl.float8e4nv)  # both casts saturate
        cast = cast.to(tl.uint8, bitcast=True)
        # an infinite gradient must not become a finite one; 0x7F is NaN in both formats
        cast = tl.where(size < _INF, cast, 0x7F).to(tl.uint8)
        out = (rows < n_padded)[:, None] & in_row[None, :]
        tl.store(cast_ptr + rows[:, None] * N_COLS + cols[None, :], cast, mask=out)
        words |= cast.to(tl.int32) << (8 * number)
        most = tl.maximum(most, tl.where(size < _INF, size, 0.0))
    if dbias_ptr is not None:
        tl.store(dbias_ptr + part * N_COLS + cols, tl.sum(dbias, axis=0), mask=in_row)
    # this atomic is deterministic: a maximum does not depend on the order of the programs
    tl.atomic_max(amax_ptr, tl.max(most), sem="relaxed")
    place = cols[:, None].to(tl.int64) * (n_padded // 4) + (fours // 4)[None, :]
    out = in_row[:, None] & (fours < n_padded)[None, :]
    tl.store(transposed_ptr + place, tl.trans(words), mask=out)


def padded(n: int) -> int:
    """n rounded up to a multiple of 16."""
    return cdiv(n, MULTIPLE) * MULTIPLE


def _cast_outputs(x: Tensor, e5m2: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn
    rows, cols = padded(x.shape[0]), x.shape[1]
    return x.new_empty(rows, cols, dtype=dtype), x.new_empty(cols, rows, dtype=dtype)


def _cast(block, outputs, x, scale, amax, e5m2, bias=None, tanh=False, dy=None):
    """Launches the kernel; with dy, `outputs` has dbias too."""
    cast, transposed, *dbias = outputs
    n_rows, n_cols = x.shape
    rows, cols, num_warps = block
    parts, partials = cdiv(n_rows, rows), None
    if dy is not None:
        partials = torch.empty(1, parts, n_cols, dtype=torch.float32, device=x.device)
    if n_rows:
        _cast_transpose_kernel(
            (parts * cdiv(n_cols, cols),),
            x, bias, dy, scale, cast.view(torch.uint8), transposed.view(torch.int32), amax,
            partials, x.stride(0), 0 if dy is None else dy.stride(0), cast.shape[0], n_rows,
            N_COLS=n_cols, E5M2=e5m2, TANH=tanh, EXACT=x.dtype == torch.float32,
            ROWS=rows, COLS=cols, num_warps=num_warps,
        )  # fmt: skip
    if partials is not None:
        add_partials(partials, *dbias)


@launcher(lambda x, _, __, e5m2: _cast_outputs(x, e5m2), mutates=("amax",))
def cast_transpose(
    outputs: tuple[Tensor, Tensor], x: Tensor, scale: Tensor, amax: Tensor, e5m2: bool
) -> None:
    """x (M, N) times `scale`, cast to FP8, and its transpose: (P, N) and (N, P).

    P is M rounded up to a multiple of 16; the added rows are 0. x has unit column stride; scale,
    amax: () float32. The format is E5M2 if `e5m2`, else E4M3. Rounds to the nearest value, ties to
    even; too large values saturate, and values that are not finite become NaN. Sets amax to the
    largest finite absolute value of x if that is larger.
    """
    _cast(CAST_BLOCK, outputs, x, scale, amax, e5m2)


@launcher(lambda x, *_: _cast_outputs(x, False), mutates=("amax",))
def gelu_cast_transpose(
    outputs: tuple[Tensor, Tensor], x: Tensor, bias: Tensor, tanh: bool, scale: Tensor, amax: Tensor
) -> None:
    """gelu(x + bias), computed in float32 and cast to E4M3 by `cast_transpose`'s rules.

    x: (M, N) with unit column stride; bias: (N,); scale, amax: () float32. Returns (P, N), (N, P).
    """
    _cast(GELU_CAST_BLOCK, outputs, x, scale, amax, False, bias, tanh)


@launcher(lambda dy, x, bias, *_: (*_cast_outputs(x, True), like(bias)), mutates=("amax",))
def gelu_bwd_cast_transpose(
    outputs: tuple[Tensor, Tensor, Tensor],
    dy: Tensor, x: Tensor, bias: Tensor, tanh: bool, scale: Tensor, amax: Tensor,
) -> None:  # fmt: skip
    """The gradient dx of gelu(x + bias), cast to E5M2 by `cast_transpose`'s rules, and dbias.

    dy, x: (M, N) with unit column stride; dbias, in bias.dtype, is summed in float32 before the
    cast. Returns (P, N), (N, P) and (N,).
    """
    _cast(GELU_BWD_CAST_BLOCK, outputs, x, scale, amax, True, bias, tanh, dy)


def product(
    a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`a @ b.T * of_a * of_b + bias`: (M, N) in `dtype`.

    a (M, K), b (N, K): casts; of_a, of_b: () float32, one over each cast's scale, at addresses that
    are multiples of 16, as cuBLAS requires; bias: (N,) in `dtype`, or None
    """
    if not a.is_cuda or not a.numel():
        y = (a.float() @ b.float().t()) * (of_a * of_b)
        return (y if bias is None else y + bias.float()).to(dtype)
    is_wide = dtype == torch.float32  # cuBLAS adds no bias to a float32 result
    if bias is not None and bias.data_ptr() % MULTIPLE:
        bias = bias.clone()
    y = torch._scaled_mm(
        a, b.t(), scale_a=of_a, scale_b=of_b, bias=None if is_wide else bias, out_dtype=dtype,
        use_fast_accum=a.dtype == b.dtype,  # only in the forward, as in TransformerEngine
    )  # fmt: skip
    return y + bias if is_wide and bias is not None else y
