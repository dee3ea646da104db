"""Picks which implementation of an operator runs; no other file asks what is installed.

An operator is a function whose body is its plain PyTorch reference. A backend is a namespace that
holds faster bodies under fixed names: `torch.ops.fastbert` (the C++/CUDA extension) or a module of
Triton launchers. The first usable backend of `PREFERENCE` runs; `FASTBERT_BACKEND`, or a
`with backend.use(...)` block, forces one for the operators that have a body there, and those raise
if it cannot run. The other operators keep the default.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from fastbert import events

BACKENDS = ("ext", "triton", "reference")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The interpreter takes milliseconds a row: on a CPU, Triton runs only where a test forces it.
PREFERENCE = {"cuda": ("ext", "triton", "reference"), "cpu": ("ext", "reference")}

OPS: dict[str, "Op"] = {}


class BackendUnavailable(RuntimeError):
    """A backend cannot run an operator here; the message says why."""


class Choice(NamedTuple):
    backend: str
    kernels: Any  # the namespace with the operator's bodies, None for the reference
    reason: str
    forced: bool = False


class Op:
    """A callable operator: its reference, the backends with a faster body, and the choice made.

    `@op("ext")` decorates the reference body; `@name.fused` then decorates a function
    `(kernels, *args)` that runs a backend's kernels, with autograd. `dtypes` are those of the first
    argument that the faster bodies take, None for any. `@name.refuses` may decorate a function of
    the arguments that returns why the faster bodies cannot take them, or None if they can. The
    reference takes the rest. `@name.describes` may decorate a function `(kernels, *args)` that
    names the kernels a backend runs for these arguments, for `fastbert.explain`.
    """

    def __init__(
        self,
        reference: Callable,
        backends: tuple[str, ...],
        dtypes: tuple[torch.dtype, ...] | None,
    ) -> None:
        functools.update_wrapper(self, reference)
        self.name = reference.__name__
        self.reference = reference
        self.backends = (*backends, "reference")
        self.dtypes = dtypes
        self.run_fused: Callable | None = None
        self.refusal: Callable[..., str | None] | None = None
        self.description: Callable[..., str] | None = None
        self.choices: dict[str, Choice] = {}
        OPS[self.name] = self

    def fused(self, function: Callable) -> Callable:
        self.run_fused = function
        return function

    def refuses(self, function: Callable[..., str | None]) -> Callable[..., str | None]:
        self.refusal = function
        return function

    def describes(self, function: Callable[..., str]) -> Callable[..., str]:
        self.description = function
        return function

    def forget(self) -> None:
        self.choices.clear()

    def choice(self, device: str) -> Choice:
        if device not in self.choices:
            self.choices[device] = select(self, device)
        return self.choices[device]

    def chosen(self, device: str) -> Choice:
        """The choice that was made, or is made now.

        torch.compile's trace keeps a dictionary as it first saw it, so there it is made first.
        """
        if torch.compiler.is_compiling() or device not in self.choices:
            _choose(self.name, device)
        return self.choices[device]

    def has_kernels(self, device: str) -> bool:
        """Whether a faster body runs on such a device, for the arguments that it takes."""
        return self.chosen(device).kernels is not None

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        choice = self.chosen(x.device.type)
        refusal = None if choice.kernels is None else self.refusal_of(x, *args, **kwargs)
        if events.is_listening():
            self._tell(choice, refusal, x, *args, **kwargs)
        if choice.kernels is None:
            return self.reference(x, *args, **kwargs)
        if refusal is not None:
            if choice.forced:
                raise BackendUnavailable(f"{self.name}: {choice.backend} has no body for {refusal}")
            return self.reference(x, *args, **kwargs)
        assert self.run_fused is not None
        return self.run_fused(choice.kernels, x, *args, **kwargs)

    def _tell(self, choice: Choice, refusal: str | None, *args: Any, **kwargs: Any) -> None:
        backend, reason = choice.backend, choice.reason
        if refusal is not None:
            backend, reason = "reference", f"{choice.backend} has no body for {refusal}"
        variant = ""
        if self.description is not None and backend == choice.backend != "reference":
            variant = self.description(choice.kernels, *args, **kwargs)
        events.tell(events.OperatorRun(self.name, backend, variant, reason, args, kwargs))

    def refusal_of(self, x: Any, *args: Any, **kwargs: Any) -> str | None:
        """What about these arguments the faster bodies cannot take; None if they can."""
        if self.dtypes is not None and x.dtype not in self.dtypes:
            return str(x.dtype)
        return self.refusal(x, *args, **kwargs) if self.refusal is not None else None


def _choose(name: str, device: str) -> str:
    return OPS[name].choice(device).backend


# While torch.compile traces a call, this runs as it is. `torch.compiler.assume_constant_result`
# sets this mark and no more, but imports all of Dynamo, and Triton with it.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def op(*backends: str, dtypes: tuple[torch.dtype, ...] | None = None) -> Callable[[Callable], Op]:
    """Decorates a reference body; `backends` names where faster bodies of it exist."""
    return lambda reference: Op(reference, backends, dtypes)


def load(backend: str, op: str, device: str) -> Any:
    """The namespace with `op`'s bodies for `device` (None for the reference).

    Raises BackendUnavailable, saying why, where there is none.
    """
    if backend == "reference":
        return None
    if backend == "ext":
        return _load_extension(op, device)
    if backend == "triton":
        return _load_triton(op, device)
    raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")


def _load_extension(op: str, device: str) -> Any:
    try:
        importlib.import_module("fastbert._C")
    except ImportError as error:
        raise BackendUnavailable(f"the C++/CUDA extension is not built ({error})") from error
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastbert::{op}", device.upper()):
        raise BackendUnavailable(f"the C++/CUDA extension was built without {device} code")
    return torch.ops.fastbert


def _load_triton(op: str, device: str) -> Any:
    if device == "cpu" and not INTERPRETED:
        raise BackendUnavailable("Triton runs on CPU tensors only under TRITON_INTERPRET=1")
    if importlib.util.find_spec("triton") is None:
        raise BackendUnavailable("triton is not installed")
    if not INTERPRETED and not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        raise BackendUnavailable(
            "Triton builds its launcher with a C compiler, and none is on PATH"
        )
    # kernels/x.py holds the bodies of all the operators of fastbert/ops/x.py
    unit = OPS[op].reference.__module__.rpartition(".")[2]
    return importlib.import_module(f"fastbert.kernels.{unit}")


def select(op: Op, device: str) -> Choice:
    if _forced is not None and _forced in op.backends:
        return Choice(_forced, load(_forced, op.name, device), "forced", forced=True)
    refusals: list[str] = []
    for backend in PREFERENCE.get(device, ()):
        if backend in op.backends:
            try:
                kernels = load(backend, op.name, device)
            except BackendUnavailable as refusal:
                refusals.append(f"{backend}: {refusal}")
                continue
            usual = "preferred" if kernels else "its only body for this device"
            return Choice(backend, kernels, "; ".join(refusals) or usual)
    return Choice("reference", None, "its only body for this device")


def _checked(backend: str | None) -> str | None:
    if backend and backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend or None


@contextlib.contextmanager
def use(backend: str | None) -> Iterator[None]:
    """Forces one backend inside a `with` block, for the operators that have a body there."""
    global _forced
    previous, _forced = _forced, _checked(backend)
    _forget()
    try:
        yield
    finally:
        _forced = previous
        _forget()


def is_forced() -> bool:
    """Whether somebody chose a backend."""
    return _forced is not None


def _forget() -> None:
    for operator in OPS.values():
        operator.forget()


_forced = _checked(os.environ.get("FASTBERT_BACKEND"))
