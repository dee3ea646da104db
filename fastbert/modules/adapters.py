"""LoRA adapters (Hu et al. 2021, https://arxiv.org/abs/2106.09685) on linear layers, as in peft.

peft's own forward takes the host longer than a small batch takes the GPU, and a CUDA graph could
not tell what it reads. So a plain LoRA layer of peft is read: the linear layer inside it, and the
two of each adapter. Any other module is called. Adapters' dropout masks come from counters, as
those of BERT's layers do.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastbert.backend import device_type
from fastbert.modules.linear import Leaf, has_hooks, is_defined_in
from fastbert.modules.products import Products
from fastbert.ops.dropout import Dropout, drawn, dropout
from fastbert.rng import DropoutState, keeps_some

# Each dropout of an adapter has its own site number. For each adapter and each linear layer of a
# BERT layer there is a block of `SITES` numbers, one for each of the model's own sites.
SITES = 1024
MOST_LINEARS = 6  # of a BERT layer
MOST_ADAPTERS = (2**16 // SITES - 1) // MOST_LINEARS  # on a linear layer: sites have 16 bits


class LowRank(NamedTuple):
    """`up(down(dropout(x))) * scaling`; dropout: its probability, 0 in eval mode."""

    down: Leaf
    up: Leaf
    dropout: float
    scaling: float

    def with_parameters(
        self, change: Callable[[Tensor], Tensor], given: Products | None
    ) -> "LowRank":
        down, up = (leaf.with_parameters(change, given) for leaf in (self.down, self.up))
        return self._replace(down=down, up=up)

    def added(
        self, sum_: Tensor, x: Tensor, number: int, place: int, rng: DropoutState | None
    ) -> Tensor:
        """`sum_` plus the adapter's product of x; number: the adapter's; place: the leaf's."""
        if rng is not None:
            rng = rng.at(SITES * (1 + MOST_LINEARS * number + place) + rng.site)
        rows = x.shape[:-1].numel()
        x = dropout.run(Dropout(x, self.dropout, drawn(rows, x.device, self.dropout, rng)))
        if not torch.is_autocast_enabled(device_type(x)):
            x = x.to(self.down.weight.dtype)
        more = self.up(self.down(x))
        if torch.compiler.is_compiling():  # which leaves alpha out after a linear layer
            return sum_ + more * self.scaling
        return torch.add(sum_, more, alpha=self.scaling)


def read_leaf(module: Any, kind: type[nn.Module] = nn.Linear) -> Leaf:
    """The leaf of a linear layer, with its adapters if it has any, or of a norm."""
    cls = type(module)
    if kind is nn.Linear and (cls.__module__, cls.__name__) == ("peft.tuners.lora.layer", "Linear"):
        found = _adapted(module)
        if found is not None:
            return found
    return Leaf(module, kind)


def _adapted(module: Any) -> Leaf | None:
    """The leaf of a LoRA layer of peft; None if it is not the usual sum or has a hook inside."""
    base, is_off = module.base_layer, module.disable_adapters
    is_usual = is_defined_in(type(module).forward, ("peft.",))
    if any(map(has_hooks, module.modules())) or not is_usual or not Leaf(base).is_plain:
        return None
    if is_off and module.merged:  # its forward would unmerge the adapters
        return None
    if is_off or module.merged:
        return Leaf(base)
    if not getattr(module, "cast_input_dtype_enabled", True):
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    if len(names) > MOST_ADAPTERS:
        return None
    found = [_low_rank(module, name) for name in names]
    return None if None in found else Leaf(base, adapters=found)


def _low_rank(module: Any, name: str) -> LowRank | None:
    """The layer's adapter of this name; None for a variant, such as DoRA, and unusual parts."""
    down, up = Leaf(module.lora_A[name]), Leaf(module.lora_B[name])
    drops, scaling = module.lora_dropout[name], module.scaling[name]
    variants = {"lora_variant", "use_dora"} & vars(module).keys()
    is_variant = any(vars(module)[attribute].get(name) for attribute in variants)
    is_known = type(drops) in (nn.Dropout, nn.Identity) and isinstance(scaling, (int, float))
    p = drops.p if type(drops) is nn.Dropout and drops.training else 0
    if is_variant or not (is_known and keeps_some(p) and down.is_plain and up.is_plain):
        return None
    return LowRank(down, up, p, scaling)
