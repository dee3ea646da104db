"""A DataLoader over global steps, whose worker processes make batches ahead of time."""

import functools
from typing import Any

import torch
from torch.utils.data import DataLoader

from fastbert.data.batches.pretraining import PretrainingData
from fastbert.packing import PackedBatch


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
        raises if a batch has too few examples
    workers: processes that make batches ahead of time; 0 makes them in this process. The batches do
        not depend on the number of workers.
    pin_memory: whether tensors are in pinned host memory, from which copies to a GPU are
        asynchronous
    """
    if start < stop:
        data.locate(start)  # plans the epoch of `start` here, so that forked workers inherit it
    batch = functools.partial(
        data.batch, rank=rank, world_size=world_size, micro_batches=micro_batches
    )
    steps: Any = range(start, stop)  # a dataset of numbers, which `batch` turns into batches
    return DataLoader(
        steps,
        batch_size=None,
        collate_fn=batch,
        num_workers=workers,
        pin_memory=pin_memory,
        # without a generator, the loader would draw a seed from torch's global one
        generator=torch.Generator(),
    )
