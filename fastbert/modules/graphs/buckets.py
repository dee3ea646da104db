"""Decides whether a call replays an encoder's layers as a CUDA graph, and which graph.

With small batches the GPU waits for Python; a graph launches all of its kernels at once. The layers
of a model, fastbert's own or a patched one, are recorded when a bucket of sizes is met for the
second time, and replayed for every later call that fits the bucket. A call that a graph could not
compute correctly runs without one, and `fastbert.explain` shows the reason.

`FASTBERT_GRAPHS=0` switches graphs off everywhere; `allow(model, False)`, which
`fastbert.patch(model, graphs=False)` calls, switches them off for one model.
"""

import functools
import os
from typing import Literal

import torch
from torch import Tensor, nn

from fastbert import backend, events
from fastbert.check import InputError, require
from fastbert.modules.graphs.call import Bucket, LayersCall, PaddedBatch, Precision, products_of
from fastbert.modules.graphs.pool import MOST_LANES, Entry, Lane, Pending, Pool, Recorded
from fastbert.modules.graphs.recorder import CudaGraphs
from fastbert.modules.graphs.replays import ForwardGraph
from fastbert.modules.layer import Share, share_packed
from fastbert.modules.linear import encoders_of
from fastbert.modules.plan import Planner, Reading
from fastbert.modules.sequences import Rows, Sequences

Graphs = Literal["auto", False]

MEMORY_SHARE = 0.4  # of the device's memory; when graphs hold more, some or all are dropped

_MARK = "_fastbert_graphs"  # attribute of a list of layers that must not replay graphs
_OFF = {"0": True, "off": True, "false": True, "auto": False, "": False}


def allow(model: nn.Module, graphs: Graphs) -> None:
    """Allows ("auto") or forbids (False) graphs in `model`; raises ValueError for other values."""
    is_known = graphs == "auto" or graphs is False
    require(is_known, "graphs", '"auto" or False', repr(graphs))
    _are_off()  # raises for a wrong FASTBERT_GRAPHS, even where no graph would run
    for layers in encoders_of(model):
        vars(layers).pop(_MARK, None)
        if graphs is False:
            vars(layers)[_MARK] = False


def off_by(layers: nn.ModuleList) -> str:
    """The name of the setting that switches these layers' graphs off; "" if they are on."""
    if _MARK in getattr(layers, "__dict__", ()):  # users may put a plain list there
        return "graphs=False"
    return "FASTBERT_GRAPHS" if _are_off() else ""


def _are_off() -> bool:
    value = os.environ.get("FASTBERT_GRAPHS", "")  # not cached: torch.compile would warn
    if value.lower() not in _OFF:
        raise InputError(f'FASTBERT_GRAPHS: expected "auto" or "0", got {value!r}')
    return _OFF[value.lower()]


@functools.cache
def pool_of(device: torch.device) -> Pool | None:
    """The device's pool of graphs; None where graphs cannot be recorded, as on a CPU."""
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        total = torch.cuda.get_device_properties(device).total_memory
        return Pool(functools.partial(CudaGraphs, shares_memory=True), MEMORY_SHARE * total)


def read_layers(
    planner: Planner, layers: nn.ModuleList, device: torch.device, *, trains: bool
) -> Reading:
    """Reads the layers for one call with tokens on `device`.

    trains: whether the module around them is in training mode, or a dropout state is given
    """
    may_replay = not (
        trains
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or backend.is_transformed()
        or pool_of(device) is None
        or any(layer.training for layer in layers)
    )
    return Reading(planner, layers, may_replay=may_replay)


def replayed(
    reading: Reading,
    x: Tensor | PaddedBatch,
    sequences: Sequences | None,
    states: tuple[int, ...] = (),
    rows: Rows | None = None,
    share: Share = share_packed,
    reason: str = "",
) -> list[Tensor] | None:
    """The outputs of `run_layers`, from a graph; None if the layers must run without a graph.

    sequences: None for a padded batch, whose outputs are those of `PaddedBatch.run`; reason: why
    the caller forbids a graph, because `reading.parts` does not describe all that the layers do;
    "" if the caller allows one.
    """
    layers, parts = reading.layers, reading.parts
    if torch.compiler.is_compiling() or (pool := pool_of(x.device)) is None:
        return None
    reason = reason or off_by(layers)
    if reason and not events.is_listening():
        return None
    at = x.input_ids if isinstance(x, PaddedBatch) else x
    with pool.entered() as is_inside, torch.cuda.device_of(at):
        if not is_inside:
            return None
        if isinstance(x, PaddedBatch):
            bucket, mask = x.bucket(), None
            x = x.fitted(bucket)
        else:
            assert sequences is not None
            bucket, mask = Bucket.of(x, sequences, rows), sequences.mask
        lane = pool.lane()
        reason = reason or _recorded(reading).reason or _refusal(bucket, mask, layers, lane)
        entry = Entry(lane, reason)
        mode = Precision.of(x), layers.training, products_of(layers)
        call = LayersCall(parts, range(len(parts)), sequences, states, rows, *mode)
        if not entry.reason:
            recorded = _recorded(reading)
            entry, call = recorded.find(bucket, x, call, pool, lane)
        if events.is_listening():
            _tell(bucket, entry)
            return None  # run without a graph, so that operators tell how they run
        if entry.graphs is None and not entry.reason:
            reading.settle()
            if reading.parts is not parts:
                return None
            pool.record(entry, bucket, x, call)
        if entry.graphs is None:
            return None
        pool.touch(entry)
        lane.recorder.follow()
        if isinstance(entry.graphs, ForwardGraph):
            last, *others = entry.graphs(x, call)
            if not recorded.settle(pool):  # checked while the GPU works
                return None
            return [last, *(share(y)[0] for y in others)]
        assert isinstance(x, Tensor)
        return Pending(pool, lane, entry.graphs, recorded).run(x, call, share)


def _recorded(reading: Reading) -> Recorded:
    """The graphs of `reading.parts`, as long as these have a plan, which keeps both."""
    plan = reading.plan
    if plan is None:  # each call reads other parts
        return Recorded(reading.parts, "a hook inside the layers")
    plan.recorded = plan.recorded or Recorded(plan.parts)
    return plan.recorded


def may_compute(reading: Reading) -> bool:
    """Whether a graph may compute this call from its padded batch on, as far as is known so far.

    Not with dropout: its masks depend on the batch, and its state is drawn outside of graphs.
    """
    # may_replay is checked first, because torch.compile cannot trace what follows
    if not reading.may_replay or reading.called() or reading.drops() or off_by(reading.layers):
        return False
    return not _recorded(reading).reason


def _refusal(bucket: Bucket, mask: Tensor | None, layers: nn.ModuleList, lane: Lane) -> str:
    """The reason why this call may not replay a graph; "" if it may."""
    if mask is not None:
        return "a general mask"
    if not bucket.tokens:
        return "no tokens"
    if not lane.is_free():
        return f"{MOST_LANES} earlier forwards whose backwards are yet to run"
    if "_is_replica" in vars(layers):
        return "a replica of DataParallel"
    if backend.forced() is not None:
        return "a backend that is forced"
    is_watched = torch._C._len_torch_dispatch_stack() or backend.is_transformed()
    if is_watched or torch.is_anomaly_enabled():
        return "a mode that looks at each operation"
    return lane.recorder.refusal()


def _tell(bucket: Bucket, entry: Entry) -> None:
    sizes = f"{bucket.tokens} tokens, {bucket.sequences} sequences of up to {bucket.longest}"
    known = "to be recorded when it is met again" if entry.graphs is None else "recorded"
    layout = "none" if entry.reason else f"of {sizes}"
    events.tell(events.Route("CUDA graph", layout, entry.reason or known))
