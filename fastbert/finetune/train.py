"""The fine-tuning loop: epochs over packed batches, the best epoch's model is kept."""

import dataclasses
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table as RichTable
from tokenizers import Tokenizer
from torch import nn

from fastbert import checkpoint
from fastbert.check import InputError
from fastbert.data import load_tokenizer, save_tokenizer
from fastbert.finetune.config import FinetuneConfig
from fastbert.finetune.task import Feature, Table, Task, pack
from fastbert.finetune.tasks import TASKS
from fastbert.models.base import BertPreTrainedModel
from fastbert.train.optimizer import linear_schedule
from fastbert.train.precision import autocast, resolve_precision
from fastbert.train.report import console, environment
from fastbert.train.state import write_json

ABOUT = "finetune.json"  # in a fine-tuned model's directory: what `predict` needs to know
SUMMARY = "summary.json"
TOKENS_OF_A_BATCH = 8192  # when nothing is trained


def finetune(config: FinetuneConfig, out: Path) -> dict[str, Any]:
    """Trains `config.model` on labelled data, leaves the best epoch's in `out`.

    out/latest is a Hugging Face checkpoint with the task's head and labels, out/summary.json has
    the metrics of every epoch, and is returned. The same config gives the same run, bit for bit on
    a CPU at the same number of threads.
    """
    if (out / checkpoint.LATEST).is_symlink():
        raise InputError(f"--out {out}: holds a run already; name another directory")
    config = dataclasses.replace(config, precision=resolve_precision(config.precision))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    kind = TASKS[config.task]
    examples = {
        name: kind.read(config, getattr(config, name), labelled=True) for name in ("train", "dev")
    }
    directory = checkpoint.resolve(config.model)
    tokenizer = load_tokenizer(directory)
    labels = kind.labels_of(examples["train"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*drawn anew")  # the head, as is meant
        model, task = load(kind, config, directory, tokenizer, labels, ignore_mismatched_sizes=True)
    features = {name: task.features(found, labelled=True) for name, found in examples.items()}
    if config.balance:
        task.balance(features["train"])  # type: ignore[attr-defined]
    model.to(device)
    console.print(
        f"{config.task}: {len(examples['train']):,} examples to train on, "
        f"{len(examples['dev']):,} to judge by"
        + (f", {len(labels)} labels" if labels else "")
        + f"; on {device.type} in {config.precision}"
    )
    history, tables = _train(task, model, examples["dev"], features, out, device)
    best = max(history, key=lambda row: row[task.best])
    summary = {
        "task": config.task,
        "best_epoch": best["epoch"],
        **{name: best[name] for name in best if name not in ("epoch", "loss")},
        "history": history,
        "model": str(config.model),
        **environment(device),
    }
    write_json(out / SUMMARY, summary)
    for table in tables:
        console.print(_rich(table))
    console.print(
        f"best after epoch {best['epoch']}: {_metrics(best)}\n"
        f"try: fastbert predict --model {out} --input FILE --out FILE.jsonl"
    )
    return summary


def load(
    kind: type[Task],
    config: FinetuneConfig,
    directory: Path,
    tokenizer: Tokenizer,
    labels: list[str],
    **changes: Any,
) -> tuple[BertPreTrainedModel, Task]:
    """The task, and its model with the weights in `directory`; a head that is not there is new."""
    if config.dropout is not None:
        names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
        changes |= dict.fromkeys(names, config.dropout)
    task = kind(config, tokenizer, labels, 0)
    model = kind.head.from_pretrained(directory, **task.model_options(), **changes)
    most = model.config.max_position_embeddings
    task.max_seq_len = config.max_seq_len or most
    if task.max_seq_len > most:
        raise InputError(f"--max-seq-len {config.max_seq_len}: the model reads {most} tokens")
    return model, task


def _train(
    task: Task,
    model: BertPreTrainedModel,
    examples: list[Any],
    features: dict[str, list[Feature]],
    out: Path,
    device: torch.device,
) -> tuple[list[dict[str, Any]], list[Table]]:
    """The metrics of every epoch, and the tables of the best."""
    config = task.config
    optimizer = _optimizer(model, config)
    batches = -(-len(features["train"]) // config.batch_size)
    total = config.epochs * batches
    warmup = round(total * config.warmup_ratio)
    history: list[dict[str, Any]] = []
    tables: list[Table] = []
    step = 0
    for epoch in range(1, config.epochs + 1):
        model.train()
        losses = torch.zeros((), device=device)
        order = torch.randperm(
            len(features["train"]),
            generator=torch.Generator().manual_seed(config.seed * 1000 + epoch),
        ).tolist()
        for begin in range(0, len(order), config.batch_size):
            batch = [features["train"][i] for i in order[begin : begin + config.batch_size]]
            for group in optimizer.param_groups:
                rate = linear_schedule(step, peak=config.learning_rate, warmup=warmup, total=total)
                group["lr"] = rate * group["scale"]
            with autocast(config.precision, device):
                loss = task.loss(model, pack(batch).to(device), batch)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses += loss.detach()
            step += 1
        row = {"epoch": epoch, "loss": float(losses) / batches}
        if not torch.isfinite(losses):
            raise InputError(
                f"the loss is not finite in epoch {epoch}; use a smaller --learning-rate"
            )
        predictions = predict_features(task, model, examples, features["dev"], device)
        metrics, found = task.metrics(examples, predictions)
        row |= {name: float(value) for name, value in metrics.items()}
        console.print(f"epoch {epoch}/{config.epochs}  loss {row['loss']:.3f}  {_metrics(row)}")
        if not history or row[task.best] > max(earlier[task.best] for earlier in history):
            tables = found
            save(out, task, model)
        history.append(row)
        best = max(history, key=lambda earlier: earlier[task.best])
        if config.patience is not None and epoch - best["epoch"] >= config.patience:
            console.print(f"no better for {config.patience} epoch(s)")
            break
    return history, tables


def _optimizer(model: BertPreTrainedModel, config: FinetuneConfig) -> torch.optim.AdamW:
    """AdamW with a learning rate that falls by `layer_decay` from the head down to the embeddings
    (Howard and Ruder 2018), and no decay on biases and LayerNorm."""
    layers = model.config.num_hidden_layers
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        layer = re.search(r"\bencoder\.layer\.(\d+)\.", name)
        above = layers + 1
        if layer:
            above = int(layer[1]) + 1
        elif ".embeddings." in name:
            above = 0
        scale = config.layer_decay ** (layers + 1 - above)
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    options = [
        {"params": found, "scale": scale, "weight_decay": decay}
        for (scale, decay), found in groups.items()
    ]
    return torch.optim.AdamW(options, lr=0.0, fused=True)


@torch.no_grad()
def predict_features(
    task: Task,
    model: BertPreTrainedModel,
    examples: list[Any],
    features: list[Feature],
    device: torch.device,
) -> list[dict[str, Any]]:
    """What the model says of each example."""
    model.eval()
    scores: dict[int, torch.Tensor] = {}
    for batch in by_length(features):
        chosen = [features[i] for i in batch]
        with autocast(task.config.precision, device):
            found = task.scores(model, pack(chosen).to(device), chosen)
        scores |= {i: score.float().cpu() for i, score in zip(batch, found, strict=True)}
    return task.predictions(examples, features, [scores[i] for i in range(len(features))])


def by_length(features: Sequence[Feature]) -> Iterator[list[int]]:
    """Indices of features in batches of about TOKENS_OF_A_BATCH tokens, long ones first."""

    def size(index: int) -> int:
        return sum(map(len, features[index].sequences))

    batch: list[int] = []
    used = 0
    for index in sorted(range(len(features)), key=size, reverse=True):
        if batch and used + size(index) > TOKENS_OF_A_BATCH:
            yield batch
            batch, used = [], 0
        batch.append(index)
        used += size(index)
    if batch:
        yield batch


def save(out: Path, task: Task, model: BertPreTrainedModel) -> None:
    """Writes out/best whole, with all that `predict` needs, and points out/latest to it."""
    directory = out / "best"
    with checkpoint.new_directory(directory) as writing:
        model.save_pretrained(writing)
        save_tokenizer(task.tokenizer, writing)
        config = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(task.config).items()
        }
        about = {"labels": task.labels, "config": config}
        (writing / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    checkpoint.point_latest(directory)


def _metrics(row: dict[str, Any]) -> str:
    return "  ".join(
        f"{name} {value:.3f}" for name, value in row.items() if name not in ("epoch", "loss")
    )


def _rich(table: Table) -> RichTable:
    found = RichTable(*table.header, title=table.title, title_justify="left")
    for line in table.lines:
        found.add_row(*line)
    return found
