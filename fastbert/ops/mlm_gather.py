"""Picks the tokens that have a label, so that the masked-LM head runs only on them."""

from typing import NamedTuple

from torch import Tensor

from fastbert.check import require
from fastbert.ops.compact import compact
from fastbert.ops.fused import is_one_graph, on_host
from fastbert.ops.gather_rows import Gather, gather_rows
from fastbert.packing import IGNORE_INDEX


class MaskedRows(NamedTuple):
    """rows: (C, H); targets: (C,); positions: (C,) int32, -1 for filler rows; count: () int32."""

    rows: Tensor
    targets: Tensor
    positions: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which is not needed here


def mlm_gather(
    hidden: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    capacity: int | None = None,
) -> MaskedRows:
    """The rows of `hidden` whose label is not `ignore_index`, with their labels.

    hidden: (T, H); labels: (T,) of an integer dtype. C is `capacity`, or if that is None the exact
    count, for which the host waits for a GPU. Filler rows are zeros with the target ignore_index,
    so they add nothing to a loss or a gradient. `count` is the true count, even if it exceeds the
    capacity and only the first C rows are returned. positions: the token that each row is from.

    Raises ValueError for other shapes, labels of another dtype or device, or a negative capacity.
    """
    who = "mlm_gather"
    require(hidden.ndim == 2, who, "hidden of shape (tokens, hidden)", tuple(hidden.shape))
    expected = f"labels of shape (tokens,) = ({hidden.shape[0]},)"
    require(labels.shape == hidden.shape[:1], who, expected, tuple(labels.shape))
    expected = f"labels on {hidden.device}, where hidden is"
    require(labels.device == hidden.device, who, expected, labels.device)
    is_integer = not (labels.is_floating_point() or labels.is_complex())
    require(is_integer, who, "labels of an integer dtype", labels.dtype)
    targets, positions, slots, offsets = compact(labels[None], ignore_index, capacity)
    rows = gather_rows.run(Gather(hidden, positions, slots))
    return MaskedRows(rows, targets, positions, count=offsets[-1])


def count_labels(labels: Tensor) -> int:
    """How many labels there are, for which the host waits for a GPU.

    Where torch.compile traces one graph, which reads no values: how many there may be.
    """
    return labels.numel() if is_one_graph() else on_host((labels != IGNORE_INDEX).sum())
