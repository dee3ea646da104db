"""A call of an encoder's layers, and the bucket of sizes whose graph may compute it.

T packed tokens of B sequences, M wanted rows, H hidden; a bucket has T', B' and M' of them.
"""

import contextlib
import itertools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastbert.modules.layer import LayerParts, layers_of, run_layers
from fastbert.modules.linear import PRODUCTS
from fastbert.modules.sequences import Rows, Sequences
from fastbert.ops.embedding import Call as Embedding


class Bucket(NamedTuple):
    """Sizes that a call is padded to, in tokens; `sequences` is a count of sequences.

    longest: an upper bound of sequence lengths; rows, longest_rows: the same for the wanted rows, 0
    where all tokens are wanted.
    """

    tokens: int
    sequences: int
    longest: int
    rows: int = 0
    longest_rows: int = 0

    @classmethod
    def of(cls, x: Tensor | Embedding, sequences: Sequences, rows: Rows | None) -> "Bucket":
        """The smallest bucket for the call; at most 15 tokens or an eighth of them are filler."""
        tokens, count, longest = x.shape[0], sequences.cu_seqlens.shape[0] - 1, sequences.max_seqlen
        wanted = (0, 0)
        if rows is not None:
            wanted = rounded(rows.index.shape[0], 16), rounded(rows.max_seqlen, 64)
        return cls(
            rounded(tokens, 16), 1 << (count - 1).bit_length(), rounded(longest, 64), *wanted
        )


def rounded(size: int, least: int) -> int:
    """`size` rounded up to a multiple of `least`, or of a power of two up to size / 8 if larger."""
    step = max(least, 1 << max(size.bit_length() - 4, 0))
    return -(-size // step) * step


class Precision(NamedTuple):
    """The autocast state of a call; the call's gradient is computed without autocast."""

    device: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor | Embedding) -> "Precision":
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
    """The arguments of the layers, except x (T, H).

    numbers, states: as in `run_layers`; training: the layers' mode; products: the `Products` that a
    recording keeps to, of `products_of`; trained: the distinct parameters that require a gradient,
    None if none does and neither does x
    """

    parts: Sequence[LayerParts]
    numbers: range
    sequences: Sequences
    states: tuple[int, ...]
    rows: Rows | None
    precision: Precision
    training: bool
    products: weakref.ref[Any] | None = None
    trained: list[Tensor] | None = None

    def own(self, x: Tensor | Embedding, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Copies of a graph's outputs without the filler; x: the call's."""
        count = (x if self.rows is None else self.rows.index).shape[0]
        return copies_of([output[:count] for output in outputs])

    def begin(self, x: Tensor) -> None:
        """Tells the `Products` that a pass begins."""
        products = self.present_products()
        if products is not None:
            products.begin(x, self.training)

    def run(self, x: Tensor) -> list[Tensor]:
        """What `run_layers` gives, under the call's autocast state."""
        run = layers_of(self.parts)
        with self.precision.restored():
            return run_layers(self.numbers, x, self.sequences, self.states, self.rows, run)

    def present_products(self) -> Any:
        """The `Products`, None without any."""
        return None if self.products is None else self.products()

    def undone(self) -> contextlib.AbstractContextManager[None]:
        """Has the `Products` as before at its end, because what runs inside is no user's pass."""
        products = self.present_products()
        return contextlib.nullcontext() if products is None else products.undone()

    def segments(self, count: int) -> list["Segment"]:
        """The layers in `count` parts of about as many layers, or in parts of one."""
        places = {parameter: place for place, parameter in enumerate(self.trained or ())}
        count = max(min(count, len(self.numbers)), 1)
        ends = [len(self.numbers) * number // count for number in range(count + 1)]
        found = []
        for start, stop in itertools.pairwise(ends):
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
            rows=call.rows if self.numbers.stop == call.numbers.stop else None,
            trained=[call.trained[place] for place in self.trained],
        )


def inputs_of(x: Tensor | Embedding) -> list[Tensor]:
    """The tensors (T, ...) of which a graph that begins with x has copies."""
    return [x] if isinstance(x, Tensor) else [ids for ids in x[:3] if ids is not None]


def fixed_of(x: Tensor | Embedding) -> Any:
    """What a recorded graph fixes of embeddings: their tables; None for the stream itself."""
    if isinstance(x, Tensor):
        return None
    ids = [None if one is None else one.dtype for one in x[:3]]
    tables = [(one.data_ptr(), one.dtype, one.shape) for one in x[3:8] if one is not None]
    return *ids, *tables, x.eps


def copies_of(tensors: list[Tensor]) -> list[Tensor]:
    """Copies of tensors, in few launches."""
    if len(tensors) == 1:
        return [tensors[0].clone()]
    return list(torch._foreach_mul(tensors, 1)) if tensors else []
