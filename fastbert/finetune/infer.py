"""Runs a model on features; `TASK_OF` has the class of each --task."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import nn

from fastbert.config.finetune import WINDOWS
from fastbert.data.text.encoding import warn_of_unknown
from fastbert.finetune.choice import Choice
from fastbert.finetune.features import Feature, WindowEncoder, collate, parts
from fastbert.finetune.questions import Answering
from fastbert.finetune.sequences import Classification, MultiLabel, Regression
from fastbert.finetune.task import Settings, Task
from fastbert.finetune.tokens import Entities
from fastbert.system.console import tracked

TASK_OF: dict[str, type[Task]] = {
    "classification": Classification,
    "multilabel": MultiLabel,
    "regression": Regression,
    "ner": Entities,
    "qa": Answering,
    "choice": Choice,
}


def encoder_of(settings: Settings, tokenizer: Tokenizer) -> WindowEncoder:
    """An encoder with a task's settings; its advice names only options that the task has."""
    advice = []
    if settings.task in WINDOWS:
        advice.append("read it in windows with --stride")
    if settings.task not in ("ner", "qa"):
        advice.append("cut it off with --truncate")
    return WindowEncoder(
        tokenizer, settings.max_seq_len, settings.stride, settings.truncate, ", or ".join(advice)
    )


def warn_of_words(what: str, features: Sequence[Feature], encoder: WindowEncoder) -> None:
    """Warns if many tokens are [UNK], because the vocabulary does not fit the texts.

    what: the option or file that the warning names
    """
    windows = [window for feature in features for window in feature.windows]
    unknown = sum(window.input_ids.count(encoder.specials.unk) for window in windows)
    warn_of_unknown(what, unknown, sum(len(window.input_ids) for window in windows))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switches dropout and gradients off in the block, and then restores the model's mode."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def run(
    task: Task,
    model: nn.Module,
    features: Sequence[Feature],
    batch_tokens: int,
    device: torch.device,
    autocast: contextlib.AbstractContextManager[Any],
) -> list[NDArray[np.float32]]:
    """The task's scores of each feature, in order; for their shapes see `Task.scores`.

    batch_tokens: the most tokens in a batch; a longer feature is a batch by itself
    """
    scores: list[NDArray[np.float32]] = []
    with evaluating(model):
        batches = parts([feature.num_tokens for feature in features], batch_tokens)
        for numbers in tracked(batches, "reading"):
            some = [features[number] for number in numbers]
            with autocast:
                output = task.forward(model, collate(some).to(device), some)
            scores += task.scores(output, some)
    return scores
