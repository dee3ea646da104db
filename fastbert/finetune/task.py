"""What a task is: reading examples, making sequences of them, scoring, and judging the result."""

import abc
import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor

from fastbert.check import InputError
from fastbert.finetune.config import FinetuneConfig
from fastbert.models.base import BertPreTrainedModel
from fastbert.packing import PackedBatch


class Feature(NamedTuple):
    """What the model reads of an example: one sequence, or one for each choice.

    target: what it is trained on, None for new text; example: index among the examples
    """

    sequences: tuple[Encoding, ...]
    target: Any
    example: int


class Table(NamedTuple):
    title: str
    header: tuple[str, ...]
    lines: list[tuple[str, ...]]


class Task(abc.ABC):
    """One of the kinds of fine-tuning.

    head: the model; best: the metric by which the best epoch is chosen, larger is better. An
    example is whatever `read` gives; everything is checked when examples are read or made features
    of, and raises InputError.
    """

    head: ClassVar[type[BertPreTrainedModel]]
    best: ClassVar[str]

    def __init__(
        self, config: FinetuneConfig, tokenizer: Tokenizer, labels: list[str], max_seq_len: int
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.labels = labels
        self.max_seq_len = max_seq_len

    @staticmethod
    @abc.abstractmethod
    def read(config: FinetuneConfig, path: Path, *, labelled: bool) -> list[Any]:
        """The examples of a file, with or without what is to be predicted."""

    @staticmethod
    def labels_of(examples: list[Any]) -> list[str]:
        """The names of the labels that occur, in the order in which the model numbers them."""
        return []

    def model_options(self) -> dict[str, Any]:
        """Changes to the configuration of the pre-trained model."""
        names = dict(enumerate(self.labels))
        return {"id2label": names, "label2id": {name: i for i, name in names.items()}}

    @abc.abstractmethod
    def features(self, examples: list[Any], *, labelled: bool) -> list[Feature]: ...

    @abc.abstractmethod
    def loss(self, model: Any, batch: PackedBatch, features: Sequence[Feature]) -> Tensor:
        """The mean over the batch, ()."""

    @abc.abstractmethod
    def scores(
        self, model: Any, batch: PackedBatch, features: Sequence[Feature]
    ) -> Sequence[Tensor]:
        """What the model says of each feature, in a tensor each."""

    @abc.abstractmethod
    def predictions(
        self, examples: list[Any], features: list[Feature], scores: list[Tensor]
    ) -> list[dict[str, Any]]:
        """What is written of each example."""

    @abc.abstractmethod
    def metrics(
        self, examples: list[Any], predictions: list[dict[str, Any]]
    ) -> tuple[dict[str, float], list[Table]]:
        """By name, in [0, 1] where they are shares; and tables to print at the end."""

    def encode(self, texts: Sequence[Any], where: Sequence[str]) -> list[Encoding]:
        """Single texts or pairs; one that is too long is cut or an error."""
        tokenizer = self.tokenizer
        tokenizer.no_truncation()
        if self.config.truncate:
            tokenizer.enable_truncation(self.max_seq_len)
        encodings = tokenizer.encode_batch(list(texts))
        for encoding, place in zip(encodings, where, strict=True):
            if len(encoding) > self.max_seq_len:
                raise InputError(
                    f"{place}: {len(encoding)} tokens, and the model reads {self.max_seq_len}; "
                    "--truncate cuts such texts"
                )
        return encodings

    def windows(
        self,
        text: Any,
        pair: str | None = None,
        *,
        where: str,
        strategy: str = "longest_first",
        is_pretokenized: bool = False,
    ) -> list[Encoding]:
        """The sequence of a text or a pair, or those that a long one is split into by --stride."""
        config, tokenizer = self.config, self.tokenizer
        tokenizer.no_truncation()
        encoding = tokenizer.encode(text, pair, is_pretokenized=is_pretokenized)
        if len(encoding) <= self.max_seq_len:
            return [encoding]
        if config.stride is None and not config.truncate:
            raise InputError(
                f"{where}: {len(encoding)} tokens, and the model reads {self.max_seq_len}; "
                "--stride splits such texts into windows, --truncate cuts them"
            )
        try:
            tokenizer.enable_truncation(
                self.max_seq_len, stride=config.stride or 0, strategy=strategy
            )
            encoding = tokenizer.encode(text, pair, is_pretokenized=is_pretokenized)
        except Exception as error:  # the library raises no narrower class
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{where}: does not fit windows of {self.max_seq_len} tokens ({reason})"
            ) from None
        return [encoding, *encoding.overflowing] if config.stride is not None else [encoding]


def pack(features: Sequence[Feature]) -> PackedBatch:
    """All sequences of the features, end to end."""
    sequences = [sequence for feature in features for sequence in feature.sequences]
    types = [kind for sequence in sequences for kind in sequence.type_ids]
    batch = PackedBatch.from_sequences([sequence.ids for sequence in sequences])
    return dataclasses.replace(batch, token_type_ids=torch.tensor(types))


def label_index(labels: list[str], label: str, where: str) -> int:
    """Raises InputError for a label that is not among them."""
    if label not in labels:
        known = ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
        raise InputError(f"{where}: the label {label!r} is not in the training data ({known})")
    return labels.index(label)


def library(name: str) -> ModuleType:
    """A module of what the extra [finetune] installs."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(
            f"{name.partition('.')[0]}: not installed; pip install 'fastbert[finetune]'"
        ) from None
