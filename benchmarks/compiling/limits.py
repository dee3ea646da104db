"""The limits for the code of each kernel: wide loads, tensor cores, and few or no spills."""

import math
from typing import NamedTuple

import torch

from benchmarks.compiling.cases import SM80, SM100
from benchmarks.launches import Launch

TABLES = "word_ptr", "position_ptr", "token_type_ptr"
ROWS_COLS, M_N, M_D = ("ROWS", "COLS"), ("BLOCK_M", "BLOCK_N"), ("BLOCK_M", "BLOCK_D")
N_D, BLOCK_D = ("BLOCK_N", "BLOCK_D"), ("BLOCK", "BLOCK_D")

# By kernel: the constants that are the sides of its tile, and the tensors that it reads by tiles,
# once for each read. A thread reads its share of each with loads of 16 bytes.
TILES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "attention_drop_words_kernel": (("BLOCK_ROWS", "BLOCK_WORDS"), ()),
    "attention_fwd_kernel": (N_D, ("k_ptr", "v_ptr")),
    "attention_dq_kernel": (N_D, ("k_ptr", "v_ptr")),
    "attention_dkdv_kernel": (M_D, ("q_ptr", "dout_ptr")),
    "attention_single_kernel": (BLOCK_D, ("q_ptr", "k_ptr", "v_ptr", "dout_ptr")),
    "_bias_gelu_fwd_kernel": (ROWS_COLS, ("x_ptr",)),
    "_bias_gelu_bwd_kernel": (ROWS_COLS, ("x_ptr", "dy_ptr")),
    "_cast_transpose_kernel": (ROWS_COLS, ("x_ptr", "dy_ptr")),
    "_compact_kernel": (("BLOCK",), ()),
    "_dropout_kernel": (ROWS_COLS, ("x_ptr",)),
    "_gather_rows_kernel": (ROWS_COLS, ("src_ptr",)),
    "_forward_kernel": (M_N, TABLES),
    "_backward_kernel": (M_N, (*TABLES, "dy_ptr")),
    "_sum_chunks_kernel": (("BLOCK_N",), ("dz_ptr",)),
    "_join_chunks_kernel": (M_N, ("heads_ptr",)),
    "layer_norm_fwd_kernel": (M_N, ("x_ptr", "residual_ptr")),
    "layer_norm_bwd_kernel": (M_N, ("dy_ptr", "dy2_ptr", "kept_ptr")),
    "add_partials_kernel": (M_N, tuple(f"partials{n}_ptr" for n in range(4))),
    "_cross_entropy_fwd_kernel": (("DEPTH", "LANES"), ("logits_ptr", "logits_ptr")),
    "_cross_entropy_bwd_kernel": (ROWS_COLS, ("logits_ptr",)),
}


# Bytes of shared memory that a program may have. sm_80's entry is that of sm_86, 89 and 120, which
# have less and use the same tables.
SHARED = {80: 101376, 90: 232448, 100: 232448}


class Limits(NamedTuple):
    """The limits for a launch's code.

    wide_loads: the least number of 16-byte global loads; shared: the most bytes of shared memory;
    dots: whether it must use the tensor cores; spills: spilled loads and stores allowed; reason:
    why any are
    """

    wide_loads: int
    shared: int
    dots: bool
    spills: int
    reason: str


def limits_of(launch: Launch) -> Limits:
    values, (sides, tensors) = launch.values, TILES[launch.kernel.__name__]
    element_bytes = sum(values[name].itemsize for name in tensors if values[name] is not None)
    is_column = values.get("COLS") == 1  # its elements are not adjacent
    tile_bytes = 0 if is_column else element_bytes * math.prod(values[side] for side in sides)
    wide_loads = tile_bytes // (16 * 32 * values["num_warps"])
    has_dots = "PRECISION" in values  # only kernels with a matrix product have it
    return Limits(wide_loads, SHARED[launch.capability], has_dots, *_spills(launch))


def block_of(launch: Launch) -> str:
    """The sides of the launch's tile and its warps, as text."""
    sides, _ = TILES[launch.kernel.__name__]
    sizes = " x ".join(str(launch.values[side]) for side in sides)
    return f"{sizes}, {launch.values['num_warps']} warps"


def _spills(launch: Launch) -> tuple[int, str]:
    """How many spills are allowed, and why."""
    capability, kernel, values = launch
    name = kernel.__name__
    if "PRECISION" in values:
        has_dropout = values["words_ptr"] is not None
        is_pipelined = name == "attention_dkdv_kernel" and values["num_stages"] > 1
        has_sums = "sums_ptr" in values and values["sums_ptr"] is not None
        if values["q_ptr"].dtype == torch.float32:
            # 207 of 2,728 instructions for sm_80, with the sums of the bias's gradient
            most = 210 if has_sums and name == "attention_dq_kernel" else 200
            return most, "three tf32 products for one in float32"
        if values.get("BLOCK") == 128 and values["num_warps"] == 4:
            return 115, "faster than 8 warps without spills"
        is_large = capability == SM100 and values["HEAD_DIM"] > 64
        if has_dropout and has_sums and is_large and name == "attention_dkdv_kernel":
            return 20, "ten registers with Triton 3.9, spilled before the loop and read after it"
        if has_dropout and (is_pipelined or is_large):
            return 4, "two registers with Triton 3.9"
        if has_dropout and capability == SM80:
            if has_sums and name == "attention_dq_kernel" and values["HEAD_DIM"] > 64:
                return 6, "three registers for the sums of the bias's gradient"
            return 2, "one register with Triton 3.6"
    is_cast = name == "_cast_transpose_kernel" and values["dy_ptr"] is not None
    if is_cast and values["x_ptr"].dtype == torch.float32:
        return 2, "one register with Triton 3.8"
    if capability == SM100 and values.get("N_COLS") == 768:
        if name == "layer_norm_bwd_kernel" and values["kept_ptr"].dtype == torch.float32:
            # 8 warps would not spill, but the table is also that of bf16
            return 2, "one register with Triton 3.8 and 3.9"
        if name == "_backward_kernel" and values["word_ptr"].dtype == torch.float16:
            # twice the warps would not spill; autocast, with tables in float32, does not need them
            return 2, "one register with Triton 3.9"
    return 0, ""
