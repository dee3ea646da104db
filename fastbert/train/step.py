"""One optimizer step of pre-training, run eagerly or replayed as one CUDA graph.

A step whose gradients are not finite changes neither weights nor the optimizer's state, and is
counted. The device decides this, so the host does not wait.

A graph's kernels always run on the same addresses and sizes. So batches are padded to fixed sizes
with filler sequences, which have no labels, and are copied into buffers. The values that change
from step to step (learning rate, dropout state, counts of the whole batch) are in device memory.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.check import first_line
from fastbert.config.pretrain import PretrainConfig
from fastbert.data import GlobalCounts, PretrainingData
from fastbert.modules.graphs import buckets
from fastbert.modules.graphs.recorder import WARM_UP, CudaGraphs, Work
from fastbert.modules.products.weight_copies import WeightCopies
from fastbert.packing import Bucket, PackedBatch
from fastbert.system.console import console
from fastbert.train import distributed
from fastbert.train.objective import Result
from fastbert.train.optimizer import clipped_step, linear_schedule
from fastbert.train.precision import LOW_PRECISION, autocast, make_scaler


class EagerStep:
    """A step run eagerly: forward and backward of each micro-batch, clipping, optimizer.

    A call takes the step's number, its micro-batches and the counts of the whole batch, and returns
    the sums from `compute`. objective: a `PretrainingObjective` as `distributed.parallelised`
    wraps it for `num_ranks`; scaler: of the loss, for the precision of `config`
    """

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: PretrainConfig,
        device: torch.device,
        num_ranks: int = 1,
    ) -> None:
        self.objective, self.optimizer, self.config = objective, optimizer, config
        self.device, self.num_ranks = device, num_ranks
        self.scaler = make_scaler(config.precision, device)
        self.rate: Tensor | None = None
        self.warmup = round(config.steps * config.warmup_ratio)
        self.autocast = autocast(config.precision, device)
        self.copies = WeightCopies(objective, LOW_PRECISION.get(config.precision))

    def __call__(self, number: int, parts: list[PackedBatch], counts: GlobalCounts) -> Tensor:
        self.set_learning_rate(number)
        parts = [part.to(self.device, non_blocking=True) for part in self.numbered(number, parts)]
        return self.compute(parts, *counts)

    def numbered(self, number: int, parts: list[PackedBatch]) -> list[PackedBatch]:
        """The micro-batches with the step's dropout state.

        Dropout masks depend on the example, not on how the batch is split.
        """
        state = torch.tensor([self.config.seed, number])
        return [dataclasses.replace(part, dropout_state=state) for part in parts]

    def set_learning_rate(self, number: int) -> None:
        rate = linear_schedule(
            number, peak=self.config.learning_rate, warmup=self.warmup, total=self.config.steps
        )
        if self.rate is not None:
            self.rate.fill_(rate)
            return
        for group in self.optimizer.param_groups:  # a checkpoint of a graphed run has True
            group["lr"], group["capturable"] = rate, False

    def use_rate_on_device(self) -> None:
        """Keeps the learning rate in device memory from now on, for a CUDA graph to read."""
        self.rate = torch.zeros((), device=self.device)
        for group in self.optimizer.param_groups:
            group["lr"], group["capturable"] = self.rate, True

    def compute(self, parts: list[PackedBatch], *counts: int | Tensor) -> Tensor:
        """Runs a step; returns (7,) float32 on the device: the objective's six sums, and `skipped`.

        If the gradients are not finite, `skipped` is 1 and the sums are 0. The host does not wait.

        counts: the values of `GlobalCounts`, as numbers or tensors of shape ()
        """
        with self.copies.in_use():
            sums = [
                self._accumulate(part, counts, is_last=number == len(parts))
                for number, part in enumerate(parts, start=1)
            ]
        self.scaler.unscale_(self.optimizer)
        parameters = self.objective.parameters()
        skipped = clipped_step(self.optimizer, parameters, self.config.max_grad_norm)
        self.scaler.update()
        return torch.cat([torch.stack(sums).sum(0).masked_fill(skipped.bool(), 0), skipped[None]])

    def _accumulate(
        self, part: PackedBatch, counts: tuple[int | Tensor, ...], *, is_last: bool
    ) -> Tensor:
        """Adds the gradients of a micro-batch; returns its sums."""
        with distributed.exchange(self.objective, wanted=is_last):
            with self.autocast:
                result: Result = self.objective(part, *counts)
            self.scaler.scale(result.loss * self.num_ranks).backward()
        return result.sums


def as_graph(step: EagerStep, data: PretrainingData) -> "EagerStep | GraphedStep":
    """The step as a CUDA graph on a single GPU, otherwise unchanged; data: the training data."""
    if step.device.type != "cuda" or step.num_ranks > 1:
        return step
    # this graph includes the layers, so graphs of their own would only take memory
    buckets.allow(step.objective, False)
    return GraphedStep(step, data.bucket(step.config.accumulation), CudaGraphs())


class GraphedStep:
    """A step recorded as a CUDA graph after a few warm-up steps, and replayed from then on.

    A batch that does not fit the bucket runs eagerly, and so do all batches if recording fails.
    Each fallback is reported once.
    """

    def __init__(self, eager: EagerStep, bucket: Bucket, graphs: CudaGraphs) -> None:
        self.eager, self.bucket, self.graphs = eager, bucket, graphs
        self.buffers: list[PackedBatch] = []
        self.counts = torch.zeros(len(GlobalCounts._fields), dtype=torch.int64, device=eager.device)
        self.replay: Work[Any] | None = None
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
                self._say("steps run without a CUDA graph", first_line(error))
                return self.eager(number, parts, counts)
        return self.graphs.warm_up(self._work) if self.replay is None else self.replay()

    @property
    def recording_failed(self) -> bool:
        return self.replay is None and self.steps > WARM_UP

    def _fill(self, parts: list[PackedBatch], counts: GlobalCounts) -> None:
        parts = [part.padded_to(self.bucket) for part in parts]
        numbers = torch.tensor(counts)
        if self.eager.device.type == "cuda":  # copies from pinned memory do not block the host
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
