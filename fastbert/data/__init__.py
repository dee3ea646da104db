"""From raw text to packed, masked batches: corpus, tokenizer, cache, sentence pairs, masking."""

from fastbert.data.batches.loading import loader
from fastbert.data.batches.pairs import PairPlan, plan_pairs, plan_sentences
from fastbert.data.batches.pretraining import (
    GlobalCounts,
    PretrainingData,
    heldout_batches,
    unigram_baseline,
)
from fastbert.data.masking.mlm import SCHEMES, Masking, make_masking, require_scheme
from fastbert.data.masking.selection import Tokens
from fastbert.data.text.corpus import Meter, fingerprint_files, read_documents
from fastbert.data.text.files import find_files
from fastbert.data.text.python_docs import fingerprint_python, python_documents
from fastbert.data.text.segment import SEGMENTERS, Segmenter, make_segmenter
from fastbert.data.text.sentences import split_sentences
from fastbert.data.text.tokenizer import (
    SpecialTokens,
    load_tokenizer,
    save_tokenizer,
    special_tokens,
    train_tokenizer,
)
from fastbert.data.tokenized.cache import OtherCache, tokenize_corpus
from fastbert.data.tokenized.corpus import TokenizedCorpus
from fastbert.data.tokenized.ngrams import NgramCounts, ngram_counts
from fastbert.data.tokenized.workers import Interrupted, available_cores

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
    "require_scheme",
    "save_tokenizer",
    "special_tokens",
    "split_sentences",
    "tokenize_corpus",
    "train_tokenizer",
    "unigram_baseline",
]
