"""Texts that are read in windows, and the words of those whose entities are wanted."""

import time

import pytest

from fastbert.check import InputError
from fastbert.config.serve import ServeConfig
from fastbert.serve.loading import load
from fastbert.serve.predictions import word_places
from tests.serve.running import is_alike, running


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        ("BertForTokenClassification", "john lives in paris " * 20),
        (
            "BertForQuestionAnswering",
            {"question": "who ?", "context": "john lives in paris , " * 9},
        ),
    ],
)
def test_what_is_read_in_windows_is_not_cut(kind, inputs, elsewhere):
    labels = {"id2label": {0: "O", 1: "B-PER"}} if "Token" in kind else {}
    directory, *_ = elsewhere(kind, **labels)
    with running(directory, truncate=True, max_seq_len=12) as server:
        whole = server.answer("/predict", inputs=inputs)
        assert is_alike(server.answer("/predict", inputs=inputs, truncate=False), whole)
        for option in ("truncate", "raw_scores"):
            said = server.refusal("/predict", 422, inputs=inputs, **{option: True})
            assert said.startswith(f"{option}: not for ")
    if "Token" in kind:
        assert len(whole["words"]) == 80


def test_a_length_in_which_the_windows_of_the_training_do_not_fit_is_an_error(learn):
    conll = "john B-PER\nlives O\nin O\nparis B-LOC\n\n"
    run, _ = learn("ner", "words.conll", conll, max_seq_len=16, stride=8)
    with pytest.raises(InputError, match=r"-len: expected at least 11, .* share 8 tokens, got 10"):
        load(ServeConfig(model=str(run), max_seq_len=10))
    with running(run, max_seq_len=11) as server:
        assert len(server.answer("/predict", inputs="john lives " * 20)["words"]) == 40


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("un cafe\u0301, cafe\u0301-bar", ["un", "cafe\u0301", ",", "cafe\u0301-bar"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("北\u0301京 \u0301a", ["北\u0301", "京", "\u0301", "a"]),
        ("a \u2764\ufe0f b", ["a", "\u2764\ufe0f", "b"]),
        ("می\u200cشود क्\u200dष", ["می\u200cشود", "क्\u200dष"]),
        ("\ufeffa\u00adb \u200e c\u200bd", ["a\u00adb", "c", "d"]),
        ("北\u2060京", ["北\u2060", "京"]),
    ],
)
def test_combining_marks_and_invisible_characters_belong_to_their_words(text, words):
    assert [text[start:end] for start, end in word_places(text)] == words


def test_texts_of_too_many_windows_are_refused_at_once(elsewhere):
    """One with windows that move by a token each would take gigabytes."""
    directory, _, _ = elsewhere("BertForQuestionAnswering")
    question = "a " * (48 - 3 - 48 // 4 - 1)  # which leaves one token more than windows share
    for inputs, said in (
        ([{"question": question, "context": "the " * 100_000}], "99988 windows, more than 100"),
        ([{"question": question, "context": "the " * 90}] * 20, "more than 100 windows"),
    ):
        with running(directory, max_queue=100) as server:
            began = time.perf_counter()
            assert said in server.refusal("/predict", 413, inputs=inputs)
            assert time.perf_counter() - began < 5


def test_a_question_that_leaves_no_room_is_refused_with_what_a_client_can_do(elsewhere):
    directory, _, _ = elsewhere("BertForQuestionAnswering")
    inputs = {"question": "a " * 40, "context": "the " * 90}
    with running(directory) as server:
        said = server.refusal("/predict", 413, inputs=inputs)
        assert said.endswith("cannot share 12; shorten the question")


def test_entities_of_a_long_text_are_found_in_time(elsewhere):
    labels = {0: "O", 1: "B-PER"}
    directory, _, _ = elsewhere("BertForTokenClassification", id2label=labels)
    with running(directory, max_queue=100_000) as server:
        ability = server.server.served.prediction
        began = time.perf_counter()
        features = ability.features([("john lives " * 20_000,)], False)
        assert time.perf_counter() - began < 10
    words = [word for feature in features for word in feature.target.words if word >= 0]
    assert sorted(words) == list(range(40_000))
