"""A DataLoader over global steps, whose worker processes make batches ahead of time."""

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
    """A DataLoader of `data.batch(step, ...)` for each global step from `start` to `stop - 1`.

    rank, world_size, micro_batches: as in `PretrainingData.batch`, whose InputError the iterator
        raises where a batch has too few examples
    workers: processes that make batches ahead of time; 0 makes them in this process. The batches do
        not depend on their number.
    pin_memory: whether tensors are in page-locked host memory, from which copies to a GPU are
        asynchronous
    """
    if start < stop:
        data.locate(start)  # plans the epoch of `start` here, so that forked workers inherit it
    steps = _Steps(data, range(start, stop), rank, world_size, micro_batches)
    return DataLoader(
        steps,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        # without its own generator, the loader would draw a seed from torch's global one
        generator=torch.Generator(),
    )
