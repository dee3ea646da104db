"""One optimizer step of pre-training, run as it is or replayed as one CUDA graph.

A graph's kernels run on the same addresses and sizes each time. So batches are padded to fixed
sizes, with sequences that predict nothing, and copied into buffers; and what changes from step to
step (learning rate, dropout's state, the counts that losses are means over) lies on the device.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastbert.config import PretrainConfig
from fastbert.data import GlobalCounts, PretrainingData
from fastbert.packing import Bucket, PackedBatch
from fastbert.train.cuda_graph import WARM_UP, CudaGraphs, Recorder, Work
from fastbert.train.objective import PretrainingObjective
from fastbert.train.optimizer import linear_schedule
from fastbert.train.report import console

Step = Callable[[int, list[PackedBatch], GlobalCounts], Tensor]


def make_step(
    objective: PretrainingObjective,
    optimizer: torch.optim.Optimizer,
    config: PretrainConfig,
    data: PretrainingData,
    device: torch.device,
    *,
    eager: bool = False,
) -> Step:
    """What the loop calls for each step: (number, parts of the batch, its counts) -> metric sums.

    On a GPU it is a graph, unless `eager` asks for none.
    """
    step = EagerStep(objective, optimizer, config, device)
    if device.type != "cuda" or eager:
        return step
    return GraphedStep(step, data.bucket(config.accumulation), CudaGraphs())


class EagerStep:
    """Forward and backward of each part, clipping, optimizer."""

    def __init__(
        self,
        objective: PretrainingObjective,
        optimizer: torch.optim.Optimizer,
        config: PretrainConfig,
        device: torch.device,
    ) -> None:
        self.objective, self.optimizer, self.config = objective, optimizer, config
        self.device = device
        self.rate: Tensor | None = None
        for group in optimizer.param_groups:  # of a checkpoint that graphs may have trained
            group["capturable"] = False
        self.warmup = round(config.steps * config.warmup_ratio)
        enabled = config.precision == "bf16"
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=enabled)

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

    def compute(
        self, parts: list[PackedBatch], num_targets: int | Tensor, num_pairs: int | Tensor
    ) -> Tensor:
        """The metric sums (6,) of the parts, all on the device; no host waits."""
        sums = []
        for part in parts:
            with self.autocast:
                result = self.objective(part, num_targets, num_pairs)
            result.loss.backward()
            sums.append(result.sums)
        nn.utils.clip_grad_norm_(self.objective.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.stack(sums).sum(0)


class GraphedStep:
    """The same, recorded after a few steps and replayed from then on.

    A batch larger than the bucket runs as it is, and so do all of them if recording fails; both
    are said once.
    """

    def __init__(self, eager: EagerStep, bucket: Bucket, graphs: Recorder) -> None:
        self.eager, self.bucket, self.graphs = eager, bucket, graphs
        self.buffers: list[PackedBatch] = []
        self.counts = torch.zeros(2, dtype=torch.int64, device=eager.device)
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
