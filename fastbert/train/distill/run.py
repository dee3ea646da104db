"""Distillation from raw text: a student is trained on a teacher's predictions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastbert import checkpoint
from fastbert.config.bert import BertConfig
from fastbert.config.distill import DistillConfig
from fastbert.config.pretrain import PretrainConfig
from fastbert.data import load_tokenizer
from fastbert.models.pretraining import BertForMaskedLM
from fastbert.models.trained import fingerprint, trained
from fastbert.train.distill.objective import (
    DistillationMetrics,
    DistillationObjective,
    Teacher,
    Weights,
)
from fastbert.train.objective import PretrainingObjective
from fastbert.train.pretrain import carry_out
from fastbert.train.recipe import Recipe, Verdict


def distill(
    config: DistillConfig,
    out: Path,
    *,
    resume: bool = False,
    eager: bool = False,
    profile: bool = False,
    parallel: str = "ddp",
) -> dict[str, Any]:
    """Runs the distillation that `config` describes in the directory `out`; `resume` continues it.

    Arguments, files and errors are those of `pretrain`. The model is a BertForMaskedLM, and
    summary.json also has the teacher's loss and accuracy on the same held-out batches.
    """
    return carry_out(
        Distillation(config), out, resume=resume, eager=eager, profile=profile, parallel=parallel
    )


class Distillation(Recipe):
    """The recipe for a student that `DistillConfig` describes, with `DistillationObjective`.

    Raises InputError for a teacher that cannot be read, has no masked-LM head or does not fit the
    options. Each process holds the whole teacher in memory, in float32.
    """

    title = "Distillation"
    command = "distill"
    directory: Path
    metrics = DistillationMetrics

    def __init__(self, config: DistillConfig) -> None:
        directory = checkpoint.resolve(config.teacher)
        shape = BertConfig.from_pretrained(directory)
        self.config: DistillConfig = config.fitted_to(shape)
        # raises InputError for the tokenizer of another model
        load_tokenizer(directory, model_vocab_size=shape.vocab_size)
        self.directory = directory
        self.model = trained(BertForMaskedLM, directory, shape)
        self.teacher = fingerprint(self.model)

    def name(self) -> str:
        student = self.config.student(self.model.config)
        return f"student of depth {student.num_hidden_layers}, width {student.hidden_size}"

    def reading(self) -> PretrainConfig:
        return self.config.reading(self.directory)

    def make_model(self, vocab_size: int) -> BertForMaskedLM:
        """The untrained student; it has the teacher's vocab_size, which may include spare rows."""
        student = BertForMaskedLM(self.config.student(self.model.config))
        if self.config.init == "teacher":
            copy_layers(self.model, student)
        return student

    def make_objective(self, model: Any) -> DistillationObjective:
        config = self.config
        weights = Weights(config.soft_weight, config.mlm_weight, config.cosine_weight)
        self.model.to(next(model.parameters()).device)
        return DistillationObjective(model, Teacher(self.model), weights, config.temperature)

    def losses(self, metrics: DistillationMetrics) -> dict[str, float]:
        config = self.config
        parts = {"soft": metrics.soft_loss, "mlm": metrics.mlm_loss}
        if config.cosine_weight:
            parts["cosine"] = metrics.cosine_loss
        return {
            "loss": sum(getattr(config, f"{name}_weight") * part for name, part in parts.items()),
            **{f"{name}_loss": part for name, part in parts.items()},
            "mlm_accuracy": metrics.mlm_accuracy,
        }

    def verdict(
        self,
        model: Any,
        validations: list[dict[str, float]],
        evaluated: Callable[[PretrainingObjective], dict[str, float]],
    ) -> Verdict:
        heldout, found = validations[-1], evaluated(PretrainingObjective(self.model).eval())
        loss, accuracy = found["heldout_mlm_loss"], found["mlm_accuracy"]
        sizes = [sum(p.numel() for p in m.parameters()) for m in (model, self.model)]
        share = heldout["mlm_accuracy"] / accuracy if accuracy else None
        figures = {
            "student_parameters": sizes[0],
            "teacher_parameters": sizes[1],
            "teacher_heldout_mlm_loss": loss,
            "teacher_mlm_accuracy": accuracy,
            "share_of_teacher_accuracy": share,
        }
        own = f"{heldout['heldout_mlm_loss']:.3f} nats, {heldout['mlm_accuracy']:.1%} right"
        line = (
            f"student of {sizes[0] / 1e6:.1f} M parameters: {own}; teacher of {sizes[1] / 1e6:.1f} "
            f"M on the same batches: {loss:.3f} nats, {accuracy:.1%} right"
        )
        if share is not None:
            line += f"; {share:.1%} of the teacher's accuracy"
        return Verdict(figures, {"teacher": loss}, line + "\n")


def layers_to_copy(depth: int, layers: int) -> list[int]:
    """Which of the teacher's `depth` layers initialize the `layers` layers of a student.

    The indices are evenly spaced from the first to the last: 0, 2, 4, 7, 9, 11 for 6 of 12, as in
    DistilBERT. A single layer is the first one.
    """
    gaps = max(layers - 1, 1)
    return [(2 * i * (depth - 1) + gaps) // (2 * gaps) for i in range(layers)]


def copy_layers(teacher: BertForMaskedLM, student: BertForMaskedLM) -> None:
    """Copies the embeddings, the masked-LM head and the layers `layers_to_copy` into the student.

    The student must have the teacher's width.
    """
    theirs, own = teacher.bert.encoder.layer, student.bert.encoder.layer
    pairs = [(teacher.bert.embeddings, student.bert.embeddings), (teacher.cls, student.cls)]
    pairs += [(theirs[n], own[i]) for i, n in enumerate(layers_to_copy(len(theirs), len(own)))]
    for source, copy in pairs:
        copy.load_state_dict(source.state_dict())
