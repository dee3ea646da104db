import shutil

import pytest
import torch
import transformers

from fastbert.config.finetune import FinetuneConfig
from fastbert.finetune.train import finetune
from tests.serve.running import running
from tests.small_model import write_model


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def minilm_server(minilm):
    with running(minilm) as server:
        yield server


@pytest.fixture(scope="session")
def server(model):
    with running(model) as server:
        yield server


@pytest.fixture
def elsewhere(model, tmp_path):
    """A checkpoint as it comes from transformers: no more than config.json tells of its task."""

    def make(kind, **options):
        directory = shutil.copytree(model, tmp_path / "elsewhere")
        torch.manual_seed(1)
        config = transformers.BertConfig.from_pretrained(directory, **options)
        theirs = getattr(transformers, kind)(config).eval()
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        theirs.save_pretrained(directory)
        return directory, theirs, transformers.BertTokenizer.from_pretrained(directory)

    return make


@pytest.fixture
def learn(model, write, tmp_path):
    """A short run of a task on a file, and the file; JSON Lines unless it is text or JSON."""

    def learn(task, name, contents, **options):
        file = write(name, contents)
        config = FinetuneConfig(
            task=task, train=file, dev=file, model=str(model), precision="fp32", epochs=10,
            learning_rate=2e-3, batch_size=4, **options,
        )  # fmt: skip
        finetune(config, tmp_path / "run")
        return tmp_path / "run", file

    return learn
