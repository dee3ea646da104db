"""Where kinds of runs differ: the model, its objective, and the reported numbers."""

import abc
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from fastbert import checkpoint
from fastbert.config.bert import BertConfig
from fastbert.config.presets import PRESETS
from fastbert.config.pretrain import PretrainConfig
from fastbert.data import load_tokenizer
from fastbert.models.pretraining import BertForMaskedLM, BertForPreTraining
from fastbert.train.objective import MaskedMetrics, Metrics, PretrainingObjective


class Verdict(NamedTuple):
    """What a finished run reports in addition to its own losses.

    figures: entries for summary.json; levels: other held-out losses by name, drawn as lines in the
    plot; said: a line to print, including its newline, or empty
    """

    figures: dict[str, Any]
    levels: dict[str, float]
    said: str


class Recipe(abc.ABC):
    """A kind of run, which `pretrain.carry_out` executes.

    title: title of the plot; command: name of the command; metrics: class of the objective's sums;
    teacher: fingerprint of the teacher model; directory: of the teacher, or of the model that is
    trained further; None without one; config: its precision may be "auto" until the run begins
    """

    title: ClassVar[str]
    command: ClassVar[str]
    metrics: ClassVar[type[MaskedMetrics]]
    teacher: str | None = None
    directory: Path | None = None
    config: PretrainConfig

    @abc.abstractmethod
    def name(self) -> str:
        """A short name of the model, for messages."""

    def reading(self) -> PretrainConfig:
        """The options that determine how the corpus becomes batches."""
        return self.config

    @abc.abstractmethod
    def make_model(self, vocab_size: int) -> BertForPreTraining | BertForMaskedLM:
        """The model before training; random weights come from torch's global generator.

        vocab_size: entries of the tokenizer's vocabulary
        """

    @abc.abstractmethod
    def make_objective(self, model: BertForPreTraining | BertForMaskedLM) -> PretrainingObjective:
        """The training objective; in eval mode its sums must be the fields of `Metrics`."""

    @abc.abstractmethod
    def losses(self, metrics: Any) -> dict[str, float]:
        """The means to report for training steps, with "loss" first."""

    def verdict(
        self,
        model: BertForPreTraining | BertForMaskedLM,
        validations: list[dict[str, float]],
        evaluated: Callable[[PretrainingObjective], dict[str, float]],
    ) -> Verdict:
        """What to report in addition to the model's final losses. A collective call.

        validations: the results of `evaluate`, in the order of steps; evaluated(objective): that of
        another model
        """
        return Verdict({}, {}, "")


class Pretraining(Recipe):
    """Masked language modelling, and next-sentence prediction unless the objective is "mlm"."""

    title = "Pre-training"
    command = "pretrain"
    metrics = Metrics

    def __init__(self, config: PretrainConfig, begun: Path | None = None) -> None:
        """begun: the checkpoint to resume from, which a resumed run reads in place of its model."""
        if config.model is not None:
            directory = begun or checkpoint.resolve(config.model)
            shape = BertConfig.from_pretrained(directory)
            # raises InputError for the tokenizer of another model
            load_tokenizer(directory, model_vocab_size=shape.vocab_size)
            self.directory, self.shape, config = directory, shape, config.fitted_to(shape)
        self.config = config

    def name(self) -> str:
        config = self.config
        return config.preset if config.model is None else f"{config.model}, trained further"

    def reading(self) -> PretrainConfig:
        if self.directory is None:
            return self.config
        return dataclasses.replace(self.config, model=None, tokenizer=self.directory)

    def make_model(self, vocab_size: int) -> BertForPreTraining | BertForMaskedLM:
        config = self.config
        kind = BertForPreTraining if config.objective == "mlm+nsp" else BertForMaskedLM
        changes: dict[str, Any] = {}
        if config.dropout is not None:
            names = "hidden_dropout_prob", "attention_probs_dropout_prob"
            changes = dict.fromkeys(names, config.dropout)
        if config.residual_in_fp32:
            changes["residual_in_fp32"] = True
        if self.directory is not None:
            shape = dataclasses.replace(self.shape, **changes)
            return kind.from_pretrained(self.directory, config=shape).train()
        return kind(
            BertConfig(
                **PRESETS[config.preset].shape,
                **changes,
                vocab_size=vocab_size,
                max_position_embeddings=max(512, config.max_seq_len),
            )
        )

    def make_objective(self, model: BertForPreTraining | BertForMaskedLM) -> PretrainingObjective:
        return PretrainingObjective(model, self.config.nsp_weight)

    def losses(self, metrics: Metrics) -> dict[str, float]:
        return {
            "loss": metrics.mlm_loss + self.config.nsp_weight * metrics.nsp_loss,
            "mlm_loss": metrics.mlm_loss,
            "mlm_accuracy": metrics.mlm_accuracy,
            **metrics.of_pairs(),
        }

    def verdict(self, model: Any, validations: list[dict[str, float]], evaluated: Any) -> Verdict:
        first = validations[0]
        if first["step"]:
            return super().verdict(model, validations, evaluated)
        loss, accuracy = first["heldout_mlm_loss"], first["mlm_accuracy"]
        figures = {"heldout_mlm_loss_before": loss, "mlm_accuracy_before": accuracy}
        said = f"before the first step: {loss:.3f} nats, {accuracy:.1%} right\n"
        return Verdict(figures, {}, said)


def training_row(
    recipe: Recipe, step: int, metrics: Any, tokens_per_second: float
) -> dict[str, float]:
    """The report on training steps up to `step`; means that no step contributed to are NaN."""
    means = recipe.losses(metrics)
    if not metrics.num_targets:
        means = dict.fromkeys(means, math.nan)
    return {
        "step": step,
        **means,
        "real_tokens_per_second": tokens_per_second,
        "skipped_steps": metrics.skipped_steps,
    }
