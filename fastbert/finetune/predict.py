"""Runs fine-tuned models on new input and writes their predictions."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from fastbert import checkpoint
from fastbert.check import InputError
from fastbert.config.bert import BertConfig
from fastbert.config.finetune import TABLES, check_length
from fastbert.config.options import read_delimiter
from fastbert.data import load_tokenizer
from fastbert.finetune.infer import TASK_OF, encoder_of, run, warn_of_words
from fastbert.finetune.metrics import require_metrics
from fastbert.finetune.task import ALL, Prediction, Refused, Settings, Task
from fastbert.models.trained import trained
from fastbert.system.files import output
from fastbert.train.precision import autocast, cast_once, resolve_precision


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
    """Predictions of a fine-tuned model for the examples of a file, in order.

    model: a fine-tuning run, its checkpoint, or a hub name; source: a file with the format and the
    columns of the training data; labels are not read. A table's row that cannot become an example,
    for instance because it has no text, gets {"error": why}.

    batch_tokens: the most tokens in a batch; precision: auto, bf16, fp16 or fp32, None for the
    training's; stride, truncate, delimiter: replace the training's; copy: columns of the table to
    copy into the predictions, "*" for all; a column named like a field of a prediction becomes
    input_NAME. Raises InputError for an option that the task does not have, a model that is not
    fine-tuned, and a file that cannot be read.
    """
    directory = checkpoint.resolve(model)
    settings = _settings(Settings.load(directory), stride, truncate, delimiter)
    if copy and settings.task not in TABLES:
        raise InputError(f"--copy: only for tasks that read tables, and {settings.task} does not")
    config = BertConfig.from_pretrained(directory)
    tokenizer = load_tokenizer(directory, model_vocab_size=config.vocab_size)
    labels = config.labels
    require_metrics(settings.task, to_measure=False)
    task = TASK_OF[settings.task](settings, labels)
    task.copied = tuple(copy)
    examples = task.read(source, labelled=False)
    good = [example for example in examples if not isinstance(example, Refused)]
    encoder = encoder_of(settings, tokenizer)
    features = task.features(good, encoder)
    warn_of_words(str(source), features, encoder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = trained(task.model_class, directory, config).to(device)
    precision = resolve_precision(precision or settings.precision)
    cast_once(loaded, precision)
    scores = run(task, loaded, features, batch_tokens, device, autocast(precision, device))
    said = iter(task.predict(good, features, scores))
    predictions = [{"error": e.reason} if isinstance(e, Refused) else next(said) for e in examples]
    return _with_copies(predictions, task) if copy else predictions


def _settings(
    settings: Settings, stride: int | None, truncate: bool, delimiter: str | None
) -> Settings:
    """The training's settings, replaced by the options that are given."""
    check_length(settings.task, stride, truncate)
    if stride is not None or truncate:
        settings = settings._replace(stride=stride, truncate=truncate)
    if delimiter is not None:
        settings = settings._replace(delimiter=read_delimiter(delimiter))
    return settings


def _with_copies(predictions: list[Prediction], task: Task) -> list[Prediction]:
    """Each prediction after the columns of its row that --copy names, None if one is missing."""
    said = {name for prediction in predictions for name in prediction}
    rows = []
    for row, prediction in zip(task.rows, predictions, strict=True):
        names = row.values if ALL in task.copied else task.copied
        copies = {f"input_{n}" if n in said else n: row.values.get(n) for n in names}
        rows.append(copies | prediction)
    return rows


def write_json_lines(path: str | Path, values: list[Prediction]) -> None:
    """Writes one JSON object per line in UTF-8; the file appears whole or not at all."""
    with output(path) as file:
        for value in values:
            # a lone surrogate cannot be UTF-8; Python's escape for it is valid JSON too
            line = json.dumps(value, ensure_ascii=False) + "\n"
            file.write(line.encode("utf-8", "backslashreplace"))
