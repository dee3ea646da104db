"""Bias and GELU in one pass, and their backward, which recomputes the activation.

M rows, N columns. A program works on ROWS x COLS tiles of the matrix. In the backward it walks down
a strip of COLS columns and keeps its part of the bias gradient in registers, so that this gradient
needs no pass of its own. All arithmetic is in float32.

GELU is x * gate(x), where the gate is the normal distribution function or a sigmoid. In half
precision the gate takes one reciprocal and one exponential, so that the kernels stay memory-bound;
the erf is formula 7.1.26 of Abramowitz and Stegun (error below 1.5e-7).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastbert.kernels.partial_sums import add_partials
from fastbert.kernels.runtime import (
    IS_INTERPRETED,
    begin,
    capability,
    cdiv,
    kernel,
    launcher,
    like,
    num_sms,
)

FWD_BLOCK = 8, 256, 4  # rows and columns of a tile, and warps
# For the backward: with up to 64 registers a thread, 32 warps are resident at once. sm_90's block
# takes up to 128 registers, so that half as many are.
WARPS_PER_SM = 32
# Stages of the backward's loop, as in `layer_norm`; with 2, sm_90's block takes 80 to 94 registers.
STAGES = 1

_INTERPRETED = tl.constexpr(IS_INTERPRETED)
_HALF_LOG2E = tl.constexpr(0.7213475204444817)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


def backward_block(capability: int, itemsize: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and warps; 4 x 256 in bf16 takes 48 registers a thread."""
    # H200, bf16, 24152 x 4096: 171 us, against 190 with (4, 256, 4)
    return (4, 512, 2) if capability == 90 and itemsize == 2 else (4, 256, 4)


@triton.jit
def _reciprocal(x, EXACT: tl.constexpr):
    if EXACT:
        return tl.div_rn(1.0, x)
    if _INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def gelu_gate(x, TANH: tl.constexpr, EXACT: tl.constexpr):
    """(gate, slope) with gelu(x) = x * gate and gelu'(x) = gate + x * slope."""
    if TANH:
        # (1 + tanh(u)) / 2 = sigmoid(2u) with u = sqrt(2 / pi) * (x + 0.044715 x^3), by exp2
        falling = tl.exp2(x * (-2.302208198 - 0.1029432397 * x * x))
        gate = _reciprocal(1.0 + falling, EXACT)
        rest = tl.where(x < 0, 1.0 - gate, falling * gate)  # 1 - gate, without cancellation
        slope = gate * rest * (1.595769122 + 0.2140644488 * x * x)
    else:
        bell = tl.exp2(x * x * -_HALF_LOG2E)
        slope = bell * _INV_SQRT_2PI
        if EXACT:
            gate = 0.5 + 0.5 * tl.erf(x * _SQRT_HALF)
        else:
            t = _reciprocal(1.0 + 0.3275911 * _SQRT_HALF * tl.abs(x), EXACT)
            series = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
            tail = 0.5 * bell * t * (0.254829592 + t * (-0.284496736 + t * series))
            gate = tl.where(x < 0, tail, 1.0 - tail)  # the tail itself, without cancellation
    return gate, slope


@kernel(do_not_specialize=["n_rows"])
def _bias_gelu_fwd_kernel(
    x_ptr, bias_ptr, y_ptr,  # (M, N), (N,), (M, N)
    x_row_stride, y_row_stride,
    n_rows,
    N_COLS: tl.constexpr, TANH: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    begin()
    strips: tl.constexpr = (N_COLS + COLS - 1) // COLS
    program = tl.program_id(0)  # strips of the same rows follow each other, as in memory
    rows = (program // strips).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = program % strips * COLS + tl.arange(0, COLS)
    mask = (rows < n_rows)[:, None] & (cols < N_COLS)[None, :]

    x = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=mask, other=0.0)
    bias = tl.load(bias_ptr + cols, mask=cols < N_COLS, other=0.0)
    x = x.to(tl.float32) + bias.to(tl.float32)[None, :]
    gate, _ = gelu_gate(x, TANH, EXACT)
    tl.store(y_ptr + rows[:, None] * y_row_stride + cols[None, :], x * gate, mask=mask)


@kernel(do_not_specialize=["n_rows", "rows_per_program"])
def _bias_gelu_bwd_kernel(
    dy_ptr, x_ptr, bias_ptr,  # (M, N), (M, N), (N,)
    dx_ptr, dbias_ptr,  # (M, N), (P, N) or None: a partial sum from each of a strip's P programs
    dy_row_stride, x_row_stride, dx_row_stride,
    n_rows, rows_per_program,
    N_COLS: tl.constexpr, TANH: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    begin()
    strips: tl.constexpr = (N_COLS + COLS - 1) // COLS
    part = tl.program_id(0) // strips
    cols = tl.program_id(0) % strips * COLS + tl.arange(0, COLS)
    in_row = cols < N_COLS
    bias = tl.load(bias_ptr + cols, mask=in_row, other=0.0).to(tl.float32)
    dbias = tl.zeros((ROWS, COLS), dtype=tl.float32)

    first = part.to(tl.int64) * rows_per_program
    last = tl.minimum(first + rows_per_program, n_rows)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < last)[:, None] & in_row[None, :]
        rows = rows.to(tl.int64)[:, None]
        x = tl.load(x_ptr + rows * x_row_stride + cols[None, :], mask=mask, other=0.0)
        dy = tl.load(dy_ptr + rows * dy_row_stride + cols[None, :], mask=mask, other=0.0)
        x = x.to(tl.float32) + bias[None, :]
        gate, slope = gelu_gate(x, TANH, EXACT)
        dx = dy.to(tl.float32) * (gate + x * slope)
        tl.store(dx_ptr + rows * dx_row_stride + cols[None, :], dx, mask=mask)
        if dbias_ptr is not None:
            dbias += dx  # masked rows add 0, because their dy is 0
    if dbias_ptr is not None:
        tl.store(dbias_ptr + part * N_COLS + cols, tl.sum(dbias, axis=0), mask=in_row)


@launcher(lambda x, *_: like(x))
def bias_gelu_fwd(y: Tensor, x: Tensor, bias: Tensor, tanh: bool) -> None:
    """gelu(x + bias) (M, N) in x.dtype, for x (M, N) with unit column stride and bias (N,)."""
    n_rows, n_cols = x.shape
    rows, cols, num_warps = FWD_BLOCK
    if n_rows:
        _bias_gelu_fwd_kernel(
            (cdiv(n_rows, rows) * cdiv(n_cols, cols),),
            x, bias, y, x.stride(0), y.stride(0), n_rows,
            N_COLS=n_cols, TANH=tanh, EXACT=x.dtype == torch.float32,
            ROWS=rows, COLS=cols, num_warps=num_warps,
        )  # fmt: skip


def _bwd_outputs(dy, x, bias, tanh, has_dbias):
    return like(x), like(bias) if has_dbias else bias.new_empty((0,))


@launcher(_bwd_outputs)
def bias_gelu_bwd(
    outputs: tuple[Tensor, Tensor], dy: Tensor, x: Tensor, bias: Tensor, tanh: bool, has_dbias: bool
) -> None:
    """Gradients of `bias_gelu_fwd`: dx (M, N) in x.dtype; dbias (N,) in bias.dtype.

    dy (M, N) and x (M, N) have unit column stride; dbias is summed in float32, and empty unless
    `has_dbias`.
    """
    n_rows, n_cols = x.shape
    rows, cols, num_warps = backward_block(capability(x), x.itemsize)
    strips = cdiv(n_cols, cols)
    programs = max(num_sms(x) * WARPS_PER_SM // num_warps // strips, 1)
    rows_per_program = cdiv(cdiv(n_rows, programs), rows) * rows
    parts = cdiv(n_rows, rows_per_program) if n_rows else 0
    dx, dbias = outputs
    partials = None
    if has_dbias:
        partials = torch.empty(1, parts, n_cols, dtype=torch.float32, device=x.device)
    if n_rows:
        _bias_gelu_bwd_kernel(
            (parts * strips,),
            dy, x, bias, dx, partials,
            dy.stride(0), x.stride(0), dx.stride(0), n_rows, rows_per_program,
            N_COLS=n_cols, TANH=tanh, EXACT=x.dtype == torch.float32,
            ROWS=rows, COLS=cols, STAGES=STAGES, num_warps=num_warps,
        )  # fmt: skip
    if partials is not None:
        add_partials(partials, dbias)
