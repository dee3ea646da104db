import pytest

from fastbert.config.pretrain import PretrainConfig
from tests.train.prepare.case import TEXT


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def config(corpus, tmp_path):
    return PretrainConfig(
        corpus=(corpus,),
        cache=tmp_path / "cache",
        preset="tiny",
        vocab_size=100,
        steps=1,
        batch_tokens=256,
        eval_batches=1,
    )
