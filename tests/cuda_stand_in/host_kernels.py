"""A plugin for pytest that computes on the host what PyTorch would launch on a GPU.

    python -m pytest -p tests.cuda_stand_in.host_kernels -m gpu tests/modules/graphs

It is for the stand-ins of CUDA's libraries beside it, whose device memory is the host's: kernels of
aten run as the CPU's on the same memory, Triton's in the interpreter. In a capture they are put on
a tape, which a replay of the graph runs. Operators run their plain bodies unless a test forces
Triton, as the interpreter takes minutes.
"""

import ctypes
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastbert import backend
from fastbert.hf import stack
from fastbert.kernels import runtime

# What manages memory alone, views, and what the stand-in for CUDA does: copies to the host.
NATIVE = {
    *("empty", "empty_strided", "resize_", "resize_as_", "set_", "as_strided", "view", "unfold"),
    *("record_stream", "_reshape_alias", "_unsafe_view", "is_pinned", "_pin_memory", "set_data"),
    *("_copy_from", "_copy_from_and_resize", "_to_copy", "lift", "is_set_to", "_fused_sdp_choice"),
    *("_has_same_storage_numel", "_efficientzerotensor", "view_as_real", "view_as_complex"),
}
ELSEWHERE = ("cudnn", "miopen", "sparse", "quantize", "_cuda")
KEYS = ("CPU", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")

_LIBRARIES = [torch.library.Library(name, "IMPL") for name in ("aten", "fastbert")]
_TAPES: dict[int, list[Callable[[], Any]]] = {}  # by the graph
_now: list[Callable[[], Any]] = []  # of the capture under way


def _product(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    return (a.float() @ b.float()).to(out_dtype)


def _scaled_product(a, b, of_a, of_b, bias=None, scale_result=None, out_dtype=None, fast=False):
    if any(t is not None and t.data_ptr() % 16 for t in (a, b, of_a, of_b, bias)):
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED: an address that is no multiple of 16")
    y = (a.float() @ b.float()) * (of_a * of_b)
    return (y if bias is None else y + bias.float()).to(out_dtype or a.dtype)


def _softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return torch.softmax(x, dim, dtype=torch.float32 if half_to_float else x.dtype)


def _log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    return torch.log_softmax(x, dim, dtype=torch.float32 if half_to_float else x.dtype)


def _softmax_gradient(dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    dy, y = dy.float(), y.float()
    return ((dy - (dy * y).sum(dim, keepdim=True)) * y).to(dtype)


def _log_softmax_gradient(dy: Tensor, y: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    dy = dy.float()
    return (dy - y.float().exp() * dy.sum(dim, keepdim=True)).to(dtype)


# What a CPU has no such kernel for, and `ldexp`, whose kernel has no key of its own.
OWN = {
    "aten::mm.dtype": _product,
    "aten::_scaled_mm": _scaled_product,
    "aten::_softmax": _softmax,
    "aten::_log_softmax": _log_softmax,
    "aten::_softmax_backward_data": _softmax_gradient,
    "aten::_log_softmax_backward_data": _log_softmax_gradient,
    "aten::ldexp.Tensor": torch.ldexp,
}


def on_host(x: Any) -> Any:
    """A CPU tensor in the memory of a CUDA tensor; other arguments as they are."""
    if isinstance(x, torch.device):
        return torch.device("cpu")
    if not isinstance(x, Tensor) or not x.is_cuda:
        return x
    storage = x.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    same = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=x.dtype).set_(same, x.storage_offset(), x.size(), x.stride())


def without_memory(x: Any) -> Any:
    """A meta tensor of the same shape, for the shapes of results in a capture."""
    if isinstance(x, torch.device):
        return torch.device("meta")
    return empty_like(x, "meta")


def empty_like(x: Any, device: str) -> Any:
    if not isinstance(x, Tensor):
        return x
    return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=device)


def launch(work: Callable[[], Any]) -> None:
    """Does the work, or in a capture puts it on the tape."""
    stream = torch.cuda.current_stream().cuda_stream
    _cudart().stand_in_launch(ctypes.c_void_p(stream))
    if torch.cuda.is_current_stream_capturing():
        _now.append(work)
    else:
        work()


@functools.cache
def _cudart() -> ctypes.CDLL:
    return ctypes.CDLL("libcudart.so.13")


class Kernel:
    """A kernel of aten, or an operator of the extension, for CUDA tensors.

    outs: the names of its `out` arguments; writes: of the arguments that it changes in place
    """

    def __init__(self, op: Any, name: str) -> None:
        self.op, self.name = op, name
        arguments = op._schema.arguments
        changed = [a for a in arguments if a.alias_info is not None and a.alias_info.is_write]
        self.outs = [a.name for a in changed if a.is_out]
        self.writes = [a.name for a in changed if not a.is_out]

    def compute(self, *args: Any, **kwargs: Any) -> Any:
        if self.name in OWN and args[0].device.type != "meta":
            return OWN[self.name](*args, **kwargs)
        for argument, value in zip(self.op._schema.arguments, args, strict=False):
            if str(argument.type) == "Tensor" and not isinstance(value, Tensor):
                return self.op.overloadpacket(*args, **kwargs)  # a number in a tensor's place
        return self.op(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("generator", None)

        def run(place: Callable[[Any], Any], **others: Any) -> Any:
            given, named = pytree.tree_map(place, (args, {**kwargs, **others}))
            return self.compute(*given, **named)

        if self.writes:
            launch(functools.partial(run, on_host))
            named = dict(zip((a.name for a in self.op._schema.arguments), args, strict=False))
            found = [(named | kwargs)[name] for name in self.writes]
        elif self.outs:
            found = [kwargs[name] for name in self.outs]
            self._fill(found, run)
        else:
            return self._new(run)
        returned = len(self.op._schema.returns)
        return None if not returned else found[0] if returned == 1 else tuple(found)

    def _new(self, run: Callable[..., Any]) -> Any:
        is_capturing = torch.cuda.is_current_stream_capturing()
        first = run(without_memory if is_capturing else on_host)
        results = pytree.tree_map(functools.partial(empty_like, device="cuda"), first)
        self._into(results, (lambda: run(on_host)) if is_capturing else (lambda: first))
        return results

    def _fill(self, outs: Sequence[Tensor], run: Callable[..., Any]) -> None:
        def results(place: Callable[[Any], Any], device: str) -> Any:
            named = zip(self.outs, outs, strict=True)
            new = {name: torch.empty(0, dtype=x.dtype, device=device) for name, x in named}
            return run(place, **new)

        is_capturing = torch.cuda.is_current_stream_capturing()
        kind = (without_memory, "meta") if is_capturing else (on_host, "cpu")
        first = results(*kind)
        for out, found in zip(outs, pytree.tree_leaves(first), strict=True):
            if out.shape != found.shape:
                out.resize_(found.shape)
        self._into(outs, (lambda: results(on_host, "cpu")) if is_capturing else (lambda: first))

    def _into(self, results: Any, compute: Callable[[], Any]) -> None:
        def work() -> None:
            pairs = zip(pytree.tree_leaves(results), pytree.tree_leaves(compute()), strict=True)
            for result, found in pairs:
                if isinstance(result, Tensor):
                    on_host(result).copy_(found)

        launch(work)


def copy(self: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    """`aten::copy_`, also between host and device, where a host that waits ends a capture."""
    if self.is_cuda and src.is_cuda:
        launch(lambda: on_host(self).copy_(on_host(src)))
        return self
    if not (non_blocking and (src.is_pinned() or self.is_pinned())):
        torch.cuda.current_stream().synchronize()
    launch(lambda: on_host(self).copy_(on_host(src)))
    return self


def clone(self: Tensor, memory_format: torch.memory_format | None = None) -> Tensor:
    layout = torch.preserve_format if memory_format is None else memory_format
    return copy(torch.empty_like(self, memory_format=layout), self)


def item(self: Tensor) -> Any:
    torch.cuda.current_stream().synchronize()
    return on_host(self).item()


def equal(self: Tensor, other: Tensor) -> bool:
    torch.cuda.current_stream().synchronize()
    return torch.equal(on_host(self), on_host(other))


HAND_MADE = {"copy_": copy, "clone": clone, "_local_scalar_dense": item, "equal": equal}


def replace_aten() -> None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in torch._C._dispatch_get_all_op_names():
        base, _, overload = name.removeprefix("aten::").partition(".")
        is_left = base in NATIVE or any(word in base for word in ELSEWHERE)
        if not name.startswith("aten::") or is_left or base in HAND_MADE:
            continue
        op = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
        if op is None or not (has(name, "CUDA") or name in OWN):
            continue
        arguments = op._schema.arguments
        is_view = any(a.alias_info is not None and not a.alias_info.is_write for a in arguments)
        if not is_view and (name in OWN or any(has(name, key) for key in KEYS)):
            _LIBRARIES[0].impl(name, Kernel(op, name), "CUDA")
    for base, function in HAND_MADE.items():
        _LIBRARIES[0].impl(base, function, "CUDA")
    for base in ("compact", "gather_rows"):
        if backend.is_loaded("ext", base, "cuda"):
            op = getattr(torch.ops.fastbert, base).default
            _LIBRARIES[1].impl(base, Kernel(op, f"fastbert::{base}"), "CUDA")


def replace_launches() -> None:
    """Triton's launches, and the capture and replay of graphs."""

    def call(self: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
        def work() -> None:
            self.jit[grid](*map(on_host, arguments), **constants, **runtime.OPTIONS)

        launch(work)

    runtime.Kernel.__call__ = call  # type: ignore[method-assign]
    graph: Any = torch.cuda.CUDAGraph
    capture_begin, capture_end, replay = graph.capture_begin, graph.capture_end, graph.replay

    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        capture_begin(self, *args, **kwargs)
        _now.clear()

    def end(self: Any) -> None:
        capture_end(self)
        _TAPES[id(self)] = [*_now]

    def again(self: Any) -> None:
        replay(self)
        for work in _TAPES[id(self)]:
            work()

    graph.capture_begin, graph.capture_end, graph.replay = begin, end, again


def install() -> None:
    warnings.filterwarnings("ignore", ".*only once for all operators")
    warnings.filterwarnings("ignore", ".*not writable")
    replace_aten()
    replace_launches()
    torch.backends.cudnn.enabled = False
    for name in ("cudnn", "flash", "mem_efficient"):
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(False)
    backend.PREFERENCE["cuda"] = ("ext", "reference")
    stack.require_kernels = lambda device: None


install()
