"""`FinetuneConfig`: the options of a fine-tuning run."""

import dataclasses
from pathlib import Path

from fastbert.check import InputError
from fastbert.config import option

TASKS = ("classification", "multilabel", "regression", "ner", "qa", "choice")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """All that determines a fine-tuning run; the command line's options are these fields."""

    task: str = option("classification", f"One of {', '.join(TASKS)}.")
    train: Path = option(
        None, "Labelled data: .csv, .tsv or .jsonl; CoNLL for ner; SQuAD's JSON for qa."
    )
    dev: Path = option(None, "The same, to choose the best epoch by.")
    model: str = option(None, "A model's or a run's directory, or a hub name.")
    text_column: str = option("text", "Column of the text; for choice, of the question.")
    pair_column: str | None = option(None, "Column of a second text, if there is one.")
    label_column: str = option("label", "Column of the label; for choice, the right one's number.")
    choices_column: str = option("choices", "For choice: column of the answers.")
    separator: str = option("|", "Between several labels, or choices, in one CSV or TSV field.")
    max_seq_len: int | None = option(None, "Longest input, in tokens; by default the model's.")
    truncate: bool = option(False, "Cut texts that are longer; otherwise they are an error.")
    stride: int | None = option(
        None, "For ner and qa: split longer texts into windows that share this many tokens."
    )
    epochs: int = option(3, "Passes over the training data, at most.")
    batch_size: int = option(32, "Examples in the batch of one optimizer step.")
    learning_rate: float = option(3e-5, "Peak learning rate.")
    layer_decay: float = option(
        1.0, "Factor of the learning rate from each layer to the one below."
    )
    warmup_ratio: float = option(0.1, "Share of the steps in which the learning rate rises.")
    weight_decay: float = option(0.01, "AdamW's, on all but biases and LayerNorm.")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm.")
    dropout: float | None = option(None, "Of the model; by default as it was trained.")
    patience: int | None = option(None, "Stop after this many epochs without a better one.")
    balance: bool = option(
        False, "For classification: weigh each label's loss by its rarity in the training data."
    )
    max_answer_len: int = option(30, "For qa: longest answer, in tokens.")
    null_threshold: float = option(
        0.0, "For qa: no answer where its score exceeds the best answer's by more than this."
    )
    precision: str = option("auto", "auto, bf16 or fp32; auto is bf16 autocast where it is fast.")
    seed: int = option(0, "Seed of the head's weights, order and dropout.")

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise InputError(f"--task: one of {', '.join(TASKS)}, got {self.task!r}")
        for name in ("train", "dev", "model"):
            if getattr(self, name) is None:
                raise InputError(f"--{name}: missing")
        for name, least in {
            "epochs": 1, "batch_size": 1, "max_answer_len": 1, "stride": 0, "patience": 1,
            "max_seq_len": 8,
        }.items():  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--{name.replace('_', '-')}: at least {least}, got {value}")
        if not 0 < self.layer_decay <= 1:
            raise InputError(f"--layer-decay: above 0 and at most 1, got {self.layer_decay}")
        if not 0 <= self.warmup_ratio <= 1:
            raise InputError(f"--warmup-ratio: between 0 and 1, got {self.warmup_ratio}")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise InputError(f"--precision: one of auto, bf16, fp32, got {self.precision!r}")
        if self.stride is not None and self.task not in ("ner", "qa"):
            raise InputError(
                f"--stride: for ner and qa; for {self.task} --truncate cuts long texts"
            )
        if self.balance and self.task != "classification":
            raise InputError(f"--balance: for classification, not for {self.task}")
