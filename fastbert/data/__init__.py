"""Raw text to packed, masked batches: corpus, tokenizer, cache, sentence pairs, masks, batches."""

from fastbert.data.batches import (
    GlobalCounts,
    PretrainingData,
    heldout_batches,
    loader,
    unigram_baseline,
)
from fastbert.data.cache import OtherCache, tokenize_corpus
from fastbert.data.corpus import Meter, fingerprint_files, read_documents
from fastbert.data.corpus_files import find_files
from fastbert.data.masking import SCHEMES, Masking, make_masking
from fastbert.data.ngrams import NgramCounts, ngram_counts
from fastbert.data.pairs import PairPlan, plan_pairs, plan_sentences
from fastbert.data.python_docs import fingerprint_python, python_documents
from fastbert.data.segment import SEGMENTERS, Segmenter, make_segmenter
from fastbert.data.selection import Tokens
from fastbert.data.sentences import split_sentences
from fastbert.data.tokenized import TokenizedCorpus
from fastbert.data.tokenizer import (
    SpecialTokens,
    load_tokenizer,
    save_tokenizer,
    special_tokens,
    train_tokenizer,
)
from fastbert.data.workers import Interrupted, available_cores

__all__ = [
    "SCHEMES",
    "SEGMENTERS",
    "GlobalCounts",
    "Interrupted",
    "Masking",
    "Meter",
    "NgramCounts",
    "OtherCache",
    "PairPlan",
    "PretrainingData",
    "Segmenter",
    "SpecialTokens",
    "TokenizedCorpus",
    "Tokens",
    "available_cores",
    "find_files",
    "fingerprint_files",
    "fingerprint_python",
    "heldout_batches",
    "load_tokenizer",
    "loader",
    "make_masking",
    "make_segmenter",
    "ngram_counts",
    "plan_pairs",
    "plan_sentences",
    "python_documents",
    "read_documents",
    "save_tokenizer",
    "special_tokens",
    "split_sentences",
    "tokenize_corpus",
    "train_tokenizer",
    "unigram_baseline",
]
