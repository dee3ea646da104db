"""Attention at head sizes of BERT (64), of smaller and larger models, and of one that is padded."""

from collections.abc import Iterator

from benchmarks.compiling.cases import CAPABILITIES, SM80, SM90, SM100, Case
from fastbert.kernels import attention_bwd, attention_dropout, attention_fwd, attention_single
from fastbert.kernels.attention_common import Tile, block_d

FP32 = ("lse_ptr", "delta_ptr", "total_ptr")
INT32 = ("cu_q_ptr", "cu_k_ptr", "words_ptr")
TYPES = {
    **dict.fromkeys(FP32, "*fp32"),
    **dict.fromkeys(INT32, "*i32"),
    "softmax_scale": "fp32",
    "keep_scale": "fp32",
}
FLOAT32_SPILLS = 200
TWO_REGISTERS = "two registers with Triton 3.9"


def cases() -> Iterator[Case]:
    for capability in CAPABILITIES:
        yield words_case(capability)
        for head_dim in (32, 64, 80, 128):
            for dropout in (False, True):
                yield from kernels(capability, head_dim, "bf16", dropout=dropout)
        yield from kernels(capability, 64, "fp16", dropout=True)
        yield from kernels(capability, 64, "bf16", mask="*u8")
        yield from kernels(capability, 64, "bf16", mask="*bf16", dropout=True)
        yield from kernels(capability, 64, "fp32", dropout=True)


def words_case(capability: int) -> Case:
    block_rows, block_words, num_warps = attention_dropout.words_block(capability)
    constants = {"BLOCK_ROWS": block_rows, "BLOCK_WORDS": block_words}
    types = TYPES | {"token_key_ptr": "*i64", "state_ptr": "*i64"}
    kernel = attention_dropout.attention_drop_words_kernel
    only = (capability,)
    return Case(kernel, "", constants, num_warps, types=types, capabilities=only, quick=True)


def kernels(
    capability: int, head_dim: int, dtype: str, *, mask: str = "", dropout: bool = False
) -> Iterator[Case]:
    """The kernels as the launchers start them on one GPU."""
    columns = block_d(head_dim)
    has_mask = bool(mask)
    size = 4 if dtype == "fp32" else 2
    common = {"HEAD_DIM": head_dim, "BLOCK_D": columns}
    common["PRECISION"] = "tf32x3" if dtype == "fp32" else "ieee"
    options = f"{dtype} {head_dim}{' mask' if mask else ''}{' dropout' if dropout else ''}"
    absent = {} if dropout else {"words_ptr": None}
    absent |= {"total_ptr": None} if size == 2 else {}
    absent |= {"mask_col_stride": 1} if mask else {"mask_ptr": None}

    limit = 0, ""
    if size == 4:
        limit = FLOAT32_SPILLS, "three tf32 products for one in float32"
    elif capability == SM80 and dropout:
        limit = 2, "one register with Triton 3.6"
    elif capability == SM100 and dropout and head_dim > 64:
        limit = 4, TWO_REGISTERS

    def case(
        kernel, tile: Tile, constants: dict, limit: tuple[int, str] = limit, note: str = ""
    ) -> Case:
        tensors = {name: f"*{dtype}" for name in kernel.arg_names if name.endswith("_ptr")}
        known = {name: value for name, value in absent.items() if name in kernel.arg_names}
        return Case(
            kernel,
            f"{options} {tile.block_m}x{tile.block_n}{note}",
            {**common, **constants, **known},
            tile.num_warps,
            tile.num_stages,
            types=tensors | TYPES | {"mask_ptr": mask},
            wide_loads=2,
            dots=True,
            spills={capability: limit[0]},
            reason=limit[1],
            capabilities=(capability,),
            quick=capability == SM90 and options == "bf16 64 dropout" and tile.block_m < 128,
        )

    def blocks(tile: Tile) -> dict:
        return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}

    tile = attention_fwd.fwd_tile(capability, size, columns, dropout=dropout, mask=has_mask)
    yield case(attention_fwd.attention_fwd_kernel, tile, blocks(tile))
    if not dropout:
        alone = blocks(tile) | {"lse_ptr": None}
        yield case(attention_fwd.attention_fwd_kernel, tile, alone, note=" inference")
    tile = attention_bwd.dq_tile(capability, size, columns, dropout=dropout, mask=has_mask)
    yield case(attention_bwd.attention_dq_kernel, tile, blocks(tile))
    tile = attention_bwd.dkdv_tile(capability, size, columns, mask=has_mask)
    pipelined = (4, TWO_REGISTERS) if dropout and tile.num_stages > 1 else limit
    yield case(attention_bwd.attention_dkdv_kernel, tile, blocks(tile), pipelined)
    for longest in (64, 128):
        single = attention_single.single_tile(capability, size, columns, longest, dropout=dropout)
        if single is not None and not mask:
            block = {"BLOCK": single.block_m}
            half = (115, "faster than 8 warps without") if single[:3] == (128, 128, 4) else limit
            yield case(attention_single.attention_single_kernel, single, block, half)
