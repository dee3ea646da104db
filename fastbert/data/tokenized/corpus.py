"""A tokenised corpus: four memory-mapped arrays and a manifest in a directory."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbert.check import InputError
from fastbert.data.streams import Purpose, stream
from fastbert.system.files import read_json

ARRAYS = ("tokens", "word_starts", "sentence_offsets", "document_offsets")
FORMAT = 2  # version of the arrays and the manifest
_COUNTED = 4096  # documents whose tokens are counted at once


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedCorpus:
    """T tokens in S sentences in D documents, without special tokens.

    tokens: (T,) uint16, or uint32 for a vocabulary of more than 65,536 entries
    word_starts: (T,) bool, True if the token begins a word
    sentence_offsets: (S + 1,) int64, where each sentence begins in `tokens`, and T
    document_offsets: (D + 1,) int64, where each document begins in `sentence_offsets`, and S
    identity: a hash of the corpus, tokenizer and segmenter from which it was made

    No sentence and no document is empty. The arrays are read-only and memory-mapped from
    `directory`; pickling, for example for a loader's workers, sends only the path.
    """

    directory: Path
    vocab_size: int
    tokens: NDArray[Any]
    word_starts: NDArray[np.bool_]
    sentence_offsets: NDArray[np.int64]
    document_offsets: NDArray[np.int64]
    identity: str = ""

    @classmethod
    def open(cls, directory: str | Path) -> "TokenizedCorpus":
        """The complete cache in `directory`; InputError if there is none or it is damaged."""
        corpus = open_cache(Path(directory))
        if corpus is None:
            raise InputError(f"cache {directory}: incomplete; tokenize the corpus again")
        return corpus

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenizedCorpus.open, (self.directory,)

    @property
    def num_documents(self) -> int:
        return len(self.document_offsets) - 1

    @property
    def num_sentences(self) -> int:
        return len(self.sentence_offsets) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def split(
        self, heldout_fraction: float, seed: int, *, pairs: bool = True
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(training, held-out) document indices: a random split, sorted, (N,) int64 each.

        Each side has at least two documents, or one if there are only two or three.

        pairs: whether examples are sentence pairs, which need two documents on each side. Raises
            InputError for a fraction not between 0 and 1, and for too few documents.
        """
        if not 0 < heldout_fraction < 1:
            raise InputError(
                f"--heldout-fraction: expected a number between 0 and 1, got {heldout_fraction}"
            )
        count = self.num_documents
        if count < (4 if pairs else 2):
            each = "one each"
            if pairs:
                each = "two each, because a random next sentence is from another document"
            raise InputError(
                f"--corpus: {count} document(s), but training and held-out text need {each}; "
                "separate documents with blank lines"
            )
        least = 2 if count >= 4 else 1
        heldout = min(max(round(count * heldout_fraction), least), count - least)
        shuffled = stream(seed, Purpose.SPLIT).permutation(count)
        return np.sort(shuffled[heldout:]), np.sort(shuffled[:heldout])

    def token_counts(self, docs: NDArray[np.int64]) -> NDArray[np.int64]:
        """(V,) int64: how often each token occurs in the documents `docs`, distinct indices."""
        counts = np.zeros(self.vocab_size, np.int64)
        is_wanted = np.zeros(self.num_documents, np.bool_)
        is_wanted[docs] = True
        begins = self.sentence_offsets[self.document_offsets]
        for first in range(0, self.num_documents, _COUNTED):
            ends = begins[first : first + _COUNTED + 1]
            tokens = self.tokens[ends[0] : ends[-1]]
            inside = np.repeat(is_wanted[first : first + _COUNTED], np.diff(ends))
            counts += np.bincount(tokens[inside], minlength=self.vocab_size)
        return counts


def open_cache(directory: Path) -> TokenizedCorpus | None:
    """The cache in a directory; None if it is incomplete or its files have wrong sizes."""
    manifest = read_record(directory / "manifest.json")
    files = {name: directory / f"{name}.npy" for name in ARRAYS}
    try:
        if manifest["format"] != FORMAT:
            return None
        if manifest["bytes"] != {name: file.stat().st_size for name, file in files.items()}:
            return None
        # plain arrays on the map, because a slice of np.memmap costs several times as much
        arrays = {n: np.asarray(np.load(file, mmap_mode="r")) for n, file in files.items()}
        corpus = TokenizedCorpus(
            directory, int(manifest["vocab_size"]), **arrays, identity=manifest["fingerprint"]
        )
        counts = (corpus.num_tokens, corpus.num_sentences, corpus.num_documents)
        whole = counts == (manifest["tokens"], manifest["sentences"], manifest["documents"])
        return corpus if whole else None
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty dict if the file is missing or damaged."""
    try:
        return read_json(path) or {}
    except InputError:
        return {}
