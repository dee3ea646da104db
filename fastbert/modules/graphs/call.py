"""A call of an encoder's layers, as a graph computes it.

T packed tokens of B sequences, M wanted rows, H hidden.
"""

import contextlib
import itertools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastbert.modules.graphs.padded import PaddedBatch
from fastbert.modules.layer import LayerParts, layers_of, run_layers
from fastbert.modules.linear import PRODUCTS
from fastbert.modules.sequences import Rows, Sequences


class Precision(NamedTuple):
    """The autocast state of a call; the call's gradient is computed without autocast."""

    device: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor | PaddedBatch) -> "Precision":
        device = x.device.type
        enabled = torch.is_autocast_enabled(device)
        return cls(device, enabled, torch.get_autocast_dtype(device))

    def restored(self) -> Any:
        """A context with the autocast state of the call."""
        # no cache: a recording must neither read autocast's earlier copies of weights nor keep any
        return torch.autocast(self.device, self.dtype, self.enabled, cache_enabled=False)


def products_of(layers: nn.ModuleList) -> weakref.ref[Any] | None:
    """The layers' `Products`, by a weak reference, as they refer to the layers; None without."""
    products = vars(layers).get(PRODUCTS)
    return None if products is None else weakref.ref(products)


class Call(NamedTuple):
    """The arguments of the layers, except x: (T, H), or a padded batch.

    sequences: None for a padded batch, of which a graph finds them; numbers, states: as in
    `run_layers`; training: the layers' mode; products: the `Products` that a recording keeps to, of
    `products_of`; trained: the distinct parameters that require a gradient, None if none does and
    neither does x
    """

    parts: Sequence[LayerParts]
    numbers: range
    sequences: Sequences | None
    states: tuple[int, ...]
    rows: Rows | None
    precision: Precision
    training: bool
    products: weakref.ref[Any] | None = None
    trained: list[Tensor] | None = None

    def own(self, x: Tensor | PaddedBatch, outputs: list[Tensor]) -> list[Tensor]:
        """Copies of a graph's outputs without the filler; x: the call's."""
        if isinstance(x, PaddedBatch):
            return x.own(outputs)
        count = (x if self.rows is None else self.rows.index).shape[0]
        return copies_of([output[:count] for output in outputs])

    def begin(self, x: Any) -> None:
        """Tells the `Products` that a pass begins."""
        products = self.present_products()
        if products is not None:
            products.begin(x, self.training)

    def run(self, x: Tensor | PaddedBatch) -> list[Tensor]:
        """What `run_layers` gives, or `PaddedBatch.run`, under the call's autocast state."""
        with self.precision.restored():
            if isinstance(x, PaddedBatch):
                return x.run(self.parts, self.numbers)
            assert self.sequences is not None
            run = layers_of(self.parts)
            return run_layers(self.numbers, x, self.sequences, self.states, self.rows, run)

    def present_products(self) -> Any:
        """The `Products`, None without any."""
        return None if self.products is None else self.products()

    def undone(self) -> contextlib.AbstractContextManager[None]:
        """Has the `Products` as before at its end, because what runs inside is no user's pass."""
        products = self.present_products()
        return contextlib.nullcontext() if products is None else products.undone()

    def segments(self, count: int) -> list["Segment"]:
        """The layers in `count` parts of about as many layers, or in parts of one.

        A part also ends with each layer whose state is wanted: a node of autograd for each part
        lets the gradient of what follows reach the state.
        """
        places = {parameter: place for place, parameter in enumerate(self.trained or ())}
        count = max(min(count, len(self.numbers)), 1)
        ends = {len(self.numbers) * number // count for number in range(count + 1)}
        ends |= {number + 1 for number in self.states}
        found = []
        for start, stop in itertools.pairwise(sorted(ends)):
            leaves = [leaf for part in self.parts[start:stop] for leaf in part.leaves]
            every = {p: None for leaf in leaves for p in leaf.parameters.values()}
            own = [places[parameter] for parameter in every if parameter in places]
            found.append(Segment(range(start, stop), own))
        return found


class Segment(NamedTuple):
    """Some of a call's layers; trained: the places of their parameters in the call's `trained`."""

    numbers: range
    trained: list[int]

    def of(self, call: Call) -> Call:
        """The call of these layers alone."""
        assert call.trained is not None
        return call._replace(
            numbers=self.numbers,
            states=(),
            rows=call.rows if self.numbers.stop == call.numbers.stop else None,
            trained=[call.trained[place] for place in self.trained],
        )


def copies_of(tensors: list[Tensor]) -> list[Tensor]:
    """Copies of tensors, in few launches, each of which takes tensors of one dtype."""
    dtypes, copies = [tensor.dtype for tensor in tensors], {}
    for dtype in dict.fromkeys(dtypes):
        some = [tensor for tensor, own in zip(tensors, dtypes, strict=True) if own == dtype]
        copies[dtype] = iter(torch._foreach_mul(some, 1))
    return [next(copies[dtype]) for dtype in dtypes]
