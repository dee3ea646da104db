"""What one line, `fastbert.patch`, gives a script of Hugging Face's, which has no CUDA graph.

A fine-tuning step of a classifier under autocast with a fused AdamW, and a forward pass with the
weights in the precision that is measured. Both models have the same weights and batches, in turns.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn

import fastbert
from benchmarks.results import FASTBERT, SDPA, Options, Results
from benchmarks.timing import interleaved, summarize
from benchmarks.workloads import VOCAB_SIZE
from fastbert.pretrain_config import PRESETS

STEP, INFERENCE = "fine-tuning step, autocast", "inference, {} weights"


class Case(NamedTuple):
    """sequences of up to `length` tokens: all of them so long, or half as long on average."""

    is_step: bool
    sequences: int
    length: int
    is_full: bool = False


GPU_CASES = (
    *(Case(True, 32, 128), Case(True, 32, 128, True), Case(True, 16, 512), Case(True, 32, 512)),
    *(Case(False, 1, 16, True), Case(False, 1, 128, True), Case(False, 8, 128)),
    *(Case(False, 32, 128), Case(False, 32, 512), Case(False, 128, 256)),
)
CPU_CASES = (Case(True, 8, 128), Case(False, 1, 128, True), Case(False, 8, 128))


def run(options: Options, results: Results) -> None:
    """The part "drop_in": a row for each batch."""
    on_gpu = options.device.type == "cuda"
    preset = "base" if on_gpu or not options.quick else "mini"
    rounds = (20 if options.quick else 60) if on_gpu else 4 if options.quick else 8
    torch.manual_seed(0)
    shape = PRESETS[preset].shape
    config = transformers.BertConfig(**shape, attn_implementation="sdpa")
    with options.device:
        model = transformers.BertForSequenceClassification(config)
    for case in GPU_CASES if on_gpu else CPU_CASES:
        batch = batch_of(case, options.device)
        models = {SDPA: copy.deepcopy(model), FASTBERT: copy.deepcopy(model)}
        fastbert.patch(models[FASTBERT])
        make = training_step if case.is_step else forward_pass
        candidates = {name: make(each, batch, options) for name, each in models.items()}
        seconds = interleaved(candidates, rounds)
        results.add(
            "drop_in",
            {
                "of": STEP if case.is_step else INFERENCE.format(options.precision),
                "preset": preset,
                "sequences": case.sequences,
                "length": case.length,
            },
            {name: summarize(values) for name, values in seconds.items()},
            fill=float(batch["attention_mask"].float().mean()),
        )


def batch_of(case: Case, device: torch.device) -> dict[str, Tensor]:
    shares = (torch.arange(case.sequences) + 0.5) / case.sequences
    lengths = (shares * case.length).round().clamp(min=1)
    lengths[-1] = case.length  # the batch is as wide as its longest
    if case.is_full:
        lengths[:] = case.length
    is_real = torch.arange(case.length) < lengths[:, None]
    batch = {
        "input_ids": torch.randint(5, VOCAB_SIZE, is_real.shape) * is_real,
        "attention_mask": is_real.long(),
        "labels": torch.arange(case.sequences) % 2,
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def training_step(
    model: nn.Module, batch: dict[str, Tensor], options: Options
) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast(
            options.device.type, torch.bfloat16, enabled=options.precision == "bf16"
        ):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def forward_pass(
    model: nn.Module, batch: dict[str, Tensor], options: Options
) -> Callable[[], object]:
    model.to(options.dtype).eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    @torch.inference_mode()
    def forward() -> Tensor:
        return model(**inputs).logits

    return forward
