"""Reading comprehension: SQuAD's JSON, versions 1.1 and 2.0; CMRC 2018 has it in Chinese.

Exact match and F1 are those of the official scripts: Rajpurkar et al. 2016 and 2018
(https://rajpurkar.github.io/SQuAD-explorer), and for Chinese Cui et al. 2019 (CMRC 2018).
"""

import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastbert.check import InputError
from fastbert.data.segment import is_chinese


class Answer(NamedTuple):
    """start: where it begins in the context, in characters."""

    text: str
    start: int


class Question(NamedTuple):
    """answers: all that count as right; none for a question without an answer in its context."""

    id: str
    question: str
    context: str
    answers: list[Answer]
    where: str


def read_squad(path: str | Path, *, labelled: bool = True) -> list[Question]:
    """The questions of a file, in order.

    Raises InputError for a file that is not of this form, or an answer that does not stand in its
    context where it says.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        found = list(_questions(content, path, labelled))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not in the form of SQuAD ({error!r})") from None
    if not found:
        raise InputError(f"{path}: holds no examples")
    return found


def _questions(content: dict[str, Any], path: Path, labelled: bool) -> Iterator[Question]:
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            context = paragraph["context"]
            for entry in paragraph["qas"]:
                where = f"{path}, question {entry['id']}"
                answers = []
                if labelled and not entry.get("is_impossible"):
                    answers = [Answer(a["text"], a["answer_start"]) for a in entry["answers"]]
                    if not answers:
                        raise InputError(f"{where}: no answer, and not marked as is_impossible")
                for text, start in answers:
                    if not text or context[max(start, 0) :][: len(text)] != text:
                        raise InputError(
                            f"{where}: the answer {text[:40]!r} does not stand at {start} in its "
                            "context"
                        )
                yield Question(str(entry["id"]), entry["question"], context, answers, where)


def exact_match(prediction: str, answers: list[str]) -> float:
    """1 if the prediction is one of the answers, but for case, punctuation and articles."""
    return max(float(_normal(prediction) == _normal(answer)) for answer in answers or [""])


def f1(prediction: str, answers: list[str]) -> float:
    """The best overlap of words with an answer; of characters, in order, where it is Chinese."""
    return max(_f1(prediction, answer) for answer in answers or [""])


def _f1(prediction: str, answer: str) -> float:
    if _in_chinese(answer):
        ours, theirs = _pieces(prediction), _pieces(answer)
        common = _longest_common_run(ours, theirs)
    else:
        ours, theirs = _normal(prediction).split(), _normal(answer).split()
        common = sum((Counter(ours) & Counter(theirs)).values())
    if not ours or not theirs:
        return float(ours == theirs)
    if not common:
        return 0.0
    precision, recall = common / len(ours), common / len(theirs)
    return 2 * precision * recall / (precision + recall)


def _normal(text: str) -> str:
    if _in_chinese(text):
        return "".join(_pieces(text))
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _in_chinese(text: str) -> bool:
    return any(map(is_chinese, text))


def _pieces(text: str) -> list[str]:
    """Chinese characters one by one, other words whole, no punctuation."""
    spaced = "".join(f" {c} " if is_chinese(c) else c for c in text.lower())
    kept = "".join(" " if unicodedata.category(c)[0] in "PS" else c for c in spaced)
    return kept.split()


def _longest_common_run(a: list[str], b: list[str]) -> int:
    """The length of the longest sequence of pieces that follow each other without a gap in both."""
    longest = 0
    before = [0] * (len(b) + 1)
    for x in a:
        here = [0]
        for j, y in enumerate(b):
            here.append(before[j] + 1 if x == y else 0)
        longest = max(longest, *here)
        before = here
    return longest
