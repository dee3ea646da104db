"""Tasks that label whole texts or pairs of texts: classification, multi-label, regression."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.check import InputError
from fastbert.data.tables import Row, read_table
from fastbert.finetune.config import FinetuneConfig
from fastbert.finetune.task import Feature, Table, Task, label_index, library
from fastbert.models.classification import BertForSequenceClassification
from fastbert.packing import PackedBatch


class Text(NamedTuple):
    """label: as the file has it, None for new text."""

    text: Any
    label: Any
    where: str


class _SequenceTask(Task):
    head = BertForSequenceClassification
    problem_type: str

    @classmethod
    def read(cls, config: FinetuneConfig, path: Path, *, labelled: bool) -> list[Text]:
        found = []
        for row in read_table(path):
            text: Any = row.text(config.text_column)
            if config.pair_column is not None:
                text = (text, row.text(config.pair_column))
            label = cls.label(row, config) if labelled else None
            found.append(Text(text, label, row.where))
        return found

    @staticmethod
    def label(row: Row, config: FinetuneConfig) -> Any:
        raise NotImplementedError

    def target(self, example: Text) -> Any:
        raise NotImplementedError

    def model_options(self) -> dict[str, Any]:
        return {**super().model_options(), "problem_type": self.problem_type}

    def features(self, examples: list[Text], *, labelled: bool) -> list[Feature]:
        encodings = self.encode([e.text for e in examples], [e.where for e in examples])
        targets = [self.target(example) if labelled else None for example in examples]
        return [
            Feature((encoding,), target, number)
            for number, (encoding, target) in enumerate(zip(encodings, targets, strict=True))
        ]

    def loss(self, model: Any, batch: PackedBatch, features: Sequence[Feature]) -> Tensor:
        targets = torch.tensor([f.target for f in features], device=batch.device)
        return model(batch, labels=targets).loss

    def scores(
        self, model: Any, batch: PackedBatch, features: Sequence[Feature]
    ) -> Sequence[Tensor]:
        return model(batch).logits.float().unbind()


class Classification(_SequenceTask):
    """One label of several."""

    best = "accuracy"
    problem_type = "single_label_classification"
    weights: Tensor | None = None

    @staticmethod
    def label(row: Row, config: FinetuneConfig) -> str:
        value = row.get(config.label_column)
        if isinstance(value, (str, int)) and str(value).strip():
            return str(value).strip()
        raise InputError(f"{row.where}: expected a label in {config.label_column!r}, got {value!r}")

    @staticmethod
    def labels_of(examples: list[Text]) -> list[str]:
        found = sorted({example.label for example in examples})
        if len(found) < 2:
            raise InputError(f"{examples[0].where}: all examples have the one label {found[0]!r}")
        return found

    def target(self, example: Text) -> int:
        return label_index(self.labels, example.label, example.where)

    def balance(self, features: list[Feature]) -> None:
        """Weighs labels by n / (labels * count), as scikit-learn's "balanced"."""
        targets = torch.tensor([feature.target for feature in features])
        counts = targets.bincount(minlength=len(self.labels))
        self.weights = len(targets) / (len(self.labels) * counts.float())

    def loss(self, model: Any, batch: PackedBatch, features: Sequence[Feature]) -> Tensor:
        if self.weights is None:
            return super().loss(model, batch, features)
        targets = torch.tensor([f.target for f in features], device=batch.device)
        return F.cross_entropy(
            model(batch).logits.float(), targets, weight=self.weights.to(batch.device)
        )

    def predictions(
        self, examples: list[Text], features: list[Feature], scores: list[Tensor]
    ) -> list[dict[str, Any]]:
        found = []
        for logits in scores:
            probabilities = logits.softmax(-1)
            best = int(probabilities.argmax())
            found.append(
                {
                    "label": self.labels[best],
                    "probability": float(probabilities[best]),
                    "probabilities": dict(zip(self.labels, probabilities.tolist(), strict=True)),
                }
            )
        return found

    def metrics(
        self, examples: list[Text], predictions: list[dict[str, Any]]
    ) -> tuple[dict[str, float], list[Table]]:
        measure = library("sklearn.metrics")
        truth, guess = [e.label for e in examples], [p["label"] for p in predictions]
        report = measure.classification_report(truth, guess, output_dict=True, zero_division=0)
        majority = max(truth.count(label) for label in self.labels) / len(truth)
        tables = [_by_label(report, self.labels)]
        if len(self.labels) <= 20:
            counts = measure.confusion_matrix(truth, guess, labels=self.labels).tolist()
            lines = [
                (label, *map(str, row)) for label, row in zip(self.labels, counts, strict=True)
            ]
            tables.append(Table("confusion (rows: true)", ("", *self.labels), lines))
        found = {
            "accuracy": measure.accuracy_score(truth, guess),
            "macro_f1": measure.f1_score(truth, guess, average="macro", zero_division=0),
            "majority": majority,
        }
        return found, tables


class MultiLabel(_SequenceTask):
    """Any number of labels."""

    best = "micro_f1"
    problem_type = "multi_label_classification"

    @staticmethod
    def label(row: Row, config: FinetuneConfig) -> list[str]:
        value = row.get(config.label_column)
        if isinstance(value, str):
            value = [part.strip() for part in value.split(config.separator) if part.strip()]
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            return value
        raise InputError(
            f"{row.where}: expected labels in {config.label_column!r}, got {value!r}: a list of "
            f"texts, or one text with {config.separator!r} between them"
        )

    @staticmethod
    def labels_of(examples: list[Text]) -> list[str]:
        found = sorted({label for example in examples for label in example.label})
        if not found:
            raise InputError(f"{examples[0].where}: no example has a label")
        return found

    def target(self, example: Text) -> list[float]:
        target = [0.0] * len(self.labels)
        for label in example.label:
            target[label_index(self.labels, label, example.where)] = 1.0
        return target

    def predictions(
        self, examples: list[Text], features: list[Feature], scores: list[Tensor]
    ) -> list[dict[str, Any]]:
        found = []
        for logits in scores:
            by_label = dict(zip(self.labels, logits.sigmoid().tolist(), strict=True))
            labels = [label for label, probability in by_label.items() if probability > 0.5]
            found.append({"labels": labels, "probabilities": by_label})
        return found

    def metrics(
        self, examples: list[Text], predictions: list[dict[str, Any]]
    ) -> tuple[dict[str, float], list[Table]]:
        measure = library("sklearn.metrics")
        truth = [self.target(example) for example in examples]
        guess = [[float(name in p["labels"]) for name in self.labels] for p in predictions]
        report = measure.classification_report(
            truth, guess, target_names=self.labels, output_dict=True, zero_division=0
        )
        found = {
            f"{how}_f1": measure.f1_score(truth, guess, average=how, zero_division=0)
            for how in ("micro", "macro")
        }
        found["exact_match"] = measure.accuracy_score(truth, guess)
        return found, [_by_label(report, self.labels)]


class Regression(_SequenceTask):
    """A number."""

    best = "r2"
    problem_type = "regression"

    @staticmethod
    def label(row: Row, config: FinetuneConfig) -> float:
        value = row.get(config.label_column)
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if not torch.isfinite(torch.tensor(number)):
            raise InputError(
                f"{row.where}: expected a number in {config.label_column!r}, got {value!r}"
            )
        return number

    @staticmethod
    def labels_of(examples: list[Text]) -> list[str]:
        return ["value"]

    def target(self, example: Text) -> float:
        return example.label

    def predictions(
        self, examples: list[Text], features: list[Feature], scores: list[Tensor]
    ) -> list[dict[str, Any]]:
        return [{"value": float(score)} for score in scores]

    def metrics(
        self, examples: list[Text], predictions: list[dict[str, Any]]
    ) -> tuple[dict[str, float], list[Table]]:
        measure, stats = library("sklearn.metrics"), library("scipy.stats")
        truth, guess = [e.label for e in examples], [p["value"] for p in predictions]
        found = {
            "r2": measure.r2_score(truth, guess),
            "mean_absolute_error": measure.mean_absolute_error(truth, guess),
            "mean_squared_error": measure.mean_squared_error(truth, guess),
        }
        if len(set(truth)) > 1 and len(set(guess)) > 1:  # undefined of a constant
            found["pearson"] = float(stats.pearsonr(truth, guess)[0])
            found["spearman"] = float(stats.spearmanr(truth, guess)[0])
        return found, []


def _by_label(report: dict[str, Any], labels: list[str]) -> Table:
    lines = [
        (
            label,
            *(f"{report[label][name]:.3f}" for name in ("precision", "recall", "f1-score")),
            f"{report[label]['support']:.0f}",
        )
        for label in labels
        if label in report
    ]
    return Table("by label", ("label", "precision", "recall", "F1", "examples"), lines)
