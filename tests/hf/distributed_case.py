"""What each process of tests/hf/test_distributed.py runs: `main(OUT)`.

Every optimizer step's batch is divided among the processes. A share's loss is its sum over the
number of masked tokens (and pairs) of the whole step, so that the shares add up to what one process
would get; DDP and FSDP average gradients, so each process scales its loss by their number.
"""

import contextlib
import json
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastbert
from fastbert import events
from fastbert.modules.graphs import buckets, pool
from fastbert.train.objective import PretrainingObjective
from tests.hf.training_case import LENGTHS, SHAPE, make_batch, make_model
from tests.modules.graphs.case import Repeats

STEPS = 4
# the first process's share of step 2 has nothing to predict
EMPTY_STEP = 2
SEQUENCES = (*LENGTHS, 5, 9, 13, 2)


def step_batch(step: int) -> dict[str, torch.Tensor]:
    batch = make_batch(SEQUENCES, seed=step)
    if step == EMPTY_STEP:
        batch["labels"][::2] = -100
    return batch | {"next_sentence_label": torch.arange(len(SEQUENCES)) % 2}


def share(batch: dict[str, torch.Tensor], rank: int, world: int) -> dict[str, torch.Tensor]:
    return {name: value[rank::world] for name, value in batch.items()}


class MaskedLM:
    """`fastbert.patch` on Hugging Face's model, normalised as Trainer does it."""

    def __init__(self):
        self.module = fastbert.patch(make_model(transformers.BertForMaskedLM))

    def loss(self, module, batch, whole):
        batch = {name: value for name, value in batch.items() if name != "next_sentence_label"}
        return module(**batch, num_items_in_batch=(whole["labels"] != -100).sum()).loss


class Pretraining:
    """fastbert's own model and objective, over packed batches."""

    def __init__(self):
        theirs = make_model(transformers.BertForPreTraining)
        model = fastbert.BertForPreTraining(
            fastbert.BertConfig(**SHAPE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        )
        model.load_state_dict(theirs.state_dict())
        self.module = PretrainingObjective(model).train()

    def loss(self, module, batch, whole):
        real = batch["attention_mask"].bool()
        lengths = real.sum(1)
        packed = fastbert.PackedBatch(
            **{name: batch[name][real] for name in ("input_ids", "token_type_ids", "labels")},
            position_ids=torch.cat([torch.arange(length) for length in lengths]),
            cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int(),
            max_seqlen=int(lengths.max()),
            num_labels=int((batch["labels"] != -100).sum()),
            next_sentence_label=batch["next_sentence_label"],
        )
        return module(packed, int((whole["labels"] != -100).sum()), len(SEQUENCES)).loss


def shard(module: torch.nn.Module) -> torch.nn.Module:
    for part in list(module.modules()):
        if type(part).__name__ == "BertLayer":
            fully_shard(part)
    return fully_shard(module)


def flatten(module: torch.nn.Module) -> torch.nn.Module:
    """By FSDP1, which puts plain tensors in the place of the parameters of all modules inside."""
    return FullyShardedDataParallel(module, use_orig_params=False, device_id=torch.device("cpu"))


WRAPPERS = {"ddp": DistributedDataParallel, "fsdp1": flatten, "fsdp2": shard}
MODELS = {"patched": MaskedLM, "own": Pretraining}


DDP_OPTIONS = {
    "plain": {},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
}


def losses(model, wrap=lambda module: module, rank=0, world=1) -> list[float]:
    """Of each step, over all processes."""
    module = wrap(model.module)
    # not Adam, which a wrong scale of the gradients would leave as it is
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    values = []
    for step in range(STEPS):
        whole = step_batch(step)
        loss = model.loss(module, share(whole, rank, world), whole)
        (loss * world).backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        values.append(total.item())
    return values


def survives(model, **options) -> bool:
    """Whether DDP takes two steps of a loss that leaves the pooler out."""
    module = DistributedDataParallel(model, **options)
    batch = {name: value for name, value in make_batch().items() if name != "labels"}
    try:
        for _ in range(2):
            module(**batch).last_hidden_state.square().mean().backward()
    except RuntimeError:
        return False
    return True


def main(path: Path) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    report = {}
    for wrapper, wrap in WRAPPERS.items():
        for name, make in MODELS.items():
            with events.listen() as heard:
                values = losses(make(), wrap, rank, world)
            routes = [event for event in heard if isinstance(event, events.Route)]
            slow = [r for r in routes if "own" in r.layout or "hooks" in r.reason]
            report[f"{wrapper} {name}"] = {
                "losses": values,
                "routes": len(routes),
                "slow": slow,
            }
    for name, make in MODELS.items():
        recorder = Repeats()
        shared = pool.Pool(recorder.lane, float("inf"))
        with (
            mock.patch.object(buckets, "pool_of", lambda device, shared=shared: shared),
            mock.patch.object(pool, "RECORDED_AT", 1),
        ):
            report[f"graphs {name}"] = {
                "losses": losses(make(), DistributedDataParallel, rank, world),
                "recorded": recorder.recorded,
                "replayed": recorder.replayed,
            }
    for name, options in DDP_OPTIONS.items():
        theirs = make_model(transformers.BertModel)
        ours = fastbert.patch(make_model(transformers.BertModel))
        report[f"unused pooler {name}"] = [survives(theirs, **options), survives(ours, **options)]
    if rank == 0:
        path.write_text(json.dumps(report))
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()
