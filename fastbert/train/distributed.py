"""Several processes that train one model: those that torchrun starts, by DDP or FSDP2.

Batches are cut up by `PretrainingData.batch(rank=, world_size=)`, and losses are over the
counts of the whole batch; so gradients are to be summed over the ranks. Both wrappers take the mean
instead, hence `EagerStep` multiplies each loss by the number of ranks.
"""

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fastbert.check import InputError
from fastbert.models.base import BertPreTrainedModel
from fastbert.system import locks
from fastbert.system.console import console
from fastbert.system.files import Unwritable, new_directory
from fastbert.train.objective import PretrainingObjective

KINDS = ("ddp", "fsdp")
# the first process may tokenise a large corpus while the others wait for it
PATIENCE = datetime.timedelta(days=7)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among the `size` of a run, and the device that it trains on."""

    device: torch.device
    rank: int = 0
    size: int = 1
    patient: dist.ProcessGroup | None = None  # of all, with PATIENCE

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor, which now holds its sum over the ranks."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    @contextlib.contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """The first process does the block, and then the others, who find what it has made."""
        if self.size > 1 and not self.is_first:
            dist.barrier(self.patient)
        yield
        if self.size > 1 and self.is_first:
            dist.barrier(self.patient)

    def claimed(self, out: Path) -> contextlib.AbstractContextManager[None]:
        """`locks.claimed`, which the first process does for all of them."""
        return locks.claimed(out) if self.is_first else contextlib.nullcontext()

    @contextlib.contextmanager
    def new_directory(self, path: Path) -> Iterator[Path]:
        """`files.new_directory`, which all of them write into; nothing is left of a failure.

        The block ends with a collective call, or the first process may rename it too early.
        """
        with contextlib.ExitStack() as stack:
            writing = [path]
            if self.is_first:
                writing = [stack.enter_context(new_directory(path))]
            if self.size > 1:
                dist.broadcast_object_list(writing, src=0)
            yield writing[0]


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that torchrun has started, by its environment; without it this one alone.

    They talk by NCCL on GPUs, each on its own, and by gloo on CPUs. Only the first one prints.
    """
    on_gpu = torch.cuda.is_available()
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield Ranks(torch.device("cuda" if on_gpu else "cpu"))
        return
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=_store(),
        rank=int(os.environ["RANK"]),
        world_size=size,
    )
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    console.quiet = dist.get_rank() != 0
    yield Ranks(device, dist.get_rank(), size, patient)
    dist.destroy_process_group()  # not after an error, which the others know nothing of


def _store() -> dist.Store:
    """torchrun's, in which the keys of processes that it has restarted are out of the way.

    It keeps them (https://github.com/pytorch/pytorch/issues/135712), and new processes would look
    for the old ones at their addresses. Several nodes count their restarts apart, so that there
    only TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, set for torchrun, is of help.
    """
    store, _, size = next(dist.rendezvous("env://"))
    if size != int(os.environ.get("LOCAL_WORLD_SIZE", 0)):
        return store
    return dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def parallelised(objective: PretrainingObjective, kind: str, ranks: Ranks) -> nn.Module:
    """The objective as this rank runs it: as it is, or by "ddp" or "fsdp".

    FSDP2 shards each layer and the rest (embeddings and tied heads) in place. Raises InputError for
    another kind.
    """
    if kind not in KINDS:
        raise InputError(f"--parallel: one of {', '.join(KINDS)}, got {kind!r}")
    if ranks.size == 1:
        return objective
    if kind == "ddp":
        return DistributedDataParallel(objective, gradient_as_bucket_view=True)
    for layer in objective.model.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(objective)
    return objective


@contextlib.contextmanager
def exchange(module: nn.Module, wanted: bool) -> Iterator[None]:
    """Forward and backward in it send gradients to the other ranks only where that is wanted."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(wanted)
    waits = isinstance(module, DistributedDataParallel) and not wanted
    with module.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
        yield


def reshard(module: nn.Module) -> None:
    """Lets go of the parameters that FSDP2 has gathered for a forward without a backward."""
    if isinstance(module, FSDPModule):
        module.reshard()


def whole_weights(model: BertPreTrainedModel) -> dict[str, Tensor]:
    """The parameters by name, a tied one once, on the CPU of the first rank; elsewhere none.

    A collective call.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(model, options=options)
    names = dict(model.named_parameters())
    return {name: tensor for name, tensor in weights.items() if name in names}


def save_optimizer(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Each rank writes its share of the optimizer's tensors. A collective call."""
    state = get_optimizer_state_dict(model, optimizer)["state"]
    try:
        dcp.save(state, checkpoint_id=directory)
    except dcp.api.CheckpointException as error:
        raise Unwritable(directory, _reason(error)) from None


def load_optimizer(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Reads what any number of ranks have saved into the tensors of these. A collective call."""
    state = get_optimizer_state_dict(model, optimizer)["state"]  # the optimizer's own, not copies
    try:
        dcp.load(state, checkpoint_id=directory)
    except dcp.api.CheckpointException as error:
        raise RuntimeError(_reason(error)) from None


def shard_state(optimizer: torch.optim.Optimizer, saved: dict) -> dict:
    """An optimizer's state_dict of whole tensors, cut as the parameters of this one are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, state in saved["state"].items():
        parameter = parameters[number]
        if isinstance(parameter, DTensor):
            for name, tensor in state.items():
                if tensor.shape == parameter.shape:
                    state[name] = distribute_tensor(
                        tensor.to(parameter.device),
                        parameter.device_mesh,
                        parameter.placements,
                        src_data_rank=None,
                    )
    return saved


def _reason(error: dcp.api.CheckpointException) -> str:
    first, _ = next(iter(error.failures.values()))
    return str(first).strip().partition("\n")[0]
