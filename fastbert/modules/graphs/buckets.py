"""Decides whether a call replays the layers of an encoder as a CUDA graph, and which graph.

A GPU waits for Python where batches are small; a graph launches all its kernels at once. The layers
of own and patched models are recorded when a bucket of sizes is first used, and replayed for every
later call that fits it. A call that a graph could not compute correctly runs without one, and
`fastbert.explain` shows the reason.

`FASTBERT_GRAPHS=0` switches graphs off everywhere; `allow(model, False)`, which
`fastbert.patch(model, graphs=False)` calls, switches them off for one model.
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
    products_of,
)
from fastbert.modules.layer import LayerParts
from fastbert.modules.sequences import Rows, Sequences

Graphs = Literal["auto", False]

MOST_GRAPHS = 64  # on a device; beyond it the least recently used graphs are dropped
MEMORY_SHARE = 0.4  # of the device's memory; beyond it all graphs are dropped
MOST_CHANGES = 16  # times that an encoder's parameters may move before graphs are given up

_MARK = "_fastbert_graphs"  # attribute of a list of layers that must not replay graphs
_OFF = {"0": True, "off": True, "false": True, "auto": False, "": False}


def allow(model: nn.Module, graphs: Graphs) -> None:
    """Lets encoders in `model` replay graphs ("auto"), or never (False); ValueError for others."""
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

    A replay therefore overwrites what a training forward saved for its backward. Until that
    backward has run, or the forward's output is freed, other calls run without graphs.
    """

    def __init__(self, recorder: Recorder, most_memory: float) -> None:
        self.recorder, self.most_memory = recorder, most_memory
        self.lock = threading.RLock()
        self.pending: weakref.ref[Pending] | None = None
        # least recently used first; weak, so that entries are freed with their encoder
        self.used: weakref.WeakKeyDictionary[Entry, None] = weakref.WeakKeyDictionary()

    def is_pending(self) -> bool:
        return self.pending is not None and self.pending() is not None

    def touch(self, entry: "Entry") -> None:
        self.used.pop(entry, None)
        self.used[entry] = None

    def record(self, entry: "Entry", bucket: Bucket, x: Tensor, call: Call) -> None:
        """Records the entry's graphs, or sets the reason why it has none."""
        while len(self.used) >= MOST_GRAPHS:
            next(iter(self.used)).drop(self)
        try:
            kind = ForwardGraph if call.trained is None else TrainingGraphs
            entry.graphs = kind(self.recorder, bucket, x, call)
        except RuntimeError as error:  # includes running out of memory
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
    """The graphs of one encoder for one bucket, or the reason why there are none."""

    def __init__(self, reason: str = "") -> None:
        self.graphs: ForwardGraph | TrainingGraphs | None = None
        self.reason = reason

    def drop(self, pool: Pool) -> None:
        self.graphs = None
        pool.used.pop(self, None)


class Pending:
    """A training forward whose backward has not run yet; it lives as long as its output."""

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
    """The graphs of one encoder, valid while the parts of its layers stay the same."""

    def __init__(self, parts: Sequence[LayerParts]) -> None:
        self.parts = parts
        self.entries: dict[tuple[Any, ...], Entry] = {}
        self.state: list[Any] = []
        self.changes = 0
        leaves = [leaf for part in parts for leaf in part.leaves()]
        others = [type(leaf.module).__name__ for leaf in leaves if not leaf.is_plain]
        functions = [part.activation for part in parts]
        others += [type(one).__name__ for one in functions if isinstance(one, nn.Module)]
        self.reason = f"a {others[0]} in the layers" if others else ""
        tables = [leaf.module._parameters for leaf in leaves]
        self.owners = tables + tables, ["weight"] * len(tables) + ["bias"] * len(tables)

    def find(self, bucket: Bucket, x: Tensor, call: Call, pool: Pool) -> tuple[Entry, Call]:
        """The entry for the call, new if there is none; and the call with `trained` filled in."""
        parameters = self.parameters()
        reason = self.reason or self._follow(parameters, pool)
        if reason:
            return Entry(reason), call
        if torch.is_grad_enabled():
            trained = [parameter for parameter in parameters if parameter.requires_grad]
            call = call._replace(trained=trained if trained or x.requires_grad else None)
        has = call.trained is None, x.requires_grad, call.sequences.rng is None
        key = bucket, call.precision, x.dtype, has, call.products, _numerics()
        return self.entries.setdefault(key, Entry()), call

    def parameters(self) -> list[Tensor]:
        """The distinct parameters that the layers have now."""
        return list(dict.fromkeys(p for p in map(dict.get, *self.owners) if p is not None))

    def _follow(self, parameters: list[Tensor], pool: Pool) -> str:
        """Drops all graphs if parameters moved, or changed in dtype or requires_grad."""
        state = _state_of(parameters)
        if state != self.state:
            if any(type(parameter) is not nn.Parameter for parameter in parameters):
                return "parameters that are not plain ones"
            for entry in self.entries.values():
                entry.drop(pool)
            self.entries, self.state, self.changes = {}, state, self.changes + 1
        return "parameters that move time and again" if self.changes > MOST_CHANGES else ""


def _state_of(parameters: list[Tensor]) -> list[Any]:
    """What a recorded graph fixes of parameters: addresses, dtypes and requires_grad."""
    return [
        *map(Tensor.data_ptr, parameters),
        *[parameter.dtype for parameter in parameters],
        *[parameter.requires_grad for parameter in parameters],
    ]


# keyed by an encoder's list of layers; graphs must not refer to it, or it would never be freed
_RECORDED: weakref.WeakKeyDictionary[nn.ModuleList, dict[bool, Recorded]] = (
    weakref.WeakKeyDictionary()
)


@functools.cache
def pool_of(device: torch.device) -> Pool | None:
    """The device's pool of graphs; None where graphs cannot be recorded, as on a CPU."""
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
    """(T, H) -> (T, H), or (M, H), by replaying a graph; None if the layers must run without one.

    reason: why the caller rules out a graph, "" if it does not: `parts` does not describe all that
    the layers do, or more than their last output is wanted.
    """
    if torch.compiler.is_compiling() or (pool := pool_of(x.device)) is None:
        return None
    with pool.lock, torch.cuda.device_of(x):
        bucket = Bucket.of(x, sequences, rows)
        entry = Entry(reason or _refusal(layers, x, sequences, pool))
        call = Call(parts, sequences, rows, Precision.of(x), None, products_of(layers))
        if not entry.reason:
            recorded = _recorded(layers, parts)
            entry, call = recorded.find(bucket, x, call, pool)
        if events.is_listening():
            _tell(bucket, entry)
            return None  # run without a graph, so that operators record how they run
        if entry.graphs is None and not entry.reason:
            pool.record(entry, bucket, x, call)
        if entry.graphs is None:
            return None
        pool.touch(entry)
        pool.recorder.follow()
        if isinstance(entry.graphs, ForwardGraph):
            return entry.graphs(x, call)
        pending = Pending(pool, entry.graphs, recorded)
        return Replayed.apply(pending, call, x, *(call.trained or ()))  # type: ignore[no-untyped-call]


def _recorded(layers: nn.ModuleList, parts: Sequence[LayerParts]) -> Recorded:
    """The encoder's graphs, separate for training and eval mode, whose dropout differs."""
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
    """PyTorch's settings that choose kernels, and so are fixed in a recording."""
    return torch.are_deterministic_algorithms_enabled(), _matmul_precision()


def _matmul_precision() -> Any:
    """The precision of float32 products on a GPU, by PyTorch's newer interface if it exists: the
    older interface raises where a user has set the newer."""
    matmul = torch.backends.cuda.matmul
    return getattr(matmul, "fp32_precision", None) or torch.get_float32_matmul_precision()


def _tell(bucket: Bucket, entry: Entry) -> None:
    sizes = f"{bucket.tokens} tokens, {bucket.sequences} sequences of up to {bucket.longest}"
    known = "to be recorded at its first use" if entry.graphs is None else "recorded"
    layout = "none" if entry.reason else f"of {sizes}"
    events.tell(events.Route("CUDA graph", layout, entry.reason or known))
