"""Raw text to packed, masked batches: corpus, tokenizer, cache, sentence pairs, masks, batches."""

from fastbert.data.batches import (
    GlobalCounts,
    PretrainingData,
    heldout_batches,
    loader,
    unigram_baseline,
)
from fastbert.data.cache import tokenize_corpus
from fastbert.data.corpus import fingerprint_files, read_documents
from fastbert.data.masking import mask_tokens
from fastbert.data.pairs import PairPlan, plan_pairs
from fastbert.data.python_docs import fingerprint_python, python_documents
from fastbert.data.sentences import split_sentences
from fastbert.data.tokenized import TokenizedCorpus
from fastbert.data.tokenizer import (
    SpecialTokens,
    load_tokenizer,
    save_tokenizer,
    special_tokens,
    train_tokenizer,
)

__all__ = [
    "GlobalCounts",
    "PairPlan",
    "PretrainingData",
    "SpecialTokens",
    "TokenizedCorpus",
    "fingerprint_files",
    "fingerprint_python",
    "heldout_batches",
    "load_tokenizer",
    "loader",
    "mask_tokens",
    "plan_pairs",
    "python_documents",
    "read_documents",
    "save_tokenizer",
    "special_tokens",
    "split_sentences",
    "tokenize_corpus",
    "train_tokenizer",
    "unigram_baseline",
]
