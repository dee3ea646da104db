"""Triton's interpreter without the work that it repeats, and with an eye on memory."""

import functools
from typing import NamedTuple

import numpy as np


def patch_once_a_launch():
    """Has the interpreter replace the functions of `triton.language` once a launch.

    It does so again at each call of a device function within the launch, where it finds nothing
    left to replace: that search takes nearly half of the time of a kernel. What device functions
    of other modules replaced is put back with the launch's, too; Triton leaves it, so that nothing
    can be compiled in this process any more.
    """
    from triton import language
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # of Triton 3.6 to 3.9
        return
    patch, scope_of = interpreter._patch_lang, interpreter._LangPatchScope
    patched, scopes = set(), []

    class Scope(scope_of):
        def restore(self):  # called of the scope of a launch alone
            while scopes:
                scope_of.restore(scopes.pop())
            patched.clear()

    @functools.cache
    def modules(function):
        values = function.__globals__.values()
        return {x for x in (language, language.core) if any(value is x for value in values)}

    def patch_what_is_not(function):
        new = modules(function) - patched
        if not new:
            return Scope()
        patched.update(new)
        scopes.append(patch(function))
        return scopes[-1]

    interpreter._LangPatchScope = Scope
    interpreter._patch_lang = patch_what_is_not


class _Extent(NamedTuple):
    """Where a tensor of a launch lies: the first byte, the one behind the last, and a writer each.

    writers: for each element of the storage, from `base` on, 1 + the program that stored it, or 0
    """

    first: int
    end: int
    base: int
    itemsize: int
    writers: np.ndarray


def patch_watched_memory():
    """Has the interpreter refuse what a GPU may let pass: accesses outside of a launch's tensors,
    and two programs of a launch of which one stores what the other one stores or loads later.

    The interpreter itself reads and writes any address, and runs the programs in order.
    """
    from triton.runtime import interpreter

    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    prepare, load, store = (
        executor._init_args_hst, builder.create_masked_load, builder.create_masked_store
    )  # fmt: skip
    extents: list[_Extent] = []

    def prepare_watched(self, *arguments):
        found = prepare(self, *arguments)
        extents.clear()
        writers = {}
        for x in found[0]:
            if hasattr(x, "untyped_storage") and x.numel():
                size, base = x.element_size(), x.untyped_storage().data_ptr()
                if base not in writers:
                    writers[base] = np.zeros(x.untyped_storage().nbytes() // size, np.int32)
                last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
                end = x.data_ptr() + (last + 1) * size
                extents.append(_Extent(x.data_ptr(), end, base, size, writers[base]))
        return found

    def places(builder, what, ptrs, mask):
        """The writers of the accessed elements, and which elements these are."""
        addresses = ptrs.data[mask.data].astype(np.int64)
        if not addresses.size:
            return np.zeros(0, np.int32), addresses
        low, high = addresses.min(), addresses.max()
        for extent in extents:
            if extent.first <= low and high < extent.end:
                return extent.writers, (addresses - extent.base) // extent.itemsize
        raise IndexError(f"program {builder.grid_idx} {what} outside of the launch's tensors")

    def number(builder):
        x, y, z = builder.grid_idx
        return 1 + (x * builder.grid_dim[1] + y) * builder.grid_dim[2] + z

    def load_watched(self, ptrs, mask, *others):
        writers, elements = places(self, "loads", ptrs, mask)
        before = writers[elements]
        if ((before != 0) & (before != number(self))).any():
            raise RuntimeError(f"program {self.grid_idx} loads what another one stores")
        return load(self, ptrs, mask, *others)

    def store_watched(self, ptrs, value, mask, *others):
        writers, elements = places(self, "stores", ptrs, mask)
        before = writers[elements]
        if ((before != 0) & (before != number(self))).any():
            raise RuntimeError(f"program {self.grid_idx} stores what another one stores")
        writers[elements] = number(self)
        return store(self, ptrs, value, mask, *others)

    executor._init_args_hst = prepare_watched
    builder.create_masked_load, builder.create_masked_store = load_watched, store_watched
