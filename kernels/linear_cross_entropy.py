"""Cross-entropy over a matrix of logits: each row's loss, and the gradient written over the logits.

C rows of L >= V columns for V classes: the columns from V on pad the rows to a multiple of 16
bytes, are left out of the softmax and get the gradient 0. All arithmetic is in float32.

The forward reads a row once. Each of LANES positions keeps its own maximum and sum of exponentials
(Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867), which are combined at the end of
the row. The backward walks down strips of columns, so that the bias gradient, the sum of each
column, is a by-product, summed before the gradients are rounded.
"""

import torch
import triton.language as tl
from torch import Tensor

from fastbert.kernels.runtime import begin, cdiv, kernel, launcher, num_sms

FWD_BLOCK = 4, 1024, 4  # DEPTH (columns for each rescaling of a lane's sum), LANES and warps
BWD_BLOCK = 8, 256, 4  # rows, columns and warps
WARPS_PER_SM = 28  # for the backward: as many as are resident at once

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite, so that a difference of two is not NaN


@kernel(do_not_specialize=["ignore_index", "label_smoothing"])
def _cross_entropy_fwd_kernel(
    logits_ptr, target_ptr,  # (C, L), (C,) int64
    loss_ptr, highest_ptr, total_ptr, correct_ptr,  # (C,), (C,) or None, (C,) or None, (C,) int32
    logits_row_stride,
    ignore_index, label_smoothing,
    N_CLASSES: tl.constexpr, N_COLS: tl.constexpr, SMOOTH: tl.constexpr,
    DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    begin()
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_row_stride
    target = tl.load(target_ptr + row)
    is_counted = target != ignore_index
    is_class = (target >= 0) & (target < N_CLASSES)
    score = tl.load(row_ptr + target, mask=is_class, other=float("nan")).to(tl.float32)

    cols = tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    top = tl.full((LANES,), _LOWEST, dtype=tl.float32)
    total = tl.full((LANES,), 0.0, dtype=tl.float32)  # the sum of exp(x - top)
    linear = tl.full((LANES,), 0.0, dtype=tl.float32)  # the sum of x, for label smoothing
    for start in range(0, N_COLS, DEPTH * LANES):
        # masking by N_COLS, a multiple of 16, instead of N_CLASSES keeps the loads 16 bytes wide
        x = tl.load(row_ptr + start + cols, mask=start + cols < N_COLS, other=0.0).to(tl.float32)
        in_row = start + cols < N_CLASSES
        if SMOOTH:
            linear += tl.sum(tl.where(in_row, x, 0.0), axis=0)
        x = tl.where(in_row, x, float("-inf"))
        higher = tl.maximum(top, tl.max(x, axis=0))
        total *= tl.exp2((top - higher) * _LOG2E)
        total += tl.sum(tl.exp2((x - higher[None, :]) * _LOG2E), axis=0)
        top = higher
    highest = tl.max(top, axis=0)
    total = tl.sum(total * tl.exp2((top - highest) * _LOG2E), axis=0)

    loss = (highest - score) + tl.log2(total) * _LN2
    if SMOOTH:
        loss += label_smoothing * (score - tl.sum(linear, axis=0) / N_CLASSES)
    tl.store(loss_ptr + row, tl.where(is_counted, loss, 0.0))
    if highest_ptr is not None:
        tl.store(highest_ptr + row, highest)
    if total_ptr is not None:
        # a target that is no class makes the gradient NaN too
        tl.store(total_ptr + row, tl.where(is_counted & (is_class == 0), float("nan"), total))

    # the first of equal scores wins, as in argmax, so the columns before the target are read again
    is_correct = is_counted & (score == highest)
    ahead = float("-inf")
    for start in range(0, tl.where(is_correct, target, 0).to(tl.int32), DEPTH * LANES):
        is_before = start + cols < target
        x = tl.load(row_ptr + start + cols, mask=start + cols < N_COLS, other=0.0).to(tl.float32)
        ahead = tl.maximum(ahead, tl.max(tl.where(is_before, x, float("-inf"))))
    tl.store(correct_ptr + row, (is_correct & (highest > ahead)).to(tl.int32))


@kernel(do_not_specialize=["n_rows", "rows_per_program", "ignore_index", "label_smoothing"])
def _cross_entropy_bwd_kernel(
    target_ptr, highest_ptr, total_ptr, scale_ptr,  # (C,) int64, (C,), (C,), ()
    logits_ptr, dbias_ptr,  # (C, L), read and overwritten; (P, L): one partial sum a program
    logits_row_stride,
    n_rows, rows_per_program,
    ignore_index, label_smoothing,
    N_CLASSES: tl.constexpr, N_COLS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    begin()
    strips: tl.constexpr = (N_COLS + COLS - 1) // COLS
    part = tl.program_id(0) // strips
    cols = tl.program_id(0) % strips * COLS + tl.arange(0, COLS)
    scale = tl.load(scale_ptr)
    of_target = 1.0 - label_smoothing
    of_each = label_smoothing / N_CLASSES
    dbias = tl.zeros((ROWS, COLS), dtype=tl.float32)

    first = part.to(tl.int64) * rows_per_program
    last = tl.minimum(first + rows_per_program, n_rows)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        targets = tl.load(target_ptr + rows, mask=rows < last, other=0)
        highest = tl.load(highest_ptr + rows, mask=rows < last, other=0.0)
        share = 1.0 / tl.load(total_ptr + rows, mask=rows < last, other=1.0)
        is_counted = (rows < last) & (targets != ignore_index)
        is_target = targets.to(tl.int32)[:, None] == cols[None, :]
        mask = (rows < last)[:, None] & (cols < N_COLS)[None, :]
        place = logits_ptr + rows.to(tl.int64)[:, None] * logits_row_stride + cols[None, :]
        x = tl.load(place, mask=mask, other=0.0).to(tl.float32)
        dx = tl.exp2((x - highest[:, None]) * _LOG2E) * share[:, None]
        dx -= of_each + tl.where(is_target, of_target, 0.0)
        is_wanted = is_counted[:, None] & (cols < N_CLASSES)[None, :]
        dx = tl.where(is_wanted, dx * scale, 0.0)  # scaled before fp16 rounding could flush it to 0
        tl.store(place, dx, mask=mask)
        dbias += dx
    tl.store(dbias_ptr + part * N_COLS + cols, tl.sum(dbias, axis=0), mask=cols < N_COLS)


def _fwd_outputs(logits, *others):
    loss = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    statistics = [torch.empty_like(loss), torch.empty_like(loss)] if others[-1] else []  # keep
    return [loss, torch.empty_like(loss, dtype=torch.int32), *statistics]


@launcher(_fwd_outputs)
def cross_entropy_fwd(
    outputs: list[Tensor], logits: Tensor, targets: Tensor, n_classes: int, ignore_index: int,
    label_smoothing: float, keep: bool,
) -> None:  # fmt: skip
    """logits (C, L), targets (C,) int64 -> loss (C,) float32, correct (C,) int32.

    If `keep`, also highest and total (C,) float32, for the backward: the largest logit and the sum
    of exp(logit - highest), because a single log-sum-exp would have fewer correct digits. Logits
    have unit column stride. The loss is 0 where the target is ignore_index, and NaN where the
    target is no class.
    """
    loss, correct, highest, total = (*outputs, None, None)[:4]
    n_rows, n_cols = logits.shape
    depth, lanes, num_warps = FWD_BLOCK
    if n_rows:
        _cross_entropy_fwd_kernel(
            (n_rows,),
            logits, targets, loss, highest, total, correct,
            logits.stride(0), ignore_index, label_smoothing,
            N_CLASSES=n_classes, N_COLS=n_cols, SMOOTH=label_smoothing != 0,
            DEPTH=depth, LANES=lanes, num_warps=num_warps,
        )  # fmt: skip


@launcher(
    lambda logits, *_: logits.new_empty(logits.shape[1], dtype=torch.float32), mutates=("logits",)
)
def cross_entropy_bwd(
    sums: Tensor, logits: Tensor, targets: Tensor, highest: Tensor, total: Tensor, scale: Tensor,
    n_classes: int, ignore_index: int, label_smoothing: float,
) -> None:  # fmt: skip
    """Overwrites the logits (C, L) with their gradient; returns its column sums (L,) in float32.

    highest, total: from `cross_entropy_fwd`; scale: () float32, the gradient of each row's loss.
    """
    n_rows, n_cols = logits.shape
    rows, cols, num_warps = BWD_BLOCK
    strips = cdiv(n_cols, cols)
    programs = max(num_sms(logits) * WARPS_PER_SM // num_warps // strips, 1)
    rows_per_program = cdiv(cdiv(n_rows, programs), rows) * rows
    parts = cdiv(n_rows, rows_per_program) if n_rows else 0
    partials = torch.empty(parts, n_cols, dtype=torch.float32, device=logits.device)
    if n_rows:
        _cross_entropy_bwd_kernel(
            (parts * strips,),
            targets, highest, total, scale, logits, partials, logits.stride(0),
            n_rows, rows_per_program, ignore_index, label_smoothing,
            N_CLASSES=n_classes, N_COLS=n_cols,
            ROWS=rows, COLS=cols, num_warps=num_warps,
        )  # fmt: skip
    torch.sum(partials, 0, out=sums)
