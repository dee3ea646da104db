"""Batches of a range of global steps, in order, made ahead of time by worker processes."""

import torch
from torch.utils.data import DataLoader, Dataset

from fastbert.data.batches.pretraining import PretrainingData
from fastbert.packing import PackedBatch


class _Steps(Dataset[list[PackedBatch]]):
    def __init__(
        self, data: PretrainingData, steps: range, rank: int, world_size: int, micro_batches: int
    ) -> None:
        self.data, self.steps = data, steps
        self.rank, self.world_size, self.micro_batches = rank, world_size, micro_batches

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> list[PackedBatch]:
        return self.data.batch(
            self.steps[index],
            rank=self.rank,
            world_size=self.world_size,
            micro_batches=self.micro_batches,
        )


def loader(
    data: PretrainingData,
    start: int,
    stop: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    micro_batches: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[list[PackedBatch]]:
    """`data.batch(step, ...)` for each global step from `start` to before `stop`, in order.

    workers: processes that make batches ahead of time; their number changes no batch
    """
    if start < stop:
        data.locate(start)  # planned once here, not once in each forked worker
    steps = _Steps(data, range(start, stop), rank, world_size, micro_batches)
    return DataLoader(
        steps,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else it draws a seed from the generator of the dropout
    )
