"""A small untrained BERT whose vocabulary knows some English words and all Chinese used here."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fastbert
from fastbert.data import load_tokenizer, save_tokenizer

WORDS = (
    "good bad fine awful film book the a was is not and very in of to lives who where what when "
    "does john mary paris london berlin cat dog red blue green one two three yes no big small near "
    "far ##s ##ing ##ed . , ? ! - ' ( ) : 2 0 1 8"
)
CHINESE = "我很喜欢这部电影不好看差极了北京是中国的首都上海在东边谁里有什么城市大小明住张三李四"
ALL_WORDS = (*WORDS.split(), *CHINESE, *"，。？")  # noqa: RUF001
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 48,
    "initializer_range": 0.1,  # an untrained model of small weights learns slowly
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def write_model(directory: Path, words: Sequence[str] = ALL_WORDS, **changes: Any) -> Path:
    """Writes the model and its tokenizer, and returns the directory.

    words: all that the vocabulary has; changes: of the SHAPE
    """
    vocab = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    (directory / "vocab.txt").write_text("".join(f"{word}\n" for word in vocab), "utf-8")
    save_tokenizer(load_tokenizer(directory), directory)
    torch.manual_seed(0)
    config = fastbert.BertConfig(vocab_size=len(vocab), **SHAPE | changes)
    fastbert.BertModel(config).save_pretrained(directory)
    return directory


def write_pipeline(
    model: Path,
    directory: Path,
    modules: Sequence[str] = ("Transformer", "Pooling"),
    pooling: dict | None = None,
    prompts: dict | None = None,
    **about: Any,
) -> Path:
    """Copies the model and writes the files of sentence-transformers beside it."""
    shutil.copytree(model, directory)
    (directory / "pool").mkdir()
    kinds = [{"path": "pool", "type": f"sentence_transformers.models.{m}"} for m in modules]
    for name, contents in (
        ("modules.json", kinds),
        ("pool/config.json", pooling or {"pooling_mode_cls_token": True}),
        ("sentence_bert_config.json", about),
        ("config_sentence_transformers.json", prompts or {}),
    ):
        (directory / name).write_text(json.dumps(contents))
    return directory
