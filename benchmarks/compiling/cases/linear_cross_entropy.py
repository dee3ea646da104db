"""Cross-entropy over BERT's vocabulary, padded from 30,522 to 30,528 columns."""

from collections.abc import Iterator

from benchmarks.compiling.cases import Case
from fastbert.kernels import linear_cross_entropy as unit

STATISTICS = ("loss_ptr", "highest_ptr", "total_ptr", "scale_ptr", "dbias_ptr")


def cases() -> Iterator[Case]:
    classes = {"N_CLASSES": 30522, "N_COLS": 30528}
    depth, lanes, fwd_warps = unit.FWD_BLOCK
    rows, cols, bwd_warps = unit.BWD_BLOCK
    for dtype in ("bf16", "fp16", "fp32"):
        types = {
            "logits_ptr": f"*{dtype}",
            **dict.fromkeys(STATISTICS, "*fp32"),
            "target_ptr": "*i64",
            "correct_ptr": "*i32",
            "label_smoothing": "fp32",
        }
        wide = 2 if dtype == "fp32" else 1  # loads of 16 bytes for 8 elements
        for smooth in (False, True):
            label = f"{dtype}{' smoothed' * smooth}"
            constants = {**classes, "DEPTH": depth, "LANES": lanes, "SMOOTH": smooth}
            yield Case(
                unit._cross_entropy_fwd_kernel, label, constants, fwd_warps, types=types,
                wide_loads=2 * depth * wide, quick=label == "bf16",
            )  # fmt: skip
        constants |= {"SMOOTH": False, "highest_ptr": None, "total_ptr": None}
        yield Case(
            unit._cross_entropy_fwd_kernel, f"{dtype} inference", constants, fwd_warps, types=types,
            wide_loads=2 * depth * wide,
        )  # fmt: skip
        constants = {**classes, "ROWS": rows, "COLS": cols}
        yield Case(
            unit._cross_entropy_bwd_kernel, dtype, constants, bwd_warps, types=types,
            wide_loads=rows // 4 * wide, quick=dtype == "bf16",
        )  # fmt: skip
