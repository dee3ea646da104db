"""Linear layers of an encoder in FP8: which ones, and the scales of their casts.

Scaling is delayed (Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433, and NVIDIA's
TransformerEngine): a cast's scale follows from the largest values of the last forward passes, so
that no tensor is read twice. All of an encoder's scales are made at once when its forward begins,
by a few operations on the device. Nothing here is a parameter or buffer, so checkpoints keep
Hugging Face's keys. Only encoders in training mode run in FP8.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import backend
from fastbert.check import require
from fastbert.modules.linear import encoders_of
from fastbert.modules.products import PRODUCTS, Products
from fastbert.ops.fp8_linear import (
    MULTIPLE,
    Fp8FeedForward,
    Fp8Linear,
    fp8_feed_forward,
    fp8_linear,
    inverse_of,
    multiplies_fp8,
)
from fastbert.ops.fp8_plain import E4M3, E5M2, LARGEST
from fastbert.ops.fused import joined, result_dtype

HISTORY = 16  # forward passes whose largest values decide a scale
ASSUMED = 16.0, 8.0, 1.0  # largest values of input, weight and gradient before any were seen


class Scales(Products):
    """The scales of an encoder's P linear layers, for the input, the weight and the gradient.

    history: (P, 3, HISTORY) float32, the largest absolute values of earlier passes, newest first;
    amax: (P, 3) float32, the largest since the last pass began, 0 before any; scale: (P, 3)
    float32, powers of two, for the last pass; inverse: (P, 3), `inverse_of` the scales. The last
    two are None before the first pass and if the last pass is in eval mode.
    """

    def __init__(self, layers: int) -> None:
        self.history = torch.tensor(ASSUMED)[:, None].repeat(layers, 1, HISTORY)
        self.amax = torch.zeros(layers, len(ASSUMED))
        self.scale: Tensor | None = None
        self.inverse: Tensor | None = None

    @torch.no_grad()
    def begin(self, x: Tensor, training: bool) -> None:
        """Makes the scales of a forward pass with input x; sets them to None if not `training`.

        Raises RuntimeError on hardware without FP8, unless a backend is forced that emulates it.
        """
        if not training:
            self.scale = self.inverse = None
            return
        if backend.forced() is None and not multiplies_fp8(x.device):
            raise RuntimeError(
                f'precision="fp8": {x.device} does not multiply FP8, which needs a GPU of compute '
                'capability 8.9 or later; `with fastbert.backend.use("reference"):` emulates it'
            )
        self.history, self.amax = self.history.to(x.device), self.amax.to(x.device)
        newest = self.history[..., :1]
        seen = torch.where(self.amax > 0, self.amax, newest[..., 0])  # 0 if the layer was unused
        self.history.copy_(torch.cat([seen[..., None], self.history[..., :-1]], -1))
        self.amax.zero_()
        largest = self.history.amax(-1)
        # a new tensor, because the backward of an earlier pass may still read that pass's scales
        formats = zip((E4M3, E4M3, E5M2), largest.unbind(1), strict=True)
        room = torch.stack([LARGEST[format] / most for format, most in formats], 1)
        self.scale = power_of_two(room)
        self.inverse = inverse_of(self.scale)

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """Undoes what passes inside have changed, whose scales may be in a graph's memory."""
        history, amax = self.history.clone(), self.amax.clone()
        scales = self.scale, self.inverse
        try:
            yield
        finally:
            self.history.copy_(history)
            self.amax.copy_(amax)
            self.scale, self.inverse = scales

    def state(self) -> dict[str, Tensor]:
        """Copies of the tensors that the next pass starts from, on the CPU."""
        return {"history": self.history.cpu().clone(), "amax": self.amax.cpu().clone()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restores a `state`; raises ValueError if it has another number of layers."""
        for name in ("history", "amax"):
            own, given = getattr(self, name), state[name]
            same = own.shape == given.shape
            require(same, "fp8", f"{name} of shape {tuple(own.shape)}", tuple(given.shape))
            own.copy_(given)


def power_of_two(x: Tensor) -> Tensor:
    """The largest power of two that is not above x; 1 where x is 0, infinite or NaN."""
    exponent = torch.frexp(x).exponent - 1
    usual = torch.ldexp(torch.ones_like(x), exponent.clamp(-60, 60))
    return torch.where((x > 0) & x.isfinite(), usual, 1.0)


class Slot(Products):
    """Multiplies in FP8 for one linear layer, with its encoder's scales at place `number`."""

    def __init__(self, scales: Scales, number: int) -> None:
        self.scales, self.number = scales, number

    def product(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
    ) -> Tensor | None:
        """`x @ weight.T + bias` in FP8; None if `Scales.scale` is None."""
        numbers = self._numbers()
        if numbers is None:
            return None
        bias = joined(biases) if biases else None
        return fp8_linear.run(Fp8Linear(x, joined(weights), bias, *numbers, result_dtype(x)))

    def feed_forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        output: Products,
        output_weight: Tensor,
        approximate: str,
    ) -> Tensor | None:
        """`gelu(x @ weight.T + bias) @ output_weight.T` in FP8; None if `Scales.scale` is None.

        output: the second layer's `Slot`; returns None too if that belongs to another encoder
        """
        numbers = self._numbers()
        if numbers is None or not isinstance(output, Slot) or output.scales is not self.scales:
            return None
        tensors = x, weight, bias, output_weight
        others = output._numbers()
        assert others is not None
        return fp8_feed_forward.run(
            Fp8FeedForward(*tensors, *numbers, *others, approximate, result_dtype(x))
        )

    def left_out(self, module: nn.Module) -> None:
        """Raises RuntimeError if the module's weight is not a parameter, as while it is pruned."""
        if self.scales.scale is not None and module._parameters.get("weight") is None:
            raise RuntimeError(
                'precision="fp8": the weight of a linear layer is not a parameter, as while it is '
                "pruned: call `torch.nn.utils.prune.remove` first"
            )

    def _numbers(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """The layer's scales, their inverses and largest values; None if the pass is not in FP8."""
        scales, number = self.scales, self.number
        if scales.scale is None or scales.inverse is None:
            return None
        if torch.compiler.is_compiling():
            raise RuntimeError('fp8: not under torch.compile; patch with precision="auto"')
        return scales.scale[number], scales.inverse[number], scales.amax[number]


def enable(model: nn.Module) -> None:
    """Makes the linear layers of the model's encoders run in FP8 in training mode.

    Heads, embeddings, poolers and adapters, also later ones, do not, nor do layers with a size that
    is not a multiple of 16. Raises ValueError if no encoder has a layer that can run in FP8.
    """
    found = False
    for layers in encoders_of(model):
        # peft keeps the adapters of a layer in ModuleDicts, by name; such small matrices would take
        # longer in FP8
        groups = [module for module in layers.modules() if isinstance(module, nn.ModuleDict)]
        adapters = {inner for group in groups for inner in group.modules()}
        plain = [module for module in layers.modules() if type(module) is nn.Linear]
        linears = [
            one
            for one in plain
            if one not in adapters and not any(size % MULTIPLE for size in one.weight.shape)
        ]
        if linears:
            scales = Scales(len(linears))
            vars(layers)[PRODUCTS] = scales
            for number, linear in enumerate(linears):
                vars(linear)[PRODUCTS] = Slot(scales, number)
            found = True
    expected = f"an encoder with linear layers whose sizes are multiples of {MULTIPLE}"
    require(found, "fp8", expected, type(model).__name__)


def disable(model: nn.Module) -> None:
    """Undoes `enable`."""
    for module in model.modules():
        vars(module).pop(PRODUCTS, None)


def scales_of(model: nn.Module) -> list[Scales]:
    """The scales of each encoder of the model, in order; none if FP8 is not enabled."""
    found = (vars(layers).get(PRODUCTS) for layers in encoders_of(model))
    return [scales for scales in found if isinstance(scales, Scales)]


def state(model: nn.Module) -> list[dict[str, Tensor]]:
    """What a checkpoint keeps of the scales; see `load`."""
    return [scales.state() for scales in scales_of(model)]


def load(model: nn.Module, saved: list[dict[str, Any]]) -> None:
    """Restores what `state` gave; raises ValueError if it is of another model."""
    own = scales_of(model)
    require(len(own) == len(saved), "fp8", f"scales of {len(own)} encoders", len(saved))
    for scales, one in zip(own, saved, strict=True):
        scales.load(one)
