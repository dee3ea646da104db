"""Each task from files to predictions, on data that can be learnt from a few examples."""

import numpy as np
import pytest
import torch
import transformers

from fastbert.config.finetune import FinetuneConfig
from fastbert.finetune.predict import predict
from fastbert.finetune.train import finetune
from fastbert.train.precision import LOW_PRECISION
from tests.finetune.case import LEARN, OPINIONS, learn

EXHAUSTIVE = pytest.mark.exhaustive
CHINESE_OPINIONS = [
    ("我很喜欢这部电影", "好"),
    ("这部电影很好看", "好"),
    ("我喜欢", "好"),
    ("很好", "好"),
    ("这部电影差极了", "差"),
    ("不好看", "差"),
    ("差", "差"),
    ("我不喜欢这部电影", "差"),
]


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        pytest.param("csv", OPINIONS, id="csv"),
        pytest.param("tsv", CHINESE_OPINIONS, id="tsv of Chinese"),
        pytest.param("jsonl", CHINESE_OPINIONS, id="jsonl of Chinese", marks=EXHAUSTIVE),
    ],
)
def test_classification(model, write, tmp_path, rows, kind):
    if kind == "jsonl":
        contents = [{"sentence": text, "y": label} for text, label in rows]
    else:
        between = {"csv": ",", "tsv": "\t"}[kind]
        contents = "".join(f"{a}{between}{b}\n" for a, b in [("y", "sentence")] + [
            (label, text) for text, label in rows])  # fmt: skip
    file = write(f"opinions.{kind}", contents)
    summary = learn(
        *(model, tmp_path),
        task="classification", train=file, dev=file, text_column="sentence", label_column="y",
    )  # fmt: skip
    assert summary["accuracy"] == summary["macro_f1"] == summary["mcc"] == 1
    labels = sorted({label for _, label in rows})
    assert summary["tables"][1]["rows"] == [(labels[0], 4, 0), (labels[1], 0, 4)]
    said = predict(tmp_path / "run", write(f"new.{kind}", contents))
    assert [one["label"] for one in said] == [label for _, label in rows]
    assert said[0]["probability"] == max(said[0]["probabilities"].values()) > 0.5

    # Hugging Face reads the result and says the same
    latest = tmp_path / "run" / "latest"
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(latest)
    assert theirs.config.id2label == dict(enumerate(labels))
    tokens = transformers.AutoTokenizer.from_pretrained(latest)(
        [text for text, _ in rows], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        shares = theirs.eval()(**tokens).logits.softmax(-1)
    ours = torch.tensor([list(one["probabilities"].values()) for one in said])
    torch.testing.assert_close(ours, shares, atol=1e-5, rtol=1e-4)


def test_pairs_and_whole_numbers_as_labels(model, write, tmp_path):
    """The label is whether the two texts name the same animal, which needs both."""
    animals = ["cat", "dog"]
    rows = [
        {"a": f"the {x}", "b": f"a {y} {z}", "same": int(x == y)}
        for x in animals for y in animals for z in ("red", "blue", "big")
    ]  # fmt: skip
    file = write("pairs.jsonl", rows)
    summary = learn(
        *(model, tmp_path),
        task="classification", train=file, dev=file, epochs=30,
        text_column="a", pair_column="b", label_column="same",
    )  # fmt: skip
    assert summary["accuracy"] == 1
    assert [one["label"] for one in predict(tmp_path / "run", file)] == [
        str(r["same"]) for r in rows
    ]


def test_multilabel(model, write, tmp_path):
    rows = [
        {"text": f"{colour} {animal}".strip(), "label": [x for x in (colour, animal) if x]}
        for colour in ("red", "blue", "") for animal in ("cat", "dog", "")
        if colour or animal
    ] + [{"text": "nothing here", "label": []}]  # fmt: skip
    file = write("tags.jsonl", rows)
    summary = learn(model, tmp_path, task="multilabel", train=file, dev=file, epochs=25)
    assert summary["exact"] == summary["micro_f1"] == summary["macro_f1"] == 1
    said = predict(tmp_path / "run", file)
    assert [sorted(one["labels"]) for one in said] == [sorted(row["label"]) for row in rows]
    table = "".join(f"{row['text']}\t{'|'.join(row['label'])}\n" for row in rows)
    again = write("tags.tsv", "text\tlabel\n" + table)
    options = LEARN | {"epochs": 2, "task": "multilabel", "label_separator": "|"}
    histories = [
        finetune(FinetuneConfig(model=str(model), train=one, dev=one, **options), tmp_path / name)[
            "history"
        ]
        for one, name in ((file, "listed"), (again, "separated"))
    ]
    assert histories[0] == histories[1]


def test_regression(model, write, tmp_path):
    numbers = {"one": 1.0, "two": 2.0, "three": 3.0}
    rows = [{"text": f"{w} {a}", "label": n} for w, n in numbers.items() for a in ("cat", "dog")]
    file = write("numbers.jsonl", rows)
    summary = learn(model, tmp_path, task="regression", train=file, dev=file, epochs=25)
    said = np.array([one["score"] for one in predict(tmp_path / "run", file)])
    truth = np.array([row["label"] for row in rows])
    assert summary["pearson"] > 0.95
    assert summary["mse"] == pytest.approx(((said - truth) ** 2).mean(), rel=1e-3)
    assert summary["pearson"] == pytest.approx(np.corrcoef(said, truth)[0, 1], rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_numbers_are_not_rounded_by_autocast(model, write, tmp_path, precision):
    """bf16 has 8 significant bits, so that from 1024 on its numbers are 8 apart."""
    rows = [{"text": text, "label": 1.0} for text in ("one cat", "two dogs", "three cats")]
    file = write("numbers.jsonl", rows)
    learn(model, tmp_path, task="regression", train=file, dev=file, epochs=1, precision="bf16")
    found = predict(tmp_path / "run", file, precision=precision)
    said = torch.tensor([one["score"] for one in found])
    assert (said != said.to(LOW_PRECISION[precision]).float()).all()


ENTITIES = """john B-PER
lives O
in O
paris B-LOC

mary B-PER
is O
in O
london B-LOC
. O

the O
dog O
is O
in O
berlin B-LOC

张 B-PER
三 I-PER
住 O
在 O
北 B-LOC
京 I-LOC

李 B-PER
四 I-PER
在 O
上 B-LOC
海 I-LOC
"""


def test_ner(model, write, tmp_path):
    file = write("entities.conll", ENTITIES)
    summary = learn(model, tmp_path, task="ner", train=file, dev=file, epochs=20)
    assert summary["f1"] == summary["accuracy"] == 1
    assert [row[0] for row in summary["tables"][0]["rows"]] == ["LOC", "PER"]
    assert [row[4] for row in summary["tables"][0]["rows"]] == [5, 4]
    unlabelled = write("new.conll", "".join(f"{x.split(' ')[0]}\n" for x in ENTITIES.split("\n")))
    said = predict(tmp_path / "run", unlabelled)
    assert said[3]["entities"] == [
        {"type": "PER", "words": ["张", "三"], "start": 0, "end": 2},
        {"type": "LOC", "words": ["北", "京"], "start": 4, "end": 6},
    ]


def squad(*rows) -> dict:
    """(context, question, answer or None) -> SQuAD v2.0."""
    paragraphs = []
    for number, (context, question, answer) in enumerate(rows):
        item = {"id": f"q{number}", "question": question, "is_impossible": answer is None}
        item["answers"] = (
            [] if answer is None else [{"text": answer, "answer_start": context.index(answer)}]
        )
        paragraphs.append({"context": context, "qas": [item]})
    return {"version": "v2.0", "data": [{"title": "all", "paragraphs": paragraphs}]}


ENGLISH_QUESTIONS = [
    ("John lives in Paris.", "Where does John live?", "Paris"),
    ("Mary lives in London.", "Where does Mary live?", "London"),
    ("The cat was in Berlin.", "Where is the cat?", "Berlin"),
    ("John lives in Paris.", "Who lives in Paris?", "John"),
    ("Mary lives in London.", "Who lives in London?", "Mary"),
    ("The cat was in Berlin.", "Who was in Berlin?", "The cat"),
]
CHINESE_QUESTIONS = [
    ("张三住在北京。", "张三住在什么城市？", "北京"),  # noqa: RUF001
    ("李四住在上海。", "李四住在什么城市？", "上海"),  # noqa: RUF001
    ("张三住在北京。", "谁在北京？", "张三"),  # noqa: RUF001
    ("李四住在上海。", "谁在上海？", "李四"),  # noqa: RUF001
]


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(ENGLISH_QUESTIONS, id="squad", marks=EXHAUSTIVE),  # as in the tests below
        pytest.param(CHINESE_QUESTIONS, id="cmrc"),
    ],
)
def test_qa(model, write, tmp_path, rows):
    file = write("squad.json", squad(*rows))
    summary = learn(model, tmp_path, task="qa", train=file, dev=file, epochs=30)
    assert (summary["exact"], summary["f1"]) == (100, 100)
    for said, (context, _, answer) in zip(predict(tmp_path / "run", file), rows, strict=True):
        assert said["answer"] == answer == context[said["start"] : said["end"]]
        assert 0 < said["probability"] <= 1
        assert "null_score_difference" not in said


def test_qa_may_answer_nothing(model, write, tmp_path):
    rows = [*ENGLISH_QUESTIONS[:3], ("The dog is big.", "Where is the dog?", None),
            ("The book is red.", "Where is the book?", None)]  # fmt: skip
    file = write("squad.json", squad(*rows))
    summary = learn(model, tmp_path, task="qa", train=file, dev=file, epochs=30)
    assert summary["exact"] == summary["has_answer_f1"] == summary["no_answer_f1"] == 100
    said = predict(tmp_path / "run", file)
    assert [one["answer"] for one in said] == ["Paris", "London", "Berlin", "", ""]
    assert said[3]["null_score_difference"] > 0 > said[0]["null_score_difference"]


def test_qa_finds_the_answer_in_a_later_window(model, write, tmp_path):
    long = "The book is red and the dog is big. " * 5
    rows = [(long + c, q, a) for c, q, a in ENGLISH_QUESTIONS[:3]]
    rows += [(c + " " + long, q, a) for c, q, a in ENGLISH_QUESTIONS[:3]]
    file = write("squad.json", squad(*rows))
    summary = learn(model, tmp_path, task="qa", train=file, dev=file, epochs=30, stride=8)
    assert (summary["exact"], summary["f1"]) == (100, 100)
    said = predict(tmp_path / "run", file)
    assert [c[p["start"] : p["end"]] for p, (c, _, _) in zip(said, rows, strict=True)] == [
        answer for _, _, answer in rows
    ]


@pytest.mark.parametrize("listed", [False, True])
def test_choice(model, write, tmp_path, listed):
    pairs = [("red", "blue", "green"), ("cat", "dog", "book"), ("one", "two", "three")]
    rows = []
    for words in pairs:
        for right, word in enumerate(words):
            choices = [f"a {other} film" for other in words]
            named = {"choices": choices} if listed else dict(zip("xyz", choices, strict=True))
            rows.append({"text": word, **named, "label": right if listed else "xyz"[right]})
    file = write("choice.jsonl", rows)
    columns = ("choices",) if listed else tuple("xyz")
    summary = learn(
        *(model, tmp_path),
        task="choice", train=file, dev=file, choice_column=columns, epochs=40,
    )  # fmt: skip
    assert summary["accuracy"] == 1
    said = predict(tmp_path / "run", file)
    assert [one["choice"] for one in said] == [0, 1, 2] * 3
    assert said[4]["text"] == "a dog film"
    assert sum(said[0]["probabilities"]) == pytest.approx(1)
