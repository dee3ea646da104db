"""What a fine-tuned model says of new examples, and embeddings of texts by any model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from fastbert import checkpoint
from fastbert.check import InputError
from fastbert.data import load_tokenizer
from fastbert.data.tables import read_table
from fastbert.finetune.config import FinetuneConfig
from fastbert.finetune.task import Feature, pack
from fastbert.finetune.tasks import TASKS
from fastbert.finetune.train import ABOUT, by_length, load, predict_features
from fastbert.models.bert import BertModel

POOLINGS = ("mean", "cls")


def predict(name_or_directory: str | Path, path: Path) -> list[dict[str, Any]]:
    """One object for each example of a file: in the form of the training data, labels or none."""
    directory = checkpoint.resolve(name_or_directory)
    config, labels = _read_about(directory)
    kind = TASKS[config.task]
    examples = kind.read(config, path, labelled=False)
    model, task = load(kind, config, directory, load_tokenizer(directory), labels)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    features = task.features(examples, labelled=False)
    found = predict_features(task, model.to(device), examples, features, device)
    shown = [{"text": e.text} if hasattr(e, "text") else {} for e in examples]
    return [what | prediction for what, prediction in zip(shown, found, strict=True)]


def _read_about(directory: Path) -> tuple[FinetuneConfig, list[str]]:
    path = directory / ABOUT
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        values = about["config"]
        paths = {name: Path(values[name]) for name in ("train", "dev")}
        return FinetuneConfig(**{**values, **paths}), list(about["labels"])
    except FileNotFoundError:
        raise InputError(
            f"{directory}: not a fine-tuned model (no {ABOUT} there); fastbert finetune makes one"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not what fastbert finetune writes ({error})") from None


def write_jsonl(rows: list[dict[str, Any]], path: Path) -> None:
    """An object a line; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with checkpoint.new_file(path) as beside:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        beside.write_text("".join(lines), encoding="utf-8")


@torch.no_grad()
def embed(
    name_or_directory: str | Path,
    texts: list[str],
    *,
    pooling: str = "mean",
    normalize: bool = False,
    max_seq_len: int | None = None,
) -> NDArray[np.float32]:
    """(N, H): of each text the mean of its last hidden states, or that of [CLS].

    Longer texts are cut to max_seq_len tokens, by default as many as the model reads; normalize
    scales each embedding to length 1. Texts are run in batches of like lengths, and stay in order.
    """
    if pooling not in POOLINGS:
        raise InputError(f"--pooling: one of {', '.join(POOLINGS)}, got {pooling!r}")
    directory = checkpoint.resolve(name_or_directory)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = BertModel.from_pretrained(directory, add_pooling_layer=False).to(device)
    tokenizer = load_tokenizer(directory)
    tokenizer.enable_truncation(max_seq_len or model.config.max_position_embeddings)
    encodings = tokenizer.encode_batch(texts)
    features = [Feature((encoding,), None, number) for number, encoding in enumerate(encodings)]
    found = np.empty((len(texts), model.config.hidden_size), np.float32)
    for batch in by_length(features):
        packed = pack([features[i] for i in batch]).to(device)
        states = model(packed).last_hidden_state.float()
        starts = packed.cu_seqlens.long()
        if pooling == "cls":
            pooled = states[starts[:-1]]
        else:
            owner = torch.repeat_interleave(starts.diff())
            sums = torch.zeros(len(batch), states.shape[1], device=device)
            pooled = sums.index_add_(0, owner, states) / starts.diff()[:, None]
        found[batch] = (F.normalize(pooled) if normalize else pooled).cpu().numpy()
    return found


def read_texts(path: Path, column: str) -> list[str]:
    """A text a line of a .txt file, or a column of a table."""
    if path.suffix.lower() not in (".txt", ".text"):
        return [row.text(column) for row in read_table(path)]
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8; convert it, for example with iconv") from None
    texts = [line for line in map(str.strip, lines) if line]
    if not texts:
        raise InputError(f"{path}: holds no examples")
    return texts


def write_npy(array: NDArray[np.float32], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with checkpoint.new_file(path) as beside, beside.open("wb") as file:
        np.save(file, array)
