"""A whole pre-training step, fastbert's and Hugging Face's, on the same batches in one process."""

from typing import Any

import torch
import transformers
from torch import nn

import fastbert
from benchmarks.timing import interleaved, summarize
from benchmarks.workloads import pretraining_batch, sequence_lengths
from fastbert.config import PRESETS


def run(
    preset: str, precision: str, distribution: str, sequences: int, steps: int, device: torch.device
) -> dict[str, Any]:
    """MLM + NSP, dropout 0.1, clipping and AdamW; the median of `steps` steps of each model."""
    torch.manual_seed(0)
    lengths = sequence_lengths(distribution, sequences)
    shape = PRESETS[preset].shape
    theirs = transformers.BertForPreTraining(
        transformers.BertConfig(**shape, attn_implementation="sdpa")
    )
    ours = fastbert.BertForPreTraining(fastbert.BertConfig(**shape))
    ours.load_state_dict(theirs.state_dict())
    padded, packed = pretraining_batch(lengths, ours.config.vocab_size)
    padded = {name: tensor.to(device) for name, tensor in padded.items()}
    packed = packed.to(device)
    seconds = interleaved(
        {
            "fastbert": _step(ours.to(device), lambda model: model(packed).loss, precision),
            "Hugging Face (SDPA)": _step(
                theirs.to(device), lambda model: model(**padded).loss, precision
            ),
        },
        steps,
    )
    tokens = sum(lengths)
    models = {name: summarize(values) for name, values in seconds.items()}
    for timing in models.values():
        timing["real_tokens_per_second"] = tokens / timing["median_s"]
    return {
        "preset": preset,
        "precision": precision,
        "lengths": distribution,
        "sequences": sequences,
        "steps": steps,
        "fill": tokens / padded["input_ids"].numel(),
        "models": models,
    }


def _step(model: nn.Module, loss_of, precision: str):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01, fused=True)
    device = next(model.parameters()).device.type
    autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")

    def step() -> None:
        with autocast:
            loss = loss_of(model)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
