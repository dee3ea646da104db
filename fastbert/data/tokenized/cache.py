"""Tokenises a corpus once, into memory-mapped arrays that all later runs and workers share.

While a cache is built, its complete parts are in `partial/`, so that a killed run can continue.
`manifest.json` is written last and records the corpus, tokenizer and segmenter. A directory without
it is not a cache, and a cache made from something else is never overwritten.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fastbert.check import InputError
from fastbert.data.text.corpus import Meter
from fastbert.data.text.encoding import DocumentEncoder
from fastbert.data.text.segment import Segmenter, name_of
from fastbert.data.tokenized import parts, workers
from fastbert.data.tokenized.corpus import ARRAYS, FORMAT, TokenizedCorpus, open_cache, read_record
from fastbert.data.tokenized.parts import Part
from fastbert.data.tokenized.workers import Batch, Foreign, Interrupted, foreign
from fastbert.system.files import Unwritable, write_json
from fastbert.system.locks import locked

Progress = Callable[[int, int, int], None]

LOCK = "lock"  # of a cache's directory


class OtherCache(InputError):
    """A cache's directory was made from another corpus, tokenizer or segmenter."""


def tokenize_corpus(
    documents: Iterable[list[str]],
    tokenizer: Tokenizer,
    directory: str | Path,
    *,
    fingerprint: str,
    segmenter: Segmenter | None = None,
    processes: int = 1,
    meter: Meter | None = None,
    progress: Progress | None = None,
) -> TokenizedCorpus:
    """The tokenised corpus in `directory`, which is built unless it is already complete.

    documents: lists of sentences, the same in the same order whenever `fingerprint` is the same;
        not read if the cache is complete. They are streamed: memory holds a few parts of 4 million
        characters for each process, and the longest document.
    fingerprint: identifies the documents, see `fingerprint_files`
    segmenter: divides Chinese into words, see `segment`; by default every character is a word
    processes: how many processes encode while this one reads; with 0 or 1, this process does both,
        on the library's threads. The result is the same, byte for byte.
    meter: the meter of `read_documents`, if `documents` come from there
    progress: called with the totals (documents, tokens, bytes read according to `meter`), first
        with what an earlier run completed, then after each part

    Sentences without tokens and documents without sentences are dropped. Only one process at a time
    builds a cache; others wait for it.

    Raises InputError if no tokens are left; OtherCache if the directory holds a cache, or parts of
    one, of another corpus, tokenizer or segmenter; Interrupted if a process is killed or the
    directory cannot be written. After Interrupted, the next call continues where this one stopped.
    An error that `documents`, the segmenter or `progress` raises passes unchanged.
    """
    if processes < 0:
        raise InputError(f"processes: expected at least 0, got {processes}")
    directory = Path(directory)
    encoder = DocumentEncoder(tokenizer.to_str(), segmenter)
    made_from = {
        "corpus": fingerprint,
        "tokenizer": hashlib.sha256(encoder.tokenizer.to_str().encode()).hexdigest(),
        "segmenter": name_of(segmenter),
    }
    try:
        with locked(directory / LOCK, f"cache {directory}", wait=True):
            require_same(made_from, read_record(directory / "manifest.json"), directory)
            if corpus := open_cache(directory):
                return corpus
            work = _Work(documents, meter or Meter(), progress or (lambda *_: None))
            return _build(work, encoder, processes, directory, made_from)
    except Foreign as found:
        raise found.error from found.error.__cause__
    except (OSError, Unwritable) as error:
        reason = Unwritable.because(directory, error).reason
        raise Interrupted(f"cache {directory}: cannot be written: {reason}") from error
    except Interrupted as error:
        raise Interrupted(f"cache {directory}: {error}") from None


def require_same(wanted: dict[str, Any], found: dict[str, Any], directory: Path) -> None:
    """Raises OtherCache if `found`, a directory's record, has other values than `wanted`.

    A name that the record lacks counts as equal.
    """
    if others := [name for name, value in wanted.items() if found.get(name, value) != value]:
        raise OtherCache(
            f"cache {directory}: was made with another {' and another '.join(others)}; "
            "remove the directory or name another one"
        )


def _read(documents: Iterable[list[str]]) -> Iterator[list[str]]:
    with foreign():
        yield from documents


class _Work:
    """The documents to encode, the complete parts, and the progress."""

    def __init__(self, documents: Iterable[list[str]], meter: Meter, progress: Progress) -> None:
        self.documents = documents
        self.meter = meter
        self.progress = progress
        self.parts: dict[int, Part] = {}
        self.sizes: dict[int, int] = {}  # bytes of the corpus in each part that is being encoded
        self.done = [0, 0, 0]  # documents, tokens, bytes

    def keep(self, kept: dict[int, Part]) -> None:
        """Uses the complete parts of an earlier run."""
        self.parts = kept
        self._count(sum(p.documents_read for p in kept.values()), self.tokens, 0)

    def missing(self, directory: Path) -> Iterator[Batch]:
        """Yields the batches that have no complete part yet."""
        before = 0
        for number, documents in enumerate(parts.batches(_read(self.documents))):
            size, before = self.meter.bytes_read - before, self.meter.bytes_read
            if number in self.parts:
                self._count(0, 0, size)
            else:
                self.sizes[number] = size
                yield Batch(number, documents, parts.part_file(directory, number))

    def add(self, number: int, part: Part) -> None:
        self.parts[number] = part
        self._count(part.documents_read, part.tokens, self.sizes.pop(number))

    def _count(self, documents: int, tokens: int, size: int) -> None:
        self.done = [a + b for a, b in zip(self.done, (documents, tokens, size), strict=True)]
        with foreign():
            self.progress(*self.done)

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts.values())


def _build(
    work: _Work,
    encoder: DocumentEncoder,
    processes: int,
    directory: Path,
    made_from: dict[str, str],
) -> TokenizedCorpus:
    (directory / "manifest.json").unlink(missing_ok=True)  # the arrays are about to change
    partial = directory / "partial"
    cut = {"format": FORMAT, "part_characters": parts.PART_CHARACTERS}
    work.keep(_kept(partial, made_from, cut))
    made = workers.write_parts(work.missing(partial), encoder, processes)
    with contextlib.closing(made):  # ends the processes even if something fails here
        for number, part in made:
            work.add(number, part)
    if not work.tokens:
        raise InputError("--corpus: holds no text")

    vocab_size = encoder.tokenizer.get_vocab_size()
    ordered = [part for _, part in sorted(work.parts.items())]
    for half in directory.glob(".*.npy.*"):  # partly written by a run that was killed
        half.unlink()
    parts.merge(ordered, directory, np.uint16 if vocab_size <= 2**16 else np.uint32)
    identity = json.dumps([FORMAT, made_from])
    manifest = {
        "format": FORMAT,
        **made_from,
        "fingerprint": hashlib.sha256(identity.encode()).hexdigest(),
        "vocab_size": vocab_size,
        "documents": sum(part.documents for part in ordered),
        "sentences": sum(part.sentences for part in ordered),
        "tokens": work.tokens,
        # sizes reveal truncated files; hashes would take minutes at every start of a run
        "bytes": {name: (directory / f"{name}.npy").stat().st_size for name in ARRAYS},
    }
    write_json(directory / "manifest.json", manifest)
    shutil.rmtree(partial, ignore_errors=True)
    return TokenizedCorpus.open(directory)


def _kept(partial: Path, made_from: dict[str, str], cut: dict[str, int]) -> dict[int, Part]:
    """The complete parts of an earlier run in the directory `partial`, which is made if missing.

    cut: the settings that divide a corpus into parts; parts made with other settings are removed.
    Raises OtherCache for parts of another corpus, tokenizer or segmenter.
    """
    owner = partial / "made_from.json"
    found = read_record(owner)
    kept = parts.complete_parts(partial)
    if kept:
        require_same(made_from, found, partial.parent)
    if found != made_from | cut:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        write_json(owner, made_from | cut)
        return {}
    return kept
