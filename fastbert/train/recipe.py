"""What a run trains: the model, its objective, and what there is to say of both."""

import abc
import math
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from fastbert.config.bert import BertConfig
from fastbert.config.pretrain import PRESETS, PretrainConfig
from fastbert.models.pretraining import BertForMaskedLM, BertForPreTraining
from fastbert.packing import PackedBatch
from fastbert.train.distributed import Ranks
from fastbert.train.objective import Metrics, PretrainingObjective


class Verdict(NamedTuple):
    """What is known at the end of a run beside its own losses.

    figures: for summary.json; levels: held-out losses to compare with, by name; said: a line with
    its end
    """

    figures: dict[str, Any]
    levels: dict[str, float]
    said: str


class Recipe(abc.ABC):
    """A kind of run, which `pretrain.carry_out` does.

    command: of the command line; metrics: what the objective's sums are, the skipped steps last;
    teacher: fingerprint of a model that the run learns from, None where there is none; directory:
    that model's.
    """

    title: ClassVar[str]
    command: ClassVar[str]
    metrics: ClassVar[Any]
    teacher: str | None = None
    directory: Path | None = None
    config: PretrainConfig

    @abc.abstractmethod
    def name(self) -> str:
        """Of the model, in a word or two."""

    def reading(self) -> PretrainConfig:
        """By which options the corpus becomes batches."""
        return self.config

    @abc.abstractmethod
    def make_model(self, vocab_size: int) -> BertForPreTraining | BertForMaskedLM:
        """As it is before the first step; torch's generator draws its weights."""

    @abc.abstractmethod
    def make_objective(self, model: BertForPreTraining | BertForMaskedLM) -> PretrainingObjective:
        """What is minimised in training mode; in eval mode it has the sums of `Metrics`."""

    @abc.abstractmethod
    def losses(self, metrics: Any) -> dict[str, float]:
        """The means that are reported of training steps, "loss" first."""

    def verdict(
        self,
        model: BertForPreTraining | BertForMaskedLM,
        heldout: dict[str, float],
        batches: list[PackedBatch],
        ranks: Ranks,
    ) -> Verdict:
        """Beside the model's `heldout` row, of those batches. A collective call."""
        return Verdict({}, {}, "")


class Pretraining(Recipe):
    """Masked language modelling, and next-sentence prediction unless the objective is "mlm"."""

    title = "Pre-training"
    command = "pretrain"
    metrics = Metrics

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config

    def name(self) -> str:
        return self.config.preset

    def make_model(self, vocab_size: int) -> BertForPreTraining | BertForMaskedLM:
        config = self.config
        kind = BertForPreTraining if config.objective == "mlm+nsp" else BertForMaskedLM
        return kind(
            BertConfig(
                **PRESETS[config.preset].shape,
                hidden_dropout_prob=config.dropout,
                attention_probs_dropout_prob=config.dropout,
                vocab_size=vocab_size,
                max_position_embeddings=max(512, config.max_seq_len),
                residual_in_fp32=config.residual_in_fp32 or None,
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


def training_row(
    recipe: Recipe, step: int, metrics: Any, tokens_per_second: float
) -> dict[str, float]:
    """What is reported of training steps; a mean that no step has contributed to is NaN."""
    means = recipe.losses(metrics)
    if not metrics.num_targets:
        means = dict.fromkeys(means, math.nan)
    return {
        "step": step,
        **means,
        "real_tokens_per_second": tokens_per_second,
        "skipped_steps": metrics.skipped_steps,
    }
