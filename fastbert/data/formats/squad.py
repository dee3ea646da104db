"""Questions about texts, in the JSON formats of SQuAD v1.1, SQuAD v2.0 and CMRC 2018."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastbert.check import InputError
from fastbert.data.formats.tables import encodable, read_text

_CONTEXTS = {"context", "context_text", "paragraphs"}  # an entry has one of these keys


class Answer(NamedTuple):
    """An answer inside a context: `text` is `context[start : start + len(text)]`."""

    text: str
    start: int


class Question(NamedTuple):
    """A question about a context.

    where: file and question, for messages; answers: empty for an impossible question, and if the
    file has no labels
    """

    where: str
    id: str
    question: str
    context: str
    answers: tuple[Answer, ...]
    is_impossible: bool


def read_squad(path: Path, *, labelled: bool = True) -> list[Question]:
    """All questions of a file in one of three forms.

    SQuAD's {"data": [{"paragraphs": [{"context": ..., "qas": [...]}]}]} (Rajpurkar et al. 2016,
    https://arxiv.org/abs/1606.05250, and 2018, https://arxiv.org/abs/1806.03822); CMRC 2018's list
    [{"context_text": ..., "qas": [{"query_id": ..., "query_text": ..., "answers": ["..."]}]}]
    (Cui et al. 2019, https://arxiv.org/abs/1810.07366); flat rows of Hugging Face's `datasets`, in
    a list, under "data" or one per line: {"id", "context", "question", "answers": {"text": [...],
    "answer_start": [...]}}. A question whose id is missing or null has its number as id.

    Raises InputError for a file that cannot be read, for JSON of another form, for an id that
    occurs twice, for an answer that is not at its answer_start, and, if `labelled`, for a question
    without an answer that is not marked is_impossible.
    """
    contents = _json(path)
    if isinstance(contents, dict):
        contents = [contents] if _CONTEXTS & contents.keys() else contents.get("data")
    if not isinstance(contents, list):
        raise InputError(f"{path}: not in SQuAD's form: expected a list of texts under 'data'")
    questions: list[Question] = []
    for item, context in _items(path, contents):
        questions.append(_question(path, len(questions) + 1, item, context, labelled))
    if not questions:
        raise InputError(f"{path}: holds no questions")
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise InputError(
                f"{question.where}: its id occurs twice; a question without an id has its number "
                "as id"
            )
        seen.add(question.id)
    return questions


def _json(path: Path) -> Any:
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = [line for line in text.split("\n") if line.strip()]
        with contextlib.suppress(ValueError, RecursionError):
            return [json.loads(line) for line in lines]
        raise InputError(f"{path}: not JSON ({error})") from None


def _items(path: Path, contents: list[Any]) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yields (question object, context) from any of the three forms."""
    for number, article in enumerate(contents, start=1):
        where = f"{path}, entry {number}"
        if not isinstance(article, dict):
            raise InputError(f"{where}: not in SQuAD's form: expected an object")
        if "question" in article and "context" in article:
            yield article, article["context"]
            continue
        paragraphs = article.get("paragraphs", [article])
        for paragraph in paragraphs if isinstance(paragraphs, list) else [None]:
            context = qas = None
            if isinstance(paragraph, dict):
                context = paragraph.get("context", paragraph.get("context_text"))
                qas = paragraph.get("qas")
            if context is None or not isinstance(qas, list):
                raise InputError(
                    f"{where}: not in SQuAD's form: expected 'context' and 'qas', or 'context' and "
                    "'question'"
                )
            for item in qas:
                if not isinstance(item, dict):
                    raise InputError(f"{where}: not in SQuAD's form: a question is not an object")
                yield item, context


def _question(
    path: Path, number: int, item: dict[str, Any], context: Any, labelled: bool
) -> Question:
    given = (item[key] for key in ("id", "query_id") if item.get(key) is not None)
    name = str(next(given, number))
    where = f"{path}, question {name}"
    question: Any = item.get("question", item.get("query_text"))
    _require_texts(where, question, context)
    question, context = encodable(question), encodable(context)
    answers = item.get("answers") or ()
    flat = isinstance(answers, dict)
    if isinstance(answers, dict):  # a flat row: one list for each key
        texts, starts = answers.get("text"), answers.get("answer_start")
        if not (isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)):
            raise InputError(f"{where}: expected as many 'text' as 'answer_start' in its answers")
        answers = [{"text": t, "answer_start": n} for t, n in zip(texts, starts, strict=True)]
    if not isinstance(answers, list | tuple):
        raise InputError(f"{where}: expected a list of answers, got {answers!r}")
    marked = item.get("is_impossible")
    if marked not in (None, True, False):  # "false" would count as true
        raise InputError(f"{where}: expected true or false as is_impossible, got {marked!r}")
    # flat rows have no is_impossible; their empty list means that the question is impossible
    is_impossible = bool(flat and not answers if marked is None else marked)
    found = () if is_impossible else tuple(_answer(where, one, context) for one in answers)
    if labelled and not found and not is_impossible:
        raise InputError(f"{where}: has no answer; mark it is_impossible if there is none")
    return Question(where, name, question, context, found, is_impossible)


def _require_texts(where: str, question: Any, context: Any) -> None:
    for name, text in (("question", question), ("context", context)):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{where}: expected a text as {name}, got {text!r}")


def _answer(where: str, given: Any, context: str) -> Answer:
    """The answer in an entry; CMRC 2018 gives only its text, which is searched in the context."""
    if isinstance(given, str):
        given = {"text": given, "answer_start": max(context.find(encodable(given)), 0)}
    if not isinstance(given, dict) or not isinstance(given.get("text"), str):
        raise InputError(f"{where}: expected an answer with a 'text', got {given!r}")
    text, start = encodable(given["text"]), given.get("answer_start")
    if isinstance(start, str) and start.strip().isdecimal():
        start = int(start)
    if not isinstance(start, int) or isinstance(start, bool):
        raise InputError(f"{where}: expected a whole number as answer_start, got {start!r}")
    if not text.strip() or start < 0 or context[start : start + len(text)] != text:
        found = context.find(text)
        hint = f"; it is at {found}" if text.strip() and found >= 0 else ""
        raise InputError(
            f"{where}: the answer {text!r} is not at {start} of its context, which has "
            f"{len(context)} characters{hint}"
        )
    return Answer(text, start)
