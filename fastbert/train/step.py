"""One optimizer step of pre-training, run as it is or replayed as one CUDA graph.

A step whose gradients are not finite changes neither weights nor the optimizer's state, and is
counted; that too is decided on the device.

A graph's kernels run on the same addresses and sizes each time. So batches are padded to fixed
sizes, with sequences that predict nothing, and copied into buffers; and what changes from step to
step (learning rate, dropout's state, the counts that losses are means over) lies on the device.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastbert.config.pretrain import PretrainConfig
from fastbert.data import GlobalCounts, PretrainingData
from fastbert.modules.graphs import buckets
from fastbert.modules.graphs.recorder import WARM_UP, CudaGraphs, Recorder, Work
from fastbert.packing import Bucket, PackedBatch
from fastbert.system.console import console
from fastbert.train import distributed
from fastbert.train.optimizer import linear_schedule
from fastbert.train.precision import autocast, make_scaler

Step = Callable[[int, list[PackedBatch], GlobalCounts], Tensor]


def make_step(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: PretrainConfig,
    data: PretrainingData,
    device: torch.device,
    *,
    scaler: torch.amp.GradScaler | None = None,
    num_ranks: int = 1,
    eager: bool = False,
) -> Step:
    """What the loop calls for each step: (number, parts of the batch, its counts) -> metric sums.

    On one GPU it is a graph, unless `eager` asks for none. objective: a `PretrainingObjective`, as
    `distributed.parallelised` returns it for that many ranks.
    """
    step = EagerStep(objective, optimizer, config, device, scaler=scaler, num_ranks=num_ranks)
    if device.type != "cuda" or eager or num_ranks > 1:
        return step
    # beside the graph of a whole step, those of the layers would only take memory
    buckets.allow(objective, False)
    return GraphedStep(step, data.bucket(config.accumulation), CudaGraphs())


class EagerStep:
    """Forward and backward of each part, clipping, optimizer."""

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: PretrainConfig,
        device: torch.device,
        *,
        scaler: torch.amp.GradScaler | None = None,
        num_ranks: int = 1,
    ) -> None:
        self.objective, self.optimizer, self.config = objective, optimizer, config
        self.device, self.num_ranks = device, num_ranks
        self.scaler = make_scaler(config.precision, device) if scaler is None else scaler
        self.rate: Tensor | None = None
        for group in optimizer.param_groups:  # of a checkpoint that graphs may have trained
            group["capturable"] = False
        self.warmup = round(config.steps * config.warmup_ratio)
        self.autocast = autocast(config.precision, device)

    def __call__(self, number: int, parts: list[PackedBatch], counts: GlobalCounts) -> Tensor:
        self.set_learning_rate(number)
        parts = [part.to(self.device, non_blocking=True) for part in self.numbered(number, parts)]
        return self.compute(parts, *counts)

    def numbered(self, number: int, parts: list[PackedBatch]) -> list[PackedBatch]:
        """Masks are those of the examples, in whatever parts the batch is run."""
        state = torch.tensor([self.config.seed, number])
        return [dataclasses.replace(part, dropout_state=state) for part in parts]

    def set_learning_rate(self, number: int) -> None:
        rate = linear_schedule(
            number, peak=self.config.learning_rate, warmup=self.warmup, total=self.config.steps
        )
        if self.rate is not None:
            self.rate.fill_(rate)
            return
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def use_rate_on_device(self) -> None:
        """From now on the optimizer reads the learning rate where a graph can."""
        self.rate = torch.zeros((), device=self.device)
        for group in self.optimizer.param_groups:
            group["lr"], group["capturable"] = self.rate, True

    def compute(self, parts: list[PackedBatch], *counts: int | Tensor) -> Tensor:
        """The objective's metrics (7,) of the parts, float32, all on the device; no host waits.

        counts: `GlobalCounts`, numbers or ()
        """
        sums = []
        for number, part in enumerate(parts, start=1):
            with distributed.exchange(self.objective, wanted=number == len(parts)):
                with self.autocast:
                    result = self.objective(part, *counts)
                self.scaler.scale(result.loss * self.num_ranks).backward()
            sums.append(result.sums)
        self.scaler.unscale_(self.optimizer)
        parameters = self.objective.parameters()
        norm = nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        skipped = (~norm.isfinite()).float()
        self._update(skipped)
        return torch.cat([torch.stack(sums).sum(0).masked_fill(skipped.bool(), 0), skipped[None]])

    def _update(self, skipped: Tensor) -> None:
        """An optimizer's step, by the flag that GradScaler would hand over, if only in fp16."""
        optimizer: Any = self.optimizer
        optimizer.found_inf = skipped
        optimizer.step()
        del optimizer.found_inf
        self.scaler.update()
        optimizer.zero_grad()


class GraphedStep:
    """The same, recorded after a few steps and replayed from then on.

    A batch larger than the bucket runs as it is, and so do all of them if recording fails; both
    are said once.
    """

    def __init__(self, eager: EagerStep, bucket: Bucket, graphs: Recorder) -> None:
        self.eager, self.bucket, self.graphs = eager, bucket, graphs
        self.buffers: list[PackedBatch] = []
        self.counts = torch.zeros(len(GlobalCounts._fields), dtype=torch.int64, device=eager.device)
        self.replay: Work | None = None
        self.steps = 0
        self.said: set[str] = set()
        eager.use_rate_on_device()

    def __call__(self, number: int, parts: list[PackedBatch], counts: GlobalCounts) -> Tensor:
        misfit = next(filter(None, (part.misfit(self.bucket) for part in parts)), None)
        if misfit or self.recording_failed:
            if misfit:
                self._say("a step runs without the CUDA graph", misfit)
            return self.eager(number, parts, counts)
        self._fill(self.eager.numbered(number, parts), counts)
        self.eager.set_learning_rate(number)
        self.steps += 1
        if self.replay is None and self.steps > WARM_UP:
            try:
                self.replay = self.graphs.record(self._work)
            except RuntimeError as error:
                self.eager.optimizer.zero_grad()
                self._say("steps run without a CUDA graph", str(error).strip().partition("\n")[0])
                return self.eager(number, parts, counts)
        return self.graphs.warm_up(self._work) if self.replay is None else self.replay()

    @property
    def recording_failed(self) -> bool:
        return self.replay is None and self.steps > WARM_UP

    def _fill(self, parts: list[PackedBatch], counts: GlobalCounts) -> None:
        parts = [part.padded_to(self.bucket) for part in parts]
        numbers = torch.tensor(counts)
        if self.eager.device.type == "cuda":  # so that no copy waits for the steps before
            parts, numbers = [part.pin_memory() for part in parts], numbers.pin_memory()
        if not self.buffers:
            self.buffers = [part.to(self.eager.device) for part in parts]
        for buffer, part in zip(self.buffers, parts, strict=True):
            buffer.copy_(part)
        self.counts.copy_(numbers, non_blocking=True)

    def _work(self) -> Tensor:
        return self.eager.compute(self.buffers, *self.counts.unbind())

    def _say(self, what: str, reason: str) -> None:
        if what not in self.said:
            console.print(f"{what}: {reason}")
            self.said.add(what)
