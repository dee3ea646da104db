"""`python -m benchmarks jump`: the losses around one step of `convergence`, in several ways.

On an H200 single losses of fastbert's runs jump, as at step 103 of seed 1, and are back at the next
step. This trains up to that step. With the weights before it, a step earlier and a step later it
computes the loss of the step's batch with the same dropout masks and with others, with the residual
stream or everything in float32, with plain bodies instead of kernels, and without dropout; and the
loss of other batches. If all of these jump, the weights do.
"""

import contextlib
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.results import Options
from benchmarks.steps.steps import autocast
from benchmarks.training.convergence import SEEDS, cases, initial, train
from fastbert import backend
from fastbert.models.losses import masked_rows, score_classes, score_words
from fastbert.packing import PackedBatch
from fastbert.train.prepare import prepare_text

WAYS: dict[str, dict[str, bool]] = {
    "the step's own masks": {},
    "residual stream in float32": {"wide": True},
    "all in float32": {"low": False},
    "plain bodies": {"plain": True},
    "plain bodies, all in float32": {"plain": True, "low": False},
    "without dropout, all in float32": {"drops": False, "low": False},
}


def main(
    seed: Annotated[int, typer.Option(help="Seed of the run.", min=min(SEEDS), max=max(SEEDS))] = 1,
    step: Annotated[int, typer.Option(help="Step whose loss it is, from 0.", min=1)] = 103,
    quick: Annotated[bool, typer.Option("--quick", help="A small model, on a CPU.")] = False,
) -> None:
    """Print both losses around a step of pre-training, computed in several ways."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = Options(device, "bf16" if device.type == "cuda" else "fp32", quick)
    config = next(one for one in cases(options) if one.seed == seed)
    if step + 2 > config.steps:
        raise typer.BadParameter(
            f"expected at most {config.steps - 2}, as the run has {config.steps} steps, got {step}",
            param_hint="--step",
        )
    with tempfile.TemporaryDirectory() as directory:
        text = prepare_text(config, Path(directory))
        batches = [text.training.batch(number)[0] for number in range(step + 2)]
    model = initial(config, text.tokenizer.get_vocab_size())

    def tell(
        name: str,
        batch: PackedBatch,
        *,
        wide: bool = False,
        low: bool = True,
        plain: bool = False,
        drops: bool = True,
    ) -> None:
        """Prints a batch's losses; wide: fp32 stream; low: products in bf16; plain: no kernels."""
        usual = model.config.residual_in_fp32
        vars(model.config)["residual_in_fp32"] = wide or usual
        model.train(drops)
        with (
            torch.no_grad(),
            autocast(options) if low else contextlib.nullcontext(),
            backend.use("reference") if plain else contextlib.nullcontext(),
        ):
            words, pairs, margins = parts(batch.to(device))
        # by `vars`, because a model in use refuses to have its configuration changed
        vars(model.config)["residual_in_fp32"] = usual
        model.train()
        print(
            f"{name:<42}words {words:8.4f}, pairs {pairs:8.4f}, "
            f"margins {margins.mean():7.3f} +- {margins.std():.3f}"
        )

    def parts(batch: PackedBatch) -> tuple[float, float, Tensor]:
        """Both losses, and for each pair its margin, the difference of its logits."""
        encoded = model.bert(batch)
        masked = masked_rows(encoded.last_hidden_state, batch)
        words = score_words(model.cls.predictions, masked)
        logits = model.cls.seq_relationship(encoded.pooler_output)
        pairs = score_classes(logits, batch.next_sentence_label)
        return float(words.loss()), float(pairs.loss()), logits.float().diff()

    def look(number: int) -> None:
        if not step - 1 <= number <= step + 1:
            return
        print(f"\nThe weights before step {number}")
        with torch.random.fork_rng():  # so that training continues with its own masks
            for name, how in WAYS.items():
                with torch.random.fork_rng():
                    tell(f"batch {number}, {name}", batches[number], **how)
            for other in range(2):
                tell(f"batch {number}, other masks, {other + 1}", batches[number])
            for other in sorted({step - 1, step, step + 1} - {number}):
                tell(f"batch {other}", batches[other])

    losses = train(model, lambda one: model(one).loss, batches, config, options, look)
    last = ", ".join(f"{loss:.4f}" for loss in losses[-6:])
    print(f"\nThe last losses of training, up to step {step + 1}: {last}")
