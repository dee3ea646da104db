"""Linear layers in fused operators: concatenated in one product, or with the bias split off."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastbert.backend import Op, device_type
from fastbert.modules.products import PRODUCTS, Products
from fastbert.ops.fused import joined
from fastbert.rng import DropoutState

Hooks = tuple[dict[int, Callable[..., Any]], ...]  # the live dictionaries of modules' hooks
# From this hidden size on, a CPU takes longer to concatenate weights than for two more products of
# few rows: 16 rows take 89 us apart and 71 us concatenated at 128, 123 us and 131 us at 192.
SMALL = 160
_NARROW = (torch.float16, torch.bfloat16)
# Other classes of tensors, such as quantized weights, may support only the operation of their
# module. Those that leave torch's functions as they are (shards, tensors without data) support all.
_WEIGHTS = Tensor.__torch_function__, torch._C._disabled_torch_function_impl


class Leaf:
    """A linear layer or norm, and whether its parameters may be read, `is_read`; checked once.

    If so, they are read at each use, from the module's dictionary, because `nn.Module`'s own
    look-up takes longer; else the module is called. adapters: `LowRank`s, which add to a linear
    layer's product; is_plain: whether it is read and has no adapters; given: the `Products` of this
    leaf alone, None for the module's; place: its index among the linear layers of a BERT layer.
    """

    __slots__ = ("adapters", "given", "is_plain", "is_read", "module", "parameters", "place")

    def __init__(
        self, module: nn.Module, kind: type[nn.Module] = nn.Linear, adapters: Sequence[Any] = ()
    ) -> None:
        self.module, self.adapters = module, adapters
        self.parameters: dict[str, Any] = module._parameters
        if "weight" not in module._parameters:  # FSDP1 sets tensors in the place of parameters
            self.parameters = vars(module)
        self.is_read = (
            is_plain(module, kind)
            and self.parameters.keys() >= {"weight", "bias"}
            and is_usual(self.parameters["weight"])
            and len(getattr(module, "normalized_shape", (0,))) == 1
        )
        self.is_plain = self.is_read and not adapters
        self.given: Products | None = None
        self.place = 0

    @property
    def inner(self) -> "list[Leaf]":
        """This leaf, and the leaves of its adapters."""
        return [self, *(leaf for one in self.adapters for leaf in (one.down, one.up))]

    def adapted(self, y: Tensor, x: Tensor, rng: DropoutState | None) -> Tensor:
        """The layer's product y of x, plus the products of its adapters."""
        sum_ = y
        for number, adapter in enumerate(self.adapters):
            sum_ = adapter.added(sum_, x, number, self.place, rng)
        return sum_.to(y.dtype)

    def with_parameters(self, change: Callable[[Tensor], Tensor], given: Products | None) -> "Leaf":
        """A leaf of the same module that reads `change(parameter)` in place of each parameter."""
        leaf, own = copy.copy(self), self.parameters.items()
        leaf.parameters = {name: None if one is None else change(one) for name, one in own}
        leaf.given = given
        leaf.adapters = [one.with_parameters(change, given) for one in self.adapters]
        return leaf

    def __call__(self, x: Tensor, rng: DropoutState | None = None) -> Tensor:
        """The module's output for x; rng: the dropout state of the layer, for its adapters."""
        if self.is_read:
            if type(self.module) is nn.LayerNorm:
                shape = self.module.normalized_shape
                return F.layer_norm(x, shape, self.weight, self.bias, self.module.eps)
            y = product(x, (self,), biases_of(self))
            return self.adapted(y, x, rng) if self.adapters else y
        if self.products is not None:
            self.products.left_out(self.module)
        return self.module(x)

    @property
    def products(self) -> Products | None:
        """What multiplies in place of `F.linear`; None if `F.linear` does."""
        return self.given or self.module.__dict__.get(PRODUCTS)

    @property
    def weight(self) -> Any:
        return self.parameters["weight"]

    @property
    def bias(self) -> Any:
        return self.parameters["bias"]


def is_usual(weight: Tensor | None) -> bool:
    """Whether operators may read the weight: its class is not one that only its module supports."""
    return weight is None or type(weight).__torch_function__ in _WEIGHTS


def product(x: Tensor, linears: Sequence[Leaf], biases: Sequence[Tensor]) -> Tensor:
    """`x @ weight.T + bias` with the concatenated weights of plain `nn.Linear`s, and biases."""
    first = linears[0]
    products = first.given or first.module.__dict__.get(PRODUCTS)  # without a call of `products`
    if products is not None:
        y = products.product(x, [layer.parameters["weight"] for layer in linears], biases)
        if y is not None:
            return y
    if len(linears) == 1:
        return F.linear(x, first.parameters["weight"], *biases)
    weight = torch.cat([layer.parameters["weight"] for layer in linears])
    return F.linear(x, weight, joined(biases) if biases else None)


def biases_of(*linears: Leaf) -> list[Tensor]:
    """The biases of the linear layers that have one."""
    every = [layer.parameters["bias"] for layer in linears]
    return [bias for bias in every if bias is not None]


def fused_linear(
    x: Tensor, linears: Sequence[Leaf], into: Op | None, rng: DropoutState | None = None
) -> tuple[Tensor, Tensor | None]:
    """The concatenated outputs of `linears`, (..., H) -> (..., sum of output sizes), and a bias.

    If every layer is a plain `nn.Linear`, with or without adapters, this is one product with the
    concatenated weights; except for few float32 rows on a CPU, where concatenating takes longer
    than the products. A layer of another class (8-bit, parametrized) or with hooks is called. rng:
    see `Leaf`.

    The bias is the concatenated one, for the operator `into` to compute its gradient, as a
    by-product of its kernel. The outputs already include the bias, detached, so that autograd makes
    no pass over the rows to sum that gradient. It is None if autograd computes the gradient or none
    is wanted: `into` is None or has no kernel on this device, or weights are not concatenated.
    """
    hidden = x.shape[-1]
    are_few = x.is_cpu and x.numel() < hidden**2 and hidden >= SMALL
    is_worth_it = not are_few or rounds_products(x)  # separate products would round dX three times
    # weights are checked here, because quantizing replaces them without another sign
    if is_worth_it and all(leaf.is_read and is_usual(leaf.weight) for leaf in linears):
        biases, bias = biases_of(*linears), None
        if len(biases) in (0, len(linears)):
            are_trained = torch.is_grad_enabled() and any(bias.requires_grad for bias in biases)
            if are_trained and into is not None and into.has_kernels(x):
                bias = joined(biases)
                products = linears[0].products
                reads_each = products is not None and products.reads_each_bias
                biases = [one.detach() for one in (biases if reads_each else (bias,))]
            y = product(x, linears, biases)
            if not all(layer.is_plain for layer in linears):
                parts = y.split([len(layer.weight) for layer in linears], dim=-1)
                each = zip(linears, parts, strict=True)
                y = torch.cat([layer.adapted(part, x, rng) for layer, part in each], dim=-1)
            return y, bias
    return torch.cat([layer(x, rng) for layer in linears], dim=-1), None


def split_bias(
    x: Tensor, layer: Leaf, into: Op | None, rng: DropoutState | None = None
) -> tuple[Tensor, Tensor | None]:
    """A linear layer's product (..., O) and its bias (O,), which the operator `into` then adds.

    The gradient of the bias is then a by-product of that operator's kernel instead of another pass
    over the rows, and in low precision the product plus bias is not rounded. The bias is None if
    the product already includes it: if `into` is None, if it has no kernel on this device in
    float32, and for a layer that is not a plain `nn.Linear`, which is called.
    """
    if not layer.is_plain:
        return layer(x, rng), None
    bias = layer.parameters["bias"]
    if bias is None or (into is not None and (into.has_kernels(x) or rounds_products(x))):
        return product(x, (layer,), ()), bias
    return product(x, (layer,), (bias,)), None


def rounds_products(x: Tensor) -> bool:
    """Whether products of x have less than float32 precision, due to its dtype or autocast."""
    return x.dtype in _NARROW or torch.is_autocast_enabled(device_type(x))


def encoders_of(model: nn.Module) -> Iterator[nn.ModuleList]:
    """The lists of layers in the model, which hold all modules of its encoders."""
    return (module for module in model.modules() if isinstance(module, nn.ModuleList))


def is_plain(layer: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether the layer is exactly of class `kind` and has no hooks, so its weights may be read.

    False if a user has given the class another forward.
    """
    return (
        type(layer) is kind
        and not has_hooks(layer)
        and is_defined_in(kind.forward, ("torch.", "fastbert."))
    )


def is_defined_in(function: Any, packages: tuple[str, ...]) -> bool:
    """Whether files of these packages define a function, and every function that it wraps.

    packages: beginnings of names. `functools.wraps` gives a user's function the `__module__` of the
    function that it replaces, but its globals stay those of the user's file.
    """
    if (function, packages) in _DEFINED:
        return True
    inner = function
    while inner is not None:
        if not getattr(inner, "__globals__", {}).get("__name__", "").startswith(packages):
            return False
        inner = getattr(inner, "__wrapped__", None)
    _DEFINED.add((function, packages))
    return True


is_defined_in._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see fastbert.backend
_DEFINED: set[tuple[Any, tuple[str, ...]]] = set()  # what `is_defined_in` has found to be so


def is_plain_table(table: nn.Module) -> bool:
    """Whether `table` is a plain nn.Embedding that only reads rows and has a dense gradient."""
    is_usual_one = is_usual(table._parameters.get("weight"))
    return is_plain(table, nn.Embedding) and reads_rows(table) and is_usual_one


def dropout_p_of(module: Any, reader: nn.Module | None = None) -> float:
    """The probability of a plain dropout; 0 in eval mode and for modules that are called instead.

    The dropout's own mode counts. Users switch it to sample from a model in eval mode (Gal &
    Ghahramani 2015, https://arxiv.org/abs/1506.02142), or to train without dropout. reader: the
    attention, if it reads `p` of any module and goes by its own mode, as Hugging Face's does.
    """
    if reader is None:
        return module.p if module.training and is_plain(module, nn.Dropout) else 0.0
    return module.p if reader.training and not isinstance(module, nn.Identity) else 0.0


def is_plain_dropout(module: nn.Module) -> bool:
    """Whether operators can replace the module: it is a plain nn.Dropout or nn.Identity."""
    return is_plain(module, nn.Dropout) or is_plain(module, nn.Identity)


def is_parametrized(module: nn.Module) -> bool:
    """Whether reading a parameter of the module computes it anew."""
    return "parametrizations" in module._modules


def reads_rows(table: Any) -> bool:
    """Whether an `nn.Embedding` sets neither max_norm, sparse nor scale_grad_by_freq."""
    return table.max_norm is None and not table.sparse and not table.scale_grad_by_freq


def has_hooks(layer: nn.Module) -> bool:
    """Whether the layer has hooks, or a forward set on the instance, so that it must be called.

    Accelerate's offloading and older transformers' output capture set such a forward. Global hooks,
    which see every module, count too.
    """
    return has_own_hooks(layer) or _has_any_global_hook()


def has_own_hooks(layer: nn.Module) -> bool:
    """`has_hooks` without global hooks, which FLOP counters set to count what runs without them."""
    return any(hooks_of(layer)) or "forward" in vars(layer)


def hooks_of(module: nn.Module) -> Hooks:
    """The four dictionaries of a module's hooks."""
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def each_hook(module: nn.Module) -> Iterable[Callable[..., Any]]:
    """The hooks of a module."""
    found = hooks_of(module)
    return (hook for hooks in found for hook in hooks.values()) if any(found) else ()


def is_watched(module: nn.Module) -> bool:
    """Whether hooks see the module's input or output."""
    return not all(map(is_of_weights, each_hook(module)))


def is_of_weights(hook: Callable[..., Any]) -> bool:
    """Whether a hook only touches weights: FSDP's hooks move parameters, hooks of pruning and
    weight norms compute them. `enable_input_require_grads` only sets a flag, so it counts too."""
    is_flag = getattr(hook, "__name__", "") == "make_inputs_require_grads"
    return is_flag or module_of_hook(hook).startswith(("torch.distributed.", "torch.nn.utils."))


def module_of_hook(hook: Callable[..., Any]) -> str:
    return getattr(hook, "__module__", None) or type(hook).__module__
