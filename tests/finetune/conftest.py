import shutil
import tempfile
from pathlib import Path

import pytest
import torch

import fastbert
from fastbert.data import load_tokenizer, save_tokenizer
from tests.command_line import call
from tests.finetune.case import ROWS, SENTENCES, command
from tests.small_model import write_model


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def place(model, tmp_path_factory):
    """Inputs that each command reads, and a fine-tuned model; readable by all."""
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    shutil.copytree(model, root / "model")
    (root / "train.csv").write_text(ROWS)
    (root / "texts.txt").write_text("a film\n")
    (root / "corpus.txt").write_text(SENTENCES)
    tokenizer = load_tokenizer(root / "model")
    torch.manual_seed(0)
    config = fastbert.BertConfig.from_pretrained(root / "model")
    fastbert.BertForMaskedLM(config).save_pretrained(root / "teacher")
    save_tokenizer(tokenizer, root / "teacher")
    status, _, error = call(*command(root, "finetune"), "--out", root / "run")
    assert status == 0, error
    yield root
    shutil.rmtree(root)
