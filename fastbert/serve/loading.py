"""Loads a checkpoint and determines which kinds of requests it can answer."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer

from fastbert import checkpoint
from fastbert.check import InputError
from fastbert.config.bert import BertConfig
from fastbert.config.serve import ServeConfig
from fastbert.data import load_tokenizer
from fastbert.embedding.sentence_files import SentenceFiles
from fastbert.finetune.metrics import require_metrics
from fastbert.finetune.task import SETTINGS, Settings
from fastbert.models.base import BertPreTrainedModel
from fastbert.models.bert import BertModel
from fastbert.models.pretraining import BertForMaskedLM
from fastbert.models.task_models import (
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from fastbert.models.trained import Headless, trained
from fastbert.serve.abilities import Embedding, MaskFilling
from fastbert.serve.predictions import SEQUENCES, SERVED, Prediction
from fastbert.train.precision import autocast, cast_once, resolve_precision

_MODELS: dict[str, type[BertPreTrainedModel]] = {
    "BertForPreTraining": BertForMaskedLM,
    "BertForMaskedLM": BertForMaskedLM,
    "BertForSequenceClassification": BertForSequenceClassification,
    "BertForTokenClassification": BertForTokenClassification,
    "BertForQuestionAnswering": BertForQuestionAnswering,
}
_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}


class Served(NamedTuple):
    """A loaded model and its abilities; prediction, mask_filling: None if it lacks the head.

    name: as given to --model; precision: fp32, bf16 or fp16 (autocast); batch_tokens, max_seq_len:
    in tokens; reranks: whether the model gives one score to a pair of texts; prompts,
    default_prompt: see `SentenceFiles`
    """

    name: str
    config: BertConfig
    model: BertPreTrainedModel
    tokenizer: Tokenizer
    precision: str
    batch_tokens: int
    max_seq_len: int
    embedding: Embedding
    prediction: Prediction | None
    mask_filling: MaskFilling | None
    reranks: bool
    prompts: Mapping[str, str]
    default_prompt: str | None

    @property
    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self.precision, self.model.device)


def load(config: ServeConfig) -> Served:
    """Loads --model onto the first GPU, or the CPU; InputError if it cannot be served."""
    directory = checkpoint.resolve(config.model)
    bert = BertConfig.from_pretrained(directory)
    tokenizer = load_tokenizer(directory, model_vocab_size=bert.vocab_size)
    files = SentenceFiles.read(directory)
    architecture = (bert.extra.get("architectures") or ["BertModel"])[0]
    longest = bert.max_position_embeddings
    limit = min(files.max_seq_len or longest, longest)
    settings = _settings(directory, architecture, bert, config.max_seq_len or limit)
    max_seq_len = config.max_seq_len or (limit if settings is None else settings.max_seq_len)
    if not 3 <= max_seq_len <= longest:
        raise InputError(f"--max-seq-len: expected 3 to the model's {longest}, got {max_seq_len}")
    if settings is not None:
        settings = _with_length(settings, max_seq_len)
    precision = config.precision or (settings.precision if settings else "auto")
    precision = resolve_precision(precision)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _model(directory, architecture, bert).to(device)
    cast_once(model, precision)
    prediction = None
    if settings is not None and settings.task in SERVED:
        require_metrics(settings.task, to_measure=False)
        labels = bert.labels
        num_texts = _num_texts(settings, is_ours=(directory / SETTINGS).is_file())
        prediction = Prediction(settings, labels, tokenizer, num_texts, config.max_queue)
    pooling = config.pooling or files.pooling or "mean"
    fills = isinstance(model, BertForMaskedLM)
    return Served(
        name=str(config.model),
        config=bert,
        model=model,
        tokenizer=tokenizer,
        precision=precision,
        batch_tokens=config.batch_tokens or _BATCH_TOKENS[device.type],
        max_seq_len=max_seq_len,
        embedding=Embedding(tokenizer, max_seq_len, pooling),
        prediction=prediction,
        mask_filling=MaskFilling(tokenizer, max_seq_len) if fills else None,
        reranks=prediction is not None and _reranks(prediction),
        prompts=files.prompts,
        default_prompt=files.default_prompt,
    )


def _model(directory: Path, architecture: str, bert: BertConfig) -> BertPreTrainedModel:
    kind = _MODELS.get(architecture)
    if kind is None:
        return trained(BertModel, directory, bert, add_pooling_layer=False)
    try:
        return trained(kind, directory, bert)
    except Headless:
        if kind is not BertForMaskedLM:
            raise
    return trained(BertModel, directory, bert, add_pooling_layer=False)  # it can still embed


def _settings(
    directory: Path, architecture: str, bert: BertConfig, max_seq_len: int
) -> Settings | None:
    """Settings of the fine-tuning, or those that another tool's config.json implies.

    max_seq_len: for implied settings. None if the checkpoint is not fine-tuned.
    """
    if (directory / SETTINGS).is_file():
        return Settings.load(directory)
    by_problem = {"regression": "regression", "multi_label_classification": "multilabel"}
    task = {
        "BertForSequenceClassification": by_problem.get(bert.problem_type or "", "classification"),
        "BertForTokenClassification": "ner",
        "BertForQuestionAnswering": "qa",
    }.get(architecture)
    if task is None:
        return None
    return Settings(
        task=task,
        text_column="text",
        pair_column=None,
        label_column="label",
        label_separator=",",
        choice_column=(),
        max_seq_len=max_seq_len,
        stride=None if task in SEQUENCES else max_seq_len // 4,
        truncate=False,
        max_answer_tokens=30,
        null_threshold=0.0,
        precision="auto",
    )


def _with_length(settings: Settings, max_seq_len: int) -> Settings:
    """The settings with this length; InputError if the training's windows do not fit it."""
    if settings.stride is not None and max_seq_len < settings.max_seq_len:
        num_special = 3 if settings.task == "qa" or settings.pair_column is not None else 2
        least = num_special + settings.stride + 1
        if max_seq_len < least:
            raise InputError(
                f"--max-seq-len: expected at least {least}, because the model reads windows that "
                f"share {settings.stride} tokens, got {max_seq_len}"
            )
    return settings._replace(max_seq_len=max_seq_len)


def _num_texts(settings: Settings, is_ours: bool) -> tuple[int, ...]:
    """How many texts an input may have; for sequences, only fastbert's checkpoints define it."""
    if settings.task in ("ner", "qa"):
        return (1,) if settings.task == "ner" else (2,)
    if not is_ours:
        return (1, 2)
    return (1,) if settings.pair_column is None else (2,)


def _reranks(prediction: Prediction) -> bool:
    is_one = prediction.settings.task in SEQUENCES and len(prediction.labels) == 1
    return is_one and 2 in prediction.num_texts


def about(served: Served, config: ServeConfig) -> dict[str, Any]:
    """The answer of /info, with text-embeddings-inference's field names."""
    from fastbert._version import __version__

    labels = {str(number): label for number, label in served.config.id2label.items()}
    classes = {"id2label": labels, "label2id": dict(served.config.label2id)}
    kind: dict[str, Any] = {"embedding": {"pooling": served.embedding.pooling}}
    if served.reranks:
        kind = {"reranker": classes}
    elif served.prediction is not None:
        kind = {"classifier": classes}
    return {
        "model_id": served.name,
        "model_type": kind,
        "model_dtype": {"bf16": "bfloat16", "fp16": "float16"}.get(served.precision, "float32"),
        "task": None if served.prediction is None else served.prediction.settings.task,
        "device": str(served.model.device),
        "max_input_length": served.max_seq_len,
        "max_batch_tokens": served.batch_tokens,
        "max_client_batch_size": config.max_texts,
        "max_concurrent_requests": config.max_requests,
        "auto_truncate": config.truncate,
        "tokenization_workers": config.tokenize_threads,
        "prompts": dict(served.prompts),
        "version": __version__,
    }
