"""Cross-entropy over BERT's vocabulary, padded from 30,522 to 30,528 columns."""

from collections.abc import Iterator

from benchmarks.compile_cases import Case
from fastbert.kernels import linear_cross_entropy as unit

STATISTICS = ("loss_ptr", "highest_ptr", "total_ptr", "scale_ptr", "dbias_ptr")


def cases() -> Iterator[Case]:
    classes = {"N_CLASSES": 30522, "N_COLS": 30528}
    lanes = {"DEPTH": unit.DEPTH, "LANES": unit.LANES}
    tile = {"ROWS": unit.ROWS, "COLS": unit.COLS}
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
            constants = {**classes, **lanes, "SMOOTH": smooth}
            yield Case(
                unit._cross_entropy_fwd_kernel, label, constants, unit.NUM_WARPS, types=types,
                wide_loads=2 * unit.DEPTH * wide, quick=label == "bf16",
            )  # fmt: skip
        yield Case(
            unit._cross_entropy_bwd_kernel, dtype, {**classes, **tile}, unit.NUM_WARPS, types=types,
            wide_loads=unit.ROWS // 4 * wide, quick=dtype == "bf16",
        )  # fmt: skip
