"""Layer norm, and dropout + residual + layer norm, at the sizes of BERT and its relatives."""

from collections.abc import Iterator

from benchmarks.compiling.cases import SM100, Case
from fastbert.kernels import layer_norm_bwd, layer_norm_fwd, partial_sums

TYPES = {"state_ptr": "*i64", "token_key_ptr": "*i64", "eps": "fp32", "keep_scale": "fp32"}
TYPES |= dict.fromkeys(("weight_ptr", "bias_ptr", "x_bias_ptr"), "*fp32")  # autocast's training
TYPES |= dict.fromkeys(("mean_ptr", "rstd_ptr", "partials_ptr"), "*fp32")
TYPES |= dict.fromkeys(("out0_ptr", "out1_ptr", "out2_ptr"), "*fp32")
PLAIN = dict.fromkeys(("residual_ptr", "x_bias_ptr", "state_ptr", "token_key_ptr", "z_ptr"))
FROM_Z, FROM_Y = {"bias_ptr": None}, {"mean_ptr": None}
INFERENCE = dict.fromkeys(("state_ptr", "token_key_ptr", "z_ptr", "mean_ptr", "rstd_ptr"))
NO_DROPOUT = FROM_Z | dict.fromkeys(("state_ptr", "token_key_ptr", "dx_ptr"))


def cases() -> Iterator[Case]:
    for columns in (128, 312, 384, 768, 1024, 2048, 4096):
        quick = columns == 768
        yield _forward(columns, "dropout", {}, quick=quick)
        for label, kept in (("dropout", FROM_Z), ("dropout, from y", FROM_Y)):
            yield _backward(columns, label, kept | {"HAS_X_BIAS": True}, quick=quick)
    for columns in (768, 1024):
        constants = dict.fromkeys(("state_ptr", "token_key_ptr"))
        yield _forward(columns, "no dropout", constants)
        yield _forward(columns, "plain", PLAIN)
        yield _forward(columns, "inference", INFERENCE)
        yield _forward(columns, "plain inference", PLAIN | INFERENCE)
        yield _forward(columns, "dropout, for y", {"z_ptr": None, "mean_ptr": None})
        yield _backward(columns, "no dropout", NO_DROPOUT | {"HAS_X_BIAS": True})
        yield _backward(columns, "plain", NO_DROPOUT | {"HAS_X_BIAS": False})
        for dtype in ("fp16", "fp32"):
            yield _forward(columns, f"dropout {dtype}", {}, dtype)
            for label, kept in (("dropout", FROM_Z), ("dropout, from y", FROM_Y)):
                yield _backward(columns, f"{label} {dtype}", kept | {"HAS_X_BIAS": True}, dtype)
        block_m, block_n, num_warps = partial_sums.ADD_BLOCK
        constants = {"N_COLS": columns, "BLOCK_M": block_m, "BLOCK_N": block_n}
        kernel = partial_sums._add_partials_kernel
        yield Case(kernel, str(columns), constants, num_warps, types=TYPES, wide_loads=1)


def _forward(columns, label, constants, dtype="bf16", quick=False) -> Case:
    block = layer_norm_fwd.forward_block(columns)
    return _case(
        layer_norm_fwd.layer_norm_fwd_kernel, block, columns, label, constants, dtype, quick
    )


def _backward(columns, label, constants, dtype="bf16", quick=False) -> Case:
    block = layer_norm_bwd.backward_block(columns)
    case = _case(
        layer_norm_bwd.layer_norm_bwd_kernel, block, columns, label, constants, dtype, quick
    )
    if case.label == "768 dropout fp32":
        # 8 warps would not spill, but the table is also that of bf16
        return case._replace(spills={SM100: 2}, reason="one register with Triton 3.8 and 3.9")
    return case


def _case(kernel, block, columns, label, constants, dtype, quick) -> Case:
    block_m, block_n, num_warps = block
    shape = {"N_COLS": columns, "BLOCK_M": block_m, "BLOCK_N": block_n, "UNIT": 8}
    element_bytes = 4 if dtype == "fp32" else 2
    loads = block_m * block_n * element_bytes // (16 * 32 * num_warps)  # a thread, of each tensor
    tensors = 1 if "residual_ptr" in constants else 2
    activations = (
        "x_ptr",
        "residual_ptr",
        "y_ptr",
        "z_ptr",
        "kept_ptr",
        "dy_ptr",
        "dz_ptr",
        "dx_ptr",
    )
    return Case(
        kernel,
        f"{columns} {label}",
        constants | shape,
        num_warps,
        types=TYPES | dict.fromkeys(activations, f"*{dtype}"),
        wide_loads=tensors * loads,
        quick=quick,
    )
