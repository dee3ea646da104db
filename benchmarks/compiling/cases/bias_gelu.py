"""Bias and GELU at the widths of the feed-forward layers of BERT-base and BERT-large."""

from collections.abc import Iterator

from benchmarks.compiling.cases import CAPABILITIES, Case
from fastbert.kernels import bias_gelu


def cases() -> Iterator[Case]:
    forward, backward = bias_gelu._bias_gelu_fwd_kernel, bias_gelu._bias_gelu_bwd_kernel
    for columns, dtype, tanh in (
        (3072, "bf16", False),
        (4096, "bf16", False),
        (4096, "bf16", True),
        (3072, "fp16", False),
        (3072, "fp32", False),
        (3072, "fp32", True),
    ):
        constants = {
            "N_COLS": columns,
            "TANH": tanh,
            "EXACT": dtype == "fp32",
        }
        # activations in `dtype`, the bias a float32 parameter as under autocast
        names = ("x_ptr", "y_ptr", "dy_ptr", "dx_ptr")
        types = {**dict.fromkeys(names, f"*{dtype}"), "bias_ptr": "*fp32", "dbias_ptr": "*fp32"}
        label = f"{columns} {dtype}{' tanh' * tanh}"
        launches = [(forward, bias_gelu.FWD_BLOCK, CAPABILITIES)]
        for capability in CAPABILITIES:
            block = bias_gelu.backward_block(capability, 4 if dtype == "fp32" else 2)
            launches.append((backward, block, (capability,)))
        for kernel, (rows, cols, num_warps), capabilities in launches:
            yield Case(
                kernel, label, {**constants, "ROWS": rows, "COLS": cols}, num_warps,
                types=types, wide_loads=2, capabilities=capabilities,
                quick=(columns, dtype, tanh) == (4096, "bf16", False),
            )  # fmt: skip
