"""Sentences to tokens, and which of them begin a word."""

import itertools
import json
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from fastbert.data.text.segment import Segmenter, continuations

_PREFIX = "##"
_BATCH = 4096  # sentences encoded at once: the library needs 100 times the memory of their tokens
_MANY_UNKNOWN = 0.1  # of all tokens


def warn_of_unknown(what: str, unknown: int, total: int) -> None:
    """Warns where many tokens of a text are [UNK]: the vocabulary is not that of the text."""
    if unknown > _MANY_UNKNOWN * total:
        warnings.warn(
            f"{what}: {unknown / total:.0%} of its tokens are [UNK], words that the vocabulary "
            "does not have; take a tokenizer or a model of the text's language",
            stacklevel=2,
        )


class EncodedDocuments(NamedTuple):
    """T tokens in S sentences in D documents, of which none is empty.

    tokens: (T,) uint32; word_starts: (T,) bool; sentence_lengths: (S,) int64, in tokens;
    document_lengths: (D,) int64, in sentences
    """

    tokens: NDArray[np.uint32]
    word_starts: NDArray[np.bool_]
    sentence_lengths: NDArray[np.int64]
    document_lengths: NDArray[np.int64]


class DocumentEncoder:
    """A tokenizer, given as JSON, that neither cuts nor pads nor adds special tokens.

    segmenter: tells the words of Chinese, see `segment`; by default every character is one
    """

    def __init__(self, tokenizer: str, segmenter: Segmenter | None = None) -> None:
        self.made_from = (tokenizer, segmenter)
        self.tokenizer = Tokenizer.from_str(tokenizer)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # text that says "[MASK]" holds no mask
        self.segmenter = segmenter
        self.continuing = continuing_tokens(self.tokenizer)

    def __reduce__(self) -> tuple[Any, ...]:
        return DocumentEncoder, self.made_from

    def encode(self, documents: list[list[str]]) -> EncodedDocuments:
        """Leaves out sentences without tokens, and documents without sentences.

        Raises InputError where the segmenter gives a word that is not in the sentence.
        """
        sentences = list(itertools.chain.from_iterable(documents))
        batches = [
            self._batch(sentences[begin : begin + _BATCH])
            for begin in range(0, max(len(sentences), 1), _BATCH)
        ]
        tokens, starts, lengths = map(np.concatenate, zip(*batches, strict=True))
        owner = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
        kept = np.bincount(owner[lengths > 0], minlength=len(documents))
        return EncodedDocuments(tokens, starts, lengths[lengths > 0], kept[kept > 0])

    def _batch(self, sentences: list[str]) -> tuple[NDArray, NDArray, NDArray]:
        """tokens, word starts, and tokens a sentence, with zeros."""
        by_pieces = self.continuing is not None and self.segmenter is None
        # the fast one gives the same tokens, but not where they were found
        encode = self.tokenizer.encode_batch_fast if by_pieces else self.tokenizer.encode_batch
        encodings = encode(sentences, add_special_tokens=False)
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        total = int(lengths.sum())

        def flat(rows: Iterable[Iterable[int | None]], dtype: type) -> NDArray[Any]:
            return np.fromiter(itertools.chain.from_iterable(rows), dtype, total)

        tokens = flat((encoding.ids for encoding in encodings), np.uint32)
        if by_pieces:
            return tokens, ~self.continuing[tokens], lengths  # type: ignore[index]
        words = flat((encoding.word_ids for encoding in encodings), np.int64)
        starts = np.diff(words, prepend=-1) != 0
        starts[(np.cumsum(lengths) - lengths)[lengths > 0]] = True  # each sentence counts from 0
        if self.segmenter is not None:
            goes_on = _continue_words(sentences, encodings, self.segmenter)
            starts &= ~np.fromiter(goes_on, np.bool_, total)
        return tokens, starts, lengths


def continuing_tokens(tokenizer: Tokenizer) -> NDArray[np.bool_] | None:
    """(V,) whether a token goes on with the word before it, wherever it stands; None if that
    depends on where.

    A WordPiece looks up what begins a word as it is, and the rest with the prefix in front. Nothing
    that begins a word has the prefix in its text, where words are cut at the punctuation "#" as
    BERT's are; an added token is a word of its own, and [UNK] stands for a whole one.
    """
    state = json.loads(tokenizer.to_str())
    model, vocab = state["model"], tokenizer.get_vocab()
    alone = [
        model.get("unk_token", _PREFIX),
        *(token["content"] for token in state["added_tokens"]),
    ]
    if (
        model.get("type") != "WordPiece"
        or model["continuing_subword_prefix"] != _PREFIX
        or (state["pre_tokenizer"] or {}).get("type") != "BertPreTokenizer"
        or any(token.startswith(_PREFIX) for token in alone)
        or len(set(vocab.values())) < len(vocab)  # two tokens of one id
    ):
        return None
    table = np.zeros(1 + max(vocab.values()), np.bool_)
    table[[number for token, number in vocab.items() if token.startswith(_PREFIX)]] = True
    return table


def _continue_words(
    sentences: list[str], encodings: list[Encoding], segmenter: Segmenter
) -> Iterator[bool]:
    """For each token, whether the segmenter takes it to the word of the one before."""
    for sentence, encoding in zip(sentences, encodings, strict=True):
        inside = continuations(sentence, segmenter)
        for begin, _ in encoding.offsets:
            yield begin in inside
