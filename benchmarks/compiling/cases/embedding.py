"""The embeddings at the sizes of BERT-base, BERT-large and a small model."""

from collections.abc import Iterator

from benchmarks.compiling.cases import CAPABILITIES, SM100, Case
from fastbert.kernels import embedding, table_gradients
from fastbert.kernels.layer_norm_bwd import backward_block

IDS = ("input_ids_ptr", "position_ids_ptr", "token_type_ids_ptr", "order_ptr")
TABLES = ("word_ptr", "position_ptr", "token_type_ptr")
TABLES += ("dword_ptr", "dposition_ptr", "dtoken_type_ptr", "dz_ptr", "weight_ptr", "bias_ptr")
TYPES = dict.fromkeys((*IDS, "state_ptr", "token_key_ptr"), "*i64")
TYPES |= dict.fromkeys(("mean_ptr", "rstd_ptr", "partials_ptr", "heads_ptr", "tails_ptr"), "*fp32")
TYPES |= {"keys_ptr": "*i32", "eps": "fp32", "keep_scale": "fp32"}


def cases() -> Iterator[Case]:
    """Training under autocast, with float32 tables; also with everything in one dtype."""
    for columns in (384, 768, 1024):
        yield from _unit(columns, "bf16", "fp32", quick=columns == 768)
    for dtype in ("bf16", "fp16", "fp32"):
        yield from _unit(768, dtype, dtype)


def _unit(columns: int, dtype: str, table: str, quick: bool = False) -> Iterator[Case]:
    types = (
        TYPES | dict.fromkeys(TABLES, f"*{table}") | {"y_ptr": f"*{dtype}", "dy_ptr": f"*{dtype}"}
    )
    label = f"{columns} {dtype}, tables {table}"

    def case(kernel, block, *, wide_loads, **constants) -> Case:
        block_m, block_n, num_warps = block
        shape = {"N_COLS": columns, "BLOCK_M": block_m, "BLOCK_N": block_n}
        shape = {k: v for k, v in (shape | constants).items() if k in kernel.arg_names}
        is_quick = quick and "chunks" not in kernel.__name__
        return Case(
            kernel, label, shape, num_warps, types=types, wide_loads=wide_loads, quick=is_quick
        )

    def loads(block, dtype: str) -> int:  # of 16 bytes, a thread, for each tensor
        block_m, block_n, num_warps = block
        return block_m * block_n * (4 if dtype == "fp32" else 2) // (16 * 32 * num_warps)

    block = embedding.forward_block(columns)
    wide = 3 * loads(block, table)
    yield case(embedding._forward_kernel, block, wide_loads=wide)
    alone = dict.fromkeys(("state_ptr", "token_key_ptr", "mean_ptr", "rstd_ptr"))
    inference = case(embedding._forward_kernel, block, wide_loads=wide, **alone)
    yield inference._replace(label=f"{label}, inference", quick=False)
    block = backward_block(columns)
    wide = 3 * loads(block, table) + loads(block, dtype)
    backward = case(embedding._backward_kernel, block, wide_loads=wide, UNIT=8)
    if label == "768 fp16, tables fp16":
        # twice the warps would not spill; autocast, whose tables are float32, has no need of them
        backward = backward._replace(spills={SM100: 2}, reason="one register with Triton 3.9")
    yield backward
    for capability in CAPABILITIES if dtype == "bf16" else ():
        chunk = table_gradients.chunk_size(capability)
        row, join = (1, *table_gradients.sum_block(columns)), table_gradients.JOIN_BLOCK
        for kernel, block in (
            (table_gradients._sum_chunks_kernel, row),
            (table_gradients._join_chunks_kernel, join),
        ):
            chunks = case(kernel, block, wide_loads=1, CHUNK=chunk)
            yield chunks._replace(capabilities=(capability,))
