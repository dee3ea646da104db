"""`FinetuneConfig`: the options of a fine-tuning run."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastbert.check import InputError
from fastbert.config.options import (
    ANY,
    INSIDE,
    PART,
    POSITIVE,
    REQUIRED,
    SEED,
    SHARE,
    Only,
    at_least,
    check_options,
    of_model,
    of_training,
    option,
    read_delimiter,
)

TASKS = ("classification", "multilabel", "regression", "ner", "qa", "choice")
WINDOWS = tuple(task for task in TASKS if task != "choice")  # can read long texts in windows
TABLES = tuple(task for task in TASKS if task not in ("ner", "qa"))
BALANCED = "balanced"


def check_length(task: str, stride: int | None, truncate: bool) -> None:
    """Raises InputError for an option about long texts that the task does not have."""
    if stride is not None and task not in WINDOWS:
        raise InputError(f"--stride: not for {task}, only for {', '.join(WINDOWS)}")
    if truncate and (task in ("ner", "qa") or stride is not None):
        raise InputError("--truncate: not for ner and qa, and not with --stride")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Everything that determines a fine-tuning run; its fields are the command line's options.

    Raises InputError, which names the option, for an unknown value, a value out of range, and
    options that exclude each other or do not fit the task.
    """

    task: str = option(REQUIRED, f"One of {', '.join(TASKS)}.", choices=TASKS)
    train: Path = option(
        REQUIRED,
        "Training examples: .csv, .tsv or .jsonl with named columns; for ner, CoNLL (a word and "
        "its label per line); for qa, JSON of SQuAD or CMRC 2018.",
    )
    dev: Path | None = option(None, "Examples that select the best epoch, in the same format.")
    dev_share: float | None = option(
        None, "Share of --train to use as --dev, which is then omitted.", bounds=INSIDE
    )
    test: Path | None = option(None, "Examples to measure the best epoch on, at the end.")
    delimiter: str | None = option(
        None,
        "Character between columns of a table; by default , in .csv and a tab in .tsv.",
        only=Only("task", TABLES),
    )
    text_column: str = option(
        "text", "Column of the text, or of its first half.", only=Only("task", TABLES)
    )
    pair_column: str | None = option(
        None,
        "Column of the second text; for choice, of the text before each choice.",
        only=Only("task", TABLES),
    )
    label_column: str = option(
        "label", "Column of the label, the number or the right choice.", only=Only("task", TABLES)
    )
    label_separator: str = option(
        ",", "Text between the labels in a multilabel column.", only=Only("task", ("multilabel",))
    )
    choice_column: tuple[str, ...] = option(
        (), "Column of a choice, once for each choice; or the column that lists them."
    )
    max_seq_len: int | None = option(
        None,
        "Longest sequence, in tokens; by default the model's limit.",
        bounds=at_least(8),
    )
    stride: int | None = option(
        None,
        "Read longer texts in windows that share this many tokens, instead of refusing them.",
        bounds=at_least(0),
    )
    truncate: bool = option(False, "Cut longer texts off instead (not for ner and qa).")
    model: str = of_model(REQUIRED, "Directory of a model or a run, or a hub name.")
    max_answer_tokens: int = of_model(
        30, "Longest answer for qa.", bounds=at_least(1), only=Only("task", ("qa",))
    )
    null_threshold: float = of_model(
        0.0,
        "qa predicts no answer if that beats the best answer's score by more than this.",
        bounds=ANY,
        only=Only("task", ("qa",)),
    )
    epochs: int = of_training(3, "Passes over the training examples.", bounds=at_least(1))
    batch_size: int = of_training(32, "Examples per optimizer step.", bounds=at_least(1))
    batch_tokens: int = of_training(
        4096, "Tokens per micro-batch; the results do not depend on it.", bounds=at_least(1)
    )
    learning_rate: float = of_training(5e-5, "Peak learning rate.", bounds=at_least(0))
    layer_decay: float = of_training(
        1.0, "Factor of the learning rate from each layer to the layer below it.", bounds=PART
    )
    warmup_ratio: float = of_training(
        0.1, "Share of the steps in which the learning rate rises.", bounds=SHARE
    )
    weight_decay: float = of_training(
        0.01, "Weight decay, except on biases and LayerNorm.", bounds=at_least(0)
    )
    max_grad_norm: float = of_training(1.0, "Clips gradients to this norm.", bounds=POSITIVE)
    class_weight: tuple[str, ...] = of_training(
        (),
        f"{BALANCED}, or LABEL=WEIGHT once for each label whose weight is not 1.",
    )
    metric: str | None = of_training(None, "Metric that selects the epoch; by default the task's.")
    patience: int = of_training(
        0, "Stop after this many epochs without a better one; 0: never.", bounds=at_least(0)
    )
    precision: str = of_training(
        "auto",
        "auto, bf16 or fp32; auto is bf16 autocast if the hardware has it, else fp32.",
        choices=("auto", "bf16", "fp32"),
    )
    seed: int = of_training(0, "Seed of the head's weights, the order and dropout.", bounds=SEED)

    def __post_init__(self) -> None:
        for name in ("choice_column", "class_weight"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if (self.dev is None) == (self.dev_share is None):
            what = "missing; name a file, or give --dev-share 0.1 to split --train"
            raise InputError(f"--dev: {what if self.dev is None else 'not with --dev-share'}")
        check_options(self)
        if not self.label_separator:
            raise InputError("--label-separator: expected at least one character, got none")
        if self.delimiter is not None:
            object.__setattr__(self, "delimiter", read_delimiter(self.delimiter))
        self._check_against_the_task()

    def _check_against_the_task(self) -> None:
        check_length(self.task, self.stride, self.truncate)
        if bool(self.choice_column) != (self.task == "choice"):
            raise InputError("--choice-column: the task choice needs it, and only that task has it")
        if self.class_weight and self.task not in ("classification", "multilabel", "ner"):
            raise InputError("--class-weight: only for classification, multilabel and ner")

    def weight_of_labels(self) -> Mapping[str, float]:
        """The given weights by label; empty for `balanced`. InputError unless they are weights."""
        weights: dict[str, float] = {}
        for given in self.class_weight if self.class_weight != (BALANCED,) else ():
            label, equals, number = given.rpartition("=")
            try:
                weights[label] = float(number)
            except ValueError:
                equals = ""
            if not equals or not 0 <= weights[label] < float("inf"):
                raise InputError(
                    f"--class-weight: expected {BALANCED} or LABEL=WEIGHT, got {given!r}"
                )
        return weights

    def to_json(self) -> dict[str, Any]:
        """The options as JSON values, with absolute paths."""
        values = dataclasses.asdict(self)
        return {k: os.path.abspath(v) if isinstance(v, Path) else v for k, v in values.items()}
