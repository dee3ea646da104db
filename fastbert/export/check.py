"""Whether an exported file answers as the model does."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastbert.check import InputError
from fastbert.config.bert import BertConfig
from fastbert.export.formats import Inputs, Runner

TOLERANCE = 1e-4  # in float32, of a number of at most 1 and relative to a larger one
_UNIT = 2.0**-11  # relative error of one rounding to fp16
_PER_LAYER, _AROUND = 12, 4  # roundings to fp16 of what flows through a layer, and outside
_SIGMAS = 6  # the largest of a million independent errors is within


class Difference(NamedTuple):
    """The largest |got - wanted|, and that which is allowed there."""

    found: float
    allowed: float


def fp16_tolerance(num_layers: int) -> float:
    """How far fp16 may be from float32, in units of the root mean square of an output.

    Roundings err independently by at most 2^-11, and about twelve in a layer reach the residual
    stream, which LayerNorm keeps at one scale: their sum grows by the square root. 0.036 at twelve
    layers, of which a model takes a tenth to a third.
    """
    return _SIGMAS * math.sqrt(_PER_LAYER * num_layers + _AROUND) * _UNIT


def batches(config: BertConfig, has_choices: bool, seed: int = 0) -> Iterator[Inputs]:
    """Batches of several sizes, none of them the traced one, padded left, right, both and not."""
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
    """The worst difference of what `run` answers from what is wanted, of all outputs and batches.

    fp16_layers: of a model in fp16, None for float32. Raises InputError, beginning with `who`,
    where a name, a shape or a number is not as it should be.
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
                    f"{where} differs from the model's by {difference.found:.2e}, more than "
                    f"{difference.allowed:.2e}; the file was not kept"
                )
            worst = max(worst, difference, key=lambda one: one.found / one.allowed)
    return worst


def _difference(got: Tensor, wanted: Tensor, fp16_layers: int | None) -> Difference:
    lowest = torch.finfo(torch.float32).min  # of a span at padding: the same, or an error
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
