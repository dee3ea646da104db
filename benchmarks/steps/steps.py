"""Pre-training steps and forward passes of fastbert and Hugging Face, on the same batches.

A step is MLM + NSP with dropout 0.1, clipping and AdamW. Hugging Face's BERT runs with eager
attention, with SDPA, and with torch.compile. On a GPU fastbert's step is a CUDA graph, as in
`fastbert pretrain`, and so is its forward pass, whose weights are cast once, as in `fastbert
serve`. Both are also timed without a graph, the step also in FP8 if the GPU has it, and Hugging
Face's forward pass also with weights in bf16. All take turns in one process.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

import fastbert
from benchmarks.operators import ceilings
from benchmarks.results import COMPILED, EAGER, FASTBERT, FP8, LOW, SDPA, Options, Results, Row
from benchmarks.steps import footprint
from benchmarks.timing import first_line, interleaved, recorded, summarize
from benchmarks.workloads import MAX_SEQLEN, Batch, pretraining_batch, sequence_lengths
from fastbert.config.presets import PRESETS
from fastbert.modules.graphs.recorder import Work
from fastbert.modules.products import fp8
from fastbert.modules.products.weight_copies import WeightCopies
from fastbert.ops.fp8_linear import multiplies_fp8
from fastbert.packing import Bucket, PackedBatch
from fastbert.train.optimizer import clipped_step

GRAPH, WITHOUT_GRAPH = "CUDA graph", "fastbert (without CUDA graph)"
OURS = (FASTBERT, WITHOUT_GRAPH, FP8)


class Case(NamedTuple):
    """A model and a batch.

    lengths: a distribution of `sequence_lengths`; few: candidates besides fastbert and Hugging
    Face's SDPA that are timed only in every fourth round
    """

    preset: str
    lengths: str
    sequences: int
    rounds: int
    few: tuple[str, ...] = (EAGER, COMPILED)


def step_cases(options: Options) -> list[Case]:
    """The training steps to time on this device; fewer and smaller ones for --quick."""
    if options.device.type == "cuda":
        if options.quick:  # torch.compile, which takes a minute, comes last
            return [
                Case("large", "wikipedia", 96, 8, ()),
                Case("large", "full", 48, 8, ()),
                Case("base", "wikipedia", 96, 12),
            ]
        return [
            Case(preset, lengths, 48 if lengths == "full" else 96, 24)
            for preset in ("base", "large")
            for lengths in ("wikipedia", "uniform", "full")
        ]
    if options.quick:
        return [Case("mini", lengths, 4, 4, ()) for lengths in ("wikipedia", "full")]
    return [
        Case("base", "wikipedia", 4, 16),
        Case("base", "full", 4, 16, ()),
        Case("base", "uniform", 4, 4, ()),
    ]


def inference_cases(options: Options) -> list[Case]:
    """The forward passes to time on this device; fewer ones for --quick."""
    if options.device.type == "cuda":
        sizes = (("base", "serving", 16), ("base", "128", 1), ("large", "384", 128))
        if options.quick:
            return [Case(*size, 20, ()) for size in sizes]
        return [Case(*size, 60) for size in sizes]
    if options.quick:
        return [Case("mini", "wikipedia", 4, 4, ())]
    return [Case("base", "wikipedia", 8, 8), Case("base", "full", 1, 16)]


def run(options: Options, results: Results) -> None:
    """Measures the parts "inference" and "steps"."""
    for case in inference_cases(options):
        compare("inference", case, options, results)
    for case in step_cases(options):
        compare("steps", case, options, results)


def compare(part: str, case: Case, options: Options, results: Results) -> Row:
    """Times fastbert and the others on one batch, and adds a row with the costs of each."""
    torch.manual_seed(0)
    lengths = sequence_lengths(case.lengths, case.sequences)
    width = MAX_SEQLEN if part == "steps" else max(lengths)
    batch = pretraining_batch(lengths, width).to(options.device)
    with options.device:  # a GPU draws a large model's weights faster
        weights = make_model(FASTBERT, case.preset).state_dict()
    candidates: dict[str, Work] = {}
    refused: dict[str, str] = {}
    names: tuple[str, ...] = (FASTBERT, SDPA, *case.few)
    if options.device.type == "cuda":
        names = (FASTBERT, WITHOUT_GRAPH, *names[1:])
        if part == "steps" and multiplies_fp8(options.device):
            names = (*names[:2], FP8, *names[2:])
        if part == "inference" and options.precision == "bf16":
            names = (*names, LOW)
    held: dict[str, dict[str, float]] = {}
    for name in names:
        memory = footprint.Memory(options.device)
        try:
            work, reason = candidate(part, name, case.preset, weights, batch, options)
            held[name] = memory.of(work)
            candidates[name] = work
            if reason:
                refused[GRAPH] = reason
        except Exception as error:  # out of memory, no compiler: still time the others
            refused[name] = first_line(error)
        work = None  # so that a failed candidate holds no memory while the next is made
    seconds = interleaved(candidates, case.rounds, dict.fromkeys(case.few, 4))
    timings = {name: summarize(values) for name, values in seconds.items()}
    flops = footprint.model_flops(case.preset, batch, training=part == "steps")
    ceiling = ceilings.of(options, results)["product"]
    for name, timing in timings.items():
        timing["utilisation"] = flops / timing["median_s"] / ceiling
        timing["real_tokens_per_second"] = sum(batch.lengths) / timing["median_s"]
        timing |= held[name] | footprint.of(candidates[name], options.device)
    about = {"preset": case.preset, "lengths": case.lengths, "sequences": case.sequences}
    if part == "steps":
        about["optimizer"] = "AdamW"
    return results.add(part, about, timings, fill=batch.fill, flops=flops, refused=refused)


def candidate(
    part: str, name: str, preset: str, weights: dict[str, Tensor], batch: Batch, options: Options
) -> tuple[Work, str | None]:
    """A candidate's work, after one run, and why it is not a graph, if recording it failed."""
    with options.device:
        model = make_model(name, preset)
    model.load_state_dict(weights)
    if name == FP8:
        fp8.enable(model)
    reason = None
    to_record = name in (FASTBERT, FP8) and options.device.type == "cuda"
    if part == "steps" and to_record:
        work, reason = graphed_step(model, batch, options)
    else:
        if part == "inference" and to_record:
            WeightCopies(model, low_precision(options)).attach()
        make = training_step if part == "steps" else forward_pass
        work = make(name, model, batch, options)
        if to_record:
            work, reason = recorded(work)
    work()
    return work, reason


def make_model(name: str, preset: str, **ours: Any) -> nn.Module:
    """A BertForPreTraining with random weights; ours: options that only fastbert's config has."""
    shape = PRESETS[preset].shape
    if name in OURS:
        return fastbert.BertForPreTraining(fastbert.BertConfig(**shape, **ours))
    attention = "eager" if name == EAGER else "sdpa"
    config = transformers.BertConfig(**shape, attn_implementation=attention)
    return transformers.BertForPreTraining(config)


def training_step(name: str, model: nn.Module, batch: Batch, options: Options) -> Work:
    """A training step of the model on the batch, packed for fastbert and padded for others."""
    model.train()
    run = torch.compile(model) if name == COMPILED else model
    if name in OURS:
        return optimizer_step(model, lambda: run(batch.packed).loss, options)
    return optimizer_step(model, lambda: run(**batch.padded).loss, options)


def graphed_step(model: nn.Module, batch: Batch, options: Options) -> tuple[Work, str | None]:
    """fastbert's step as a graph, on a batch filled to fixed sizes, and why, if it is not one."""
    packed = at_fixed_places(batch.packed.padded_to(bucket_of(batch.packed)))
    return recorded(
        optimizer_step(model.train(), lambda: model(packed).loss, options, capturable=True)
    )


def bucket_of(batch: PackedBatch) -> Bucket:
    """A bucket with as much room as `PretrainingData.bucket` leaves."""
    assert batch.num_labels is not None
    sequences = int(1.1 * batch.num_sequences) + 8
    tokens = batch.num_tokens + -batch.num_tokens % 128
    return Bucket(tokens, sequences, batch.num_labels + sequences, MAX_SEQLEN)


def at_fixed_places(batch: PackedBatch) -> PackedBatch:
    """The batch with its dropout state in a tensor, which a graph reads at a fixed address."""
    state = torch.zeros(2, dtype=torch.int64, device=batch.device)
    return dataclasses.replace(batch, dropout_state=state)


def optimizer_step(
    model: nn.Module, loss_of: Callable[[], Tensor], options: Options, *, capturable: bool = False
) -> Work:
    """A function that takes one training step and returns its loss; ours as in `EagerStep`."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-5, weight_decay=0.01, fused=True, capturable=capturable
    )
    ours = isinstance(model, fastbert.BertForPreTraining)
    copies = WeightCopies(model, low_precision(options) if ours else None)

    def step() -> Tensor:
        with copies.in_use():
            with autocast(options):
                loss = loss_of()
            loss.backward()
        if ours:
            clipped_step(optimizer, model.parameters(), 1.0)
        else:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return step


def forward_pass(name: str, model: nn.Module, batch: Batch, options: Options) -> Work:
    """A forward pass of encoder and pooler in eval mode, without the heads of pre-training."""
    encoder = model.eval().bert
    if name == LOW:
        encoder, options = encoder.bfloat16(), dataclasses.replace(options, precision="fp32")
    encoder = torch.compile(encoder) if name == COMPILED else encoder
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    padded = {key: batch.padded[key] for key in inputs}

    @torch.inference_mode()
    def forward() -> Tensor:
        with autocast(options):
            output = encoder(batch.packed) if name in OURS else encoder(**padded)
        return output.pooler_output

    return forward


def low_precision(options: Options) -> torch.dtype | None:
    """The dtype of autocast; None without autocast."""
    return torch.bfloat16 if options.precision == "bf16" else None


def autocast(options: Options) -> torch.autocast:
    """Autocast to bfloat16 on the measured device; off unless the precision is bf16."""
    enabled = options.precision == "bf16"
    return torch.autocast(options.device.type, torch.bfloat16, enabled=enabled)
