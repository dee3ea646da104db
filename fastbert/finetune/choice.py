"""Multiple choice: which of several texts continues or answers a first one (SWAG, RACE, C3).

Each choice becomes a sequence [CLS] text [SEP] choice [SEP], for which the model has one score. A
softmax over a question's choices gives probabilities (Devlin et al. 2018, section 4.4).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastbert.check import InputError
from fastbert.data.formats.tables import Row
from fastbert.finetune.features import Feature, WindowEncoder
from fastbert.finetune.metrics import Report
from fastbert.finetune.task import Prediction, Scores, Task, softmax, to_host
from fastbert.models.task_models import BertForMultipleChoice
from fastbert.packing import PackedBatch


class ChoiceExample(NamedTuple):
    """A first text, its choices, and the index of the right choice.

    where: file and line, for error messages; choices: each begins with the text of --pair-column;
    target: None for unlabelled input
    """

    where: str
    text: str
    choices: tuple[str, ...]
    target: int | None


class Choice(Task):
    """Predicts which of a question's choices is right."""

    model_class = BertForMultipleChoice
    metrics = ("accuracy",)

    def read(self, path: Path, *, labelled: bool = True) -> list[ChoiceExample]:
        s = self.settings
        columns = [s.text_column, *s.choice_column]
        columns += [column for column in (s.pair_column,) if column is not None]
        examples = self.from_table(
            path, columns, labelled, lambda row: self._example(row, labelled)
        )
        for example in examples if labelled else ():
            if len(example.choices) != len(examples[0].choices):
                raise InputError(
                    f"{example.where}: expected {len(examples[0].choices)} choices, as in the "
                    f"first row, got {len(example.choices)}"
                )
        return examples

    def _example(self, row: Row, labelled: bool) -> ChoiceExample:
        s = self.settings
        listed = row.values.get(s.choice_column[0])
        if len(s.choice_column) == 1 and isinstance(listed, list):
            choices = [Row(row.where, {"choice": text}).text("choice") for text in listed]
        else:
            choices = [row.text(column) for column in s.choice_column]
        if len(choices) < 2:
            raise InputError(f"{row.where}: expected two choices or more, got {len(choices)}")
        before = "" if s.pair_column is None else row.text(s.pair_column) + " "
        target = self._target(row, len(choices)) if labelled else None
        return ChoiceExample(
            row.where, row.text(s.text_column), tuple(before + text for text in choices), target
        )

    def _target(self, row: Row, count: int) -> int:
        """Index of the right choice; the label is this index, from 0, or the name of its column."""
        label = row.label(self.settings.label_column)
        if label in self.settings.choice_column:
            return self.settings.choice_column.index(label)
        if not label.isdecimal() or int(label) >= count:
            raise InputError(
                f"{row.where}: expected a number from 0 to {count - 1} as the right choice, "
                f"got {label!r}"
            )
        return int(label)

    def learn(self, examples: Sequence[ChoiceExample]) -> None:
        self.labels = []

    def model_options(self) -> dict[str, Any]:
        return {"num_labels": 2, "problem_type": None}  # as in Hugging Face; the head has 1 output

    def features(self, examples: Sequence[ChoiceExample], encoder: WindowEncoder) -> list[Feature]:
        features = []
        for number, (where, text, choices, target) in enumerate(examples):
            first = encoder.ids(text)
            windows = [
                window
                for choice in choices
                for window in encoder.windows(where, first, encoder.ids(choice))
            ]
            features.append(Feature(number, tuple(windows), target))
        return features

    def forward(self, model: Any, batch: PackedBatch, features: Sequence[Feature]) -> Any:
        """The output, one score per sequence: questions may differ in their number of choices."""
        return model(batch, num_choices=1)

    def summed_loss(self, logits: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        # all labelled questions have equally many choices, see `read`
        return super().summed_loss(logits.view(len(targets), -1), targets, weights)

    def scores(self, output: Any, features: Sequence[Feature]) -> list[NDArray[np.float32]]:
        """(C,) for each feature of C choices."""
        ends = np.cumsum([len(feature.windows) for feature in features])
        return np.split(to_host(output.logits)[:, 0], ends[:-1])

    def prediction(
        self, example: ChoiceExample, features: list[Feature], scores: Scores
    ) -> Prediction:
        """choice: index of the likeliest choice; text: that choice; probabilities: of all."""
        (row,) = scores
        best = int(row.argmax())
        return {"choice": best, "text": example.choices[best], "probabilities": softmax(row)}

    def evaluate(self, examples: Sequence[Any], predictions: Sequence[Prediction]) -> Report:
        right = [p["choice"] == e.target for e, p in zip(examples, predictions, strict=True)]
        return Report({"accuracy": float(np.mean(right))})
