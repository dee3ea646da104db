"""Runs fine-tuned models on new input, and writes what they say."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbert import checkpoint
from fastbert.check import InputError
from fastbert.config.bert import BertConfig
from fastbert.config.finetune import TABLES, WINDOWS, read_delimiter
from fastbert.data import load_tokenizer
from fastbert.data.tables import read_table, read_text
from fastbert.data.texts import texts_of
from fastbert.files import is_stream, output
from fastbert.finetune.features import Encoder, Feature, collate, parts
from fastbert.finetune.infer import TASK_OF, encoder_of, evaluating, run, warn_of_words
from fastbert.finetune.metrics import require_libraries
from fastbert.finetune.task import ALL, Prediction, Refused, Settings, Task
from fastbert.models.bert import BertModel
from fastbert.train.precision import autocast, resolve_precision
from fastbert.train.report import tracked

POOLINGS = ("mean", "cls")


def predict(
    model: str | Path,
    source: Path,
    *,
    batch_tokens: int = 4096,
    precision: str | None = None,
    stride: int | None = None,
    truncate: bool = False,
    delimiter: str | None = None,
    copy: Sequence[str] = (),
) -> list[Prediction]:
    """What the model in a fine-tuning run, or in its checkpoint, says of each example of a file.

    The file has the format and the columns that the model was trained with; labels are not read.
    A row of a table that has no text is answered by {"error": why}.

    precision: auto, bf16 or fp32; None is what the model was trained and measured in; stride,
    truncate, delimiter: in place of those of the training; copy: columns of the table that the
    predictions have too, "*" for all, one that they have already as input_NAME
    """
    directory = checkpoint.resolve(model)
    settings = _settings(Settings.load(directory), stride, truncate, delimiter)
    if copy and settings.task not in TABLES:
        raise InputError(f"--copy: only for tables, and {settings.task} reads none")
    config = BertConfig.from_pretrained(directory)
    tokenizer = load_tokenizer(directory, model_vocab_size=config.vocab_size)
    labels = [config.id2label[number] for number in range(config.num_labels)]
    require_libraries(settings.task, to_measure=False)
    task = TASK_OF[settings.task](settings, labels)
    task.copied = tuple(copy)
    examples = task.read(source, labelled=False)
    good = [example for example in examples if not isinstance(example, Refused)]
    encoder = encoder_of(settings, tokenizer)
    features = task.features(good, encoder)
    warn_of_words(str(source), features, encoder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = task.model_class.from_pretrained(directory).to(device)
    low = autocast(resolve_precision(precision or settings.precision), device)
    scores = run(task, trained, features, batch_tokens, device, low)
    said = iter(task.predict(good, features, scores))
    predictions = [{"error": e.reason} if isinstance(e, Refused) else next(said) for e in examples]
    return _with_copies(predictions, task) if copy else predictions


def _settings(
    settings: Settings, stride: int | None, truncate: bool, delimiter: str | None
) -> Settings:
    """Those of the training, with what is asked for in place of them."""
    if stride is not None and settings.task not in WINDOWS:
        raise InputError(f"--stride: not for {settings.task}, only for {', '.join(WINDOWS)}")
    if truncate and (settings.task in ("ner", "qa") or stride is not None):
        raise InputError("--truncate: not for ner and qa, nor beside --stride")
    if stride is not None or truncate:
        settings = settings._replace(stride=stride, truncate=truncate)
    if delimiter is not None:
        settings = settings._replace(delimiter=read_delimiter(delimiter))
    return settings


def _with_copies(predictions: list[Prediction], task: Task) -> list[Prediction]:
    """The columns that are asked for, and then what is said."""
    said = {name for prediction in predictions for name in prediction}
    rows = []
    for row, prediction in zip(task.rows, predictions, strict=True):
        names = row.values if ALL in task.copied else task.copied
        copies = {f"input_{n}" if n in said else n: row.values[n] for n in names}
        rows.append(copies | prediction)
    return rows


def write_json_lines(path: str | Path, values: list[Prediction]) -> None:
    """One object a line, in UTF-8; the file appears whole or not at all."""
    with output(path) as file:
        for value in values:
            # half a surrogate pair is written as JSON spells it, which is as Python does
            line = json.dumps(value, ensure_ascii=False) + "\n"
            file.write(line.encode("utf-8", "backslashreplace"))


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
    delimiter: str | None = None,
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
    advice = "cut it off with --truncate"
    encoder = Encoder(tokenizer, max_seq_len or longest, None, truncate, advice)
    features = [
        Feature(number, tuple(encoder.windows(where, encoder.ids(text))), None)
        for number, (where, text) in enumerate(_texts(source, text_column, delimiter))
    ]
    warn_of_words(str(source), features, encoder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bert = BertModel.from_pretrained(directory, add_pooling_layer=False).to(device)
    low = autocast(resolve_precision(precision), device)
    embeddings = np.empty((len(features), config.hidden_size), np.float32)
    with evaluating(bert), low:
        batches = parts([feature.num_tokens for feature in features], batch_tokens)
        for numbers in tracked(batches, "reading"):
            batch = collate([features[number] for number in numbers]).to(device)
            hidden = bert(batch).last_hidden_state.float()
            pooled = pool(hidden, batch.cu_seqlens, pooling)
            embeddings[numbers.start : numbers.stop] = pooled.cpu().numpy()
    return embeddings


def pool(hidden: Tensor, cu_seqlens: Tensor, pooling: str) -> Tensor:
    """(T, H) -> (B, H)."""
    if pooling == "cls":
        return hidden[cu_seqlens[:-1].long()]
    lengths = cu_seqlens.diff().long()
    return torch.segment_reduce(hidden, "mean", lengths=lengths)


def _texts(source: Path, column: str, delimiter: str | None) -> list[tuple[str, str]]:
    """(where, text) of the lines of a .txt or of a stream, or of the rows of a table.

    An empty text is one, so that the embeddings are as many as the lines or the rows.
    """
    if source.suffix.lower() == ".parquet" and not is_stream(source):
        return [(row.where, row.text) for row in texts_of(source, column).rows()]
    is_table = source.suffix.lower() in (".csv", ".tsv", ".jsonl") or delimiter is not None
    if source.suffix.lower() == ".txt" or (is_stream(source) and not is_table):
        lines = read_text(source).split("\n")
        if not lines[-1]:
            lines.pop()
        return [(f"{source}, line {i}", line.rstrip("\r")) for i, line in enumerate(lines, start=1)]
    delimiter = None if delimiter is None else read_delimiter(delimiter)
    rows = read_table(source, [column], delimiter)
    return [(r.where, "" if r.values[column] == "" else r.text(column)) for r in rows]


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
