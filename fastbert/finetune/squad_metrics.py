"""Exact match and F1 of answers, with the rules of SQuAD and, for Chinese, of CMRC 2018."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher

from fastbert.finetune.metrics import Report

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# exactly the marks that the evaluation script of CMRC 2018 removes; it keeps "……", because it
# compares this mark of two characters with single characters
_CMRC_MARKS = "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』"  # noqa: RUF001
_CMRC_PUNCTUATION = str.maketrans("", "", _CMRC_MARKS)
# the script splits words as NLTK does: a number includes its decimal and thousands separators
_CMRC_UNITS = re.compile(r"[\u4e00-\u9fa5]|(?:(?![\u4e00-\u9fa5])[\w…]|[.,](?=\d))+|[^\w\s]")
_CHINESE = re.compile(r"[\u4e00-\u9fa5]")


def score_answers(
    truth: Sequence[Sequence[str]], predicted: Sequence[str], questions: Sequence[str]
) -> Report:
    """Exact match and F1 in percent; each question is scored against its best-matching answer.

    truth: the right answers of each question, empty if it has none; predicted: one answer each, ""
    for "no answer", which is right if there is none. CMRC 2018's rules (Cui et al. 2019) apply if
    more than half of the questions have a Chinese character, else SQuAD's (Rajpurkar et al. 2016).
    If some questions have no answer, both groups of questions also have metrics of their own.
    """
    chinese = 2 * sum(bool(_CHINESE.search(question)) for question in questions) > len(questions)
    exact, f1 = (_cmrc_exact, _cmrc_f1) if chinese else (_squad_exact, _squad_f1)
    rows = []
    for answers, guess in zip(truth, predicted, strict=True):
        # SQuAD ignores an answer such as "the", which its rules reduce to nothing
        right = [answer for answer in answers if chinese or _squad_words(answer)] or [""]
        best = max(exact(one, guess) for one in right), max(f1(one, guess) for one in right)
        rows.append((bool(answers), *best))
    metrics = _means("", rows)
    if not all(has for has, _, _ in rows):
        metrics |= _means("has_answer_", [row for row in rows if row[0]])
        metrics |= _means("no_answer_", [row for row in rows if not row[0]])
    return Report(metrics)


def _means(prefix: str, rows: Sequence[tuple[bool, float, float]]) -> dict[str, float]:
    if not rows:
        return {}
    return {
        f"{prefix}exact": 100 * sum(row[1] for row in rows) / len(rows),
        f"{prefix}f1": 100 * sum(row[2] for row in rows) / len(rows),
    }


def _squad_words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _squad_exact(answer: str, guess: str) -> float:
    return float(_squad_words(answer) == _squad_words(guess))


def _squad_f1(answer: str, guess: str) -> float:
    """F1 of the words that the answers have in common, in any order."""
    right, said = _squad_words(answer), _squad_words(guess)
    return _f1((Counter(right) & Counter(said)).total(), len(right), len(said))


def _cmrc_exact(answer: str, guess: str) -> float:
    right, said = (text.lower().strip().translate(_CMRC_PUNCTUATION) for text in (answer, guess))
    return float(right == said)


def _cmrc_f1(answer: str, guess: str) -> float:
    """F1 of the longest common run of units, which are Chinese characters and other words."""
    right, said = (
        _CMRC_UNITS.findall(text.lower().translate(_CMRC_PUNCTUATION)) for text in (answer, guess)
    )
    common = SequenceMatcher(None, right, said, autojunk=False).find_longest_match()
    return _f1(common.size, len(right), len(said))


def _f1(common: int, right: int, said: int) -> float:
    if not right or not said:
        return float(right == said)
    return 2 * common / (right + said)
