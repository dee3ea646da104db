"""Tokenises a corpus once, into memory-mapped arrays that every later run and worker shares.

While a cache is built, complete parts of it wait in `partial/`, so that a killed run continues
where it was. `manifest.json` is written last: without it, or with another fingerprint in it, there
is no cache.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from fastbert.check import InputError
from fastbert.data.segment import Segmenter, continuations, name_of
from fastbert.data.tokenized import TokenizedCorpus, open_cache

_FORMAT = 1  # of the arrays and of the manifest
_PART_CHARACTERS = 4_000_000  # of text in a part: seconds of work, a few 100 MB while it is encoded

Progress = Callable[[int, int], None]


def tokenize_corpus(
    documents: Iterable[list[str]],
    tokenizer: Tokenizer,
    directory: str | Path,
    *,
    fingerprint: str,
    segmenter: Segmenter | None = None,
    progress: Progress | None = None,
) -> TokenizedCorpus:
    """The cache in `directory` if it is of this corpus and tokenizer, else a new one.

    documents: lists of sentences, the same in the same order whenever `fingerprint` is the same;
        not touched if the cache is complete. They stream: memory is bounded by a part and the
        longest document.
    segmenter: tells the words of Chinese, see `segment`; by default every character is one
    progress: called with (documents, tokens) so far, after each part

    Sentences without tokens are dropped, and documents without sentences. Only one process at a
    time builds; another one that asks for the same directory waits for it. Raises InputError if
    nothing is left or the directory cannot be written.
    """
    directory = Path(directory)
    tokenizer = Tokenizer.from_str(tokenizer.to_str())  # a copy, to be changed below
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # text that says "[MASK]" holds no mask
    made_by = f"{_FORMAT} {fingerprint} {tokenizer.to_str()} {name_of(segmenter)}"
    identity = hashlib.sha256(made_by.encode()).hexdigest()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory / "lock"):
            corpus = open_cache(directory, identity)
            return corpus or _build(documents, tokenizer, segmenter, directory, identity, progress)
    except OSError as error:
        raise InputError(f"cache {directory}: cannot be written: {error.strerror}") from error


def _build(
    documents: Iterable[list[str]],
    tokenizer: Tokenizer,
    segmenter: Segmenter | None,
    directory: Path,
    identity: str,
    progress: Progress | None,
) -> TokenizedCorpus:
    (directory / "manifest.json").unlink(missing_ok=True)  # the arrays are about to change
    partial = directory / "partial"
    owner = partial / "identity"
    if not owner.is_file() or owner.read_text() != identity:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        write_file(owner, lambda file: file.write(identity.encode()))

    parts = list(_complete_parts(partial))
    seen = sum(part.documents_read for part in parts)
    tokens = sum(part.tokens for part in parts)
    for batch in _batches(itertools.islice(documents, seen, None)):
        part = _encode(batch, tokenizer, segmenter, partial / f"{len(parts):06d}.npz")
        parts.append(part)
        seen += part.documents_read
        tokens += part.tokens
        if progress:
            progress(seen, tokens)
    if not tokens:
        raise InputError("corpus: holds no text")

    vocab_size = tokenizer.get_vocab_size()
    _merge(parts, directory, np.uint16 if vocab_size <= 2**16 else np.uint32)
    manifest = {
        "fingerprint": identity,
        "vocab_size": vocab_size,
        "tokens": tokens,
        "sentences": sum(part.sentences for part in parts),
        "documents": sum(part.documents for part in parts),
    }
    text = json.dumps(manifest, indent=2) + "\n"
    write_file(directory / "manifest.json", lambda file: file.write(text.encode()))
    shutil.rmtree(partial, ignore_errors=True)
    return TokenizedCorpus.open(directory)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A complete part file: tokens, word_starts, tokens a sentence and sentences a document."""

    path: Path
    documents_read: int  # with those that were dropped
    tokens: int
    sentences: int
    documents: int


def _complete_parts(partial: Path) -> Iterator[_Part]:
    """The parts in order, up to the first that is missing or, after a power cut, damaged."""
    for number in itertools.count():
        path = partial / f"{number:06d}.npz"
        try:
            with np.load(path) as arrays:
                counts = arrays["counts"].tolist()
        except Exception:  # a damaged zip raises almost anything; the part is simply made again
            return
        yield _Part(path, *counts)


def _batches(documents: Iterable[list[str]]) -> Iterator[list[list[str]]]:
    """Consecutive documents, enough for one part each."""
    batch: list[list[str]] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += sum(map(len, document))
        if size >= _PART_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(
    documents: list[list[str]], tokenizer: Tokenizer, segmenter: Segmenter | None, path: Path
) -> _Part:
    sentences = list(itertools.chain.from_iterable(documents))
    # runs on all cores; encode_batch_fast would be no faster to speak of and forgets the words
    encodings = tokenizer.encode_batch(sentences, add_special_tokens=False)
    lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
    total = int(lengths.sum())

    def flat(rows: Iterable[list[Any]]) -> NDArray[np.int64]:
        return np.fromiter(itertools.chain.from_iterable(rows), np.int64, total)

    tokens = flat(encoding.ids for encoding in encodings)
    words = flat(encoding.word_ids for encoding in encodings)
    starts = np.diff(words, prepend=-1) != 0
    starts[(np.cumsum(lengths) - lengths)[lengths > 0]] = True  # each sentence counts from 0
    if segmenter is not None:
        goes_on = _continue_words(sentences, encodings, segmenter)
        starts &= ~np.fromiter(goes_on, np.bool_, total)

    owner = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    kept = np.bincount(owner[lengths > 0], minlength=len(documents))
    lengths, kept = lengths[lengths > 0], kept[kept > 0]
    counts = (len(documents), total, len(lengths), len(kept))
    arrays = {
        "tokens": tokens.astype(np.uint32),
        "word_starts": starts,
        "sentence_lengths": lengths,
        "document_lengths": kept,
        "counts": np.array(counts),
    }
    write_file(path, lambda file: np.savez(file, **arrays))
    return _Part(path, *counts)


def _continue_words(
    sentences: list[str], encodings: list[Encoding], segmenter: Segmenter
) -> Iterator[bool]:
    """For each token, whether the segmenter takes it to the word of the one before."""
    for sentence, encoding in zip(sentences, encodings, strict=True):
        inside = continuations(sentence, segmenter)
        for begin, _ in encoding.offsets:
            yield begin in inside


def _merge(parts: list[_Part], directory: Path, dtype: type) -> None:
    """Lays the parts end to end in the four arrays; lengths become offsets."""
    tokens = sum(part.tokens for part in parts)
    shapes = {
        "tokens": (dtype, tokens),
        "word_starts": (np.bool_, tokens),
        "sentence_offsets": (np.int64, sum(part.sentences for part in parts) + 1),
        "document_offsets": (np.int64, sum(part.documents for part in parts) + 1),
    }
    beside = {name: directory / f".{name}.npy" for name in shapes}
    out = {
        name: np.lib.format.open_memmap(beside[name], mode="w+", dtype=kind, shape=(size,))
        for name, (kind, size) in shapes.items()
    }
    token = sentence = document = 0
    for part in parts:
        here = slice(token, token + part.tokens)
        sentence_ends = slice(sentence + 1, sentence + 1 + part.sentences)
        document_ends = slice(document + 1, document + 1 + part.documents)
        with np.load(part.path) as arrays:
            out["tokens"][here] = arrays["tokens"]
            out["word_starts"][here] = arrays["word_starts"]
            out["sentence_offsets"][sentence_ends] = token + np.cumsum(arrays["sentence_lengths"])
            out["document_offsets"][document_ends] = sentence + np.cumsum(
                arrays["document_lengths"]
            )
        token += part.tokens
        sentence += part.sentences
        document += part.documents
    for name, array in out.items():
        array.flush()
        beside[name].replace(directory / f"{name}.npy")


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file that is either complete under its name or not there, whatever happens."""
    beside = path.with_name(f".{path.name}")
    with beside.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the file's lock, where the system has such locks; a killed process lets go of it."""
    with path.open("wb") as file:
        if os.name == "posix":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
