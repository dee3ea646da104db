"""Divides Chinese, which is written without spaces, into words, for whole-word masking."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

from fastbert.check import InputError, require_libraries

# Returns the words of a sentence in order; it may omit the text between words.
Segmenter = Callable[[str], Iterable[str]]

SEGMENTERS = ("characters", "spaces", "jieba")
LONGEST = 10  # characters; a longer "word" is text that the segmenter could not divide

# First and last code point of each block of characters that BERT's tokenizers take as single words
# (_is_chinese_char in tokenization.py of https://github.com/google-research/bert).
_BLOCKS = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip


def make_segmenter(name: str) -> Segmenter | None:
    """The segmenter of a name in SEGMENTERS; None for "characters": each character is a word.

    "spaces" divides words at the text's spaces, "jieba" as https://github.com/fxsjy/jieba does.
    Raises InputError for another name, or if jieba is missing.
    """
    if name == "characters":
        return None
    if name == "spaces":
        return _between_spaces
    if name == "jieba":
        require_libraries("--segmenter jieba", ("jieba",), "chinese")
        return _by_jieba
    raise InputError(f"--segmenter: expected one of {', '.join(SEGMENTERS)}, got {name!r}")


def _by_jieba(sentence: str) -> list[str]:
    """Calls jieba, whose own function cannot be pickled for another process."""
    words: list[str] = _jieba().lcut(sentence)
    return words


@functools.cache
def _jieba() -> Any:
    import jieba

    jieba.setLogLevel("WARNING")
    return jieba


def _between_spaces(sentence: str) -> list[str]:
    return sentence.split()


def name_of(segmenter: Segmenter | None) -> str:
    """The segmenter's name in a cache's manifest, to distinguish it from other segmenters."""
    if segmenter is None:
        return ""
    return f"{segmenter.__module__}.{segmenter.__qualname__}"


def continuations(sentence: str, segmenter: Segmenter) -> set[int]:
    """Indices of the Chinese characters that continue the word of the character before them.

    The tokenizer divides words in other scripts. A "word" of more than LONGEST characters is
    ignored, because it is text that the segmenter did not divide. Raises InputError for a word that
    is not in the sentence.
    """
    inside: set[int] = set()
    end = 0
    for word in segmenter(sentence):
        begin = sentence.find(word, end)
        if begin < 0:
            raise InputError(
                f"--segmenter: returned the word {word!r}, which is not in {sentence[:60]!r}"
            )
        end = begin + len(word)
        if len(word) <= LONGEST:
            chinese = [is_chinese(character) for character in word]
            inside.update(begin + i for i in range(1, len(word)) if chinese[i] and chinese[i - 1])
    return inside


def is_chinese(character: str) -> bool:
    """Whether BERT's tokenizers take the character as a word by itself."""
    return any(first <= ord(character) <= last for first, last in _BLOCKS)
