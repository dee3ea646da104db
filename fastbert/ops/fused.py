"""What operators share: how autograd Functions run and refuse, host values, shapes, dtypes."""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

REFERENCE = 'run its forward inside `with fastbert.backend.use("reference"):`'


def run(function: type[Function], kernels: Any, call: tuple[Any, ...]) -> Any:
    """Applies the Function to the kernels and the call's fields.

    If no gradient is needed, only the Function's forward runs, with None as `ctx`, so that it saves
    nothing for a backward.
    """
    if torch.is_grad_enabled():
        for x in call:
            if isinstance(x, Tensor) and x.requires_grad:
                return function.apply(kernels, *call)
    return function.forward(None, kernels, *call)


def applied(function: type[Function], *arguments: Any) -> Any:
    """`function.apply` without its search of the arguments for leftovers of function transforms.

    With many arguments the search takes most of the call's time. No transform may be active.
    """
    return super(Function, function).apply(*arguments)  # type: ignore[misc]


def once(who: str, remedy: str = REFERENCE) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a Function's backward: differentiating its gradients again is a RuntimeError."""

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def first_derivative(ctx: Any, *gradients: Tensor | None) -> Any:
            if not torch.is_grad_enabled():
                return backward(ctx, *gradients)
            message = f"{who}: its gradients cannot be differentiated again; {remedy}"
            # The gradients depend on the inputs too, and not all were saved as they were given. So
            # all leaves behind these lead to the refusal: otherwise `torch.autograd.grad` with
            # allow_unused=True would skip it and return None. A trace has no nodes, so a dummy.
            sources = [x for x in (*gradients, *ctx.saved_tensors) if x is not None]
            sources = [x for x in sources if x.requires_grad] + _leaves(ctx)
            sources = sources or [torch.zeros((), requires_grad=True)]
            with torch.no_grad():
                found = backward(ctx, *gradients)
            return _Refusal.apply(message, len(sources), *sources, *found)  # type: ignore[no-untyped-call]

        return first_derivative

    return decorate


def _leaves(node: Any) -> list[Tensor]:
    """The leaf tensors from which the inputs of a node of autograd's graph were computed."""
    nodes, waiting = {node: None}, [node]
    while waiting:
        parents = [parent for parent, _ in getattr(waiting.pop(), "next_functions", ())]
        new = dict.fromkeys(one for one in parents if one is not None and one not in nodes)
        nodes.update(new)
        waiting += new
    return [one.variable for one in nodes if hasattr(one, "variable")]


class _Refusal(Function):
    """Returns the gradients that a backward computed; differentiating these again raises."""

    @staticmethod
    def forward(ctx: Any, message: str, count: int, *tensors: Tensor | None) -> Any:
        """tensors: `count` tensors that the gradients depend on, then the gradients."""
        ctx.message = message
        return tuple(None if x is None else x.view_as(x) for x in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        raise RuntimeError(ctx.message)


def is_one_graph() -> bool:
    """Whether torch.compile(fullgraph=True) or torch.export traces: the host can read no values."""
    is_exporting = torch.compiler._is_exporting_flag
    return torch.compiler.is_compiling() and (is_exporting or _is_one_graph())


def _is_one_graph() -> bool:
    translator: Any = torch._dynamo.symbolic_convert.InstructionTranslator
    try:  # Dynamo's own names, which a new release may change; it then refuses to read values
        now = translator.current_tx()
        return bool(now.one_graph or now.error_on_graph_break)
    except AttributeError:
        return False


_is_one_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see fastbert.backend


def on_host(count: Tensor) -> int:
    """A tensor of one integer, 0 or more, as a Python number; the host waits for a GPU.

    Where torch.compile breaks its graph to read it, it would log a warning about `int()`, and about
    a `tolist()` of an input of the graph.
    """
    if not torch.compiler.is_compiling():
        return int(count)
    number: int = count[None].tolist()[0]
    torch._check(number >= 0)  # for graphs that may read numbers, by an option of torch's
    return number


def as_rows(x: Tensor) -> Tensor:
    """(..., H) -> (M, H) with unit column stride, a view where possible."""
    if x.ndim == 2 and x.is_contiguous():  # the case of models; the rest takes microseconds
        return x
    rows = torch.atleast_2d(x).flatten(0, -2)
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def shaped(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """A result (M, H) as (..., H); for autograd no view, because users may change it in place."""
    if len(shape) == 2:
        return rows
    result: Tensor = torch.ops.aten._unsafe_view.default(rows, shape)
    return result


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors concatenated along the first dimension; a single one is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))


def result_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matrix products with x: autocast's, or x.dtype without autocast."""
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x) else x.dtype


def is_autocast(x: Tensor) -> bool:
    """Whether autocast lowers x's precision; not float64's, and PyTorch has none for "meta"."""
    kind = x.device.type
    is_cast = x.dtype != torch.float64 and kind != "meta"
    return is_cast and torch.is_autocast_enabled(kind)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which products keep x's dtype, as a backward may run under autocast too."""
    return torch.autocast(x.device.type, enabled=False) if is_autocast(x) else nullcontext()


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`; on a GPU, half-precision factors give a float32 product unrounded."""
    if a.is_cuda and dtype == torch.float32 != a.dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)
