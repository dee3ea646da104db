"""`FinetuneConfig`, the options of a fine-tuning run."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastbert.check import InputError
from fastbert.pretrain_config import option

TASKS = ("classification", "multilabel", "regression", "ner", "qa", "choice")
WINDOWS = tuple(task for task in TASKS if task != "choice")  # may read long texts in parts
BALANCED = "balanced"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """All that determines a fine-tuning run; the command line's options are these fields."""

    task: str = option(None, f"One of {', '.join(TASKS)}.")
    train: Path = option(
        None,
        "Examples to learn from: .csv, .tsv or .jsonl with named columns; for ner CoNLL (a word "
        "and its label a line, a blank line between sentences); for qa SQuAD JSON, v1.1 or v2.0.",
    )
    dev: Path = option(None, "Examples to measure by, in the same format.")
    test: Path | None = option(
        None, "Examples to measure the best epoch by, once, at the end; in the same format."
    )
    model: str = option(None, "Directory of a model or of a run, or a hub name.")
    text_column: str = option("text", "Column of the text, or of its first half.")
    pair_column: str | None = option(
        None, "Column of the second text; for choice, of what stands before each choice."
    )
    label_column: str = option("label", "Column of the label, the number or the right choice.")
    label_separator: str = option(",", "Between the labels of a multilabel column.")
    choice_column: tuple[str, ...] = option(
        (), "Column of a choice, given once for each; or the one column that lists them."
    )
    max_seq_len: int | None = option(
        None, "Longest sequence, in tokens; by default what the model can read."
    )
    stride: int | None = option(
        None, "Reads longer texts in windows that share this many tokens; without it they are "
        "refused."
    )  # fmt: skip
    truncate: bool = option(False, "Cuts longer texts off instead (not for ner and qa).")
    epochs: int = option(3, "Passes over the training examples.")
    batch_size: int = option(32, "Examples of an optimizer step.")
    batch_tokens: int = option(4096, "Tokens computed at once; the results do not depend on it.")
    learning_rate: float = option(5e-5, "Peak learning rate.")
    layer_decay: float = option(
        1.0, "Factor of the learning rate from each layer to the one below."
    )
    warmup_ratio: float = option(0.1, "Share of the steps in which the learning rate rises.")
    weight_decay: float = option(0.01, "AdamW's, on all but biases and LayerNorm.")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm.")
    class_weight: tuple[str, ...] = option(
        (), f"{BALANCED}, or LABEL=WEIGHT once for each label whose weight in the loss is not 1."
    )
    metric: str | None = option(None, "What the best epoch is best in; by default the task's.")
    patience: int = option(0, "Stops after this many epochs without a better one; 0 never.")
    max_answer_tokens: int = option(30, "Longest answer of qa.")
    null_threshold: float = option(
        0.0, "qa answers nothing where that scores better than the best answer by more than this."
    )
    precision: str = option("auto", "auto, bf16 or fp32; auto is bf16 autocast where it is fast.")
    seed: int = option(0, "Seed of the head's weights, the order and dropout.")

    def __post_init__(self) -> None:
        for name in ("choice_column", "class_weight"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.task not in TASKS:
            raise InputError(f"--task: one of {', '.join(TASKS)}, got {self.task!r}")
        for name in ("train", "dev", "model"):
            if getattr(self, name) is None:
                raise InputError(f"--{name}: missing")
        least = {"epochs": 1, "batch_size": 1, "batch_tokens": 1, "patience": 0}
        least |= {"max_answer_tokens": 1, "max_seq_len": 8, "stride": 0, "seed": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise InputError(f"--{name.replace('_', '-')}: at least {low}, got {value}")
        if not 0 < self.layer_decay <= 1:
            raise InputError(f"--layer-decay: above 0 and at most 1, got {self.layer_decay}")
        if not 0 <= self.warmup_ratio <= 1:
            raise InputError(f"--warmup-ratio: between 0 and 1, got {self.warmup_ratio}")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise InputError(f"--precision: one of auto, bf16, fp32, got {self.precision!r}")
        if self.seed >= 2**63:
            raise InputError(f"--seed: between 0 and 2^63 - 1, got {self.seed}")
        if not self.label_separator:
            raise InputError("--label-separator: at least one character, got none")
        self._check_against_the_task()

    def _check_against_the_task(self) -> None:
        if self.stride is not None and self.task not in WINDOWS:
            raise InputError(f"--stride: not for {self.task}, only for {', '.join(WINDOWS)}")
        if self.truncate and (self.task in ("ner", "qa") or self.stride is not None):
            raise InputError("--truncate: not for ner and qa, nor beside --stride")
        if bool(self.choice_column) != (self.task == "choice"):
            raise InputError("--choice-column: needed for the task choice, and only there")
        if self.class_weight and self.task not in ("classification", "multilabel", "ner"):
            raise InputError("--class-weight: only for classification, multilabel and ner")

    def weight_of_labels(self) -> Mapping[str, float]:
        """The weights that were given by label; `balanced` gives none."""
        weights: dict[str, float] = {}
        for given in self.class_weight if self.class_weight != (BALANCED,) else ():
            label, equals, number = given.rpartition("=")
            try:
                weights[label] = float(number)
            except ValueError:
                equals = ""
            if not equals or not 0 <= weights[label] < float("inf"):
                raise InputError(f"--class-weight: {BALANCED} or LABEL=WEIGHT, got {given!r}")
        return weights

    def to_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
