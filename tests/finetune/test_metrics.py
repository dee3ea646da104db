"""Every metric against values worked out by hand."""

import warnings

import pytest

from fastbert.finetune import metrics
from fastbert.finetune.squad_metrics import score_answers


def test_classification():
    truth, predicted = list("aaabbc"), list("aabbbb")
    report = metrics.classification(truth, predicted, ["a", "b", "c"])
    # F1: a 2*2/(3+2), b 2*2/(2+4), c 0
    assert report.metrics["accuracy"] == pytest.approx(4 / 6)
    assert report.metrics["macro_f1"] == pytest.approx((4 / 5 + 4 / 6 + 0) / 3)
    by_label, confusion = report.tables
    assert by_label.rows[1] == ("b", pytest.approx(2 / 4), 1.0, pytest.approx(2 / 3), 2.0)
    assert confusion.rows == [("a", 2, 1, 0), ("b", 0, 2, 0), ("c", 0, 1, 0)]


def test_matthews_correlation():
    # tp 2, tn 1, fp 1, fn 0: (2*1 - 1*0) / sqrt(3*2*2*1)
    report = metrics.classification(list("1100"), list("1110"), ["0", "1"])
    assert report.metrics["mcc"] == pytest.approx(2 / 12**0.5)


def test_what_is_undefined_is_zero_and_warns_of_nothing():
    with warnings.catch_warnings(action="error"):
        of_texts = metrics.classification(["a", "a"], ["a", "a"], ["a", "b"]).metrics
        of_sets = metrics.multilabel([(), ()], [(), ()], ["a", "b"]).metrics
        of_numbers = metrics.regression([1.0, 1.0], [1.0, 2.0]).metrics
        of_words = metrics.entities([["B-X", "O"]], [["O", "O"]]).metrics
    assert of_texts == {"accuracy": 1, "macro_f1": 0.5, "mcc": 0}
    assert of_sets == {"micro_f1": 0, "macro_f1": 0, "exact": 1}
    assert of_numbers == {"pearson": 0, "spearman": 0, "mse": 0.5, "mae": 0.5}
    assert of_words == {"precision": 0, "recall": 0, "f1": 0, "accuracy": 0.5}


def test_multilabel():
    truth, predicted = [("a",), ("a", "b"), ()], [("a", "b"), ("b",), ()]
    report = metrics.multilabel(truth, predicted, ["a", "b", "c"])
    # a: tp 1, fn 1; b: tp 1, fp 1; c: never, so 0
    assert report.metrics["micro_f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert report.metrics["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert report.metrics["exact"] == pytest.approx(1 / 3)


def test_regression():
    report = metrics.regression([1.0, 2.0, 3.0], [1.0, 4.0, 3.0])
    assert report.metrics["mse"] == pytest.approx(4 / 3)
    assert report.metrics["mae"] == pytest.approx(2 / 3)
    assert report.metrics["spearman"] == pytest.approx(0.5)  # 1 - 6 * 2 / (3 * 8)
    assert report.metrics["pearson"] == pytest.approx(2 / (2 * 14 / 3) ** 0.5)
    assert metrics.regression([1.0, 2.0], [3.0, 3.0]).metrics["pearson"] == 0


def test_entities_count_as_wholes():
    truth = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC", "O"]]
    predicted = [["B-PER", "O", "O", "B-LOC"], ["B-LOC", "B-PER"]]
    report = metrics.entities(truth, predicted)
    # of 3 true and 4 predicted entities 2 agree in type and both ends
    assert report.metrics["precision"] == pytest.approx(2 / 4)
    assert report.metrics["recall"] == pytest.approx(2 / 3)
    assert report.metrics["f1"] == pytest.approx(4 / 7)
    assert report.metrics["accuracy"] == pytest.approx(4 / 6)
    assert report.tables[0].rows == [("LOC", 1, 1, 1, 2), ("PER", 0, 0, 0, 1)]
    nothing = metrics.entities([["O", "O"]], [["O", "O"]])
    assert nothing.metrics["accuracy"] == 1


@pytest.mark.parametrize("name", ["accuracy", "micro avg", "macro avg", "samples avg"])
def test_a_label_may_have_the_name_of_a_mean(name):
    row = (name, 1.0, 0.5, pytest.approx(2 / 3), 2)
    of_texts = metrics.classification([name, name, "a"], [name, "a", "a"], [name, "a"])
    of_sets = metrics.multilabel([(name,), (name,)], [(name,), ()], [name, "a"])
    of_words = metrics.entities([[f"B-{name}", f"B-{name}"]], [[f"B-{name}", "O"]])
    assert [report.tables[0].rows[0] for report in (of_texts, of_sets, of_words)] == [row] * 3


@pytest.mark.parametrize(
    ("answers", "guess", "exact", "f1"),
    [
        (["The Cat!"], "cat", 100, 100),  # case, article and punctuation do not count
        (["an apple"], "apples", 0, 0),
        (["the old red cat"], "cat red", 0, 100 * 2 * 2 / (3 + 2)),  # order does not count
        (["cat cat"], "cat", 0, 100 * 2 / 3),  # but how often
        (["dog", "red cat"], "cat", 0, 100 * 2 / 3),  # the best answer
        ([], "", 100, 100),
        ([], "cat", 0, 0),
        (["cat"], "", 0, 0),
        (["theatre"], "atre", 0, 0),  # an article is a word
        (["cat", "the"], "", 0, 0),  # of "the" nothing is left, which is not "no answer"
    ],
)
def test_squad(answers, guess, exact, f1):
    report = score_answers([answers], [guess], ["where is it?"])
    assert report.metrics["exact"] == pytest.approx(exact)
    assert report.metrics["f1"] == pytest.approx(f1)


@pytest.mark.parametrize(
    ("answers", "guess", "exact", "f1"),
    [
        (["北京，上海。"], "北京上海", 100, 100),  # noqa: RUF001
        (["北京市"], "北京", 0, 100 * 2 * 2 / (3 + 2)),
        (["北京上海"], "上海北京", 0, 100 * 2 * 2 / (4 + 4)),  # the longest common run
        (["2018年"], "2018", 0, 100 * 2 * 1 / (2 + 1)),  # a number is one unit
        (["3.5亿"], "3.5", 0, 100 * 2 * 1 / (2 + 1)),  # with its decimals
        (["12,000.5人"], "12,000.5", 0, 100 * 2 * 1 / (2 + 1)),  # and its thousands
        (["北京……上海"], "北京上海", 0, 100 * 2 * 2 / (5 + 4)),  # dots are not removed
        (["the cat"], "cat", 0, 100 * 2 / 3),  # articles count here
    ],
)
def test_cmrc(answers, guess, exact, f1):
    report = score_answers([answers], [guess], ["在什么城市？"])  # noqa: RUF001
    assert report.metrics["exact"] == pytest.approx(exact)
    assert report.metrics["f1"] == pytest.approx(f1)


def test_questions_with_and_without_an_answer_apart():
    report = score_answers([["cat"], ["dog"], []], ["cat", "", "cat"], ["where?"] * 3)
    assert report.metrics == {
        "exact": pytest.approx(100 / 3),
        "f1": pytest.approx(100 / 3),
        "has_answer_exact": 50,
        "has_answer_f1": 50,
        "no_answer_exact": 0,
        "no_answer_f1": 0,
    }
