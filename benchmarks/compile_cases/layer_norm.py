"""Layer norm at the sizes of BERT-base and BERT-large, in bf16."""

from collections.abc import Iterator

from benchmarks.compile_cases import Case
from fastbert.kernels import layer_norm


def cases() -> Iterator[Case]:
    statistics = dict.fromkeys(("mean_ptr", "rstd_ptr", "dweight_ptr", "dbias_ptr"), "*fp32")
    types = {"eps": "fp32", **statistics}
    for columns in (768, 1024):
        block, num_warps = layer_norm.block_and_warps(columns)
        constants = {"N_COLS": columns, "BLOCK_N": block}
        for kernel in (layer_norm._layer_norm_fwd_kernel, layer_norm._layer_norm_bwd_kernel):
            yield Case(
                kernel, str(columns), constants, num_warps, types=types, wide_loads=3, quick=True
            )
