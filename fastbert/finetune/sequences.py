"""Tasks of whole texts or pairs of texts: classification, multi-label and regression.

Their losses are softmax cross-entropy, binary cross-entropy of each label, and squared error.
"""

import abc
import contextlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fastbert.check import InputError
from fastbert.data.formats.tables import Row, clean_label
from fastbert.finetune import metrics as measures
from fastbert.finetune.features import Feature, WindowEncoder
from fastbert.finetune.metrics import Report
from fastbert.finetune.task import Prediction, Scores, Task, by_example, softmax, to_host
from fastbert.models.task_models import BertForSequenceClassification
from fastbert.packing import PackedBatch

_LARGEST = torch.finfo(torch.float32).max


class TextExample(NamedTuple):
    """One text or two, with their target.

    where: file and line, for error messages; target: a label, a tuple of labels or a number, or
    None for unlabelled input
    """

    where: str
    texts: tuple[str, ...]
    target: Any


class _SequenceTask(Task):
    """A task that scores whole texts.

    In training, each window of a long text counts as an example; in prediction, the scores of its
    windows are averaged.
    """

    model_class = BertForSequenceClassification
    problem_type: ClassVar[str]

    def read(self, path: Path, *, labelled: bool = True) -> list[TextExample]:
        s = self.settings
        texts = [column for column in (s.text_column, s.pair_column) if column is not None]

        def make(row: Row) -> TextExample:
            return TextExample(row.where, tuple(map(row.text, texts)), self.target(row, labelled))

        return self.from_table(path, texts, labelled, make)

    def target(self, row: Row, labelled: bool) -> Any:
        return row.label(self.settings.label_column) if labelled else None

    def number(self, target: Any) -> Any:
        """The target in the form of the loss: an index, a list of 0.0 and 1.0, or a number."""
        return self.labels.index(target)

    def features(self, examples: Sequence[TextExample], encoder: WindowEncoder) -> list[Feature]:
        return [
            Feature(i, (window,), None if e.target is None else self.number(e.target))
            for i, e in enumerate(examples)
            for window in encoder.windows(e.where, *map(encoder.ids, e.texts))
        ]

    def scores(self, output: Any, features: Sequence[Feature]) -> list[NDArray[np.float32]]:
        return list(to_host(output.logits))

    def means(
        self, examples: Sequence[Any], features: Sequence[Feature], scores: Sequence[NDArray[Any]]
    ) -> list[NDArray[np.float32]]:
        """(L,) scores of each example: the mean over its windows."""
        groups = by_example(features, scores, len(examples))
        return [np.mean(own, axis=0) for _, own in groups]

    def prediction(
        self, example: TextExample, features: list[Feature], scores: Scores
    ) -> Prediction:
        return self.said(np.mean(scores, axis=0))

    @abc.abstractmethod
    def said(self, scores: NDArray[np.float32]) -> Prediction:
        """The prediction from (L,) scores."""

    def model_options(self) -> dict[str, Any]:
        return super().model_options() | {"problem_type": self.problem_type}


class Classification(_SequenceTask):
    """One label per text; the prediction is the likeliest label."""

    metrics = ("accuracy", "macro_f1", "mcc")
    problem_type = "single_label_classification"

    def labels_of(self, example: TextExample) -> Iterable[str]:
        return () if example.target is None else (example.target,)

    def count(self, feature: Feature) -> float:
        return 1.0 if self.weights is None else self.weights[feature.target].item()

    def said(self, scores: NDArray[np.float32]) -> Prediction:
        """label: the likeliest; probability: of that label; probabilities: of all by name."""
        by_label = dict(zip(self.labels, softmax(scores), strict=True))
        best = self.labels[int(scores.argmax())]
        return {"label": best, "probability": by_label[best], "probabilities": by_label}

    def evaluate(self, examples: Sequence[Any], predictions: Sequence[Prediction]) -> Report:
        truth = [example.target for example in examples]
        return measures.classification(truth, [p["label"] for p in predictions], self.labels)


class MultiLabel(_SequenceTask):
    """Any number of labels per text; a label is predicted if its probability is above 0.5."""

    metrics = ("micro_f1", "macro_f1", "exact")
    problem_type = "multi_label_classification"

    def target(self, row: Row, labelled: bool) -> tuple[str, ...] | None:
        """The labels from a JSON list, or from a text split at --label-separator; none if empty."""
        if not labelled:
            return None
        s = self.settings
        value = row.values[s.label_column]
        if isinstance(value, list):
            return tuple(Row(row.where, {s.label_column: x}).label(s.label_column) for x in value)
        if isinstance(value, str) and not clean_label(value):
            return ()
        value = row.label(s.label_column)
        names = map(clean_label, str(value).split(s.label_separator))
        return tuple(name for name in names if name)

    def labels_of(self, example: TextExample) -> Iterable[str]:
        return example.target or ()

    def number(self, target: tuple[str, ...]) -> list[float]:
        return [float(label in target) for label in self.labels]

    def balanced(self, examples: Sequence[TextExample]) -> list[float]:
        """For each label, the number of examples without it over the number of examples with it.

        A label that no example or every example has gets 1: there is nothing to balance.
        """
        have = np.array([self.number(example.target) for example in examples]).sum(0)
        lack = len(examples) - have
        weights: list[float] = np.where(have * lack > 0, lack / np.maximum(have, 1), 1.0).tolist()
        return weights

    def summed_loss(self, logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        losses = F.binary_cross_entropy_with_logits(
            logits, targets, pos_weight=weights, reduction="sum"
        )
        return losses / len(self.labels)

    def said(self, scores: NDArray[np.float32]) -> Prediction:
        """labels: those above 0.5; probabilities: of each label by name."""
        shares = torch.from_numpy(scores).sigmoid().tolist()
        by_label = dict(zip(self.labels, shares, strict=True))
        chosen = [label for label, share in by_label.items() if share > 0.5]
        return {"labels": chosen, "probabilities": by_label}

    def evaluate(self, examples: Sequence[Any], predictions: Sequence[Prediction]) -> Report:
        truth = [example.target for example in examples]
        return measures.multilabel(truth, [p["labels"] for p in predictions], self.labels)


class Regression(_SequenceTask):
    """A number per text, learnt with the mean squared error."""

    metrics = ("pearson", "spearman", "mse", "mae")
    problem_type = "regression"

    def target(self, row: Row, labelled: bool) -> float | None:
        if not labelled:
            return None
        column = self.settings.label_column
        text, number = row.label(column), math.nan
        with contextlib.suppress(ValueError):
            number = float(text.replace("_", "?"))  # Python reads 1_000 as 1000
        if not math.isfinite(number):
            raise InputError(f"{row.where}: expected a number in column {column!r}, got {text!r}")
        if abs(number) > _LARGEST:
            raise InputError(
                f"{row.where}: expected a number that fits float32 in column {column!r}, at most "
                f"{_LARGEST:.1e}, got {text!r}; scale the labels down"
            )
        return number

    def learn(self, examples: Sequence[TextExample]) -> None:
        self.labels = ["score"]

    def forward(self, model: Any, batch: PackedBatch, features: Sequence[Feature]) -> Any:
        """The model's output, with logits that autocast has not rounded to a few digits."""
        handle = model.classifier.register_forward_hook(_unrounded)
        try:
            return model(batch)
        finally:
            handle.remove()

    def number(self, target: float) -> float:
        return target

    def summed_loss(self, logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        return F.mse_loss(logits[:, 0], targets, reduction="sum")

    def said(self, scores: NDArray[np.float32]) -> Prediction:
        """score: the predicted number."""
        return {"score": float(scores[0])}

    def evaluate(self, examples: Sequence[Any], predictions: Sequence[Prediction]) -> Report:
        truth = [example.target for example in examples]
        return measures.regression(truth, [p["score"] for p in predictions])


def _unrounded(layer: nn.Linear, given: tuple[Tensor], output: Tensor) -> Tensor:
    """A forward hook: the layer's output again, in float32 under autocast too."""
    with torch.autocast(output.device.type, enabled=False):
        return F.linear(given[0].float(), layer.weight, layer.bias)
