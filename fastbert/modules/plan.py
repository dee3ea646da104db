"""Caches the parts of an encoder's layers, with a cheap check in each call that they still hold.

Reading a layer means asking each of its modules for its class, hooks and probabilities, which takes
longer than the kernels of a small batch. So the parts are cached, with a guard: the attributes and
classes that they were read from, compared in a few C calls. Parameters are not cached; they are
read at each use.
"""

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from fastbert.modules.layer import LayerParts
from fastbert.modules.linear import Hooks, hooks_of

# Attributes that the parts of a layer do not depend on.
_UNREAD = {"in_features", "out_features", "normalized_shape", "elementwise_affine", "inplace"}

_ABSENT = ("forward", "save")  # attributes that instances usually lack, but may be given


class Plan(NamedTuple):
    """The parts of each layer, and the state of the layers' modules when they were read.

    attributes: (instance dictionaries, names, values), three lists of equal length; children: the
    live dictionaries of submodules, and copies from that time; types: the modules' classes;
    classes: each class's `forward` and `save`. Nothing here refers to the list of layers, so that a
    plan is freed with its encoder.
    """

    parts: tuple[LayerParts | None, ...]
    modules: tuple[nn.Module, ...]
    attributes: tuple[list[dict[str, Any]], list[str], list[Any]]
    children: tuple[list[dict[str, Any]], list[dict[str, Any]]]
    types: list[type]
    classes: dict[type, tuple[Any, ...]]

    def holds(self) -> bool:
        """Whether the layers are as they were when read; hooks are not compared."""
        dictionaries, names, values = self.attributes
        return (
            list(map(dict.get, dictionaries, names)) == values
            and self.children[0] == self.children[1]
            and list(map(type, self.modules)) == self.types
            and all(_of_class(cls) == then for cls, then in self.classes.items())
        )


class Planner:
    """Keeps the plans of encoders, by their lists of layers, as long as these live.

    Training and eval mode have separate plans, so that a change of mode does not read the layers
    again.
    """

    def __init__(self, parts_of: Callable[[Any], LayerParts | None]) -> None:
        self.parts_of = parts_of
        self.plans: weakref.WeakKeyDictionary[nn.ModuleList, dict[bool, tuple[Plan, Hooks]]] = (
            weakref.WeakKeyDictionary()
        )

    def parts(self, layers: nn.ModuleList) -> tuple[Any, ...]:
        """The result of `parts_of` for each layer; passes on what `parts_of` raises."""
        if torch.compiler.is_compiling():  # torch.compile has its own guards on what it reads
            return tuple(map(self.parts_of, layers))
        plans = self.plans.setdefault(layers, {})
        found = plans.get(layers.training)
        if found is not None:
            plan, hooks = found
            if not any(hooks) and plan.holds():
                return plan.parts
        parts = tuple(map(self.parts_of, layers))
        inner = [module for layer in layers for module in layer.modules() if module is not layer]
        hooks = tuple(hook for module in inner for hook in hooks_of(module))
        if not any(hooks):  # hooked layers are read each time: some hooks are only active at times
            plans[layers.training] = _plan(layers, parts), hooks
        return parts


def calls_layers(layers: nn.ModuleList) -> bool:
    """Whether layers must be called as modules: for hooks, a replaced forward, or checkpointing."""
    if torch.nn.modules.module._has_any_global_hook():
        return True
    for layer in layers:
        own = vars(layer)
        if (
            any(hooks_of(layer))
            or "forward" in own
            or (own.get("gradient_checkpointing") and own["training"])
        ):
            return True
    return False


def _plan(layers: nn.ModuleList, parts: tuple[LayerParts | None, ...]) -> Plan:
    modules = tuple(module for layer in layers for module in layer.modules())
    rows = [(vars(m), name, value) for m in modules for name, value in _attributes(m)]
    attributes = [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]
    live: list[dict[str, Any]] = [layers._modules, *(m._modules for m in modules if m._modules)]
    types = list(map(type, modules))
    classes = {cls: _of_class(cls) for cls in types}
    return Plan(
        parts,
        modules,
        attributes,
        (live, [dict(children) for children in live]),
        types,
        classes,
    )


def _attributes(module: nn.Module) -> Iterable[tuple[str, Any]]:
    """A module's numbers, strings and functions; None for the attributes of _ABSENT it lacks."""
    own = vars(module)
    yield from ((name, own.get(name)) for name in _ABSENT)
    for name, value in own.items():
        is_read = name not in _UNREAD and name not in _ABSENT and not name.startswith("_")
        if is_read and (isinstance(value, (bool, int, float, str)) or callable(value)):
            yield name, value


def _of_class(cls: type) -> tuple[Any, Any]:
    return getattr(cls, "forward", None), getattr(cls, "save", None)
