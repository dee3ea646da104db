"""Layer norm, and dropout + residual + layer norm, at the sizes of BERT and its relatives."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from benchmarks.compiling.cases import CAPABILITIES, ROWS, SM90, Case, dropout_of, floats
from fastbert.ops.layer_norm import Norm, dropout_add_layer_norm, layer_norm


def cases() -> Iterator[Case]:
    for columns in (128, 312, 384, 768, 1024, 2048, 4096):
        is_quick = columns == 768
        yield _add(columns, "dropout", quick=CAPABILITIES * is_quick)
        yield _add(columns, "dropout, from y", save="y", quick=(SM90,) * is_quick)
        yield _add(columns, "dropout, one branch", branches=False)
        yield _add(columns, "dropout, frozen", frozen=True)
    for columns in (768, 1024):
        yield _add(columns, "no dropout", dropout_p=0.0)
        yield _add(columns, "inference", dropout_p=0.0, trains=False)
        yield _add(columns, "inference, fp32 stream", stream="fp32", dropout_p=0.0, trains=False)
        yield _add(columns, "dropout, fp32 stream", stream="fp32")
        tensors = floats(ROWS, columns, dtype="bf16"), floats(columns), floats(columns)
        yield Case(f"{columns} plain", layer_norm, tensors)
        yield Case(f"{columns} plain inference", layer_norm, tensors, trains=False)
        for dtype in ("fp16", "fp32"):
            yield _add(columns, f"dropout {dtype}", dtype)
            yield _add(columns, f"dropout, from y {dtype}", dtype, save="y")


def _add(
    columns: int, label: str, dtype: str = "bf16", *, dropout_p: float = 0.1, save: str = "z",
    branches: bool = True, trains: bool = True, quick: tuple[int, ...] = (), stream: str = "",
    frozen: bool = False,
) -> Case:  # fmt: skip
    """A case with activations in `dtype` and float32 parameters, as in training under autocast.

    stream: the residual's dtype, by default the activations'; frozen: whether no parameter gets a
    gradient
    """
    options = {"save": save, "branches": branches, **dropout_of(dropout_p)}

    parameters = tuple(floats(columns) for _ in range(3))

    def call(x: Tensor, residual: Tensor, *trained: Tensor) -> Any:
        weight, bias, x_bias = trained or parameters
        call = Norm(x, residual, weight, bias, x_bias=x_bias, **options)
        return dropout_add_layer_norm.run(call)

    activations = tuple(floats(ROWS, columns, dtype=one) for one in (dtype, stream or dtype))
    tensors = activations if frozen else (*activations, *parameters)
    return Case(f"{columns} {label}", call, tensors, trains, quick)
