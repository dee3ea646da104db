"""The calls whose host time is measured: models, batches, forward passes and training steps."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import fastbert
from benchmarks.results import FASTBERT, PATCHED, PATCHED_GRAPHS, REDUCED, Options
from fastbert.modules.graphs import buckets

ENCODER, CLASSIFIER = "BertModel", "BertForSequenceClassification"
INFERENCE, STEP = "inference", "training step"
STATES, CONTRASTIVE = "inference, all hidden states", "contrastive step"
LORA = "training step with LoRA"
SMALL = {
    "num_hidden_layers": 12,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 128,
    "max_position_embeddings": 32,
}
TOKENS = 16

Work = Callable[[], Any]


class Case(NamedTuple):
    """A kind of call (INFERENCE, STEP, STATES, CONTRASTIVE or LORA), a model and a batch.

    sequences: their number, with up to `length` tokens each; is_full: whether all have that length;
    otherwise half of it on average; has_mask: whether an attention_mask is passed
    """

    of: str
    model: str = CLASSIFIER
    sequences: int = 1
    length: int = TOKENS
    is_full: bool = True
    has_mask: bool = True


def batch_of(case: Case, device: torch.device, shape: dict) -> dict[str, Tensor]:
    shares = (torch.arange(case.sequences) + 0.5) / case.sequences
    lengths = (shares * case.length).round().clamp(min=1)
    lengths[-1] = case.length  # the batch is as wide as its longest sequence
    if case.is_full:
        lengths[:] = case.length
    is_real = torch.arange(case.length) < lengths[:, None]
    words = shape.get("vocab_size", transformers.BertConfig().vocab_size)
    batch = {"input_ids": torch.randint(5, words, is_real.shape) * is_real}
    if case.has_mask:
        batch["attention_mask"] = is_real.long()
    if case.of in (STEP, LORA):
        batch["labels"] = torch.arange(case.sequences) % 2
    return {name: tensor.to(device) for name, tensor in batch.items()}


def models(case: Case, shape: dict, names: list[str], device: torch.device) -> dict[str, nn.Module]:
    """A model for each name, all with the same weights."""
    made: dict[str, nn.Module] = {}
    for name in names:
        with device:
            if name == FASTBERT:
                model = getattr(fastbert, case.model)(fastbert.BertConfig(**shape))
                buckets.allow(model, False)
            else:
                config = transformers.BertConfig(**shape, attn_implementation="sdpa")
                model = getattr(transformers, case.model)(config)
        if made:
            model.load_state_dict(next(iter(made.values())).state_dict())
        if name in (PATCHED, PATCHED_GRAPHS):
            fastbert.patch(model, graphs="auto" if name == PATCHED_GRAPHS else False)
        made[name] = model
    return {name: adapted(model) for name, model in made.items()} if case.of == LORA else made


def adapted(model: nn.Module) -> nn.Module:
    """The model with LoRA (Hu et al. 2021) on queries and values; only the adapters train."""
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, target_modules=["query", "value"], lora_dropout=0.1)
    return peft.get_peft_model(model, config)


def callable_of(name: str, model: nn.Module) -> Callable:
    if name != REDUCED:
        return model
    torch.compiler.reset()  # compilations of earlier cases count against a limit
    compiled = torch.compile(model, mode="reduce-overhead")

    def call(**batch: Tensor) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # the last call's outputs are no longer read
        return compiled(**batch)

    return call


def forward_pass(
    name: str, model: nn.Module, batch: dict[str, Tensor], options: Options, **wanted: bool
) -> Work:
    run = callable_of(name, model.to(options.dtype).eval())
    return torch.inference_mode()(lambda: run(**batch, **wanted))


def own_loss(run: Callable, batch: dict[str, Tensor]) -> Tensor:
    return run(**batch).loss


def contrastive_loss(run: Callable, batch: dict[str, Tensor]) -> Tensor:
    """SimCSE's loss: InfoNCE (van den Oord et al. 2018) of two forwards with different dropout."""
    first, second = (F.normalize(run(**batch).last_hidden_state[:, 0]) for _ in range(2))
    return F.cross_entropy(20 * first @ second.t(), torch.arange(len(first), device=first.device))


def training_step(
    name: str,
    model: nn.Module,
    batch: dict[str, Tensor],
    options: Options,
    loss_of: Callable[..., Tensor] = own_loss,
) -> Work:
    """Forward and backward, under autocast if bf16; on a GPU a fused AdamW step follows."""
    parameters = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    run, device = callable_of(name, model), options.device.type
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True) if device == "cuda" else None

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=options.precision == "bf16"):
            loss = loss_of(run, batch)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        for parameter in parameters:
            parameter.grad = None

    return step


MAKERS: dict[str, Callable[..., Work]] = {
    INFERENCE: forward_pass,
    STEP: training_step,
    LORA: training_step,
    STATES: partial(forward_pass, output_hidden_states=True),
    CONTRASTIVE: partial(training_step, loss_of=contrastive_loss),
}
