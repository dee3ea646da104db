"""Whether the layers of an encoder are replayed as CUDA graphs in this call, and which.

A GPU waits for Python where batches are small; a graph launches all its kernels at once. The layers
of own and patched models are recorded for a bucket of sizes when it is first met, and replayed for
every later call that fits it. What a graph could not do right runs as it would without: the reason
is told to `fastbert.explain`.

`FASTBERT_GRAPHS=0` switches graphs off everywhere; `allow(model, False)`, which
`fastbert.patch(model, graphs=False)` calls, for one model.
"""

import functools
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastbert import backend, events
from fastbert.check import require
from fastbert.modules.graphs.recorder import CudaGraphs, Recorder
from fastbert.modules.graphs.replays import (
    Bucket,
    Call,
    ForwardGraph,
    Precision,
    Replayed,
    TrainingGraphs,
)
from fastbert.modules.layer import LayerParts
from fastbert.modules.linear import Leaf
from fastbert.modules.sequences import Rows, Sequences

Graphs = Literal["auto", False]

MOST_GRAPHS = 64  # of a device; the least recently used one goes first
MEMORY_SHARE = 0.4  # of the device, above which all its graphs go
MOST_CHANGES = 16  # of an encoder's parameters; if they move in each call, nothing is won

_MARK = "_fastbert_graphs"  # of a list of layers that runs without
_OFF = {"0": True, "off": True, "false": True, "auto": False, "": False}


def allow(model: nn.Module, graphs: Graphs) -> None:
    """Lets the encoders in `model` replay graphs where that is right ("auto"), or never (False)."""
    is_known = graphs == "auto" or graphs is False
    require(is_known, "graphs", '"auto" or False', repr(graphs))
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            vars(module).pop(_MARK, None)
            if graphs is False:
                vars(module)[_MARK] = False


def are_allowed(layers: nn.ModuleList) -> bool:
    """Whether `allow` lets these layers of an encoder replay graphs."""
    return _MARK not in vars(layers)


@functools.cache
def _are_off(value: str) -> bool:
    require(value.lower() in _OFF, "FASTBERT_GRAPHS", '"auto" or "0"', repr(value))
    return _OFF[value.lower()]


class Pool:
    """The graphs of one device, which share their memory.

    So a replay spoils what a forward in training has kept for its backward. Until that has run, or
    its output is gone, other calls run without graphs.
    """

    def __init__(self, recorder: Recorder, most_memory: float) -> None:
        self.recorder, self.most_memory = recorder, most_memory
        self.lock = threading.RLock()
        self.pending: weakref.ref[Pending] | None = None
        # the least recently used first; an entry goes with its encoder
        self.used: weakref.WeakKeyDictionary[Entry, None] = weakref.WeakKeyDictionary()

    def is_pending(self) -> bool:
        return self.pending is not None and self.pending() is not None

    def touch(self, entry: "Entry") -> None:
        self.used.pop(entry, None)
        self.used[entry] = None

    def record(self, entry: "Entry", bucket: Bucket, x: Tensor, call: Call) -> None:
        """Gives the entry its graphs, or the reason why it has none."""
        while len(self.used) >= MOST_GRAPHS:
            next(iter(self.used)).drop(self)
        try:
            kind = ForwardGraph if call.trained is None else TrainingGraphs
            entry.graphs = kind(self.recorder, bucket, x, call)
        except RuntimeError as error:  # out of memory is one
            entry.reason = f"recording failed: {str(error).strip().partition(chr(10))[0]}"
            return
        self.touch(entry)
        if self.recorder.memory() > self.most_memory:
            is_alone = len(self.used) == 1
            for other in list(self.used):
                other.drop(self)
            self.recorder.begin_anew()
            if is_alone:
                entry.reason = "its graph takes too much of the device's memory"


class Entry:
    """A bucket of an encoder: its graphs, or why it has none."""

    def __init__(self, reason: str = "") -> None:
        self.graphs: ForwardGraph | TrainingGraphs | None = None
        self.reason = reason

    def drop(self, pool: Pool) -> None:
        self.graphs = None
        pool.used.pop(self, None)


class Pending:
    """A forward in training whose backward is yet to run; it lives as long as its output."""

    def __init__(self, pool: Pool, graphs: TrainingGraphs, recorded: "Recorded") -> None:
        self.pool, self.graphs, self.recorded = pool, graphs, recorded
        self.state = recorded.state

    def forward(self, x: Tensor, call: Call) -> Tensor:
        self.pool.pending = weakref.ref(self)
        return self.graphs.forward(x, call)

    def backward(self, dout: Tensor, num_tokens: int) -> tuple[Tensor | None, ...] | None:
        with self.pool.lock, torch.cuda.device_of(dout):
            if self.pool.pending is None or self.pool.pending() is not self:
                return None
            self.pool.pending = None
            if _state_of(self.recorded.parameters()) != self.state:
                return None
            self.pool.recorder.follow()
            return self.graphs.backward(dout, num_tokens)


class Recorded:
    """What is recorded of one encoder, for one reading of its layers."""

    def __init__(self, parts: Sequence[LayerParts]) -> None:
        self.parts = parts
        self.entries: dict[tuple, Entry] = {}
        self.state: list[Any] = []
        self.changes = 0
        leaves = [one for part in parts for one in part if isinstance(one, Leaf)]
        others = [type(leaf.module).__name__ for leaf in leaves if not leaf.is_plain]
        functions = [part.activation for part in parts]
        others += [type(one).__name__ for one in functions if isinstance(one, nn.Module)]
        self.reason = f"a {others[0]} in the layers" if others else ""
        tables = [leaf.module._parameters for leaf in leaves]
        self.owners = tables + tables, ["weight"] * len(tables) + ["bias"] * len(tables)

    def find(self, bucket: Bucket, x: Tensor, call: Call, pool: Pool) -> tuple[Entry, Call]:
        """What is recorded for such a call, or is to be; and the call with what has a gradient."""
        parameters = self.parameters()
        reason = self.reason or self._follow(parameters, pool)
        if reason:
            return Entry(reason), call
        if torch.is_grad_enabled():
            trained = [parameter for parameter in parameters if parameter.requires_grad]
            call = call._replace(trained=trained if trained or x.requires_grad else None)
        has = call.trained is None, x.requires_grad, call.sequences.rng is None
        key = bucket, call.precision, x.dtype, has, _numerics()
        return self.entries.setdefault(key, Entry()), call

    def parameters(self) -> list[Tensor]:
        """Those of the layers, as they are now, each once."""
        return list(dict.fromkeys(p for p in map(dict.get, *self.owners) if p is not None))

    def _follow(self, parameters: list[Tensor], pool: Pool) -> str:
        """Drops what was recorded of parameters that lay elsewhere, or were otherwise."""
        state = _state_of(parameters)
        if state != self.state:
            if any(type(parameter) is not nn.Parameter for parameter in parameters):
                return "parameters that are not plain ones"
            for entry in self.entries.values():
                entry.drop(pool)
            self.entries, self.state, self.changes = {}, state, self.changes + 1
        return "parameters that move time and again" if self.changes > MOST_CHANGES else ""


def _state_of(parameters: list[Tensor]) -> list[Any]:
    """What a graph knows of them beside their values."""
    return [
        *map(Tensor.data_ptr, parameters),
        *[parameter.dtype for parameter in parameters],
        *[parameter.requires_grad for parameter in parameters],
    ]


# by the encoders' lists of layers, to which nothing refers that a graph holds
_RECORDED: weakref.WeakKeyDictionary[nn.ModuleList, dict[bool, Recorded]] = (
    weakref.WeakKeyDictionary()
)


@functools.cache
def pool_of(device: torch.device) -> Pool | None:
    """None where graphs cannot be recorded, as on a CPU."""
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        total = torch.cuda.get_device_properties(device).total_memory
        return Pool(CudaGraphs(shares_memory=True), MEMORY_SHARE * total)


def replayed(
    layers: nn.ModuleList,
    parts: Sequence[LayerParts],
    x: Tensor,
    sequences: Sequences,
    rows: Rows | None,
    reason: str = "",
) -> Tensor | None:
    """(T, H) -> (T, H), or (M, H), by a graph; None where the layers must run as they are.

    reason: the caller's, not to replay one: that `parts` does not say all that the layers do, or
    that more is wanted than their last output.
    """
    if torch.compiler.is_compiling() or (pool := pool_of(x.device)) is None:
        return None
    with pool.lock, torch.cuda.device_of(x):
        bucket = Bucket.of(x, sequences, rows)
        entry = Entry(reason or _refusal(layers, x, sequences, pool))
        call = Call(parts, sequences, rows, Precision.of(x), None)
        if not entry.reason:
            recorded = _recorded(layers, parts)
            entry, call = recorded.find(bucket, x, call, pool)
        if events.is_listening():
            _tell(bucket, entry)
            return None  # and so the operators tell how they run
        if entry.graphs is None and not entry.reason:
            pool.record(entry, bucket, x, call)
        if entry.graphs is None:
            return None
        pool.touch(entry)
        pool.recorder.follow()
        if isinstance(entry.graphs, ForwardGraph):
            return entry.graphs(x, call)
        pending = Pending(pool, entry.graphs, recorded)
        return Replayed.apply(pending, call, x, *(call.trained or ()))


def _recorded(layers: nn.ModuleList, parts: Sequence[LayerParts]) -> Recorded:
    """Kept for training and for eval mode apart, whose dropout differs."""
    by_mode = _RECORDED.setdefault(layers, {})
    recorded = by_mode.get(layers.training)
    if recorded is None or recorded.parts is not parts:
        recorded = by_mode[layers.training] = Recorded(parts)
    return recorded


def _refusal(layers: nn.ModuleList, x: Tensor, sequences: Sequences, pool: Pool) -> str:
    """Why this call may not replay a graph, "" if it may."""
    if not are_allowed(layers):
        return "graphs=False"
    if _are_off(os.environ.get("FASTBERT_GRAPHS", "")):
        return "FASTBERT_GRAPHS"
    if sequences.mask is not None:
        return "a general mask"
    if not len(x):
        return "no tokens"
    if pool.is_pending():
        return "an earlier forward whose backward is yet to run"
    if "_is_replica" in vars(layers):
        return "a replica of DataParallel"
    if backend.forced() is not None:
        return "a backend that is forced"
    if pool.recorder.is_inside():
        return "a recording of the caller's own"
    is_watched = torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active()
    if is_watched or torch.is_anomaly_enabled():
        return "a mode that looks at each operation"
    return ""


def _numerics() -> tuple[Any, ...]:
    """Settings of PyTorch that choose kernels, which a recording fixes."""
    return torch.are_deterministic_algorithms_enabled(), _matmul_precision()


def _matmul_precision() -> Any:
    """Of float32 products on a GPU, by the newer of PyTorch's two interfaces where it has that:
    the older one raises where a user has set the newer."""
    matmul = torch.backends.cuda.matmul
    return getattr(matmul, "fp32_precision", None) or torch.get_float32_matmul_precision()


def _tell(bucket: Bucket, entry: Entry) -> None:
    sizes = f"{bucket.tokens} tokens, {bucket.sequences} sequences of up to {bucket.longest}"
    known = "to be recorded at its first use" if entry.graphs is None else "recorded"
    layout = "none" if entry.reason else f"of {sizes}"
    events.tell(events.Route("CUDA graph", layout, entry.reason or known))
