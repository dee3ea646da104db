"""The graphs of a device and of its encoders: which are kept, and when one is dropped or stale.

A device has a `Pool` of graphs, in `Lane`s of memory. An encoder's `Plan` has an object `Recorded`,
with an `Entry` for each bucket and lane. `Pending` is a training forward that waits for its
backward.
"""

import contextlib
import operator
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.modules.graphs.call import Bucket, LayersCall, PaddedBatch
from fastbert.modules.graphs.recorder import CudaGraphs
from fastbert.modules.graphs.replays import (
    ForwardGraph,
    Replayed,
    TrainingGraphs,
    num_segments,
)
from fastbert.modules.layer import LayerParts, Share
from fastbert.ops.fused import applied

MOST_GRAPHS = 64  # on a device; beyond it the least recently used graphs are dropped
MOST_LANES = 4  # on a device: the training forwards that may wait for their backwards at once
# The use of a bucket at which it is recorded. A recording runs the layers several times and waits
# for the GPU, which does not pay for sizes that are met only once.
RECORDED_AT = 2
MOST_CHANGES = 16  # times that an encoder's parameters may move before graphs are given up


class Lane:
    """Memory that graphs share, in which one training forward at a time waits for its backward.

    A replay overwrites what earlier replays have saved there. So other calls replay graphs of the
    next lane until that backward has run or the forward's output is freed.
    """

    def __init__(self, recorder: CudaGraphs) -> None:
        self.recorder = recorder
        self.pending: weakref.ref[Pending] | None = None

    def is_free(self) -> bool:
        return self.pending is None or self.pending() is None


class Pool:
    """The graphs of one device, in lanes."""

    def __init__(self, new_recorder: Callable[[], CudaGraphs], most_memory: float) -> None:
        self.new_recorder, self.most_memory = new_recorder, most_memory
        self.lock = threading.RLock()
        self.is_recording = False
        self.lanes: list[Lane] = []
        # least recently used first; weak, so that entries are freed with their encoder
        self.used: weakref.WeakKeyDictionary[Entry, None] = weakref.WeakKeyDictionary()

    @contextlib.contextmanager
    def entered(self) -> Iterator[bool]:
        """Holds the lock and yields True; without it yields False while another thread records.

        Autograd runs the backwards of all threads in one thread of its own. If that thread waited
        here, a recording that needs it for a backward would never end.
        """
        while not (is_inside := self.lock.acquire(timeout=0.001)) and not self.is_recording:
            pass
        try:
            yield is_inside
        finally:
            if is_inside:
                self.lock.release()

    def lane(self) -> Lane:
        """The first free lane, else a new one; if there are MOST_LANES already, the last one."""
        for lane in self.lanes:
            if lane.is_free():
                return lane
        if len(self.lanes) < MOST_LANES:
            self.lanes.append(Lane(self.new_recorder()))
        return self.lanes[-1]

    def touch(self, entry: "Entry") -> None:
        self.used.pop(entry, None)
        self.used[entry] = None

    def record(
        self, entry: "Entry", bucket: Bucket, x: Tensor | PaddedBatch, call: LayersCall
    ) -> None:
        """Records the entry's graphs from use number RECORDED_AT on; on failure sets its reason."""
        entry.uses += 1
        if entry.uses < RECORDED_AT:
            return
        while len(self.used) >= MOST_GRAPHS:
            next(iter(self.used)).drop(self)
        self.is_recording = True
        try:
            with call.undone():
                kind: Any = ForwardGraph if call.trained is None else TrainingGraphs
                entry.graphs = kind(entry.lane.recorder, bucket, x, call)
        except RuntimeError as error:  # includes running out of memory
            entry.reason = f"recording failed: {str(error).strip().partition(chr(10))[0]}"
            return
        finally:
            self.is_recording = False
        self.touch(entry)
        if sum(lane.recorder.memory() for lane in self.lanes) > self.most_memory:
            self._make_room(entry)

    def _make_room(self, entry: "Entry") -> None:
        """Drops all graphs in the entry's lane, or in every lane if the entry's is the first."""
        lanes = self.lanes if entry.lane is self.lanes[0] else [entry.lane]
        dropped = [other for other in self.used if other.lane in lanes]
        for other in dropped:
            other.drop(self)
        for lane in lanes:
            lane.recorder.begin_anew()
        if entry.is_too_large or len(dropped) == 1:
            entry.reason = "its graph takes too much of the device's memory"
        entry.is_too_large = True  # the entry gets no graph if this happens again


class Entry:
    """The graphs of one encoder for one bucket in one lane, or the reason why there are none."""

    def __init__(self, lane: Lane, reason: str = "") -> None:
        self.lane, self.reason = lane, reason
        self.graphs: ForwardGraph | TrainingGraphs | None = None
        self.uses = 0
        self.is_too_large = False

    def drop(self, pool: Pool) -> None:
        self.graphs = None
        pool.used.pop(self, None)


class Pending:
    """A training forward whose backward has not run yet; it lives as long as its output."""

    def __init__(
        self, pool: Pool, lane: Lane, graphs: TrainingGraphs, recorded: "Recorded"
    ) -> None:
        self.pool, self.lane, self.graphs, self.recorded = pool, lane, graphs, recorded
        self.addresses, self.layouts = recorded.addresses, recorded.layouts
        self.left = set(graphs.replay_backward)  # the segments whose backward is yet to run

    def run(self, x: Tensor, call: LayersCall, share: Share) -> list[Tensor]:
        """The outputs of `run_layers` from the forward's graph, with an autograd node a segment."""
        self.lane.pending = weakref.ref(self)
        found, states = self.graphs.forward(x, call), []
        for number, segment in enumerate(self.graphs.segments):
            one = segment.of(call)
            (x,) = applied(Replayed, self, number, one, found[number], x, *(one.trained or ()))
            if segment.numbers[-1] in call.states:
                shared, x = share(x)
                states.append(shared)
        return [x, *states]

    def backward(
        self, number: int, x: Tensor, gradients: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...] | None:
        with self.pool.entered() as is_inside, torch.cuda.device_of(x):
            if not is_inside:
                return None
            if number not in self.left:
                return None
            self.left.remove(number)
            if not self.left:
                self.lane.pending = None
            parameters = self.recorded.parameters()
            if _addresses(parameters) != self.addresses or _layouts(parameters) != self.layouts:
                return None
            self.lane.recorder.follow()
            return self.graphs.backward(number, x, gradients)


class Recorded:
    """The graphs of one encoder, valid while the parts of its layers stay the same.

    reason: why there can be none; "" unless the caller or the parts give one.
    """

    def __init__(self, parts: Sequence[LayerParts], reason: str = "") -> None:
        self.entries: dict[tuple[Any, ...], Entry] = {}
        self.found: list[Any] | None = None  # the parameters in `owners` at the last call
        self.distinct: list[Tensor] = []  # each of them once
        self.addresses: list[int] = []
        self.layouts: list[Any] = []
        self.trained: list[Tensor] | None = None  # None before the first call with gradients
        self.changes = 0
        leaves = [leaf for part in parts for leaf in part.leaves]
        others: list[Any] = [
            leaf.module
            for leaf in leaves
            if not (leaf.is_read and leaf.parameters is leaf.module._parameters)
        ]
        others += [part.activation for part in parts if isinstance(part.activation, nn.Module)]
        self.reason = f"a {type(others[0]).__name__} in the layers" if others else reason
        tables = [leaf.module._parameters for leaf in leaves]
        self.owners = tables + tables, ["weight"] * len(tables) + ["bias"] * len(tables)

    def find(
        self, bucket: Bucket, x: Tensor | PaddedBatch, call: LayersCall, pool: Pool, lane: Lane
    ) -> tuple[Entry, LayersCall]:
        """The entry for the call, new if there is none; and the call with `trained` filled in."""
        parameters = self.parameters()
        # only read where it matters, because reading requires_grad takes microseconds
        trained = None
        if torch.is_grad_enabled():
            trained = [parameter for parameter in parameters if parameter.requires_grad]
        reason = self._follow(parameters, trained, pool)
        if reason:
            return Entry(lane, reason), call
        wants_dx = x.requires_grad
        if trained or (trained is not None and wants_dx):
            call = call._replace(trained=trained)
        drops = call.sequences is not None and call.sequences.rng is not None
        has = call.trained is None, wants_dx, drops
        mode = call.states, call.precision, x.dtype, has, call.products, num_segments()
        fixed = x.key() if isinstance(x, PaddedBatch) else None
        key = fixed, lane, bucket, mode, _numerics()
        entry = self.entries.get(key)
        if entry is None:
            entry = self.entries[key] = Entry(lane)
        return entry, call

    def parameters(self) -> list[Tensor]:
        """The distinct parameters that the layers have now."""
        found = [*map(dict.get, *self.owners)]
        if not are_same(found, self.found):  # hashing tensors takes longer than the rest
            self.found = found
            self.distinct = list(dict.fromkeys(p for p in found if p is not None))
        return self.distinct

    def _follow(self, parameters: list[Tensor], trained: list[Tensor] | None, pool: Pool) -> str:
        """Drops all graphs if parameters moved or changed layout, or if other ones are trained.

        Returns why graphs are refused, or "". Without gradients (`trained` is None), `settle`
        checks the layouts after the replay.
        """
        addresses = _addresses(parameters)
        if self.trained is None:
            self.trained = trained
        is_same = trained is None or (
            are_same(trained, self.trained) and _layouts(parameters) == self.layouts
        )
        if not is_same or addresses != self.addresses:
            if any(type(parameter) is not nn.Parameter for parameter in parameters):
                return "parameters that are not plain ones"
            self._drop(pool)
            self.addresses, self.layouts = addresses, _layouts(parameters)
            self.trained, self.changes = trained, self.changes + 1
        return "parameters that move time and again" if self.changes > MOST_CHANGES else ""

    def settle(self, pool: Pool) -> bool:
        """Whether the parameters still have the recorded layouts; if not, drops all graphs.

        A replay before this check may have misread the parameters, so the caller drops its result.
        """
        if _layouts(self.distinct) == self.layouts:
            return True
        self._drop(pool)
        return False

    def _drop(self, pool: Pool) -> None:
        for entry in self.entries.values():
            entry.drop(pool)
        self.entries, self.addresses = {}, []


def _addresses(parameters: list[Tensor]) -> list[int]:
    return [*map(Tensor.data_ptr, parameters)]


def _layouts(parameters: list[Tensor]) -> list[Any]:
    """The dtypes, sizes and contiguity of parameters, which are fixed in a recorded graph.

    Shapes and strides would take twice as long to read. Sizes suffice, because the layers around a
    weight fix one of its dimensions.
    """
    dtypes = [parameter.dtype for parameter in parameters]
    return [dtypes, [*map(Tensor.numel, parameters)], [*map(Tensor.is_contiguous, parameters)]]


def are_same(some: list[Any], others: list[Any] | None) -> bool:
    """Whether both lists hold the same objects."""
    return others is not None and len(some) == len(others) and all(map(operator.is_, some, others))


def _numerics() -> tuple[Any, ...]:
    """PyTorch's settings that choose kernels, and so are fixed in a recording."""
    # `torch.get_float32_matmul_precision` would raise if a user has set this attribute
    precision = torch.backends.cuda.matmul.fp32_precision
    return torch.are_deterministic_algorithms_enabled(), precision
