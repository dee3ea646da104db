"""Caches the parts of layers and of embeddings, with a cheap check in each call that they hold.

Reading a layer means looking up the class, hooks and probabilities of each of its modules, which
takes longer than the kernels of a small batch. So the parts are cached, with a guard: the
attributes and classes that they were read from, compared in a few C calls. Parameters are not
cached; they are read at each use. In inference the GPU starts before the guard is checked: until
then a `Reading` assumes the parts of the last call.
"""

import copy
from collections.abc import Callable, Iterable
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from fastbert import events
from fastbert.modules.linear import Hooks, each_hook, hooks_of, module_of_hook
from fastbert.modules.request import CAPTURING, captured_around

# Attributes that classes define. Users replace them on the class, or set them on an instance.
_OF_CLASSES = "forward", "save", "feed_forward_chunk", "ff_chunk"
MOST_PLANS = 4  # kept for the same modules in one mode
# What `read_leaf` reads of peft's LoRA layers, besides numbers and modules.
_ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")

# All that the parts of a layer depend on in modules of exactly these classes.
_READ = {
    nn.Linear: ("forward",),
    nn.LayerNorm: ("forward", "eps"),
    nn.Dropout: ("forward", "training", "p"),
    nn.Embedding: ("forward", "padding_idx", "max_norm", "sparse", "scale_grad_by_freq"),
}


class Plan:
    """The parts of each layer, and the state of the layers' modules when they were read.

    owner: the list of layers, or a module that is read alone, the only one of `layers` then. A plan
    keeps only dictionaries of it, so that the plan is freed with its owner. hooks: the live
    dictionaries of the hooks inside the layers, which are empty or hold hooks that sleep;
    own_hooks: those of the layers themselves; recorded: the CUDA graphs of the parts, a
    `pool.Recorded`, which must not refer to the owner either, or None.
    """

    recorded: Any = None

    def __init__(
        self, owner: nn.Module, layers: list[nn.Module], parts: tuple[Any, ...], hooks: Hooks
    ) -> None:
        self.parts, self.hooks = parts, tuple(some for some in hooks if not some)
        self.asleep = tuple(some for some in hooks if some)
        self.own_hooks = tuple(hook for layer in layers for hook in hooks_of(layer))
        self.has_forward = any("forward" in vars(layer) for layer in layers)
        every = list(owner.modules())
        self.modules = every[1:]
        self.types = list(map(type, self.modules))
        kinds = dict.fromkeys(kind for module in every for kind in type(module).__mro__)
        self.classes = [vars(kind) for kind in kinds for _ in _OF_CLASSES]
        self.methods = list(_OF_CLASSES) * len(kinds)
        self.methods_then = list(map(MappingProxyType.get, self.classes, self.methods))
        # FSDP1 takes parameters away, and gives them back
        owners = [module for module in every if module._parameters or "weight" in vars(module)]
        self.parameters = [module._parameters for module in owners]
        self.counts = list(map(len, self.parameters))
        self.children = [module._modules for module in every if module._modules]
        self.children_then = [dict(children) for children in self.children]
        rows = [(vars(m), name, value) for m in every for name, value in _attributes(m)]
        self.dictionaries = [dictionary for dictionary, _, _ in rows]
        self.names = [name for _, name, _ in rows]
        self.values = [value for _, _, value in rows]

    def holds(self) -> bool:
        """Whether the layers are as they were when read."""
        return (
            not any(self.hooks)
            and not (self.asleep and are_awake(self.asleep))
            and list(map(dict.get, self.dictionaries, self.names)) == self.values
            and self.children == self.children_then
            and list(map(len, self.parameters)) == self.counts
            and list(map(type, self.modules)) == self.types
            and list(map(MappingProxyType.get, self.classes, self.methods)) == self.methods_then
        )


class Planner:
    """Keeps the plans of lists of layers, and of modules read alone, as long as these live.

    plans: for each owner and mode (training or not), the plans of the same modules in several
    states, the last used first, so that switching modes or adapters does not read the layers again
    """

    def __init__(self, parts_of: Callable[[Any], Any]) -> None:
        self.parts_of = parts_of
        self.plans: WeakKeyDictionary[nn.Module, dict[bool, list[Plan]]] = WeakKeyDictionary()

    def parts(self, owner: nn.Module) -> tuple[Any, ...]:
        """The result of `parts_of` for each layer of a list, or for a module alone.

        Passes on what `parts_of` raises.
        """
        layers = list(owner) if isinstance(owner, nn.ModuleList) else [owner]
        if torch.compiler.is_compiling():  # torch.compile has its own guards on what it reads
            return tuple(map(self.parts_of, layers))
        plans = self.plans.get(owner, {}).get(owner.training, [])
        for plan in plans:
            if plan.holds():
                if plan is not plans[0]:  # a new list, because another thread may go through this
                    others = [one for one in plans if one is not plan]
                    self.plans[owner][owner.training] = [plan, *others]
                return plan.parts
        parts = tuple(map(self.parts_of, layers))
        inner = [module for layer in layers for module in layer.modules() if module is not layer]
        hooks = tuple(hook for module in inner for hook in hooks_of(module))
        # hooked layers are read each time, because some hooks are only active at times; a forward
        # set on the owner refers to the owner, and in a plan would keep it from being freed
        if not (are_awake(hooks) or "forward" in vars(owner) or _has_any_global_hook()):
            plan = Plan(owner, layers, parts, hooks)
            others = [one for one in plans if one.modules == plan.modules][: MOST_PLANS - 1]
            self.plans.setdefault(owner, {})[owner.training] = [plan, *others]
        return parts

    def known(self, owner: nn.Module) -> Plan | None:
        """The plan last used in the owner's present mode, which may no longer hold."""
        plans = self.plans.get(owner, {}).get(owner.training)
        return plans[0] if plans else None


class Reading:
    """The parts of a list of layers in one call, from `Planner.parts`.

    may_replay: whether a graph may compute the call, so that the parts of an earlier call are
    assumed until `settle` checks them; has_tried_graph: whether `replay_padded` saw this call
    """

    has_tried_graph = False

    def __init__(self, planner: Planner, layers: nn.ModuleList, *, may_replay: bool) -> None:
        self.planner, self.layers, self.may_replay = planner, layers, may_replay
        # wrong parts make a call start again, and listeners should hear of each thing once
        assumes = may_replay and not events.is_listening()
        self.assumed = planner.known(layers) if assumes else None
        self.parts = planner.parts(layers) if self.assumed is None else self.assumed.parts

    def called(self) -> list[int]:
        """The layers to call as modules: unread, hooked, checkpointed, or with a replaced forward.

        With an assumed plan most of the search is skipped: the plan has the hooks and forwards, and
        without gradients no layer is checkpointed.
        """
        plan, are_all = self.assumed, _has_any_global_hook()
        is_seen = plan is None or plan.has_forward or any(plan.own_hooks) or are_all
        numbers = []
        for number, layer in enumerate(self.layers if is_seen else ()):
            own = vars(layer)
            is_checkpointed = own.get("gradient_checkpointing") and own["training"]
            is_hooked = are_all or "forward" in own or any(map(is_awake, each_hook(layer)))
            if is_hooked or is_checkpointed:
                numbers.append(number)
        unread = [number for number, part in enumerate(self.parts) if part is None]
        return unread + numbers

    def drops(self) -> bool:
        """Whether a dropout of the layers may be on.

        If none is, nothing is drawn from torch's generator, so that its next numbers are the same
        as with Hugging Face's model.
        """
        return any(part is None or part.drops for part in self.parts)

    @property
    def plan(self) -> Plan | None:
        """The plan that keeps the parts; None if they must be read anew in each call."""
        plan = self.planner.known(self.layers)
        return plan if plan is not None and plan.parts is self.parts else None

    def holds(self) -> bool:
        """Whether the layers are as they were when read, as far as a plan tells."""
        plan = self.plan
        return plan is not None and plan.holds()

    def settle(self) -> None:
        """Reads the parts anew if the assumed ones do not hold; their results must be dropped.

        Passes on what reading raises.
        """
        plan, self.assumed = self.assumed, None
        if plan is not None and not plan.holds():
            self.parts = self.planner.parts(self.layers)


def are_awake(hooks: Hooks) -> bool:
    """Whether one of the hooks is active."""
    return any(is_awake(hook) for some in hooks for hook in some.values())


def is_awake(hook: Callable[..., Any]) -> bool:
    """Whether a hook is active: transformers 5's capturing hooks stay, but act only when asked."""
    return module_of_hook(hook) != CAPTURING or bool(captured_around())


def is_plain_list(layers: Any) -> bool:
    """Whether a call visits each of the layers in order, as torch's own lists do.

    Lists of the user's own may leave some out, such as those of LayerDrop (Fan et al. 2020,
    https://arxiv.org/abs/1909.11556).
    """
    return isinstance(layers, nn.ModuleList) and type(layers).__iter__ is nn.ModuleList.__iter__


def _attributes(module: nn.Module) -> Iterable[tuple[str, Any]]:
    """A module's attributes on which parts depend, with values; None for those that it lacks."""
    own, read = vars(module), _READ.get(type(module))
    absent = [name for name in _OF_CLASSES if hasattr(type(module), name)]
    yield from ((name, own.get(name)) for name in read or absent)
    if read is None:
        yield from ((name, copy.copy(own[name])) for name in _ADAPTERS if name in own)
        for name, value in own.items():
            is_read = name not in absent and not name.startswith("_")
            if is_read and (isinstance(value, (bool, int, float, str)) or callable(value)):
                yield name, value
