"""What the code of each kernel must keep to: wide loads, tensor cores, and no spills but a few."""

import itertools
import math
from typing import NamedTuple

import torch

from benchmarks.compiling.cases import SM80, SM100
from benchmarks.launches import Launch

M_N, ROWS_COLS = ("BLOCK_M", "BLOCK_N"), ("ROWS", "COLS")
M_D, N_D, BLOCK_D = ("BLOCK_M", "BLOCK_D"), ("BLOCK_N", "BLOCK_D"), ("BLOCK", "BLOCK_D")
TABLES = "word_ptr", "position_ptr", "token_type_ptr"
BACKWARD_TILES = {"q_ptr": M_D, "dout_ptr": M_D, "k_ptr": N_D, "v_ptr": N_D}

# By kernel: the tensors that it reads by tiles, and the constants that are a tile's sides. A thread
# reads its share of each by loads of 16 bytes.
TILES: dict[str, dict[str, tuple[str, ...]]] = {
    "attention_drop_words_kernel": {},
    "attention_fwd_kernel": {"q_ptr": M_D, "k_ptr": N_D, "v_ptr": N_D},
    "attention_dq_kernel": BACKWARD_TILES,
    "attention_dkdv_kernel": BACKWARD_TILES,
    "attention_single_kernel": dict.fromkeys(BACKWARD_TILES, BLOCK_D),
    "_bias_gelu_fwd_kernel": {"x_ptr": ROWS_COLS},
    "_bias_gelu_bwd_kernel": {"x_ptr": ROWS_COLS, "dy_ptr": ROWS_COLS},
    "_forward_kernel": dict.fromkeys(TABLES, M_N),
    "_backward_kernel": dict.fromkeys((*TABLES, "dy_ptr"), M_N),
    "_sum_chunks_kernel": {"dz_ptr": ("BLOCK_N",)},
    "_join_chunks_kernel": {"heads_ptr": M_N},
    "layer_norm_fwd_kernel": {"x_ptr": M_N, "residual_ptr": M_N},
    "layer_norm_bwd_kernel": {"dy_ptr": M_N, "kept_ptr": M_N},
    "_add_partials_kernel": {"partials_ptr": M_N},
    "_cross_entropy_fwd_kernel": {"logits_ptr": ("DEPTH", "LANES")},
    "_cross_entropy_bwd_kernel": {"logits_ptr": ROWS_COLS},
}


class Limits(NamedTuple):
    """wide_loads: 16-byte global loads that the code must have at least; dots: whether it must use
    the tensor cores; spills: spilled loads and stores allowed; reason: why any are.
    """

    wide_loads: int
    dots: bool
    spills: int
    reason: str


def limits_of(launch: Launch) -> Limits:
    values = launch.values
    tile_bytes = sum(
        math.prod(values[side] for side in sides) * values[name].itemsize
        for name, sides in TILES[launch.kernel.__name__].items()
        if values[name] is not None
    )
    wide_loads = tile_bytes // (16 * 32 * values["num_warps"])
    has_dots = "PRECISION" in values  # which only a product has
    return Limits(wide_loads, has_dots, *_spills(launch))


def block_of(launch: Launch) -> str:
    """The sides of its tiles, and warps."""
    sides = dict.fromkeys(itertools.chain(*TILES[launch.kernel.__name__].values()))
    sizes = " x ".join(str(launch.values[side]) for side in sides)
    return f"{sizes}, {launch.values['num_warps']} warps".removeprefix(", ")


def _spills(launch: Launch) -> tuple[int, str]:
    """How many are allowed, and why."""
    capability, kernel, values = launch
    name = kernel.__name__
    if name.startswith("attention") and "PRECISION" in values:
        has_dropout = values["words_ptr"] is not None
        is_pipelined = name == "attention_dkdv_kernel" and values["num_stages"] > 1
        if values["q_ptr"].dtype == torch.float32:
            return 200, "three tf32 products for one in float32"
        if values.get("BLOCK") == 128 and values["num_warps"] == 4:
            return 115, "faster than 8 warps without"
        if has_dropout and (is_pipelined or (capability == SM100 and values["HEAD_DIM"] > 64)):
            return 4, "two registers with Triton 3.9"
        if has_dropout and capability == SM80:
            return 2, "one register with Triton 3.6"
    if capability == SM100 and values.get("N_COLS") == 768:
        if name == "layer_norm_bwd_kernel" and values["kept_ptr"].dtype == torch.float32:
            # 8 warps would not spill, but the table is also that of bf16
            return 2, "one register with Triton 3.8 and 3.9"
        if name == "_backward_kernel" and values["word_ptr"].dtype == torch.float16:
            # twice the warps would not spill; autocast, with tables in float32, does not need them
            return 2, "one register with Triton 3.9"
    return 0, ""
