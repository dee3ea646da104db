"""The same pre-training by fastbert, by Hugging Face, and on a CPU by the plain reference.

All read the same real text in the same batches, with the same initial weights and optimizer. On a
CPU there is no dropout, so loss curves differ only by rounding. On a GPU they train BERT-base with
dropout, whose masks differ. Several seeds show how far apart two runs may end. With `--precision
bf16` fastbert also trains in FP8, which a CPU emulates.
"""

import contextlib
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import fastbert
from benchmarks.results import FASTBERT, FP8, Options, Results
from benchmarks.steps.steps import autocast, low_precision
from fastbert import backend
from fastbert.config.presets import PRESETS
from fastbert.config.pretrain import PretrainConfig
from fastbert.modules.products import fp8
from fastbert.modules.products.weight_copies import WeightCopies
from fastbert.ops.fp8_linear import multiplies_fp8
from fastbert.packing import IGNORE_INDEX, PackedBatch
from fastbert.reference import ReferenceBert
from fastbert.train.optimizer import clipped_step, linear_schedule, make_optimizer
from fastbert.train.prepare import prepare_text

REFERENCE, HUGGING_FACE = "reference", "Hugging Face"
SEEDS = (0, 1, 2)

LossOf = Callable[[PackedBatch], Tensor]


def cases(options: Options) -> list[PretrainConfig]:
    """The runs to compare; seeds differ in initial weights, batches and dropout."""
    if options.device.type == "cuda":
        shape = {"preset": "base", "steps": 100 if options.quick else 500, "batch_tokens": 8192}
        shape |= {"max_seq_len": 128, "dropout": 0.1}
    else:
        preset, steps = ("tiny", 20) if options.quick else ("mini", 300)
        shape = {"preset": preset, "steps": steps, "batch_tokens": 1024}
        shape |= {"max_seq_len": 64, "nsp_weight": 1.0, "dropout": 0.0}
    return [PretrainConfig(**shape, seed=n) for n in SEEDS]


def run(options: Options, results: Results) -> None:
    """Measures the part "convergence": training losses, and their largest gap to fastbert's."""
    with tempfile.TemporaryDirectory() as directory:
        for config in cases(options):
            text = prepare_text(config, Path(directory))
            batches = [text.training.batch(step)[0] for step in range(config.steps)]
            curves = compare(config, text.tokenizer.get_vocab_size(), batches, options)
            gaps = {
                name: max(abs(a - b) for a, b in zip(curves[FASTBERT], curve, strict=True))
                for name, curve in curves.items()
                if name != FASTBERT
            }
            case = {
                name: getattr(config, name)
                for name in ("preset", "steps", "batch_tokens", "dropout", "seed")
            }
            results.add("convergence", case, curves=curves, largest_gap=gaps)


def compare(
    config: PretrainConfig, vocab_size: int, batches: list[PackedBatch], options: Options
) -> dict[str, list[float]]:
    """The loss curve of each candidate; the reference runs only without dropout."""
    is_cpu = options.device.type == "cpu"
    ours = initial(config, vocab_size)
    theirs = transformers.BertForPreTraining(
        transformers.BertConfig(**shape_of(config, vocab_size))
    )
    losses: dict[str, tuple[nn.Module, LossOf]] = {
        FASTBERT: (ours, lambda batch: ours(batch).loss),
        HUGGING_FACE: (theirs, lambda batch: theirs(**padded(batch)).loss),
    }
    theirs.load_state_dict(ours.state_dict())
    if not config.dropout:
        plain = ReferenceBert(ours.config)
        plain.load_state_dict(ours.state_dict(), strict=False)
        losses[REFERENCE] = (plain, lambda batch: plain(**padded(batch))[0])
    if options.precision == "bf16" and (is_cpu or multiplies_fp8(options.device)):
        eight = copy.deepcopy(ours)
        fp8.enable(eight)
        losses[FP8] = eight, lambda batch: eight(batch).loss
    curves = {}
    for name, how in losses.items():
        emulated = backend.use("reference") if is_cpu and name == FP8 else contextlib.nullcontext()
        with emulated:
            curves[name] = train(*how, batches, config, options)
    return curves


def shape_of(config: PretrainConfig, vocab_size: int) -> dict[str, Any]:
    """The fields of the models' BertConfig, which Hugging Face's has too."""
    return {
        **PRESETS[config.preset].shape,
        "vocab_size": vocab_size,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
    }


def initial(config: PretrainConfig, vocab_size: int) -> fastbert.BertForPreTraining:
    """The model of a run before its first step."""
    torch.manual_seed(config.seed)
    return fastbert.BertForPreTraining(fastbert.BertConfig(**shape_of(config, vocab_size)))


def train(
    model: nn.Module,
    loss_of: LossOf,
    batches: list[PackedBatch],
    config: PretrainConfig,
    options: Options,
    before: Callable[[int], None] = lambda step: None,
) -> list[float]:
    """Trains on the batches, of which there may be fewer than `config.steps`; returns their losses.

    The losses are read from the device only at the end. before: called with each step's number.
    """
    model.to(options.device).train()
    optimizer = make_optimizer(model, config.weight_decay)
    copies = WeightCopies(model, low_precision(options))  # only fastbert's models read them
    losses = []
    for step, batch in enumerate(batches):
        before(step)
        for group in optimizer.param_groups:
            group["lr"] = linear_schedule(
                step, peak=config.learning_rate, warmup=config.steps // 10, total=config.steps
            )
        with copies.in_use():
            with autocast(options):
                loss = loss_of(batch.to(options.device))
            loss.backward()
        clipped_step(optimizer, model.parameters(), config.max_grad_norm)
        losses.append(loss.detach())
    return torch.stack(losses).float().tolist()


def padded(batch: PackedBatch) -> dict[str, Tensor]:
    """The batch as padded arguments, for Hugging Face's model and the reference."""
    lengths = batch.cu_seqlens.diff().tolist()

    def spread(tokens: Tensor, elsewhere: int) -> Tensor:
        return pad_sequence(tokens.split(lengths), batch_first=True, padding_value=elsewhere)

    return {
        "input_ids": spread(batch.input_ids, 0),
        "attention_mask": spread(torch.ones_like(batch.input_ids), 0),
        "token_type_ids": spread(batch.token_type_ids, 0),
        "labels": spread(batch.labels, IGNORE_INDEX),
        "next_sentence_label": batch.next_sentence_label,
    }
