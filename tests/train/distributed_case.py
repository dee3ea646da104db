"""What each process of tests/train/test_distributed.py runs: `main(ROOT)`.

ROOT/report.pt, of training steps of a small model in float64, with dropout and accumulation, by DDP
and FSDP2, of pre-training, also in FP8, and of distillation; one of them has a loss that is not
finite on the last rank alone. And of steps of LAMB on shards.

Then those of RUNS that ROOT/runs.json names, in ROOT, one after the other in these processes: runs
of `fastbert pretrain` with the options in ROOT/options.json. Those that are started again go on
with the last run that was begun.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from fastbert import backend
from fastbert.config.bert import BertConfig
from fastbert.config.pretrain import PretrainConfig
from fastbert.data import GlobalCounts
from fastbert.models.pretraining import BertForMaskedLM
from fastbert.modules.products import fp8
from fastbert.optim import Lamb
from fastbert.train import distributed
from fastbert.train.distill.objective import DistillationObjective, Teacher, Weights
from fastbert.train.distributed import Ranks
from fastbert.train.objective import PretrainingObjective
from fastbert.train.step import EagerStep
from tests.command_line import main as fastbert
from tests.models.pretraining_case import make_batch, make_model

# what FSDP2 calls, by its name since torch 2.13 and before
SCATTER = next(n for n in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(dist, n))
STEPS, BAD_STEP, PARTS = 4, 2, 2
LENGTHS = (9, 3, 14, 5, 1, 16, 7, 12, 2)
CONFIG = PretrainConfig(preset="tiny", steps=STEPS, learning_rate=0.3, dropout=0.3, seed=3)


def share(step, rank, size):
    """This rank's parts of a batch, as unequal as they come."""
    ids = list(range(len(LENGTHS)))
    return [
        make_batch([LENGTHS[i] for i in mine], ids=mine, seed=step)
        for mine in (ids[rank * PARTS + part :: size * PARTS] for part in range(PARTS))
    ]


class Descent(torch.optim.Optimizer):
    """Not Adam or LAMB, which a wrong scale of the gradients would leave as they are."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                x, g = (
                    t.to_local() if isinstance(t, DTensor) else t
                    for t in (parameter, parameter.grad)
                )
                x.sub_(g.masked_fill(self.found_inf.bool(), 0), alpha=group["lr"])


def distillation() -> DistillationObjective:
    shape = dataclasses.asdict(make_model(dropout=0.3).config) | {"num_labels": None}
    student, teacher = (
        BertForMaskedLM(BertConfig(**shape | {"num_hidden_layers": layers})).double()
        for layers in (2, 3)
    )
    return DistillationObjective(student, Teacher(teacher), Weights(5.0, 2.0, 1.0), 2.0)


def in_fp8() -> PretrainingObjective:
    model = make_model(dropout=0.3)
    fp8.enable(model)
    return PretrainingObjective(model)


def train(
    ranks: Ranks, kind: str, objective: PretrainingObjective | None = None, precision: str = "fp32"
) -> dict:
    """Metrics of each step over all ranks, weights and FP8's scales at the end, exchanges."""
    if objective is None:
        objective = PretrainingObjective(make_model(dropout=0.3).double())
    model = objective.model
    module = distributed.parallelised(objective, kind, ranks)
    exchanged = []
    if kind == "ddp" and ranks.size > 1:
        module.register_comm_hook(None, counting(exchanged))
    optimizer = Descent(module.parameters(), {"lr": 0.0})
    config = dataclasses.replace(CONFIG, precision=precision)
    step = EagerStep(module, optimizer, config, ranks.device, ranks.size)
    rows = []
    for number in range(STEPS):
        whole = share(number, 0, 1)
        counts = GlobalCounts(sum(part.num_labels for part in whole), len(LENGTHS), sum(LENGTHS))
        if number == BAD_STEP and ranks.rank == ranks.size - 1:
            counts = (torch.tensor(torch.nan), *counts[1:])
        with mock.patch.object(dist, SCATTER, side_effect=getattr(dist, SCATTER)) as sent:
            sums = step(number, share(number, ranks.rank, ranks.size), counts)
        if kind == "fsdp":
            exchanged.append(sent.call_count)
        ranks.sum(sums[:-1])
        rows.append(sums)
    weights = distributed.whole_weights(model, ranks)
    found = {"rows": torch.stack(rows), "weights": weights, "exchanged": exchanged}
    return found | {"scales": fp8.state(model)}


def counting(exchanged):
    def hook(state, bucket):
        exchanged.append(bucket.index())
        buffer = bucket.buffer().div_(dist.get_world_size())
        work = dist.all_reduce(buffer, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    return hook


class Tensors(nn.Module):
    """Some that two ranks share equally, unequally, and not at all."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        shapes = ((6, 4), (5,), (1, 3), (7, 2))
        self.all = nn.ParameterList(
            torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes
        )


def lamb(variant: str, sharded: bool) -> list[torch.Tensor]:
    module = Tensors()
    whole = [parameter.detach().clone() for parameter in module.all]
    if sharded:
        fully_shard(module)
    members = list(module.parameters())
    groups = [
        {"params": members[:2], "weight_decay": 0.01},
        {"params": members[2:], "weight_decay": 0.0},
    ]
    optimizer = Lamb(groups, lr=0.1, variant=variant)
    draw = torch.Generator().manual_seed(1)
    for _ in range(4):
        for member, value in zip(members, whole, strict=True):
            gradient = 3 * torch.randn(value.shape, generator=draw, dtype=value.dtype)
            if isinstance(member, DTensor):
                gradient = distribute_tensor(gradient, member.device_mesh, member.placements)
            member.grad = gradient
        optimizer.step()
    return [m.full_tensor() if isinstance(m, DTensor) else m.detach() for m in members]


def report(path: Path) -> None:
    with distributed.joined() as ranks:
        found = {kind: train(ranks, kind) for kind in distributed.KINDS}
        found |= {f"distil {k}": train(ranks, k, distillation()) for k in distributed.KINDS}
        with backend.use("reference"):  # which emulates FP8
            found |= {f"fp8 {k}": train(ranks, k, in_fp8(), "fp8") for k in distributed.KINDS}
        found |= {variant: lamb(variant, sharded=True) for variant in ("paper", "nvidia")}
        if ranks.is_first:
            torch.save(found, path)


def back_to_step(step: int, out: Path, copy: Path) -> Path:
    """A copy of a run of 9 steps as it was after an earlier one."""
    shutil.copytree(out, copy, symlinks=True)
    (copy / "latest").unlink()
    (copy / "latest").symlink_to(f"checkpoint-{step}")
    shutil.rmtree(copy / "checkpoint-9")
    return copy


# Name of the run -> its kind, and the run from whose step 6 it goes on; KILLED are begun again.
KILLED = {f"killed {kind}": kind for kind in distributed.KINDS}
RUNS = {kind: (kind, None) for kind in distributed.KINDS}
RUNS |= {f"{a} to {b}": (b, a) for a, b in (("one", "ddp"), ("one", "fsdp"), ("ddp", "fsdp"))}
RUNS |= {name: (kind, None) for name, kind in KILLED.items()}


def main(root: Path) -> None:
    # Each joins torchrun's store by a number of its own: the store keeps what earlier ones wrote.
    restarts = 100 * int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    runs = json.loads((root / "runs.json").read_text())
    if restarts:
        begun = [name for name in runs if name in KILLED and (root / name).exists()]
        runs = runs[runs.index(begun[-1]) :]
    else:
        report(root / "report.pt")
    for number, name in enumerate(runs, 1):
        kind, before = RUNS[name]
        if before:
            os.environ["TORCHELASTIC_RESTART_COUNT"] = str(restarts + 50 + number)
            with distributed.joined() as ranks, ranks.first_goes_ahead():
                if ranks.is_first:
                    back_to_step(6, root / before, root / name)
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(restarts + number)
        if os.environ["RANK"] == "0":
            print(f"run {name}", flush=True)
        options = [] if before else json.loads((root / "options.json").read_text())
        options += ["--resume"] if before or name in KILLED else []
        fastbert("pretrain", "--out", root / name, "--parallel", kind, *options)
