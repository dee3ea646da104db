"""Models and batches on a GPU, and what its pool has recorded."""

import torch

from fastbert.modules.graphs import buckets
from tests.modules.graphs.case import batch, models, plans_of


def on_gpu(kind="Bert", head="ForSequenceClassification", **options):
    return [model.cuda() for model in models(kind, head, **options)]


def on_gpu_batch(lengths, number=0):
    return {name: x.cuda() for name, x in batch(lengths, number).items()}


def assert_close(actual, expected):
    """Within sums in another order, relative to the largest element."""
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        assert a is None or (a - e).abs().max() <= 1e-3 * (1 + e.abs().max())


def num_recorded():
    """How many buckets have graphs on the first GPU now."""
    return len(buckets.pool_of(torch.device("cuda", 0)).used)


def reasons(model):
    """Why each bucket of the model has no graph, "" where it has one."""
    every = [plan.recorded for plan in plans_of(model) if plan.recorded is not None]
    entries = [entry for recorded in every for entry in recorded.entries.values()]
    return ["" if entry.graphs else entry.reason or "not yet" for entry in entries]
