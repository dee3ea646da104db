"""A student with half the layers, distilled and trained without a teacher, on the same batches.

Each seed has its own teacher, because the seed decides which documents are held out.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.results import Options, Results
from benchmarks.training.noising import heldout_losses
from fastbert.config.bert import BertConfig
from fastbert.config.distill import DistillConfig
from fastbert.config.pretrain import PretrainConfig
from fastbert.models.pretraining import BertForMaskedLM
from fastbert.train.distill.run import Distillation
from fastbert.train.pretrain import carry_out
from fastbert.train.recipe import Pretraining, Recipe

TEACHER = "teacher"
COPIES = "student, distilled, begun with the teacher's layers"
RANDOM = "student, distilled, begun at random"
PLAIN = "student, masked LM alone, begun at random"


class Plain(Pretraining):
    """Pre-trains a model of the given shape by masked LM: the student without a teacher."""

    def __init__(self, config: PretrainConfig, shape: BertConfig) -> None:
        super().__init__(config)
        self.shape = shape

    def make_model(self, vocab_size: int) -> BertForMaskedLM:
        return BertForMaskedLM(self.shape)


def run(options: Options, results: Results) -> None:
    """Measures the part "distillation": held-out losses of the students and their teacher."""
    base = PretrainConfig(preset="mini", eval_every=50, log_every=50, precision=options.precision)
    teacher_steps, steps, seeds = 700, 300, 2
    if options.quick:
        base = dataclasses.replace(
            base, preset="tiny", eval_every=3, eval_batches=2, batch_tokens=512, vocab_size=1000
        )
        teacher_steps, steps, seeds = 6, 6, 1
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as directory:
            _compare(
                dataclasses.replace(base, steps=teacher_steps, seed=seed),
                steps,
                Path(directory),
                results,
            )


def _compare(teacher: PretrainConfig, steps: int, directory: Path, results: Results) -> None:
    """Trains the teacher and then each student, for one seed."""
    _measure(Pretraining(teacher), TEACHER, directory / "teacher", results)
    same = {
        name: getattr(teacher, name)
        for name in ("eval_every", "log_every", "eval_batches", "batch_tokens", "precision", "seed")
    }
    source = directory / "teacher"
    distil = DistillConfig(teacher=str(source), steps=steps, **same)
    copies = Distillation(distil)
    plain = PretrainConfig(
        preset=teacher.preset,
        steps=steps,
        objective="mlm",
        tokenizer=source / "latest",
        **same,
    )
    students: dict[str, Recipe] = {
        COPIES: copies,
        RANDOM: Distillation(dataclasses.replace(distil, init="random")),
        PLAIN: Plain(plain, copies.config.student(copies.model.config)),
    }
    for number, (name, recipe) in enumerate(students.items()):
        _measure(recipe, name, directory / str(number), results)


def _measure(recipe: Recipe, scheme: str, out: Path, results: Results) -> dict[str, Any]:
    """Trains a model and adds its row; a distilled student's row also has its teacher's figures."""
    config = recipe.config
    summary = carry_out(recipe, out, resume=False, eager=False, profile=False, parallel="ddp")
    losses = heldout_losses(out)
    model = BertForMaskedLM.from_pretrained(out)
    return results.add(
        "distillation",
        {"scheme": scheme, "seed": config.seed, "steps": config.steps},
        heldout=losses,
        final=losses[-1][1],
        accuracy=summary["mlm_accuracy"],
        baseline=summary["unigram_baseline"],
        parameters=sum(p.numel() for p in model.parameters()),
        seconds=summary["seconds"],
        teacher_final=summary.get("teacher_heldout_mlm_loss"),
        teacher_accuracy=summary.get("teacher_mlm_accuracy"),
    )
