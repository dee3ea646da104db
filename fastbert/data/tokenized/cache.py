"""Tokenises a corpus once, into memory-mapped arrays that every later run and worker shares.

While a cache is built, complete parts of it wait in `partial/`, so that a killed run continues
where it was. `manifest.json` is written last and tells what the cache was made from: without it
there is no cache, and one of another corpus, tokenizer or segmenter is not touched.
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
from fastbert.data.tokenized.corpus import ARRAYS, FORMAT, TokenizedCorpus, open_cache, read_json
from fastbert.data.tokenized.parts import Part
from fastbert.data.tokenized.workers import Batch, Interrupted
from fastbert.system import locks
from fastbert.system.files import Unwritable, write_json

Progress = Callable[[int, int, int], None]


class OtherCache(InputError):
    """A directory holds what was made from something else than what is asked for now."""


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
    """The cache in `directory`, which is built unless it is there already.

    documents: lists of sentences, the same in the same order whenever `fingerprint` is the same;
        not touched if the cache is complete. They stream: memory is bounded by a few parts of
        4 million characters a process, and the longest document.
    segmenter: tells the words of Chinese, see `segment`; by default every character is one
    processes: that encode, beside this one, which reads; with 0 or 1 this one does both, on the
        library's threads. The result is the same, byte for byte.
    meter: of `read_documents`, if it is what gives the documents
    progress: called with (documents, tokens, bytes read, by `meter`) done so far, at the beginning,
        when an earlier run may have left some, and after each part

    Sentences without tokens are dropped, and documents without sentences. Only one process at a
    time builds; another one that asks for the same directory waits for it.

    Raises InputError if nothing is left or the directory cannot be written; OtherCache if it holds
    a cache, or the beginning of one, of another corpus, tokenizer or segmenter; Interrupted if one
    of the processes is killed: running again goes on where it was.
    """
    if processes < 0:
        raise InputError(f"processes: at least 0, got {processes}")
    directory = Path(directory)
    encoder = DocumentEncoder(tokenizer.to_str(), segmenter)
    made_from = {
        "corpus": fingerprint,
        "tokenizer": hashlib.sha256(encoder.tokenizer.to_str().encode()).hexdigest(),
        "segmenter": name_of(segmenter),
    }
    try:
        with locked(directory):
            require_same(made_from, read_json(directory / "manifest.json"), directory)
            if corpus := open_cache(directory):
                return corpus
            work = _Work(documents, meter or Meter(), progress or (lambda *_: None))
            return _build(work, encoder, processes, directory, made_from)
    except (OSError, Unwritable) as error:
        reason = Unwritable.because(directory, error).reason
        raise Interrupted(f"cache {directory}: cannot be written: {reason}") from error
    except Interrupted as error:
        raise Interrupted(f"cache {directory}: {error}") from None


def require_same(wanted: dict[str, Any], found: dict[str, Any], directory: Path) -> None:
    """Raises OtherCache where `found`, what a directory was made from, says another thing."""
    if others := [name for name, value in wanted.items() if found.get(name, value) != value]:
        raise OtherCache(
            f"cache {directory}: was made with another {' and another '.join(others)}; "
            "remove the directory or name another one"
        )


class _Work:
    """What is to be encoded, and how much of it is."""

    def __init__(self, documents: Iterable[list[str]], meter: Meter, progress: Progress) -> None:
        self.documents = documents
        self.meter = meter
        self.progress = progress
        self.parts: dict[int, Part] = {}
        self.sizes: dict[int, int] = {}  # of parts under way, bytes of the corpus
        self.done = [0, 0, 0]  # documents, tokens, bytes

    def keep(self, kept: dict[int, Part]) -> None:
        """Begins with the parts of an earlier run."""
        self.parts = kept
        self._count(sum(p.documents_read for p in kept.values()), self.tokens, 0)

    def missing(self, directory: Path) -> Iterator[Batch]:
        """Batches of which there is no part yet."""
        before = 0
        for number, documents in enumerate(parts.batches(self.documents)):
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
    with contextlib.closing(made):  # ends the processes, whatever fails here
        for number, part in made:
            work.add(number, part)
    if not work.tokens:
        raise InputError("corpus: holds no text")

    vocab_size = encoder.tokenizer.get_vocab_size()
    ordered = [part for _, part in sorted(work.parts.items())]
    for half in directory.glob(".*.npy.*"):  # of a run that was killed here
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
        # sizes show a file that was cut short; hashes would take minutes at each start of a run
        "bytes": {name: (directory / f"{name}.npy").stat().st_size for name in ARRAYS},
    }
    write_json(directory / "manifest.json", manifest)
    shutil.rmtree(partial, ignore_errors=True)
    return TokenizedCorpus.open(directory)


def _kept(partial: Path, made_from: dict[str, str], cut: dict[str, int]) -> dict[int, Part]:
    """The complete parts of an earlier run, in a directory that is made if there is none.

    cut: what tells how documents lie in the parts, where corpus and tokenizer are the same
    """
    owner = partial / "made_from.json"
    found = read_json(owner)
    kept = parts.complete_parts(partial)
    if kept:
        require_same(made_from, found, partial.parent)
    if found != made_from | cut:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        write_json(owner, made_from | cut)
        return {}
    return kept


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds the lock of a cache's directory, which is made if there is none; waits for it."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locks.locked(directory / "lock", wait=True))
        except OSError as error:
            raise Unwritable.because(f"cache {directory}", error) from error
        yield
