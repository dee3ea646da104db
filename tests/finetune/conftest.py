import pytest
import torch

import fastbert
from fastbert.data import save_tokenizer, train_tokenizer

ENGLISH = "the cat sat on a mat while good dogs ran away from bad birds in Paris and Ann met Bob ."
CHINESE = "北京是中国的首都上海很大今天天气好坏我不喜欢他在工作学习"
HIDDEN = 64


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A directory with a small model that reads 64 tokens, of English and Chinese words."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([ENGLISH, CHINESE] * 20, 400)
    torch.manual_seed(0)
    config = fastbert.BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
    )
    fastbert.BertForPreTraining(config).save_pretrained(directory)
    save_tokenizer(tokenizer, directory)
    return directory
