"""An eager and a graphed step of the same model, with stand-ins for a graph that run it again."""

import copy
import dataclasses

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastbert.config.pretrain import PretrainConfig
from fastbert.data import GlobalCounts
from fastbert.packing import Bucket, PackedBatch
from fastbert.train.distill.objective import DistillationObjective, Teacher, Weights
from fastbert.train.objective import PretrainingObjective
from fastbert.train.optimizer import make_optimizer
from fastbert.train.step import EagerStep, GraphedStep
from tests.models.pretraining_case import make_batch, make_model

CPU = torch.device("cpu")
STEPS = 9
BUCKET = Bucket(num_tokens=64, num_sequences=9, num_labels=48, max_seqlen=16)
CONFIG = PretrainConfig(preset="tiny", steps=STEPS, learning_rate=1e-2, dropout=0.1, seed=3)


def batches(parts=1):
    """Of changing sizes, which all fit the bucket."""
    draw = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        sizes = [torch.randint(1, 5, (), generator=draw) for _ in range(parts)]
        lengths = [torch.randint(1, 16, (size,), generator=draw).tolist() for size in sizes]
        yield [
            prepared(make_batch(some, seed=10 * step + part)) for part, some in enumerate(lengths)
        ]


def prepared(batch: PackedBatch) -> PackedBatch:
    """As a loader gives it: what dropout draws from is the step's."""
    return dataclasses.replace(batch, dropout_state=None)


def counts_of(parts):
    names = ("num_labels", "num_sequences", "num_tokens")
    return GlobalCounts(*(sum(getattr(part, name) for part in parts) for name in names))


class Repeats:
    """Does the work anew each time."""

    def warm_up(self, work):
        return work()

    def record(self, work):
        return work


class Operators(TorchDispatchMode):
    """Every operator that runs, with its arguments: tensors as places, numbers as they are.

    As on a GPU, what the host reads of a tensor is not part of the graph, here an error.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("the host reads a tensor")
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result


class Recorded(Repeats):
    """A graph on a CPU: the operators of the work, run again in order on what the places hold."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer

    def record(self, work):
        states = [x for state in self.optimizer.state.values() for x in state.values()]
        places = [*self.model.parameters(), *states]
        before = [place.detach().clone() for place in places]
        with Operators() as recording:
            recorded = work()
        with torch.no_grad():
            for place, value in zip(places, before, strict=True):
                place.copy_(value)

        @torch.no_grad()
        def replay():
            now = {}

            def current(tensor):
                return now.get(id(tensor), tensor)

            for function, args, kwargs, result in recording.calls:
                args, kwargs = tree_map_only(torch.Tensor, current, (args, kwargs))
                again = function(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    now.setdefault(id(old), new)
            return current(recorded)

        return replay


def distillation(model, cosine=1.0):
    teacher = make_model(num_hidden_layers=3).double()
    return DistillationObjective(model, Teacher(teacher), Weights(5.0, 2.0, cosine), 2.0)


def make_steps(
    device=CPU,
    graphs=None,
    bucket=BUCKET,
    precision="fp32",
    optimizer="adamw",
    objective=PretrainingObjective,
):
    config = dataclasses.replace(CONFIG, precision=precision)
    model = make_model(device=device)
    if device == CPU:  # in float32, AdamW makes steps of the noise that is the keys' bias gradient
        model.double()
    found = []
    for one in (model, copy.deepcopy(model)):
        made = make_optimizer(one, 0.01, optimizer)
        found.append(EagerStep(objective(one), made, config, device))
    eager, inner = found
    return eager, GraphedStep(inner, bucket, graphs or Repeats())


def run_both(eager, graphed, parts=1, tolerance=1e-5):
    for number, batch in enumerate(batches(parts=parts)):
        expected = eager(number, batch, counts_of(batch))
        actual = graphed(number, batch, counts_of(batch))
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_same_weights(eager, graphed, tolerance=1e-6):
    ours, theirs = (s.objective.state_dict() for s in (eager, graphed.eager))
    for name, tensor in theirs.items():
        torch.testing.assert_close(tensor, ours[name], rtol=tolerance, atol=tolerance, msg=name)


def assert_moved_alike(eager, graphed, before, share):
    """All steps together moved each weight to the same place, but for `share` of the way.

    The bias of the keys has a gradient of 0, and AdamW makes whole steps of its rounding.
    """
    ours, theirs = (s.objective.state_dict() for s in (eager, graphed.eager))
    for name, start in before.items():
        if not name.endswith("key.bias"):
            apart = (ours[name] - theirs[name]).norm()
            assert apart <= share * (ours[name] - start).norm(), name
