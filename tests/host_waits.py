"""A stand-in for a GPU's host: an error where a step would wait for the device.

On a GPU the host waits where it reads a tensor, where a result has as many rows as the device says,
and where a value is copied over from the host's memory, be it one number. On a CPU all of this
works, so `NoHostWaits` refuses it. Tests that a captured CUDA graph would fail fail here, too.
"""

import sys
import weakref
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastbert

PACKAGE = str(Path(fastbert.__file__).parent)
aten = torch.ops.aten
READS = {
    aten._local_scalar_dense,  # int(x), bool(x), x.item()
    aten.equal,
    aten.is_nonzero,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
FROM_THE_HOST = {aten.lift_fresh, aten.lift_fresh_copy, aten.lift}  # torch.tensor(...)


class HostWaits(Exception):
    """The host would have waited for the device."""


class NoHostWaits(TorchDispatchMode):
    """Raises HostWaits where the host would wait, but in functions named by `allowed`.

    present: the tensors that are on the device already; each other tensor that an operator takes
    must be the result of one. seen: the allowed functions that waited, in order.
    """

    def __init__(self, present: Iterable[Tensor], allowed: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.allowed = allowed
        self.seen: list[str] = []
        self.storages: dict[int, torch.UntypedStorage] = {}  # kept, so that no number comes twice
        self.functions = _Lists(self)
        for tensor in present:
            self._know(tensor)

    def __enter__(self):
        self.functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.functions.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = function.overloadpacket
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if packet in READS:
            self.waits(f"{function} is read by the host")
        if packet in INDEXING and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        ):
            self.waits(f"{function} by a mask, whose rows the host must count")
        if packet is aten.repeat_interleave and kwargs.get("output_size") is None:
            self.waits(f"{function} without an output_size")
        if str(packet) == "fastbert.compact" and args[2:3] in ((), (None,)):
            self.waits("compact without a capacity")
        if packet in FROM_THE_HOST:
            self.waits(f"{function} copies from the host")
        for tensor in tensors:
            if tensor.untyped_storage()._cdata not in self.storages:
                self.waits(f"{function} takes {tuple(tensor.shape)} {tensor.dtype} from the host")
        result = function(*args, **kwargs)
        for tensor in (*tensors, *tree_leaves(result)):
            if isinstance(tensor, Tensor):
                self._know(tensor)
        return result

    def waits(self, what: str) -> None:
        frame = sys._getframe()
        while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
            frame = frame.f_back
        place = "outside fastbert"
        if frame is not None:
            if frame.f_code.co_name in self.allowed:
                self.seen.append(frame.f_code.co_name)
                return
            place = f"{frame.f_code.co_filename}:{frame.f_lineno}, {frame.f_code.co_name}"
        raise HostWaits(f"{what}: {place}")

    def _know(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage


class _Lists(TorchFunctionMode):
    """`tolist` and `numpy` read a CPU's memory without an operator."""

    def __init__(self, waits: NoHostWaits) -> None:
        super().__init__()
        self.waits = weakref.proxy(waits)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (Tensor.tolist, Tensor.numpy, Tensor.cpu):
            self.waits.waits(f"Tensor.{function.__name__}")
        return function(*args, **(kwargs or {}))


def tensors_of(*owners) -> list[Tensor]:
    """The tensors of modules, optimizers, and (nested) containers of tensors."""
    found: list[Tensor] = []
    for owner in owners:
        if isinstance(owner, torch.nn.Module):
            found += [*owner.parameters(), *owner.buffers()]
        elif isinstance(owner, torch.optim.Optimizer):
            found += [x for x in tree_leaves(owner.state_dict()) if isinstance(x, Tensor)]
        else:
            leaves = tree_leaves(vars(owner) if hasattr(owner, "__dataclass_fields__") else owner)
            found += [x for x in leaves if isinstance(x, Tensor)]
    return found
