"""What is wrong with the input is one clear line and exit code 2, on the command line."""

import re
import sys

import pytest

from fastbert import cli

GOOD = "text,label\nthe film was good,pos\nawful,neg\n"
CONLL = "john B-PER\nin O\n"
LONG = "very " * 60


def squad(answer: str = "Paris", start: int = 14, **changes) -> dict:
    question = {
        "id": "q1",
        "question": "Where?",
        "answers": [{"text": answer, "answer_start": start}],
    }
    paragraph = {"context": "John lives in Paris.", "qas": [question | changes]}
    return {"version": "1.1", "data": [{"title": "", "paragraphs": [paragraph]}]}


CASES = {
    "unseen label": (
        *("classification", GOOD, "text,label\nx,odd\n", []), "line 2: .*'odd' .*--train",
    ),
    "missing column": (
        *("classification", "text,y\na,b\n", GOOD, []), "no column 'label', only text, y",
    ),
    "empty": ("classification", "", GOOD, [], "train.csv: is empty"),
    "no rows": ("classification", "text,label\n", GOOD, [], "header but no rows"),
    "fields": (
        *("classification", "text,label\na,b,c\n", GOOD, []), "line 2: expected 2 fields.*got 3",
    ),
    "quote": ("classification", 'text,label\n"a,b\n', GOOD, [], "line 2: unexpected end"),
    "no text": (
        *("classification", "text,label\n,b\n", GOOD, []), "line 2: expected a text in .*'text'",
    ),
    "no label": ("classification", "text,label\na,\n", GOOD, [], "line 2: expected a label"),
    "one label": (
        *("classification", "text,label\na,b\n", GOOD, []), "two labels or more, got only b",
    ),
    "long": ("classification", GOOD + LONG + ",pos\n", GOOD, [], "line 4: 62 tokens.*48.*--stride"),
    "metric": ("classification", GOOD, GOOD, ["--metric", "bleu"], "expected one of accuracy"),
    "weight": ("classification", GOOD, GOOD, ["--class-weight", "odd=2"], "'odd' does not occur"),
    "weight form": (
        *("classification", GOOD, GOOD, ["--class-weight", "pos"]), "LABEL=WEIGHT, got 'pos'",
    ),
    "stride": (
        *("classification", GOOD + LONG + ",pos\n", GOOD, ["--stride", "46"]), "cannot share 46",
    ),
    "underscore": ("regression", "text,label\na,1_0\n", GOOD, [], "expected a number .* got '1_0'"),
    "large": ("regression", "text,label\na,1e39\n", GOOD, [], "fits float32 in column 'label'"),
    "words of options": (
        *("classification", "batch_size,label_column\na,b\n", GOOD, []),
        "no column 'text', only batch_size, label_column",
    ),
    "number": ("regression", "text,label\na,b\n", GOOD, [], "expected a number in column 'label'"),
    "task": ("poetry", GOOD, GOOD, [], "--task: expected one of classification.*'poetry'"),
    "kind of file": ("classification", None, GOOD, [], "train.csv: cannot be read"),
    "conll fields": (
        *("ner", CONLL + "a b c\n", CONLL, []), "line 3: expected 2 fields, got 3: a b c",
    ),
    "conll one field": ("ner", "john\n", CONLL, [], "line 1: expected 2 fields, got 1"),
    "conll label": (
        *("ner", "john NN\n", CONLL, []), "expected a label O, B-TYPE or I-TYPE, got 'NN'",
    ),
    "conll unseen": ("ner", CONLL, "x B-ODD\n", [], "'B-ODD' does not occur in --train"),
    "conll empty": ("ner", "\n\n", CONLL, [], "is empty"),
    "conll long": ("ner", "x O\n" * 50 + CONLL, CONLL, [], "line 1: 54 tokens.*--stride"),
    "answer": (
        *("qa", squad(start=3), squad(), []), "q1: the answer 'Paris' is not at 3 .*it is at 14",
    ),
    "answer beyond": (
        *("qa", squad("Rome", 400), squad(), []), "'Rome' is not at 400 .* 20 characters",
    ),
    "no answer": ("qa", squad(answers=[]), squad(), [], "q1: has no answer; mark it is_impossible"),
    "impossible": (
        *("qa", squad(is_impossible="false"), squad(), []), "expected true or false as .*'false'"
    ),
    "not squad": ("qa", {"rows": []}, squad(), [], "not in SQuAD's form"),
    "not json": ("qa", "{", squad(), [], "not JSON"),
    "question too long": (
        *("qa", squad(question=LONG), squad(), ["--stride", "4"]), "windows of 0 tokens.*share 4"
    ),
}  # fmt: skip


def run(monkeypatch, capsys, *arguments) -> str:
    """The line that the command line ends with."""
    monkeypatch.setattr(sys, "argv", ["fastbert", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("fastbert: error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("name", CASES)
def test_finetune_refuses(name, model, write, tmp_path, monkeypatch, capsys):
    task, train, dev, options, pattern = CASES[name]
    suffix = {"ner": "conll", "qa": "json"}.get(task, "csv")
    paths = [tmp_path / f"train.{suffix}", tmp_path / f"dev.{suffix}"]
    for path, contents in zip(paths, (train, dev), strict=True):
        if contents is not None:
            write(path.name, contents)
    files = ["--train", paths[0], "--dev", paths[1], "--model", model, "--out", tmp_path / "run"]
    error = run(monkeypatch, capsys, "finetune", "--task", task, *files, *options)
    assert re.search(pattern, error), error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("contents", "pattern"),
    [
        ("text,label\nx,odd\n", r"test.csv, line 2: the label 'odd' does not occur in --train"),
        ("text,y\nx,pos\n", r"test.csv: no column 'label'"),
        ("", "test.csv: is empty"),
    ],
)
def test_bad_test_data_are_refused_before_training(
    contents, pattern, model, write, tmp_path, monkeypatch, capsys
):
    file, test = write("train.csv", GOOD), write("test.csv", contents)
    files = ["--train", file, "--dev", file, "--test", test, "--model", model]
    arguments = ["finetune", "--task", "classification", *files, "--out", tmp_path / "run"]
    error = run(monkeypatch, capsys, *arguments)
    assert re.search(pattern, error), error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "source", "out", "options", "pattern"),
    [
        ("predict", "text\na\n", "x.jsonl", [], "has no finetune.json"),
        ("embed", "text\na\n", "x.npy", ["--pooling", "max"], "expected one of mean, cls"),
        ("embed", "words\na\n", "x.npy", [], "no column 'text', only words"),
        ("embed", f"text\n{LONG}\n", "x.npy", [], "line 2: 62 tokens"),
        ("embed", "text\na\n", "x.txt", [], "ends in .npy"),
    ],
)
def test_predict_and_embed_refuse(
    command, source, out, options, pattern, model, write, tmp_path, monkeypatch, capsys
):
    file = write("input.csv", source)
    arguments = ["--model", model, "--input", file, "--out", tmp_path / out, *options]
    assert pattern in run(monkeypatch, capsys, command, *arguments)
