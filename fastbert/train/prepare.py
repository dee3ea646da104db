"""From the user's corpus to batches: the tokenizer, the tokenised cache, the split."""

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer

from fastbert import data
from fastbert.config import PretrainConfig
from fastbert.packing import IGNORE_INDEX, PackedBatch
from fastbert.train.report import console

TEXT = "text"  # the directory of a run where they are kept


class PreparedText(NamedTuple):
    """baseline: cross-entropy, in nats, of the held-out targets under the training unigrams;
    fingerprint: a hash of the text and the tokenizer.
    """

    fingerprint: str
    tokenizer: Tokenizer
    training: data.PretrainingData
    heldout: list[PackedBatch]
    baseline: float


def prepare_text(config: PretrainConfig, out: Path, num_ranks: int = 1) -> PreparedText:
    """Tokenises the corpus into out/text, or finds it there, and splits its documents."""
    directory = out / TEXT
    tokenizer = _tokenizer(config, directory)
    if config.corpus:
        fingerprint = data.fingerprint_files(config.corpus)
    else:
        fingerprint = data.fingerprint_python()
    corpus = data.tokenize_corpus(
        _documents(config),
        tokenizer,
        directory,
        fingerprint=fingerprint,
        segmenter=data.make_segmenter(config.segmenter),
        progress=lambda documents, tokens: console.print(
            f"tokenised {documents:,} documents, {tokens:,} tokens"
        ),
    )
    train, heldout = corpus.split(config.heldout_fraction, config.seed)
    specials = data.special_tokens(tokenizer)

    def examples(documents, scheme: str) -> data.PretrainingData:
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
            pairs=config.objective == "mlm+nsp",
        )

    training = examples(train, config.masking)
    # refuses a budget that is too small
    training.batch(0, world_size=num_ranks, micro_batches=config.accumulation)
    batches = list(
        itertools.islice(data.heldout_batches(examples(heldout, "bert")), config.eval_batches)
    )
    labels = torch.cat([batch.labels for batch in batches if batch.labels is not None])
    targets = labels[labels != IGNORE_INDEX].numpy()
    baseline = data.unigram_baseline(corpus.token_counts(train), targets)
    both = hashlib.sha256(f"{fingerprint} {tokenizer.to_str()}".encode()).hexdigest()
    return PreparedText(both, tokenizer, training, batches, baseline)


def _tokenizer(config: PretrainConfig, directory: Path) -> Tokenizer:
    """The user's tokenizer, or the one that this run trained, or a new one, kept in `directory`."""
    if config.tokenizer is not None:
        return data.load_tokenizer(config.tokenizer)
    if (directory / "tokenizer.json").is_file():
        return data.load_tokenizer(directory)
    sentences = itertools.chain.from_iterable(_documents(config))
    tokenizer = data.train_tokenizer(sentences, config.vocab_size, config.lowercase)
    console.print(f"trained a vocabulary of {tokenizer.get_vocab_size():,} entries")
    data.save_tokenizer(tokenizer, directory)
    return tokenizer


def _documents(config: PretrainConfig) -> Iterator[list[str]]:
    return data.read_documents(config.corpus) if config.corpus else data.python_documents()
