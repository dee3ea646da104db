"""A task needs what it is measured by, and nothing that another task is."""

import sys

import pytest

from fastbert.check import InputError
from fastbert.config.finetune import FinetuneConfig
from fastbert.finetune.predict import predict
from fastbert.finetune.train import finetune

TABLE = "text,label\nthe film was good,1\nawful,2\n"
CONLL = "john B-PER\nin O\nberlin B-LOC\n"
QUESTION = {
    "id": "1",
    "question": "who lives?",
    "answers": [{"text": "john", "answer_start": 0}],
}
SQUAD = {
    "version": "1.1",
    "data": [{"title": "", "paragraphs": [{"context": "john lives", "qas": [QUESTION]}]}],
}
CHOICE = "text,a,b,label\nthe film was,good,book,0\nthe cat was,not,red,1\n"

FILES = {
    "classification": ("table.csv", TABLE),
    "regression": ("table.csv", TABLE),
    "choice": ("choice.csv", CHOICE),
    "ner": ("words.conll", CONLL),
    "qa": ("squad.json", SQUAD),
}


@pytest.fixture
def without(monkeypatch):
    """Has imports of libraries fail, as where they are not installed."""

    def block(*libraries: str) -> None:
        loaded = [name for name in sys.modules if name.partition(".")[0] in libraries]
        for name in {*loaded, *libraries}:
            monkeypatch.setitem(sys.modules, name, None)

    return block


def learn(task, model, write, out):
    """The summary of a short run, and the file it read."""
    file = write(*FILES[task])
    config = FinetuneConfig(
        task=task,
        train=file,
        dev=file,
        model=str(model),
        epochs=1,
        precision="fp32",
        choice_column=("a", "b") if task == "choice" else (),
    )
    return finetune(config, out), file


@pytest.mark.parametrize(
    ("task", "missing"),
    [
        ("classification", ("seqeval",)),
        ("regression", ("seqeval",)),
        ("choice", ("seqeval", "sklearn", "scipy")),
        ("qa", ("seqeval", "sklearn", "scipy")),
    ],
)
def test_a_task_runs_without_the_libraries_of_others(
    task, missing, model, write, tmp_path, without
):
    without(*missing)
    summary, file = learn(task, model, write, tmp_path / "run")
    assert summary["steps"] == 1
    without("sklearn", "scipy")
    assert predict(tmp_path / "run", file)


@pytest.mark.parametrize(
    ("task", "missing"),
    [("ner", "seqeval"), ("classification", "sklearn"), ("regression", "scipy")],
)
def test_a_missing_library_is_named_before_anything_is_done(
    task, missing, model, write, tmp_path, without
):
    without(missing)
    with pytest.raises(InputError) as error:
        learn(task, model, write, tmp_path / "run")
    assert str(error.value) == f"--task {task} needs {missing}: pip install 'fastbert[finetune]'"
    assert not (tmp_path / "run").exists()


def test_entities_are_not_found_without_seqeval(model, write, tmp_path, without):
    _, file = learn("ner", model, write, tmp_path / "run")
    without("seqeval")
    with pytest.raises(InputError, match="--task ner needs seqeval: pip install"):
        predict(tmp_path / "run", file)
