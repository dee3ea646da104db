import pytest

import fastbert
from tests.checkpoint.case import SHAPE


@pytest.fixture
def saved(tmp_path):
    model = fastbert.BertForPreTraining(fastbert.BertConfig(**SHAPE)).eval()
    model.save_pretrained(tmp_path)
    return model, tmp_path
