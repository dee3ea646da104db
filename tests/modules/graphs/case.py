"""A stand-in for CUDA graphs, with which a CPU sees what their logic does, and models to record."""

import collections
import copy
from unittest import mock

import torch
import transformers
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fastbert
from fastbert.hf import stack
from fastbert.modules import encoder
from fastbert.modules.graphs import buckets, pool
from fastbert.modules.graphs.pool import Pool
from fastbert.modules.plan import Plan
from fastbert.ops import attention_plain

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 61,
    "max_position_embeddings": 160,
}
KINDS = ("own", "Bert", "Roberta", "DistilBert")
# of three sequences of seven places
MASKS = {
    "none": None,
    "right": [[1, 1, 1, 1, 1, 0, 0], [1] * 7, [1, 1, 0, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0] * 6 + [1]],
    "holes": [[1, 0, 1, 1, 0, 1, 0], [0, 1] * 3 + [1], [1] * 7],
    "a row of padding": [[1] * 7, [0] * 7, [1, 1, 0, 0, 0, 0, 0]],
    "all padding": [[0] * 7] * 3,
    "ones": [[1] * 7] * 3,
}
# operations for which the host waits for a GPU
HOST_READS = {
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "unique_dim",
}


class Repeats:
    """Does the operations of a recording again where a CUDA graph would replay it, without Python.

    They read and write the tensors that they did when recorded, and the host may read none of
    them. A replay spoils what other graphs of its lane have returned, and gives nothing but NaN for
    a backward whose forward was not the last replay there, as CUDA graphs that share memory may;
    who kept a static buffer instead of a copy sees it. error: what recordings end in; taken: the
    bytes that each recording takes; again: False for replays that compute nothing.
    """

    def __init__(self, error: str = "", taken: int = 0, again: bool = True) -> None:
        self.error, self.taken, self.again = error, taken, again
        self.recorded = self.replayed = self.begun = 0
        self.lanes: list[Lane] = []
        self.refusal = ""

    def lane(self) -> "Lane":
        self.lanes.append(Lane(self))
        return self.lanes[-1]

    def memory(self) -> int:
        return sum(lane.held for lane in self.lanes)

    def record(self, lane, work):
        if self.error:
            raise RuntimeError(f"{self.error}\nand more")
        self.recorded += 1
        lane.held += self.taken
        on_a_gpu = mock.patch.object(attention_plain, "reads_lengths", return_value=False)
        with on_a_gpu, Tape() as tape:
            result = work()
        if not self.again:
            tape.operations.clear()  # which would keep tensors that a graph has the address of
        results = tensors_of(result)
        method = getattr(work, "func", work)
        owner = getattr(method, "__self__", work)
        lane.results.append((owner, results))
        is_backward = getattr(method, "__name__", "") == "_backward"

        def replay():
            self.replayed += 1
            is_lost, lane.owner = is_backward and lane.owner is not owner, owner
            for whose, theirs in lane.results:
                for one in theirs if whose is not owner else ():
                    one.fill_(float("nan"))
            if self.again:
                tape.play()
            for one in results if is_lost else ():
                one.fill_(float("nan"))
            return result

        return replay


class Counter(TorchDispatchMode):
    """Counts operators by their names."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **kwargs or {})


class Tape(TorchDispatchMode):
    """Records operations with the tensors that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in HOST_READS:
            raise RuntimeError(f"{name}: the host reads a tensor in a recording")
        found = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, tensors_of(found)))
        return found

    def play(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, places in self.operations:
                for place, x in zip(places, tensors_of(function(*args, **kwargs)), strict=True):
                    if place.data_ptr() != x.data_ptr():  # else a view, or written in place
                        place.copy_(x)


class Lane:
    """A recorder of `Repeats`, whose recordings share memory with each other alone."""

    def __init__(self, device: Repeats) -> None:
        self.device, self.held = device, 0
        self.results: list[tuple[object, list[Tensor]]] = []
        self.owner = None  # of the last replay

    def begin_anew(self) -> None:
        self.device.begun += 1
        self.held = 0

    def refusal(self) -> str:
        return self.device.refusal

    def memory(self) -> int:
        return self.held

    def follow(self) -> None:
        pass

    def warm_up(self, work):
        return work()

    def record(self, work):
        return self.device.record(self, work)


def tensors_of(result) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]


def use(
    recorder: Repeats, monkeypatch, most_memory: float = float("inf"), recorded_at: int = 1
) -> Repeats:
    """Has this machine's pool record by `recorder`, at the first use of a bucket."""
    monkeypatch.setattr(pool, "RECORDED_AT", recorded_at)
    shared = Pool(recorder.lane, most_memory)
    monkeypatch.setattr(buckets, "pool_of", lambda device: shared)
    monkeypatch.delenv("FASTBERT_GRAPHS", raising=False)
    return recorder


def models(kind: str, head: str = "ForSequenceClassification", **options):
    """The same model twice, the first of which runs without graphs; dropout is on in training."""
    torch.manual_seed(0)
    options = {**SHAPE, "num_labels": 3, **options}
    if kind == "own":
        plain = getattr(fastbert, f"Bert{head}")(fastbert.BertConfig(**options))
    else:
        if kind == "DistilBert":
            names = ("dim", "n_layers", "n_heads", "hidden_dim", *list(SHAPE)[4:], "num_labels")
            options = dict(zip(names, options.values(), strict=True))
        config = getattr(transformers, f"{kind}Config")(**options)
        plain = fastbert.patch(getattr(transformers, f"{kind}{head}")(config))
    recorded = copy.deepcopy(plain)
    buckets.allow(plain, False)
    return plain, recorded


def batch(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(3, 61, real.shape) * real
    return {"input_ids": ids, "attention_mask": real.long()}


def layers_of(model) -> torch.nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))


def plans_of(model) -> list[Plan]:
    """The plans of the layers' parts, which keep the graphs of these."""
    planners = encoder._PLANNER, stack._PLANNER
    found = (planner.plans.get(layers_of(model), {}).values() for planner in planners)
    return [plan for modes in found for plans in modes for plan in plans]


def logits(model, inputs, **options):
    torch.manual_seed(5)  # of dropout
    with torch.no_grad():
        return model(**inputs, **options).logits


def step(model, inputs, labels=None):
    """The loss and every gradient."""
    torch.manual_seed(5)
    model.zero_grad()
    labels = torch.arange(len(inputs["input_ids"])) % 3 if labels is None else labels
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    return [loss.detach(), *gradients(model)]


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_near(actual, expected):
    """The same by norm, for sums whose terms nearly cancel."""
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        assert a is None or (a - e).norm() <= 1e-4 * e.norm() + 1e-6


def assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)
