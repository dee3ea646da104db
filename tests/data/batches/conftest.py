import numpy as np
import pytest

from fastbert.data import PretrainingData, make_masking, special_tokens
from tests.data.batches.case import BATCH_TOKENS, MAX_SEQ_LEN, SEED


@pytest.fixture(scope="session")
def make(corpus, tokenizer):
    def build(docs=None, **options):
        defaults = {"seed": SEED, "batch_tokens": BATCH_TOKENS, "max_seq_len": MAX_SEQ_LEN}
        docs = np.arange(corpus.num_documents) if docs is None else docs
        specials = special_tokens(tokenizer)
        masking = make_masking("bert", specials, corpus.vocab_size)
        return PretrainingData(corpus, docs, specials, masking, **defaults | options)

    return build


@pytest.fixture(scope="session")
def data(make):
    return make()
