"""Training of one model in the processes that torchrun starts, with DDP or FSDP2.

`PretrainingData.batch(rank=, world_size=)` divides the batches, and losses are divided by the
counts of the whole batch, so gradients must be summed over the ranks. Both wrappers average them,
so `EagerStep` multiplies each loss by the number of ranks.
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
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fastbert.check import InputError
from fastbert.models.base import BertPreTrainedModel
from fastbert.system import locks
from fastbert.system.console import console
from fastbert.train.objective import PretrainingObjective

KINDS = ("ddp", "fsdp")
# how long other processes wait while the first one tokenises a large corpus
PATIENCE = datetime.timedelta(days=7)
_FAILED = "fastbert has failed"  # key of the store, set by a process that ends with an error


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process, one of the `size` processes of a run, and the device on which it trains.

    patient: a gloo group of all processes with the timeout PATIENCE; None for a single process
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    patient: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums the tensor over the ranks, in place, and returns it. A collective call."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    @contextlib.contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """Runs the block in the first process, then in the others, which can read its files."""
        if self.size > 1 and not self.is_first:
            dist.barrier(self.patient)
        yield
        if self.size > 1 and self.is_first:
            dist.barrier(self.patient)

    def whole(self, tensor: Any) -> Any:
        """A sharded tensor as a whole on the first rank's CPU, None on the other ranks.

        Any other argument is returned as it is. A collective call if the tensor is sharded.
        """
        if not isinstance(tensor, DTensor):
            return tensor
        found = tensor.full_tensor()
        return found.cpu() if self.is_first else None

    def claimed(self, out: Path) -> contextlib.AbstractContextManager[None]:
        """`locks.claimed` by the first process for all of them; no lock in the others."""
        return locks.claimed(out) if self.is_first else contextlib.nullcontext()


@contextlib.contextmanager
def joined() -> Iterator[Ranks]:
    """Joins the process group of torchrun's environment variables; without them, a single process.

    Each process has its own GPU and uses NCCL, or gloo on CPUs. Only the first one prints. After an
    InputError or OSError in one process, the processes that wait for it raise SystemExit(2). Raises
    InputError if only some of the variables are set.
    """
    on_gpu = torch.cuda.is_available()
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield Ranks(torch.device("cuda" if on_gpu else "cpu"))
        return
    wanted = ("RANK", "MASTER_ADDR", "MASTER_PORT", *["LOCAL_RANK"] * on_gpu)
    if missing := [name for name in wanted if name not in os.environ]:
        raise InputError(
            f"WORLD_SIZE={size}: {', '.join(missing)} not set; start the processes with torchrun, "
            "which sets all of them, or unset WORLD_SIZE"
        )
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    store = _store()
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=int(os.environ["RANK"]),
        world_size=size,
    )
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    console.quiet = dist.get_rank() != 0
    try:
        yield Ranks(device, dist.get_rank(), size, patient)
    except (InputError, OSError):
        with contextlib.suppress(RuntimeError):  # the process that has the store may be gone
            store.set(_FAILED, "")
        raise
    except RuntimeError:  # perhaps a lost connection to that process
        if _has_failed(store):
            raise SystemExit(2) from None
        raise
    dist.destroy_process_group()  # not after an error, which the other processes do not know of


def _has_failed(store: dist.Store) -> bool:
    """Whether a process has recorded in the store that its error ends the run."""
    with contextlib.suppress(RuntimeError):
        return store.check([_FAILED])
    return False


def _store() -> dist.Store:
    """torchrun's store, with separate keys for each restart of the processes.

    The store keeps the keys of earlier processes
    (https://github.com/pytorch/pytorch/issues/135712), so restarted ones would connect to addresses
    of dead processes. Nodes count their restarts independently, so a run on several nodes needs
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment instead.
    """
    store: dist.Store
    store, _, size = next(dist.rendezvous("env://"))
    if size != int(os.environ.get("LOCAL_WORLD_SIZE", 0)):
        return store
    return dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def require_kind(kind: str) -> None:
    """Raises InputError if `kind` is not in KINDS."""
    if kind not in KINDS:
        raise InputError(f"--parallel: expected one of {', '.join(KINDS)}, got {kind!r}")


def parallelised(objective: PretrainingObjective, kind: str, ranks: Ranks) -> nn.Module:
    """The objective as this rank runs it, wrapped for "ddp" or "fsdp" if there are several ranks.

    FSDP2 shards in place: each encoder layer, and the rest (embeddings, tied heads) as one unit.
    """
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
    """Makes a forward and backward in the block exchange gradients only if `wanted`."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(wanted)
    waits = isinstance(module, DistributedDataParallel) and not wanted
    with module.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
        yield


def reshard(module: nn.Module) -> None:
    """Frees the whole parameters that FSDP2 gathered for a forward without a backward."""
    if isinstance(module, FSDPModule):
        module.reshard()


def whole_weights(model: BertPreTrainedModel, ranks: Ranks) -> dict[str, Tensor]:
    """The unsharded parameters by name, on the first rank, tied ones once. A collective call."""
    return {name: ranks.whole(p.detach()) for name, p in model.named_parameters()}


def whole_state(optimizer: torch.optim.Optimizer, ranks: Ranks) -> dict[str, Any]:
    """The optimizer's state_dict with unsharded tensors, on the first rank. A collective call."""
    saved = optimizer.state_dict()
    states = {
        number: {name: ranks.whole(value) for name, value in state.items()}
        for number, state in saved["state"].items()
    }
    return saved | {"state": states}


def shard_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """Shards a state_dict of whole tensors in place, like the parameters of `optimizer`."""
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
