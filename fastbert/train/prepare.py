"""From the user's corpus to batches: tokenizer, tokenised cache, training and held-out split."""

import hashlib
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fastbert import data
from fastbert.check import InputError
from fastbert.checkpoint import LATEST
from fastbert.config.pretrain import PretrainConfig
from fastbert.data.text.encoding import warn_of_unknown
from fastbert.data.text.files import Corpus, describe
from fastbert.data.tokenized.cache import LOCK, require_same
from fastbert.data.tokenized.corpus import read_record
from fastbert.packing import IGNORE_INDEX, PackedBatch
from fastbert.system.console import console
from fastbert.system.files import write_json
from fastbert.system.locks import locked
from fastbert.train.report import TokenizingReporter

TEXT = "text"  # directory in a run for tokenizer and cache, unless --cache names another
CHANGED = "{}: the corpus (or its files' names) or the tokenizer has changed since the run began"
_NEARLY_ALL = 0.95  # warns if the share of random pairs is larger
_MUCH_LOST = 0.25  # warns if a larger share of tokens is beyond --max-seq-len in its sentence
_SENTENCES = 1_000_000  # number of sentences from which that share is estimated
LARGE = 100 << 20  # bytes of a corpus for which starting several processes, in seconds, pays off


class PreparedText(NamedTuple):
    """A corpus that is ready for training.

    fingerprint: a hash of the text and the tokenizer; heldout: held-out batches, masked as in BERT;
    baseline: cross-entropy, in nats, of their targets under the training text's unigrams
    """

    fingerprint: str
    tokenizer: Tokenizer
    training: data.PretrainingData
    heldout: list[PackedBatch]
    baseline: float


def prepare_text(config: PretrainConfig, out: Path, num_ranks: int = 1) -> PreparedText:
    """Tokenises the corpus into the cache, or finds it there, and splits its documents.

    Raises InputError; if it is data.OtherCache or data.Interrupted, the cache is worth keeping.
    """
    data.require_scheme(config.masking)  # checked first, because reading the corpus may take hours
    segmenter = data.make_segmenter(config.segmenter)
    source = _Source(config)
    try:
        tokenizer, corpus = _tokenised(config, source, config.cache or out / TEXT, segmenter)
    except data.OtherCache:
        if config.cache is None and (out / LATEST).is_symlink():
            raise InputError(CHANGED.format(out)) from None
        raise
    if config.corpus:
        for line in describe(source.found, corpus.num_documents):
            console.print(line)
    pairs = config.objective == "mlm+nsp"
    train, heldout = corpus.split(config.heldout_fraction, config.seed, pairs=pairs)
    specials = data.special_tokens(tokenizer)
    counts = corpus.token_counts(train)
    _check_words(counts, specials)

    def examples(documents: NDArray[np.int64], scheme: str) -> data.PretrainingData:
        masking = data.make_masking(
            scheme,
            specials,
            tokenizer.get_vocab_size(),
            probability=config.mlm_probability,
            gamma=config.gamma,
            counts=lambda: data.ngram_counts(corpus),
        )
        return data.PretrainingData(
            corpus,
            documents,
            specials,
            masking,
            seed=config.seed,
            batch_tokens=config.batch_tokens,
            max_seq_len=config.max_seq_len,
            short_seq_prob=config.short_seq_prob,
            pairs=pairs,
        )

    training = examples(train, config.masking)
    training.require_examples(num_ranks, config.accumulation)
    if (share := training.random_share) is not None and share > _NEARLY_ALL:
        warnings.warn(
            f"--objective mlm+nsp: {share:.0%} of the pairs have a random second sentence, so the "
            "model cannot learn next-sentence prediction, because most documents have one sentence "
            "or sentences longer than --max-seq-len; use --objective mlm",
            stacklevel=2,
        )
    lengths = np.diff(corpus.sentence_offsets[:_SENTENCES])
    lost = np.maximum(lengths - config.max_seq_len, 0).sum() / lengths.sum()
    if pairs and lost > _MUCH_LOST:
        warnings.warn(
            f"--corpus: at least {int(100 * lost)}% of its tokens are not read, because sentences "
            f"are cut to --max-seq-len {config.max_seq_len}; put one sentence on each line, raise "
            "--max-seq-len, or use --objective mlm, which reads long sentences in parts",
            stacklevel=2,
        )
    batches = list(
        itertools.islice(data.heldout_batches(examples(heldout, "bert")), config.eval_batches)
    )
    labels = torch.cat([batch.labels for batch in batches if batch.labels is not None])
    targets = labels[labels != IGNORE_INDEX].numpy()
    baseline = data.unigram_baseline(counts, targets)
    both = hashlib.sha256(f"{source.fingerprint} {tokenizer.to_str()}".encode()).hexdigest()
    return PreparedText(both, tokenizer, training, batches, baseline)


def _check_words(counts: NDArray[np.int64], specials: data.SpecialTokens) -> None:
    """Raises InputError if no word of the text is in the vocabulary; warns if many are missing."""
    total, unknown = int(counts.sum()), int(counts[specials.unk])
    if total == int(counts[list(specials)].sum()):
        raise InputError(
            "--corpus: none of its words are in the vocabulary, so every token is [UNK]; name "
            "another tokenizer or model, or omit both to train a vocabulary"
        )
    warn_of_unknown("--corpus", unknown, total)


class _Source:
    """The text that a run reads: the user's corpus, or Python's own documentation."""

    def __init__(self, config: PretrainConfig) -> None:
        self.paths = config.corpus
        self.found = data.find_files(self.paths) if self.paths else Corpus([], [])
        self.meter = data.Meter()
        self.fingerprint = (
            data.fingerprint_files(self.paths) if self.paths else data.fingerprint_python()
        )

    def documents(self) -> Iterator[list[str]]:
        """Yields all documents; a run reads them twice, for the vocabulary and for the tokens."""
        self.meter.bytes_read = 0
        if not self.paths:
            return data.python_documents()
        return data.read_documents(self.paths, self.meter)


def _tokenised(
    config: PretrainConfig, source: _Source, directory: Path, segmenter: data.Segmenter | None
) -> tuple[Tokenizer, data.TokenizedCorpus]:
    tokenizer = _tokenizer(config, source, directory)
    documents = source.documents()
    workers = config.tokenize_workers
    if workers is None:
        workers = data.available_cores() if source.meter.bytes_total >= LARGE else 0
    with TokenizingReporter(source.meter.bytes_total) as reporter:
        corpus = data.tokenize_corpus(
            documents,
            tokenizer,
            directory,
            fingerprint=source.fingerprint,
            segmenter=segmenter,
            processes=workers,
            meter=source.meter,
            progress=reporter,
        )
    return tokenizer, corpus


def _tokenizer(config: PretrainConfig, source: _Source, directory: Path) -> Tokenizer:
    """The user's tokenizer, or one trained on the corpus and kept in `directory`."""
    if config.tokenizer is not None:
        return data.load_tokenizer(config.tokenizer)
    made_from = {
        "corpus": source.fingerprint,
        "vocab_size": config.vocab_size,
        "lowercase": config.lowercase,
        "strip_accents": config.strip_accents,
    }
    record = directory / "trained_on.json"
    with locked(directory / LOCK, f"cache {directory}", wait=True):
        if (directory / "tokenizer.json").is_file():
            # earlier versions did not record strip_accents, which was None
            require_same(made_from, {"strip_accents": None} | read_record(record), directory)
            return data.load_tokenizer(directory)
        sentences = itertools.chain.from_iterable(source.documents())
        tokenizer = data.train_tokenizer(
            sentences, config.vocab_size, config.lowercase, config.strip_accents
        )
        console.print(f"trained a vocabulary of {tokenizer.get_vocab_size():,} entries")
        write_json(record, made_from)
        data.save_tokenizer(tokenizer, directory)
        return tokenizer
