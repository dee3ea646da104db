"""Questions about texts: the JSON of SQuAD v1.1 and v2.0, which CMRC 2018 has too."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from fastbert.check import InputError
from fastbert.data.tables import read_text


class Answer(NamedTuple):
    """`text` is `context[start : start + len(text)]`."""

    text: str
    start: int


class Question(NamedTuple):
    """A question about a context; no answers where the context has none, or none were given."""

    where: str
    id: str
    question: str
    context: str
    answers: tuple[Answer, ...]
    is_impossible: bool


def read_squad(path: Path, *, labelled: bool = True) -> list[Question]:
    """All questions of a file: {"data": [{"paragraphs": [{"context": ..., "qas": [...]}]}]}.

    Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250, and 2018,
    https://arxiv.org/abs/1806.03822; Cui et al. 2019, https://arxiv.org/abs/1810.07366. Raises
    InputError for JSON of another form, an answer that is not where it says, and, if `labelled`, a
    question that has no answer and is not said to be impossible.
    """
    try:
        contents = json.loads(read_text(path))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not JSON ({error})") from None
    try:
        questions = [
            _question(path, item, paragraph["context"], labelled)
            for article in contents["data"]
            for paragraph in article["paragraphs"]
            for item in paragraph["qas"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not in SQuAD's form ({type(error).__name__}: {error})") from None
    if not questions:
        raise InputError(f"{path}: holds no questions")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise InputError(f"{question.where}: the id stands there twice")
        seen.add(question.id)
    return questions


def _question(path: Path, item: dict[str, Any], context: str, labelled: bool) -> Question:
    where = f"{path}, question {item['id']}"
    for name, text in (("question", item["question"]), ("context", context)):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{where}: expected a text as {name}, got {text!r}")
    is_impossible = bool(item.get("is_impossible", False))
    given = () if is_impossible else item.get("answers") or ()
    answers = tuple(_answer(where, answer, context) for answer in given)
    if labelled and not answers and not is_impossible:
        raise InputError(f"{where}: has no answer; mark it is_impossible if there is none")
    return Question(where, str(item["id"]), item["question"], context, answers, is_impossible)


def _answer(where: str, given: dict[str, Any], context: str) -> Answer:
    text, start = given["text"], given["answer_start"]
    if not text.strip() or start < 0 or context[start : start + len(text)] != text:
        found = context.find(text)
        hint = f"; it is at {found}" if text.strip() and found >= 0 else ""
        raise InputError(
            f"{where}: the answer {text!r} is not at {start} of its context, which has "
            f"{len(context)} characters{hint}"
        )
    return Answer(text, start)
