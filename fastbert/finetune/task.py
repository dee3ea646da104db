"""The interface of a task: reading files, encoding examples, the loss, predictions and metrics."""

import abc
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fastbert.check import InputError
from fastbert.config.finetune import BALANCED, FinetuneConfig
from fastbert.data.formats.tables import Row, clean_label, read_table
from fastbert.finetune.features import Feature, WindowEncoder
from fastbert.finetune.metrics import Report
from fastbert.models.base import BertPreTrainedModel
from fastbert.packing import IGNORE_INDEX, PackedBatch
from fastbert.system.files import read_json

SETTINGS = "finetune.json"
ALL = "*"  # all columns, for --copy

Prediction = dict[str, Any]
Scores = list[NDArray[np.float32]]  # one array for each feature
Example = TypeVar("Example")


class Refused(NamedTuple):
    """In prediction, replaces a row that cannot become an example; reason says why it cannot."""

    where: str
    reason: str


class Settings(NamedTuple):
    """The training options that a fine-tuned model needs to read new input.

    They are in finetune.json beside the weights; all fields but the last are FinetuneConfig's.
    """

    task: str
    text_column: str
    pair_column: str | None
    label_column: str
    label_separator: str
    choice_column: tuple[str, ...]
    max_seq_len: int
    stride: int | None
    truncate: bool
    max_answer_tokens: int
    null_threshold: float
    precision: str  # of training and evaluation
    delimiter: str | None = None
    may_be_impossible: bool = False  # qa: the training data had questions without an answer

    @classmethod
    def of(cls, config: FinetuneConfig, max_seq_len: int) -> Self:
        """The settings of a training run; max_seq_len: the length that the run used."""
        values = {k: getattr(config, k) for k in cls._fields if k != "may_be_impossible"}
        return cls(**values | {"max_seq_len": max_seq_len})

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Reads a model's directory; raises InputError if its settings are missing or damaged."""
        path = directory / SETTINGS
        values = read_json(path)
        if values is None:
            raise InputError(
                f"{directory}: has no {SETTINGS}; give a model that `fastbert finetune` trained"
            )
        try:
            return cls(**values | {"choice_column": tuple(values["choice_column"])})
        except (TypeError, KeyError) as error:
            raise InputError(f"{path}: not the settings of a fine-tuned model ({error})") from None

    def save(self, directory: Path) -> None:
        """Writes finetune.json into the directory of a model."""
        text = json.dumps(self._asdict(), indent=2, ensure_ascii=False) + "\n"
        (directory / SETTINGS).write_text(text, encoding="utf-8")


class Task(abc.ABC):
    """Base class of the tasks that `--task` names.

    Each task has its own type of example, with a field `where`, file and line, for error messages.
    labels: the names of the model's outputs, in order; empty if the task has none.
    """

    model_class: ClassVar[type[BertPreTrainedModel]]
    metrics: ClassVar[tuple[str, ...]]  # for --metric; the first is the default

    def __init__(self, settings: Settings, labels: Sequence[str] = ()) -> None:
        self.settings = settings
        self.labels = list(labels)
        self.weights: Tensor | None = None  # (labels,) float32, weights of the labels in the loss
        self.copied: tuple[str, ...] = ()  # columns to copy into the predictions
        self.rows: list[Row] = []  # of the most recently read table

    @abc.abstractmethod
    def read(self, path: Path, *, labelled: bool = True) -> list[Any]:
        """The examples of a file; raises InputError for a row that cannot become one.

        labelled: False for prediction, which does not read labels and replaces a table's row that
        cannot become an example with a `Refused`
        """

    def from_table(
        self, path: Path, columns: Sequence[str], labelled: bool, make: Callable[[Row], Example]
    ) -> list[Example]:
        """The examples that `make` makes from a table's rows; the table must have the columns.

        labelled: as in `read`; True also requires the label column, and every column in every row
        of JSON Lines
        """
        columns = [*columns, self.settings.label_column] if labelled else list(columns)
        columns += [column for column in self.copied if column != ALL]
        self.rows = read_table(path, columns, self.settings.delimiter, in_every_row=labelled)
        return [make(row) if labelled else self._attempt(make, row) for row in self.rows]

    def _attempt(self, make: Callable[[Row], Example], row: Row) -> Any:
        try:
            return make(row)
        except InputError as error:
            return Refused(row.where, str(error))

    @abc.abstractmethod
    def features(self, examples: Sequence[Any], encoder: WindowEncoder) -> list[Feature]:
        """The features of the examples, in order, with targets if the examples are labelled."""

    def forward(self, model: Any, batch: PackedBatch, features: Sequence[Feature]) -> Any:
        """The model's output for `batch`, which holds these features."""
        return model(batch)

    def loss(
        self, model: Any, batch: PackedBatch, features: Sequence[Feature], total: float
    ) -> Tensor:
        """The summed loss of these features over `total`: their share of the step's mean loss.

        total: the sum of `count` over all features of the step, which may include others
        """
        logits = self.forward(model, batch, features).logits.float()
        targets = torch.tensor(self.targets(features), device=logits.device)
        weights = None if self.weights is None else self.weights.to(logits.device)
        return self.summed_loss(logits, targets, weights) / total

    def targets(self, features: Sequence[Feature]) -> list[Any]:
        """The targets as numbers, which `loss` turns into a tensor."""
        return [feature.target for feature in features]

    def summed_loss(self, logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        """The sum of the losses, with the labels' weights if there are any."""
        return F.cross_entropy(logits, targets, weights, ignore_index=IGNORE_INDEX, reduction="sum")

    @abc.abstractmethod
    def scores(self, output: Any, features: Sequence[Feature]) -> list[NDArray[np.float32]]:
        """The model's scores of each feature, a float32 array whose shape the task chooses."""

    def predict(
        self,
        examples: Sequence[Any],
        features: Sequence[Feature],
        scores: Sequence[NDArray[np.float32]],
    ) -> list[Prediction]:
        """The prediction for each example, in order, as it is written to JSON Lines."""
        groups = by_example(features, scores, len(examples))
        return [self.prediction(e, *group) for e, group in zip(examples, groups, strict=True)]

    @abc.abstractmethod
    def prediction(self, example: Any, features: list[Feature], scores: Scores) -> Prediction:
        """The prediction for an example with these features."""

    @abc.abstractmethod
    def evaluate(self, examples: Sequence[Any], predictions: Sequence[Prediction]) -> Report:
        """Metrics and tables of predictions for labelled examples."""

    def learn(self, examples: Sequence[Any]) -> None:
        """Takes the labels from the training examples; raises InputError for fewer than two."""
        found = {label for example in examples for label in self.labels_of(example)}
        self.labels = _in_order(found)
        _warn_of_alike(self.labels)
        if len(self.labels) < 2:
            raise InputError(
                f"--train: expected two labels or more, got only {', '.join(found) or 'none'}"
            )

    def labels_of(self, example: Any) -> Iterable[str]:
        """The labels that an example has, for tasks with labels."""
        return ()

    def check(self, examples: Sequence[Any]) -> None:
        """Raises InputError for a label that is not in the training examples."""
        for example in examples if self.labels else ():
            for label in self.labels_of(example):
                if label not in self.labels:
                    raise InputError(
                        f"{example.where}: the label {label!r} does not occur in --train, which "
                        f"has {', '.join(self.labels[:10])}"
                        f"{', ...' if len(self.labels) > 10 else ''}"
                    )

    def weigh(self, config: FinetuneConfig, examples: Sequence[Any]) -> None:
        """Sets the labels' weights from --class-weight; raises InputError for an unknown label."""
        if not config.class_weight:
            return
        if config.class_weight == (BALANCED,):
            self.weights = torch.tensor(self.balanced(examples), dtype=torch.float32)
            return
        given = {clean_label(k): v for k, v in config.weight_of_labels().items()}
        for label in given:
            if label not in self.labels:
                raise InputError(f"--class-weight: the label {label!r} does not occur in --train")
        self.weights = torch.tensor([given.get(label, 1.0) for label in self.labels])

    def balanced(self, examples: Sequence[Any]) -> list[float]:
        """Weights that make each label's total weight equal (scikit-learn's "balanced").

        A label that occurs c times among n gets n / (number of labels that occur * c). A label that
        only the examples for evaluation have gets 1, which no training example uses.
        """
        from sklearn.utils.class_weight import compute_class_weight

        y = np.array([label for example in examples for label in self.labels_of(example)])
        there = np.unique(y)
        found = compute_class_weight("balanced", classes=there, y=y)
        weights = dict(zip(there.tolist(), found.tolist(), strict=True))
        return [weights.get(label, 1.0) for label in self.labels]

    def model_options(self) -> dict[str, Any]:
        """Fields of the model's configuration that replace the checkpoint's."""
        return {
            "num_labels": None,
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: number for number, label in enumerate(self.labels)},
            "problem_type": None,
        }

    def count(self, feature: Feature) -> float:
        """The feature's weight in the mean loss of a step."""
        return 1.0


def _in_order(labels: Iterable[str]) -> list[str]:
    """Sorted as numbers if all labels are whole numbers, else as text."""
    labels = sorted(labels)
    return sorted(labels, key=int) if all(label.isdecimal() for label in labels) else labels


def _warn_of_alike(labels: Sequence[str]) -> None:
    """Warns of labels that differ only in upper and lower case."""
    seen: dict[str, str] = {}
    for label in labels:
        other = seen.setdefault(label.casefold(), label)
        if other != label:
            warnings.warn(
                f"--train: the labels {other!r} and {label!r} differ only in case, but count as "
                "two labels; spell them identically if they mean the same",
                stacklevel=2,
            )


def by_example(
    features: Sequence[Feature], scores: Sequence[NDArray[np.float32]], num_examples: int
) -> list[tuple[list[Feature], Scores]]:
    """The features of each example, and their scores."""
    groups: list[tuple[list[Feature], Scores]] = [([], []) for _ in range(num_examples)]
    for feature, own in zip(features, scores, strict=True):
        groups[feature.example][0].append(feature)
        groups[feature.example][1].append(own)
    return groups


def to_host(scores: Tensor) -> NDArray[np.float32]:
    """The scores as a float32 array on the host, of the same shape."""
    return scores.detach().float().cpu().numpy()


def softmax(scores: NDArray[np.float32]) -> list[float]:
    """Probabilities of (L,) scores."""
    shares = np.exp(scores - scores.max())
    probabilities: list[float] = (shares / shares.sum()).tolist()
    return probabilities
