"""Runs fine-tuned models on new input, and writes what they say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbert import checkpoint
from fastbert.check import InputError
from fastbert.config import BertConfig
from fastbert.data import load_tokenizer
from fastbert.data.tables import read_table, read_text
from fastbert.files import is_stream, output
from fastbert.finetune.features import Encoder, Feature, collate, parts
from fastbert.finetune.infer import TASK_OF, evaluating, run
from fastbert.finetune.metrics import require_libraries
from fastbert.finetune.task import Prediction, Settings
from fastbert.models.bert import BertModel
from fastbert.train.precision import autocast, resolve_precision
from fastbert.train.report import tracked

POOLINGS = ("mean", "cls")


def predict(
    model: str | Path, source: Path, *, batch_tokens: int = 4096, precision: str | None = None
) -> list[Prediction]:
    """What the model in a fine-tuning run, or in its checkpoint, says of each example of a file.

    The file has the format and the columns that the model was trained with; labels are not read.
    precision: auto, bf16 or fp32; None is what the model was trained and measured in.
    """
    directory = checkpoint.resolve(model)
    settings = Settings.load(directory)
    config = BertConfig.from_pretrained(directory)
    tokenizer = load_tokenizer(directory, model_vocab_size=config.vocab_size)
    labels = [config.id2label[number] for number in range(config.num_labels)]
    require_libraries(settings.task, to_measure=False)
    task = TASK_OF[settings.task](settings, labels)
    examples = task.read(source, labelled=False)
    encoder = Encoder(tokenizer, settings.max_seq_len, settings.stride, settings.truncate)
    features = task.features(examples, encoder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = task.model_class.from_pretrained(directory).to(device)
    low = autocast(resolve_precision(precision or settings.precision), device)
    return task.predict(examples, features, run(task, trained, features, batch_tokens, device, low))


def write_json_lines(path: str | Path, values: list[Prediction]) -> None:
    """One object a line, in UTF-8; the file appears whole or not at all."""
    with output(path) as file:
        for value in values:
            file.write((json.dumps(value, ensure_ascii=False) + "\n").encode())


def embed(
    model: str | Path,
    source: Path,
    *,
    text_column: str = "text",
    pooling: str = "mean",
    max_seq_len: int | None = None,
    truncate: bool = False,
    batch_tokens: int = 4096,
    precision: str = "auto",
) -> NDArray[np.float32]:
    """Embeddings (N, hidden_size) float32 of the texts of a file, in order.

    source: a .txt with a text a line, or a table; pooling: the mean of the last hidden states of
    all tokens with [CLS] and [SEP], as in Sentence-BERT (Reimers & Gurevych 2019), or
    that of [CLS] alone.
    """
    if pooling not in POOLINGS:
        raise InputError(f"--pooling: one of {', '.join(POOLINGS)}, got {pooling!r}")
    directory = checkpoint.resolve(model)
    config = BertConfig.from_pretrained(directory)
    tokenizer = load_tokenizer(directory, model_vocab_size=config.vocab_size)
    longest = config.max_position_embeddings
    if max_seq_len is not None and not 3 <= max_seq_len <= longest:
        raise InputError(f"--max-seq-len: between 3 and the model's {longest}, got {max_seq_len}")
    encoder = Encoder(tokenizer, max_seq_len or longest, None, truncate)
    features = [
        Feature(number, tuple(encoder.windows(where, encoder.ids(text))), None)
        for number, (where, text) in enumerate(_texts(source, text_column))
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bert = BertModel.from_pretrained(directory, add_pooling_layer=False).to(device)
    low = autocast(resolve_precision(precision), device)
    embeddings = np.empty((len(features), config.hidden_size), np.float32)
    with evaluating(bert), low:
        batches = parts([feature.num_tokens for feature in features], batch_tokens)
        for numbers in tracked(batches, "reading"):
            batch = collate([features[number] for number in numbers]).to(device)
            hidden = bert(batch).last_hidden_state.float()
            pooled = _pool(hidden, batch.cu_seqlens, pooling)
            embeddings[numbers.start : numbers.stop] = pooled.cpu().numpy()
    return embeddings


def _pool(hidden: Tensor, cu_seqlens: Tensor, pooling: str) -> Tensor:
    """(T, H) -> (B, H)."""
    if pooling == "cls":
        return hidden[cu_seqlens[:-1].long()]
    lengths = cu_seqlens.diff().long()
    return torch.segment_reduce(hidden, "mean", lengths=lengths)


def _texts(source: Path, column: str) -> list[tuple[str, str]]:
    if source.suffix != ".txt":
        return [(row.where, row.text(column)) for row in read_table(source, [column])]
    lines = read_text(source).split("\n")
    if not lines[-1]:
        lines.pop()
    return [(f"{source}, line {i}", line.rstrip("\r")) for i, line in enumerate(lines, start=1)]


def write_npy(path: str | Path, array: NDArray[Any]) -> None:
    """The file appears whole or not at all."""
    require_npy(path)
    with output(path) as file:
        header = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(np.ascontiguousarray(array).data)  # np.save asks where it is, as no pipe knows


def require_npy(path: str | Path) -> None:
    if not is_stream(path) and Path(path).suffix != ".npy":
        raise InputError(f"--out {path}: expected a name that ends in .npy")
