"""Picks which implementation of an operator runs; no other file checks what is installed.

An operator has a function that checks its arguments, and a reference body in plain PyTorch. A
backend is a namespace with faster bodies under fixed names: `torch.ops.fastbert` (the C++/CUDA
extension) or a module of Triton launchers. The first usable backend of `PREFERENCE` runs.
`FASTBERT_BACKEND`, or a `with backend.use(...)` block, forces one backend for the operators that
have a body in it; these raise if it cannot run. The other operators keep the default.
"""

import contextlib
import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastbert import events
from fastbert.check import InputError

BACKENDS = ("ext", "triton", "reference")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Triton's interpreter takes milliseconds per row, so on a CPU it runs only if a test forces it.
PREFERENCE = {"cuda": ("ext", "triton", "reference"), "cpu": ("ext", "reference")}

LEAST_CAPABILITY = 8, 0  # the lowest compute capability that runs Triton's kernels
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # the dtypes that Triton's kernels take

OPS: dict[str, "Op"] = {}

Body = TypeVar("Body", bound=Callable[..., Any])


class BackendUnavailable(RuntimeError):
    """A backend cannot run an operator here; the message says why."""


class Choice(NamedTuple):
    """The backend that an operator uses on a type of device, and why; `kernels` has its bodies."""

    backend: str
    kernels: Any  # the namespace with the operator's bodies, None for the reference
    reason: str
    forced: bool = False


class Op:
    """A callable operator: the check of its arguments, its bodies, and the choice among them.

    `@op("triton")` decorates the public function. That function raises ValueError for wrong
    arguments and returns valid ones, with defaults filled in, as a named tuple, the call, whose
    first field is a tensor. Models, whose calls are valid by construction, pass them to `run`
    without the check. Calling an operator, or `run`, raises BackendUnavailable if a forced backend
    cannot run the call. The other decorators take these functions:

    `@name.plain`, `(call)`: the operator in plain PyTorch. `@name.fused`, `(kernels, call)`: the
    same with a backend's kernels, and with gradients. `@name.refuses`, `(call)`: why the kernels
    cannot take the call, None if they can; refused calls run the plain body. `@name.describes`,
    `(kernels, call)`: the names of the kernels that run, for `fastbert.explain`. `@name.traces`,
    with the arguments of the extension's body: its outputs without values, for torch.compile; it
    has no effect if the extension is not built.
    """

    plain_body: Callable[..., Any]
    fused_body: Callable[..., Any]

    def __init__(self, check: Callable[..., Any], backends: tuple[str, ...]) -> None:
        functools.update_wrapper(self, check)
        self.name = check.__name__
        self.check = check
        self.backends = (*backends, "reference")
        self.refusal: Callable[[Any], str | None] = lambda call: None
        self.description: Callable[[Any, Any], str] = lambda kernels, call: ""
        self.choices: dict[str, Choice] = {}
        OPS[self.name] = self

    def plain(self, function: Body) -> Body:
        self.plain_body = function
        result = inspect.signature(function).return_annotation  # `help` shows it, not the call
        self.__signature__ = inspect.signature(self.check).replace(return_annotation=result)
        return function

    def fused(self, function: Body) -> Body:
        self.fused_body = function
        return function

    def refuses(self, function: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
        self.refusal = function
        return function

    def describes(self, function: Callable[[Any, Any], str]) -> Callable[[Any, Any], str]:
        self.description = function
        return function

    def traces(self, function: Body) -> Body:
        if is_loaded("ext", self.name):
            torch.library.register_fake(f"fastbert::{self.name}", function)
        return function

    def chosen(self, device: str) -> Choice:
        """The cached choice for a device type; raises BackendUnavailable if a forced one fails.

        While torch.compile traces, `_choose` always runs first, because a trace does not see
        entries added to a dictionary after it has first read it.
        """
        if torch.compiler.is_compiling() or device not in self.choices:
            _choose(self.name, device)
        return self.choices[device]

    def has_kernels(self, x: Tensor) -> bool:
        """Whether a faster body than plain PyTorch runs on x's type of device."""
        return self.chosen(device_type(x)).kernels is not None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self.check(*args, **kwargs))

    def run(self, call: Any) -> Any:
        """Runs a call that was checked, or that is valid by construction."""
        backend, kernels, reason, forced = self.chosen(device_type(call[0]))
        if kernels is not None:
            is_plain = is_transformed()
            refusal = "function transforms (torch.func)" if is_plain else self.refusal(call)
            if refusal is not None:
                reason = f"{backend} does not support {refusal}"
                if forced and not is_plain:
                    raise BackendUnavailable(f"{self.name}: {reason}")
                backend, kernels = "reference", None
        if events.is_listening():
            variant = "" if kernels is None else self.description(kernels, call)
            events.tell(events.OperatorRun(self.name, backend, variant, reason, call))
        return self.plain_body(call) if kernels is None else self.fused_body(kernels, call)


def device_type(x: Any) -> str:
    """The type of x's device, for the usual ones faster than `x.device.type`."""
    return "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type


def place(x: Tensor) -> Any:
    """Equal for two tensors only if they are on one device; cheaper than `x.device` on CUDA."""
    return x.get_device() if x.is_cuda else x.device


def is_transformed() -> bool:
    """Whether torch.func or forward-mode AD is active; only plain PyTorch supports these."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def forced() -> str | None:
    """The backend that the user forces, with `use` or FASTBERT_BACKEND; None if there is none."""
    return _forced


def _choose(name: str, device: str) -> str:
    operator = OPS[name]
    if device not in operator.choices:
        operator.choices[device] = select(operator, device)
    return operator.choices[device].backend


# This makes torch.compile run `_choose` at trace time instead of tracing into it. The decorator
# `torch.compiler.assume_constant_result` does no more, but imports Dynamo and Triton.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def op(*backends: str) -> Callable[[Callable[..., Any]], Op]:
    """Decorates an operator's check; `backends` names the backends that have a faster body."""
    return lambda check: Op(check, backends)


def load(backend: str, op: str, device: str) -> Any:
    """The namespace with `op`'s bodies for the device type; None for the reference.

    Raises BackendUnavailable if the backend cannot run there, ValueError for an unknown backend.
    """
    if _checked(backend) == "reference":
        return None
    return {"ext": _load_extension, "triton": _load_triton}[backend](op, device)


def is_loaded(backend: str, op: str, device: str = "cpu") -> bool:
    """Whether `load` finds the backend's bodies of `op` for the device type."""
    try:
        load(backend, op, device)
    except BackendUnavailable:
        return False
    return True


def _load_extension(op: str, device: str) -> Any:
    try:
        importlib.import_module("fastbert._C")
    except ModuleNotFoundError:
        raise BackendUnavailable("the C++/CUDA extension is not built") from None
    except ImportError as error:
        raise BackendUnavailable(f"the C++/CUDA extension cannot be loaded ({error})") from error
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastbert::{op}", device.upper()):
        raise BackendUnavailable(f"the C++/CUDA extension was built without {device} code")
    return torch.ops.fastbert


def _load_triton(op: str, device: str) -> Any:
    if device == "cpu" and not INTERPRETED:
        raise BackendUnavailable("Triton runs on CPU tensors only under TRITON_INTERPRET=1")
    if importlib.util.find_spec("triton") is None:
        raise BackendUnavailable("triton is not installed")
    if device == "cuda":
        _require_gpus()
    fault = "" if INTERPRETED else importlib.import_module("fastbert.kernels.runtime").fault()
    if fault:
        raise BackendUnavailable(
            "Triton cannot compile a kernel here; it needs a C compiler and Python's headers (gcc "
            f"and python3-dev): {fault}"
        )
    # kernels/x.py holds the bodies of all the operators of fastbert/ops/x.py
    unit = OPS[op].check.__module__.rpartition(".")[2]
    return importlib.import_module(f"fastbert.kernels.{unit}")


def _require_gpus() -> None:
    """Raises BackendUnavailable if one of the visible GPUs cannot run Triton's kernels."""
    if torch.version.hip is not None:
        raise BackendUnavailable("the kernels are written for NVIDIA's GPUs")
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_capability(number)
        if found < LEAST_CAPABILITY:
            least, own = (".".join(map(str, one)) for one in (LEAST_CAPABILITY, found))
            raise BackendUnavailable(
                f"the kernels need compute capability {least}, and GPU {number}, "
                f"{torch.cuda.get_device_name(number)}, has {own}; hide it with "
                "CUDA_VISIBLE_DEVICES"
            )


def select(op: Op, device: str) -> Choice:
    """Chooses a backend for `op`: the forced one, or the first usable one of `PREFERENCE`."""
    # the variable is checked here, not at import, so that the command line catches the error
    wanted = _checked(_forced, "FASTBERT_BACKEND")
    if wanted is not None and wanted in op.backends:
        return Choice(wanted, load(wanted, op.name, device), "forced", forced=True)
    refusals: list[str] = []
    for backend in PREFERENCE.get(device, ()):
        if backend in op.backends:
            try:
                kernels = load(backend, op.name, device)
            except BackendUnavailable as refusal:
                refusals.append(f"{backend}: {refusal}")
                continue
            usual = "preferred" if kernels else "its only implementation for this device"
            return Choice(backend, kernels, "; ".join(refusals) or usual)
    return Choice("reference", None, "its only implementation for this device")


def _checked(backend: str | None, who: str = "backend") -> str | None:
    if backend and backend not in BACKENDS:
        raise InputError(f"{who}: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend or None


@contextlib.contextmanager
def use(backend: str | None) -> Iterator[None]:
    """Forces one backend inside a `with` block, for the operators that have a body in it.

    backend: "ext", "triton" or "reference"; None forces none. Raises ValueError for others.
    """
    global _forced
    previous, _forced = _forced, _checked(backend)
    _forget()
    try:
        yield
    finally:
        _forced = previous
        _forget()


def _forget() -> None:
    for operator in OPS.values():
        operator.choices.clear()


_forced = os.environ.get("FASTBERT_BACKEND") or None
