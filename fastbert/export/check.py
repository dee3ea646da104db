"""Compares the outputs of an exported file with the model's."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert.check import InputError
from fastbert.config.bert import BertConfig
from fastbert.export.formats import Inputs, Runner

TOLERANCE = 1e-4  # in float32: absolute up to 1, relative above
_UNIT = 2.0**-11  # relative error of one rounding to fp16
_PER_LAYER, _AROUND = 12, 4  # fp16 roundings that reach the residual stream: per layer, elsewhere
_SIGMAS = 6  # a bound for the largest of a million independent errors


class Difference(NamedTuple):
    """found: the largest error; allowed: its tolerance, in the same unit."""

    found: float
    allowed: float


def fp16_tolerance(num_layers: int) -> float:
    """How far fp16 may be from float32, in units of the root mean square of an output.

    Each rounding has a relative error of at most 2^-11, independent of the others. About twelve per
    layer reach the residual stream, whose scale LayerNorm keeps, so their sum grows with the square
    root of their number. That is 0.036 at twelve layers; measured errors are a tenth to a third of
    the tolerance (docs/export.md).
    """
    return _SIGMAS * math.sqrt(_PER_LAYER * num_layers + _AROUND) * _UNIT


def batches(config: BertConfig, has_choices: bool, seed: int = 0) -> Iterator[Inputs]:
    """Random batches of four sizes, none the traced one; padded left, right, on both sides or not.

    has_choices: inputs are (B, 4, S), else (B, S); all are int64
    """
    generator = torch.Generator().manual_seed(seed)
    longest = config.max_position_embeddings
    for batch, length in ((1, 1), (1, 16), (5, 33), (3, longest)):
        shape = (batch, 4, min(length, longest)) if has_choices else (batch, min(length, longest))

        def random(high: int, shape: tuple[int, ...] = shape) -> Tensor:
            return torch.randint(high, shape, generator=generator)

        mask = torch.ones(shape, dtype=torch.int64)
        for number, row in enumerate(mask.view(-1, shape[-1])[1:]):
            left, right = ((1 / 4, 0), (0, 1 / 2), (1 / 8, 1 / 4), (0, 0))[number % 4]
            row[: int(left * len(row))] = 0
            row[len(row) - int(right * len(row)) :] = 0
        yield {
            "input_ids": random(config.vocab_size),
            "attention_mask": mask.view(shape),
            "token_type_ids": random(config.type_vocab_size),
        }


def compare(
    who: str,
    run: Runner,
    wanted: Callable[[Inputs], dict[str, Tensor]],
    *inputs: Inputs,
    fp16_layers: int | None = None,
) -> Difference:
    """The difference that is closest to its tolerance, over all outputs and batches.

    run: computes the outputs to check; wanted: computes the expected ones; fp16_layers: number of
    layers of a model in fp16, None in float32. Raises InputError, which begins with `who`, if an
    output's name or shape is wrong, or a number differs by more than its tolerance or is NaN.
    """
    worst = Difference(0.0, TOLERANCE)
    for one in inputs:
        got, answer = run(one), wanted(one)
        shape = tuple(one["input_ids"].shape)
        if got.keys() != answer.keys():
            raise InputError(f"{who}: has outputs {', '.join(got)}, not {', '.join(answer)}")
        for name, expected in answer.items():
            where = f"{who}: on a batch {shape}, {name}"
            if got[name].shape != expected.shape:
                sizes = tuple(got[name].shape), tuple(expected.shape)
                raise InputError(f"{where} has shape {sizes[0]}, not {sizes[1]}")
            difference = _difference(got[name], expected, fp16_layers)
            if not difference.found <= difference.allowed:  # NaN too
                raise InputError(
                    f"{where} differs from the model's by {difference.found:.2e}, more than the "
                    f"allowed {difference.allowed:.2e}; no file is kept"
                )
            worst = max(worst, difference, key=lambda one: one.found / one.allowed)
    return worst


def _difference(got: Tensor, wanted: Tensor, fp16_layers: int | None) -> Difference:
    lowest = torch.finfo(torch.float32).min  # a span logit at padding, which must be equal
    is_number = wanted != lowest
    if not torch.equal(is_number, got != lowest):
        return Difference(math.inf, TOLERANCE)
    got, wanted = got[is_number].double(), wanted[is_number].double()
    errors = (got - wanted).abs()
    if fp16_layers is None:
        errors = errors / wanted.abs().clamp(min=1)
        return Difference(float(errors.max()), TOLERANCE)
    size = float(wanted.square().mean().sqrt())
    return Difference(float(errors.max()), fp16_tolerance(fp16_layers) * max(size, 1.0))
