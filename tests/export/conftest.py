import pytest
import torch

import fastbert
from fastbert import models
from fastbert.data import load_tokenizer, save_tokenizer
from tests.export.case import SIZES


@pytest.fixture
def saved(tmp_path):
    """Writes a model of a class, as drawn, and its tokenizer; returns the directory."""

    def save(name: str, **options):
        torch.manual_seed(0)
        directory = tmp_path / name
        config = fastbert.BertConfig(**SIZES | options)
        getattr(models, name)(config).save_pretrained(directory)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(chr(97 + i) for i in range(26))]
        words += [f"##{chr(97 + i)}" for i in range(26)]
        (directory / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
        save_tokenizer(load_tokenizer(directory), directory)
        return directory

    return save
