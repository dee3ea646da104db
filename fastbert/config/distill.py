"""`DistillConfig`: the options of a run that trains a student model on a teacher's predictions."""

import dataclasses
from pathlib import Path
from typing import Any, Self

from fastbert.check import InputError
from fastbert.config.bert import BertConfig
from fastbert.config.options import BELOW_ONE, POSITIVE, at_least, of_model, of_training, option
from fastbert.config.presets import PRESETS, nearest
from fastbert.config.pretrain import PretrainConfig, placed

WEIGHTS = ("soft_weight", "mlm_weight", "cosine_weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(PretrainConfig):
    """Everything that determines a distillation; its fields are the command line's options.

    Defaults are those of DistilBERT (Sanh et al. 2019, https://arxiv.org/abs/1910.01108) and of
    pre-training. An option that is None gets its value from the teacher, see `fitted_to`. Raises
    InputError, which names the option, for a missing teacher or a value out of range.
    """

    teacher: str = of_model(
        None,
        "Directory of a model or a run, or a hub name, with a masked-LM head; a new run needs it.",
    )
    preset: str = of_model(
        None,
        f"Architecture of the student: {', '.join(PRESETS)}; by default half the teacher's layers.",
        choices=PRESETS,
    )
    layers: int = of_model(
        None,
        "Layers of a student as wide as the teacher; by default half the teacher's.",
        bounds=at_least(1),
    )
    init: str = of_model(
        None,
        "teacher (copies of its layers) or random; by default teacher, if the student is as wide "
        "and not deeper.",
        choices=("teacher", "random"),
    )
    temperature: float = of_training(
        2.0, "Divisor of both models' logits for the soft targets.", bounds=POSITIVE
    )
    soft_weight: float = of_training(
        5.0, "Weight of the loss against the teacher's probabilities.", bounds=at_least(0)
    )
    mlm_weight: float = of_training(2.0, "Weight of the masked-LM loss.", bounds=at_least(0))
    cosine_weight: float = of_training(
        None,
        "Weight of the hidden states' cosine distance; by default 1, or 0 for another width.",
        bounds=at_least(0),
    )
    max_seq_len: int = option(
        None,
        "Longest example, in tokens; by default from the preset nearest in width.",
        bounds=at_least(8),
    )
    learning_rate: float = of_training(
        None,
        "Peak learning rate; by default from the preset nearest in width.",
        bounds=at_least(0),
    )
    dropout: float = of_model(
        None,
        "Dropout of hidden states and attention; by default from the preset nearest in width.",
        bounds=BELOW_ONE,
    )
    # options of pre-training that the teacher determines; setting one raises InputError
    model: str | None = option(None, "the student begins as --init says", hidden=True)
    tokenizer: Path | None = option(None, "the student uses the teacher's tokenizer", hidden=True)
    vocab_size: int = option(None, "the student has the teacher's vocabulary", hidden=True)
    lowercase: bool = option(None, "the student uses the teacher's tokenizer", hidden=True)
    strip_accents: bool | None = option(
        None, "the student uses the teacher's tokenizer", hidden=True
    )
    objective: str = option("mlm", "distillation has no next-sentence loss", hidden=True)
    nsp_weight: float = option(None, "distillation has no next-sentence loss", hidden=True)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            shown = field.metadata["shown"]
            if shown["hidden"] and getattr(self, field.name) != field.default:
                name = field.name.replace("_", "-")
                raise InputError(f"--{name}: {shown['help']}; omit the option")
        if self.teacher is None:
            raise InputError("--teacher: missing")
        super().__post_init__()
        if self.preset is not None and self.layers is not None:
            raise InputError(
                "--layers: not with --preset, which has its own number of layers; omit one of them"
            )
        if all(getattr(self, name) == 0 for name in WEIGHTS):
            raise InputError("--soft-weight: all three weights are 0, so there is nothing to learn")

    def _complete(self) -> None:
        """Does not take the preset's values: `fitted_to` replaces the options that are None."""

    def placed(self) -> Self:
        """As `PretrainConfig.placed`, with an absolute path of a teacher on disk."""
        return dataclasses.replace(super().placed(), teacher=placed(self.teacher))

    def fitted_to(self, teacher: BertConfig) -> Self:
        """A copy in which values that suit the teacher replace the options that are None.

        Raises InputError for an option that this teacher does not allow.
        """
        depth, width = teacher.num_hidden_layers, teacher.hidden_size
        layers = self.layers
        if self.preset is None and layers is None:
            layers = max(-(-depth // 2), 1)
        student = dataclasses.replace(teacher, **self._shape(teacher, layers))
        if self.preset is None and student.num_hidden_layers > depth:
            raise InputError(f"--layers {layers}: more than the teacher's {depth}; lower it")
        alike = ("hidden_size", "num_attention_heads", "intermediate_size")
        copies = student.num_hidden_layers <= depth and all(
            getattr(student, name) == getattr(teacher, name) for name in alike
        )
        if self.init == "teacher" and not copies:
            raise InputError(
                f"--init teacher: only a student of the teacher's width, {width}, and at most its "
                f"{depth} layers can copy layers; give --layers instead of --preset"
            )
        as_wide = student.hidden_size == width
        if self.cosine_weight and not as_wide:
            raise InputError(
                f"--cosine-weight {self.cosine_weight:g}: compares hidden states of one width, but "
                f"the student's is {student.hidden_size}, the teacher's {width}; omit it"
            )
        near = PRESETS[self.preset or nearest(student.hidden_size)]
        longest = teacher.max_position_embeddings
        return self._fitted(
            longest,
            layers=layers,
            init="teacher" if copies else "random",
            cosine_weight=1.0 if as_wide else 0.0,
            learning_rate=near.learning_rate,
            dropout=near.dropout,
            max_seq_len=min(near.max_seq_len, longest),
        )

    def student(self, teacher: BertConfig) -> BertConfig:
        """The student's architecture; `fitted_to` must have fitted the options to the teacher."""
        return dataclasses.replace(
            teacher,
            **self._shape(teacher, self.layers),
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
            residual_in_fp32=self.residual_in_fp32 or None,
        )

    def reading(self, tokenizer: Path) -> PretrainConfig:
        """The options of pre-training for reading the corpus.

        tokenizer: the teacher's, a file or a directory
        """
        names = (field.name for field in dataclasses.fields(PretrainConfig))
        given = {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        return PretrainConfig(**given | {"tokenizer": tokenizer})

    def _shape(self, teacher: BertConfig, layers: int | None) -> dict[str, Any]:
        if self.preset is not None:
            return PRESETS[self.preset].shape
        return {"num_hidden_layers": layers}
