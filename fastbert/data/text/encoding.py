"""Encodes sentences as tokens, and marks the tokens that begin a word."""

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
_BATCH = 4096  # sentences encoded at once, because encodings take 100 times their tokens' memory
_MANY_UNKNOWN = 0.1  # warns if a larger share of all tokens is [UNK]


def warn_of_unknown(what: str, unknown: int, total: int) -> None:
    """Warns if many tokens of a text are [UNK], because its vocabulary is probably wrong.

    what: the text's name in the message; unknown, total: numbers of tokens
    """
    if unknown > _MANY_UNKNOWN * total:
        warnings.warn(
            f"{what}: {unknown / total:.0%} of its tokens are [UNK], because the vocabulary lacks "
            "these words; use a tokenizer or a model for the text's language",
            stacklevel=2,
        )


class EncodedDocuments(NamedTuple):
    """T tokens in S sentences in D documents; no sentence and no document is empty.

    tokens: (T,) uint32; word_starts: (T,) bool; sentence_lengths: (S,) int64, in tokens;
    document_lengths: (D,) int64, in sentences
    """

    tokens: NDArray[np.uint32]
    word_starts: NDArray[np.bool_]
    sentence_lengths: NDArray[np.int64]
    document_lengths: NDArray[np.int64]


class DocumentEncoder:
    """Encodes documents with a tokenizer, without truncation, padding and special tokens.

    tokenizer: the JSON from `tokenizers.Tokenizer.to_str`; segmenter: divides Chinese into words,
    see `segment`; by default every Chinese character is a word
    """

    def __init__(self, tokenizer: str, segmenter: Segmenter | None = None) -> None:
        self.made_from = (tokenizer, segmenter)
        self.tokenizer = Tokenizer.from_str(tokenizer)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # "[MASK]" in a text is not the special token
        self.segmenter = segmenter
        self.continuing = continuing_tokens(self.tokenizer)

    def __reduce__(self) -> tuple[Any, ...]:
        return DocumentEncoder, self.made_from

    def encode(self, documents: list[list[str]]) -> EncodedDocuments:
        """Encodes documents; drops sentences without tokens, and documents that are then empty.

        Raises InputError if the segmenter returns a word that is not in the sentence.
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

    def _batch(self, sentences: list[str]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """(tokens, word starts, number of tokens of each sentence, which may be 0)."""
        by_pieces = self.continuing is not None and self.segmenter is None
        # encode_batch_fast gives the same tokens without their offsets in the text
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
        # word ids restart at 0 in each sentence, so a one-word sentence would run into the next
        starts[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
        if self.segmenter is not None:
            goes_on = _continue_words(sentences, encodings, self.segmenter)
            starts &= ~np.fromiter(goes_on, np.bool_, total)
        return tokens, starts, lengths


def continuing_tokens(tokenizer: Tokenizer) -> NDArray[np.bool_] | None:
    """(V,) bool: whether a token continues a word; None if that depends on more than the token.

    WordPiece looks up the first piece of a word as it is, and the others with the prefix "##". The
    first piece cannot begin with "##" itself if the pre-tokenizer splits at the punctuation "#", as
    BERT's does. An added token is a word of its own, and [UNK] stands for a whole word.
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
        or len(set(vocab.values())) < len(vocab)  # two tokens have the same id
    ):
        return None
    table = np.zeros(1 + max(vocab.values()), np.bool_)
    table[[number for token, number in vocab.items() if token.startswith(_PREFIX)]] = True
    return table


def _continue_words(
    sentences: list[str], encodings: list[Encoding], segmenter: Segmenter
) -> Iterator[bool]:
    """Yields for each token whether the segmenter puts it into the previous token's word."""
    for sentence, encoding in zip(sentences, encodings, strict=True):
        inside = continuations(sentence, segmenter)
        for begin, _ in encoding.offsets:
            yield begin in inside
