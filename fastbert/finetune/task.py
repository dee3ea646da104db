"""What a task is: how its files become sequences, what it learns, and how it is measured."""

import abc
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbert.check import InputError
from fastbert.config.finetune import BALANCED, FinetuneConfig
from fastbert.data.formats.tables import Row, clean_label, read_table
from fastbert.finetune.features import Feature, WindowEncoder
from fastbert.finetune.metrics import Report
from fastbert.models.base import BertPreTrainedModel
from fastbert.packing import PackedBatch

SETTINGS = "finetune.json"
ALL = "*"  # columns

Prediction = dict[str, Any]
Example = TypeVar("Example")


class Refused(NamedTuple):
    """Stands for a row to predict that can be no example, and says why."""

    where: str
    reason: str


class Settings(NamedTuple):
    """What a fine-tuned model must know of its run to read new input; fields of the config."""

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
    precision: str  # what the model was trained and measured in
    delimiter: str | None = None
    may_be_impossible: bool = False  # qa: the training data had questions without an answer

    @classmethod
    def of(cls, config: FinetuneConfig, max_seq_len: int) -> Self:
        values = {k: getattr(config, k) for k in cls._fields if k != "may_be_impossible"}
        return cls(**values | {"max_seq_len": max_seq_len})

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Of a fine-tuned model's directory; InputError for another."""
        path = directory / SETTINGS
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**values | {"choice_column": tuple(values["choice_column"])})
        except FileNotFoundError:
            raise InputError(
                f"{directory}: no {SETTINGS} there; `fastbert finetune` makes a model that has one"
            ) from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(f"{path}: not the settings of a fine-tuned model ({error})") from None

    def save(self, directory: Path) -> None:
        text = json.dumps(self._asdict(), indent=2, ensure_ascii=False) + "\n"
        (directory / SETTINGS).write_text(text, encoding="utf-8")


class Task(abc.ABC):
    """One of `--task`, over examples E of its own type, each with a `where` for messages.

    labels: the names of what the model scores, in order; empty where there are none to learn.
    """

    model_class: ClassVar[type[BertPreTrainedModel]]
    metrics: ClassVar[tuple[str, ...]]  # by which epochs are compared, by default the first

    def __init__(self, settings: Settings, labels: Sequence[str] = ()) -> None:
        self.settings = settings
        self.labels = list(labels)
        self.weights: Tensor | None = None  # of the labels in the loss
        self.copied: tuple[str, ...] = ()  # columns that predictions are to have too
        self.rows: list[Row] = []  # of the table that was read last

    @abc.abstractmethod
    def read(self, path: Path, *, labelled: bool = True) -> list[Any]:
        """The examples of a file; InputError for what cannot be one."""

    def from_table(
        self, path: Path, columns: Sequence[str], labelled: bool, make: Callable[[Row], Example]
    ) -> list[Example]:
        """What `make` gives of the rows of a table, one of the columns the label's if `labelled`.

        If not, a row that it cannot make an example of becomes a `Refused`, not an InputError.
        """
        columns = [*columns, self.settings.label_column] if labelled else list(columns)
        columns += [column for column in self.copied if column != ALL]
        self.rows = read_table(path, columns, self.settings.delimiter)
        return [make(row) if labelled else self._attempt(make, row) for row in self.rows]

    def _attempt(self, make: Callable[[Row], Example], row: Row) -> Any:
        try:
            return make(row)
        except InputError as error:
            return Refused(row.where, str(error))

    @abc.abstractmethod
    def features(self, examples: Sequence[Any], encoder: WindowEncoder) -> list[Feature]:
        """The sequences of the examples in order, with targets where the examples have them."""

    def forward(self, model: Any, batch: PackedBatch, features: Sequence[Feature]) -> Any:
        """The model's output for the batch of these features."""
        return model(batch)

    @abc.abstractmethod
    def loss(
        self, model: Any, batch: PackedBatch, features: Sequence[Feature], total: float
    ) -> Tensor:
        """The share of this part of a step in the step's mean loss: its sum by `total`."""

    @abc.abstractmethod
    def scores(self, output: Any, features: Sequence[Feature]) -> list[NDArray[np.float32]]:
        """The model's scores of each feature, on the host."""

    @abc.abstractmethod
    def predict(
        self,
        examples: Sequence[Any],
        features: Sequence[Feature],
        scores: Sequence[NDArray[np.float32]],
    ) -> list[Prediction]:
        """What is said of each example, in order, as it is written to JSON Lines."""

    @abc.abstractmethod
    def evaluate(self, examples: Sequence[Any], predictions: Sequence[Prediction]) -> Report:
        """The metrics by the field's definitions, and tables of what goes wrong."""

    def learn(self, examples: Sequence[Any]) -> None:
        """Takes the labels from the training examples."""
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
        """Sets the weights of the labels as --class-weight says."""
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
        """Weights that give each label the same weight in all: n / (labels * count)."""
        from sklearn.utils.class_weight import compute_class_weight

        y = np.array([label for example in examples for label in self.labels_of(example)])
        weights = compute_class_weight("balanced", classes=np.array(self.labels), y=y)
        return weights.tolist()

    def model_options(self) -> dict[str, Any]:
        """What the model's config says other than the checkpoint's."""
        return {
            "num_labels": None,
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: number for number, label in enumerate(self.labels)},
            "problem_type": None,
        }

    def count(self, feature: Feature) -> float:
        """What the feature counts in the mean loss of a step."""
        return 1.0


def _in_order(labels: Iterable[str]) -> list[str]:
    """By number where all are whole numbers, else by their characters."""
    labels = sorted(labels)
    return sorted(labels, key=int) if all(label.isdecimal() for label in labels) else labels


def _warn_of_alike(labels: Sequence[str]) -> None:
    """Warns of labels that differ in upper and lower case alone."""
    seen: dict[str, str] = {}
    for label in labels:
        other = seen.setdefault(label.casefold(), label)
        if other != label:
            warnings.warn(
                f"--train: the labels {other!r} and {label!r} differ in case alone, and are two "
                "labels; spell them alike if they mean the same",
                stacklevel=2,
            )


def by_example(features: Sequence[Feature], num_examples: int) -> list[list[int]]:
    """The numbers of each example's features."""
    numbers: list[list[int]] = [[] for _ in range(num_examples)]
    for number, feature in enumerate(features):
        numbers[feature.example].append(number)
    return numbers


def to_host(scores: Tensor) -> NDArray[np.float32]:
    return scores.detach().float().cpu().numpy()


def softmax(scores: NDArray[np.float32]) -> list[float]:
    """The probabilities that (L,) scores stand for."""
    shares = np.exp(scores - scores.max())
    return (shares / shares.sum()).tolist()
