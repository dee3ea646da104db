"""`python -m benchmarks jump`: the loss of one step of `convergence`, computed in several ways.

On an H200 single losses of fastbert's runs jump, as at step 103 of seed 1, and are back at the next
step. This trains up to the step before, and computes the batch's loss with the same weights: with
the same dropout masks and with others, with the residual stream or everything in float32, by plain
bodies in the place of kernels, and without dropout.
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
from fastbert.models.losses import score_classes, score_masked
from fastbert.train.prepare import prepare_text


def main(
    seed: Annotated[int, typer.Option(help="Of the run.", min=min(SEEDS), max=max(SEEDS))] = 1,
    step: Annotated[int, typer.Option(help="Whose loss it is, from 0.", min=0)] = 103,
    quick: Annotated[bool, typer.Option("--quick", help="A small model, on a CPU.")] = False,
) -> None:
    """Print the loss of a step of pre-training, and its parts, computed in several ways."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = Options(device, "bf16" if device.type == "cuda" else "fp32", quick)
    config = next(one for one in cases(options) if one.seed == seed)
    if step >= config.steps:
        raise typer.BadParameter(
            f"one of the run's {config.steps}, got {step}", param_hint="--step"
        )
    with tempfile.TemporaryDirectory() as directory:
        text = prepare_text(config, Path(directory))
        batches = [text.training.batch(number)[0] for number in range(step + 1)]
    model = initial(config, text.tokenizer.get_vocab_size())
    train(model, lambda one: model(one).loss, batches[:step], config, options)
    batch, narrow = batches[step].to(device), model.config.residual_in_fp32
    state = torch.get_rng_state(), torch.cuda.get_rng_state() if device.type == "cuda" else None

    def tell(name: str, *, again: bool = True, wide: bool | None = narrow, **others: bool) -> None:
        """again: with the masks of the step; wide: the residual stream."""
        vars(model.config)["residual_in_fp32"] = wide  # a model that is in use refuses a change
        model.train(others.get("drops", True))
        with (
            torch.no_grad(),
            autocast(options) if others.get("low", True) else contextlib.nullcontext(),
            backend.use("reference") if others.get("plain") else contextlib.nullcontext(),
        ):
            found = []
            for compute in (whole, parts):
                if again:
                    torch.set_rng_state(state[0])
                    if state[1] is not None:
                        torch.cuda.set_rng_state(state[1])
                found += compute()
        loss, words, pairs = map(float, found)
        print(f"{name:<32}{loss:8.4f}   by all rows: words {words:8.4f}, pairs {pairs:8.4f}")

    def whole() -> list[Tensor]:
        return [model(batch).loss]

    def parts() -> list[Tensor]:
        """By every row of the last layer, where the model's loss computes what it reads alone."""
        encoded = model.bert(batch)
        words = score_masked(model.cls.predictions, encoded.last_hidden_state, batch)
        logits = model.cls.seq_relationship(encoded.pooler_output)
        return [words.loss(), score_classes(logits, batch.next_sentence_label).loss()]

    tell("as it was trained")
    for number in range(3):
        tell(f"other masks, {number + 1}", again=False)
    tell("residual stream in float32", wide=True)
    tell("all in float32", low=False)
    tell("plain bodies", plain=True)
    tell("plain bodies, all in float32", plain=True, low=False)
    tell("without dropout, narrow stream", drops=False, wide=False)
    tell("without dropout, all in float32", drops=False, low=False)
