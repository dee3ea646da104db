"""Which of several answers to a question, or of several endings of a text, is right."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastbert.check import InputError
from fastbert.data.tables import Row, read_table
from fastbert.finetune.config import FinetuneConfig
from fastbert.finetune.task import Feature, Table, Task
from fastbert.models.classification import BertForMultipleChoice
from fastbert.packing import PackedBatch


class Question(NamedTuple):
    """label: the right choice, from 0; None for a new question."""

    text: str
    choices: list[str]
    label: int | None
    where: str


class Choice(Task):
    head = BertForMultipleChoice
    best = "accuracy"

    @staticmethod
    def read(config: FinetuneConfig, path: Path, *, labelled: bool) -> list[Question]:
        found = []
        for row in read_table(path):
            choices = _choices(row, config)
            label = _label(row, config, len(choices)) if labelled else None
            found.append(Question(row.text(config.text_column), choices, label, row.where))
            if len(choices) != len(found[0].choices):
                raise InputError(
                    f"{row.where}: {len(choices)} choices, and the first question has "
                    f"{len(found[0].choices)}"
                )
        return found

    def model_options(self) -> dict[str, Any]:
        return {}

    def features(self, examples: list[Question], *, labelled: bool) -> list[Feature]:
        pairs = [(example.text, choice) for example in examples for choice in example.choices]
        places = [example.where for example in examples for _ in example.choices]
        encodings = iter(self.encode(pairs, places))
        return [
            Feature(tuple(next(encodings) for _ in example.choices), example.label, number)
            for number, example in enumerate(examples)
        ]

    def loss(self, model: Any, batch: PackedBatch, features: Sequence[Feature]) -> Tensor:
        labels = torch.tensor([feature.target for feature in features], device=batch.device)
        return model(batch, labels=labels, num_choices=len(features[0].sequences)).loss

    def scores(
        self, model: Any, batch: PackedBatch, features: Sequence[Feature]
    ) -> Sequence[Tensor]:
        return model(batch, num_choices=len(features[0].sequences)).logits.float().unbind()

    def predictions(
        self, examples: list[Question], features: list[Feature], scores: list[Tensor]
    ) -> list[dict[str, Any]]:
        found = []
        for example, logits in zip(examples, scores, strict=True):
            best = int(logits.argmax())
            probabilities = logits.softmax(-1).tolist()
            choice = example.choices[best]
            found.append({"label": best, "choice": choice, "probabilities": probabilities})
        return found

    def metrics(
        self, examples: list[Question], predictions: list[dict[str, Any]]
    ) -> tuple[dict[str, float], list[Table]]:
        right = [p["label"] == e.label for p, e in zip(predictions, examples, strict=True)]
        truth = [example.label for example in examples]
        majority = max(map(truth.count, set(truth))) / len(truth)
        return {"accuracy": sum(right) / len(right), "majority": majority}, []


def _choices(row: Row, config: FinetuneConfig) -> list[str]:
    value = row.get(config.choices_column)
    if isinstance(value, str):
        value = [part.strip() for part in value.split(config.separator)]
    if isinstance(value, list) and len(value) > 1 and all(isinstance(c, str) for c in value):
        return value
    raise InputError(
        f"{row.where}: expected two choices or more in {config.choices_column!r}, got {value!r}: a "
        f"list of texts, or one text with {config.separator!r} between them"
    )


def _label(row: Row, config: FinetuneConfig, count: int) -> int:
    value = row.get(config.label_column)
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < count:
        raise InputError(
            f"{row.where}: expected the number of the right choice in {config.label_column!r}, "
            f"from 0 to {count - 1}, got {value!r}"
        )
    return number
