"""The forms in which people have their data, and what is wrong in them, by name and line."""

import json
import re
from functools import partial
from unittest.mock import Mock

import pytest
import transformers

from fastbert.check import InputError
from fastbert.config.finetune import FinetuneConfig
from fastbert.config.options import read_delimiter
from fastbert.data.formats.conll import read_conll
from fastbert.data.formats.squad import read_squad
from fastbert.data.formats.tables import Row, delimited_rows, read_table
from fastbert.finetune import metrics
from fastbert.finetune.infer import TASK_OF
from fastbert.finetune.predict import write_json_lines
from fastbert.finetune.sequences import TextExample
from fastbert.finetune.task import Settings
from fastbert.finetune.tokens import _entities

CONTEXT = "张三住在北京。"
FLAT = {"id": "a", "title": "t", "context": CONTEXT, "question": "谁？"}  # noqa: RUF001


def make_task(name: str, **options):
    config = FinetuneConfig(task=name, train="x", dev="x", model="x", **options)
    return TASK_OF[name](Settings.of(config, 48))


# 19 K and 20.6: SQuAD's and CMRC's forms


def test_cmrc_as_it_was_published(write):
    query = {"query_id": "q1", "query_text": "住在哪里", "answers": ["北京", "京"]}
    file = write("a.json", json.dumps([{"context_id": "c", "context_text": CONTEXT, "title": "t",
                                        "qas": [query]}]))  # fmt: skip
    (question,) = read_squad(file)
    assert (question.id, question.question, question.context) == ("q1", "住在哪里", CONTEXT)
    assert [tuple(answer) for answer in question.answers] == [("北京", 4), ("京", 5)]


@pytest.mark.parametrize("form", ["list", "data", "lines"])
def test_flat_rows_as_hugging_face_gives_them(form, write):
    rows = [FLAT | {"answers": {"text": ["北京"], "answer_start": [4]}},
            FLAT | {"id": "b", "answers": {"text": [], "answer_start": []}}]  # fmt: skip
    contents = {"list": json.dumps(rows), "data": {"data": rows}, "lines": rows}[form]
    one, two = read_squad(write("a.json", contents))
    assert (one.answers[0].start, one.is_impossible) == (4, False)
    assert (two.answers, two.is_impossible) == ((), True)


def test_one_line_is_one_entry(write):
    qas = [{"id": "a", "question": "?", "answers": ["北京"]}]
    for row in (FLAT | {"answers": {"text": ["北京"], "answer_start": [4]}, "data": None},
                {"context_text": CONTEXT, "qas": qas},
                {"paragraphs": [{"context": CONTEXT, "qas": qas}]}):  # fmt: skip
        (question,) = read_squad(write("a.jsonl", [row]))
        assert (question.id, question.answers[0].start) == ("a", 4)


def test_places_in_text_and_questions_without_an_id(write):
    items = [{"question": "?", "answers": [{"text": "北京", "answer_start": "4"}]}] * 2
    file = write("a.json", {"data": [{"paragraphs": [{"context": CONTEXT, "qas": items}]}]})
    assert [(q.id, q.answers[0].start) for q in read_squad(file)] == [("1", 4), ("2", 4)]


def test_null_stands_for_a_value_that_is_missing(write):
    answers = {"text": ["北京"], "answer_start": [4]}
    none = {"text": [], "answer_start": []}
    rows = [
        FLAT | {"id": None, "answers": answers},
        FLAT | {"id": None, "query_id": "q", "answers": answers, "is_impossible": None},
        FLAT | {"id": None, "answers": none, "is_impossible": None},
    ]
    found = read_squad(write("a.json", json.dumps(rows)))
    assert [q.id for q in found] == ["1", "q", "3"]
    assert [q.is_impossible for q in found] == [False, False, True]
    rows[1] = FLAT | {"id": 3, "answers": answers}
    with pytest.raises(InputError, match="question 3: its id occurs twice; a question with"):
        read_squad(write("a.json", json.dumps(rows)))


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([{"text": "北京", "answer_start": "four"}], "a: expected a whole number as answer_start"),
        ([{"text": "北京", "answer_start": None}], "a: expected a whole number as answer_start"),
        ([{"answer_start": 4}], "a: expected an answer with a 'text'"),
        ({"text": ["北京"]}, "a: expected as many 'text' as 'answer_start'"),
        (["上海"], "a: the answer '上海' is not at 0"),
        ("北京", "a: expected a list of answers"),
    ],
)
def test_answers_of_another_form_are_named(answers, message, write):
    with pytest.raises(InputError, match=re.escape(message)):
        read_squad(write("a.json", json.dumps([FLAT | {"answers": answers}])))


@pytest.mark.parametrize("contents", [[1], [{"qas": []}], {"data": 3}, [{"paragraphs": 1}]])
def test_another_json_is_not_in_squads_form(contents, write):
    with pytest.raises(InputError, match="not in SQuAD's form"):
        read_squad(write("a.json", json.dumps(contents)))


def test_json_too_deep_to_be_read_is_named(write):
    deep = "[" * 10**6 + "\n["
    for read in (read_squad, lambda path: read_table(path.rename(path.with_suffix(".jsonl")), [])):
        with pytest.raises(InputError, match=r"a\.json.*: not JSON \(maximum recursion depth"):
            read(write("a.json", deep))


# 19 K: CoNLL and tables


def test_comments_of_conll_u_are_left_out_and_the_word_is_not(write):
    text = (
        "# newdoc\n# sent_id = 1\n# text = We are No. # 1 O\nWe O\n# O\n1 B-X\n\n# id = 3\nEnd O\n"
    )
    one, two = read_conll(write("a.conll", text))
    assert (one.words, two.words) == (("We", "#", "1"), ("End",))
    words = read_conll(write("b.conll", "# text = a\nWe\n#\n1\n"), labelled=False)
    assert words[0].words == ("We", "#", "1")


def test_tables_with_another_delimiter(write):
    for name, character in (("a.csv", ";"), ("a.tsv", "|"), ("b.csv", "\t")):
        file = write(name, f"text{character}label\na b, c{character}x\n")
        (row,) = read_table(file, ["text", "label"], character)
        assert row.values == {"text": "a b, c", "label": "x"}
    for given in ("\\t", "tab", "\t"):
        assert read_delimiter(given) == "\t"
    for given in ("", ";;", '"', "\n"):
        with pytest.raises(InputError, match="--delimiter: expected a character"):
            read_delimiter(given)


@pytest.mark.parametrize("character", [";", "\t", "|"])
def test_a_header_that_is_not_divided_suggests_the_delimiter(character, write):
    shown = "\\t" if character == "\t" else character
    with pytest.raises(InputError, match=re.escape(f"give --delimiter '{shown}'")):
        read_table(write("a.csv", f"text{character}label\na{character}x\n"), ["text"])


def test_blanks_in_cells_stay_and_around_names_go(write):
    (row,) = read_table(write("a.tsv", " text \tlabel\u00a0\n a  b \tx\n"), ["text", "label"])
    assert row.values == {"text": " a  b ", "label": "x"}


def test_a_table_without_a_header_is_refused(write, tmp_path):
    for text, message in (
        ("\ntext\na\n", "line 1: expected the names of the columns"),
        ("text\n", "has a header but no rows"),
    ):
        with pytest.raises(InputError, match=message):
            read_table(write("a.csv", text), ["text"])
    with pytest.raises(InputError, match="line 1: expected the names of the columns"):
        list(delimited_rows([], tmp_path / "a.csv", ["text"], ".csv", longest=9))


def test_a_field_may_be_as_long_as_it_is(write):
    long = "word " * 40_000
    (row,) = read_table(write("a.csv", f'text\n"{long}"\n'), ["text"])
    assert row.text("text") == long


# 19 O and 20.6: where it is wrong


def test_an_unclosed_quote_is_reported_where_it_opens(write):
    lines = ["text,label", "a,x", '"two', 'lines",x', '"b,x', *["c,x"] * 50]
    with pytest.raises(InputError, match=r"line 5: .*which goes on to line 55, but no mark closes"):
        read_table(write("a.csv", "\n".join(lines) + "\n"), ["text"])
    lines[-1] = 'a "quoted" word,x'
    with pytest.raises(InputError, match=r"line 5: .*goes on to line"):
        read_table(write("b.csv", "\n".join(lines) + "\n"), ["text"])


def test_a_row_of_several_lines_is_named_by_its_first(write):
    rows = read_table(write("a.csv", 'text\n"one\ntwo"\nthree\n'), ["text"])
    assert [row.where[-6:] for row in rows] == ["line 2", "line 4"]


def test_what_is_not_utf_8_is_named_by_its_line(tmp_path):
    (tmp_path / "a.csv").write_bytes("text,label\nok,x\nschön,y\n".encode("latin-1"))
    for read in (lambda p: read_table(p, ["text"]), read_conll, read_squad):
        with pytest.raises(InputError, match=r"a\.csv, line 3: not UTF-8; convert the file"):
            read(tmp_path / "a.csv")


# 19 N and 20.4: labels


@pytest.mark.parametrize("given", ["pos ", " pos", "pos\u00a0", "\u202fpos\t", "pos"])
def test_blanks_around_a_label_are_none_of_it(given, write):
    assert Row("x", {"label": given}).label("label") == "pos"
    task = make_task("multilabel")
    assert task.target(Row("x", {"label": f"{given},neg"}), True) == ("pos", "neg")
    assert task.target(Row("x", {"label": [given]}), True) == ("pos",)


def test_labels_are_compared_as_composed(write):
    assert Row("x", {"label": "e\u0301"}).label("label") == "é"
    (sentence,) = read_conll(write("a.conll", "x B-e\u0301\u00a0\n"))
    assert sentence.labels == ("B-é",)
    task = make_task("classification", class_weight=("e\u0301 =3",))
    examples = [TextExample("x", ("a",), label) for label in ("é", "b")]
    task.learn(examples)
    task.weigh(FinetuneConfig(task="classification", train="x", dev="x", model="x",
                              class_weight=("e\u0301 =3",)), examples)  # fmt: skip
    assert task.weights.tolist() == [1, 3]


def test_labels_alike_but_for_case_are_named_once():
    task = make_task("classification")
    with pytest.warns(UserWarning, match="labels 'Pos' and 'pos' differ only in case") as said:
        task.learn([TextExample("x", ("a",), label) for label in ("pos", "Pos", "neg", "pos")])
    assert len(said) == 1
    assert task.labels == ["Pos", "neg", "pos"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "", " \u00a0", {}, []])
def test_what_is_no_label_is_none(value):
    with pytest.raises(InputError, match="expected a label in column 'label'"):
        Row("x", {"label": value}).label("label")


@pytest.mark.parametrize(
    "labels",
    [
        "B-PER L-PER O U-LOC B-ORG I-ORG L-ORG",
        "B-PER E-PER O S-LOC B-ORG M-ORG E-ORG",
        "B-PER E-PER O W-LOC B-ORG M-ORG E-ORG",
        "B-PER E-PER O S-LOC B-ORG I-ORG E-ORG",
    ],
    ids=["BILOU", "BMES", "BMEWO", "IOBES"],
)
def test_entities_of_every_scheme(labels, write):
    text = "".join(f"w{i} {label}\n" for i, label in enumerate(labels.split()))
    (sentence,) = read_conll(write("a.conll", text))
    assert list(sentence.labels) == labels.split()
    report = metrics.entities([sentence.labels], [sentence.labels])
    assert {row[0]: row[4] for row in report.tables[0].rows} == {"LOC": 1, "ORG": 1, "PER": 1}
    assert report.metrics["f1"] == report.metrics["accuracy"] == 1
    found = _entities(sentence.words, list(sentence.labels))
    assert [(e["type"], e["start"], e["end"]) for e in found] == [
        ("PER", 0, 2), ("LOC", 3, 4), ("ORG", 4, 7),
    ]  # fmt: skip


def test_a_label_without_a_prefix_is_a_type():
    """Such as a part of speech; what is expected is what Hugging Face's pipeline makes of them."""
    labels = ["NOUN", "NOUN", "VERB", "O", "PER", "B-PER", "I-PER", "B"]
    rows = [{"entity": label, "score": 1.0, "word": "w", "start": i, "end": i + 1}
            for i, label in enumerate(labels)]  # fmt: skip
    theirs = Mock(tokenizer=Mock(convert_tokens_to_string=" ".join))
    pipeline = transformers.TokenClassificationPipeline
    theirs.get_tag = partial(pipeline.get_tag, theirs)
    theirs.group_sub_entities = partial(pipeline.group_sub_entities, theirs)
    expected = [
        (group["entity_group"], group["start"], group["end"])
        for group in pipeline.group_entities(theirs, rows)
        if group["entity_group"] != "O"
    ]
    found = _entities(["w"] * len(labels), labels)
    assert [(e["type"], e["start"], e["end"]) for e in found] == expected
    assert expected[:2] == [("NOUN", 0, 2), ("VERB", 2, 3)]


def test_two_entities_of_one_word_side_by_side_are_two():
    truth = [["U-PER", "U-PER", "O"]]
    assert metrics.entities(truth, truth).tables[0].rows[0][4] == 2


def test_a_support_of_one_prints_as_one():
    report = metrics.classification(["a", "b"], ["a", "b"], ["a", "b"])
    assert [row[4] for row in report.tables[0].rows] == [1, 1]
    assert all(isinstance(row[4], int) for row in report.tables[0].rows)


def test_carriage_returns_alone_end_the_rows_of_a_table(write):
    table = write("a.csv", 'text,label\rone,x\r"two\rthree",y\r')
    assert [row.values["text"] for row in read_table(table, ["text"])] == ["one", "two\rthree"]


def test_a_row_of_json_lines_ends_at_a_newline_alone(write):
    """Not at the other ends of lines that Unicode has, which may stand in a text."""
    file = write("a.jsonl", [{"text": "a \u2028 b \x85 c"}, {"text": "d"}])
    assert [row.text("text") for row in read_table(file, ["text"])] == ["a \u2028 b \x85 c", "d"]


def test_half_a_surrogate_pair_is_no_text(write, tmp_path):
    """Which JSON can spell; the tokenizer and UTF-8 know none."""
    file = write("a.jsonl", '{"text": "a \\ud800 b", "label": "\\udfff"}\n')
    (row,) = read_table(file, ["text", "label"])
    assert (row.text("text"), row.label("label")) == ("a ? b", "?")
    whole, context = {"text": ["京 \ud800"], "answer_start": [3]}, "\ud800 北京 \ud800"
    for answers, place in (
        (["北京"], ("北京", 2)),
        (["京 \ud800"], ("京 ?", 3)),
        (whole, ("京 ?", 3)),
    ):
        flat = json.dumps(FLAT | {"context": context, "answers": answers})
        (question,) = read_squad(write("b.json", f"[{flat}]"))
        assert question.context == "? 北京 ?"
        assert question.answers == (place,)
    write_json_lines(tmp_path / "out.jsonl", [{"text": "a \ud800 é"}])
    assert (tmp_path / "out.jsonl").read_bytes() == '{"text": "a \\ud800 é"}\n'.encode()
