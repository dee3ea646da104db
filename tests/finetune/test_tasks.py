"""Each task from files to predictions, on data that can be learnt from a few examples."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from fastbert.check import InputError
from fastbert.config.finetune import FinetuneConfig
from fastbert.finetune import train
from fastbert.finetune.predict import predict
from fastbert.finetune.sequences import Classification
from fastbert.finetune.train import finetune
from fastbert.train.optimizer import clipped_step, finetuning_optimizer

EXHAUSTIVE = pytest.mark.exhaustive
LEARN = {"epochs": 20, "batch_size": 8, "learning_rate": 2e-3, "precision": "fp32"}


def learn(model, tmp_path, **options) -> dict:
    return finetune(FinetuneConfig(model=str(model), **LEARN | options), tmp_path / "run")


OPINIONS = [
    ("the film was good", "pos"),
    ("a very good book", "pos"),
    ("fine film", "pos"),
    ("a fine book and a good film", "pos"),
    ("the film was awful", "neg"),
    ("a very bad book", "neg"),
    ("awful film", "neg"),
    ("a bad book and an awful film", "neg"),
]
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


def test_gradients_that_are_not_finite_end_the_run(model, write, tmp_path, monkeypatch):
    """By a sentence at the end of their epoch, although the loss is finite."""

    def overflowing(built, *options):
        built.classifier.weight.register_hook(lambda gradient: gradient * math.inf)
        return finetuning_optimizer(built, *options)

    monkeypatch.setattr(train, "finetuning_optimizer", overflowing)
    file = write("opinions.csv", "text,label\n" + "".join(f"{a},{b}\n" for a, b in OPINIONS))
    with pytest.raises(InputError, match=r"gradients are not finite in epoch 1; .*--learning-rate"):
        learn(model, tmp_path, task="classification", train=file, dev=file)


def test_a_step_has_its_dropout_its_total_weight_and_clipping(model, write, tmp_path, monkeypatch):
    states, totals, norms = [], [], []

    def loss(task, built, batch, features, total):
        states.append(batch.dropout_state.tolist())
        totals.append((total, sum(4.0 if f.target else 1.0 for f in features)))
        return own_loss(task, built, batch, features, total)

    def step(optimizer, parameters, max_norm):
        norms.append(max_norm)
        return clipped_step(optimizer, parameters, max_norm)

    own_loss = Classification.loss
    monkeypatch.setattr(Classification, "loss", loss)
    monkeypatch.setattr(train, "clipped_step", step)
    file = write("opinions.csv", "text,label\n" + "".join(f"{a},{b}\n" for a, b in OPINIONS))
    options = {"epochs": 2, "batch_size": 3, "seed": 5, "class_weight": ("pos=4",)}
    options |= {"task": "classification", "train": file, "dev": file, "max_grad_norm": 0.5}
    learn(model, tmp_path, **options)
    assert states == [[5, number] for number in range(6)]
    assert all(total == weight for total, weight in totals)
    assert len({total for total, _ in totals}) > 1
    assert norms == [0.5] * 6


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


def test_the_same_config_gives_the_same_run_in_any_number_of_parts(model, write, tmp_path):
    """Dropout is on: its masks follow the examples, not the parts of a batch."""
    directory = tmp_path / "model"
    directory.mkdir()
    for file in model.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((directory / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    (directory / "config.json").write_text(json.dumps(config))
    rows = [{"text": text, "label": label} for text, label in OPINIONS]
    file = write("opinions.jsonl", rows)
    weights = []
    for name, limit in (("one", 4096), ("same", 4096), ("parts", 10)):
        options = {**LEARN, "epochs": 2, "batch_tokens": limit, "class_weight": ("pos=3",)}
        config = FinetuneConfig(
            model=str(directory), task="classification", train=file, dev=file, **options
        )
        finetune(config, tmp_path / name)
        weights.append(load_file(tmp_path / name / "latest" / "model.safetensors"))
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
        torch.testing.assert_close(tensor, weights[2][name], atol=2e-4, rtol=1e-3)


def test_early_stopping_keeps_the_best_epoch(model, write, tmp_path):
    """At a rate of next to nothing no epoch is better than the first."""
    rows = [{"text": text, "label": label} for text, label in OPINIONS]
    file = write("opinions.jsonl", rows)
    summary = learn(
        *(model, tmp_path),
        task="classification", train=file, dev=file, learning_rate=1e-12, patience=2,
    )  # fmt: skip
    assert [row["epoch"] for row in summary["history"]] == [1, 2, 3]
    assert summary["best_epoch"] == 1
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    assert (tmp_path / "run" / "latest").resolve().name == "checkpoint-1"
    with pytest.raises(InputError, match="holds a run already"):
        learn(model, tmp_path, task="classification", train=file, dev=file)


def test_the_test_data_measure_the_best_epoch_not_the_last(model, write, tmp_path):
    """The dev data say the opposite of what is learnt, so that an early epoch is the best."""
    numbers = {"one": 1.0, "two": 2.0, "three": 3.0}
    rows = [{"text": f"the {word} cat", "label": n} for word, n in numbers.items()]
    file = write("train.jsonl", rows)
    dev = write("dev.jsonl", [row | {"label": 4 - row["label"]} for row in rows])
    summary = learn(
        *(model, tmp_path),
        task="regression", train=file, dev=dev, test=file, epochs=25, metric="mse",
    )  # fmt: skip
    said = np.array([one["score"] for one in predict(tmp_path / "run", file)])
    error = ((said - [1, 2, 3]) ** 2).mean()
    assert summary["test"]["mse"] == pytest.approx(error, rel=1e-4)
    assert summary["best_epoch"] < 25
    assert error > 0.1


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_predictions_are_computed_as_the_model_was_measured(model, write, tmp_path, precision):
    """On whatever machine: `auto` may stand there for the other precision."""
    rows = [{"text": text, "label": float(n)} for n, (text, _) in enumerate(OPINIONS)]
    file = write("rows.jsonl", rows)
    summary = learn(
        model, tmp_path, task="regression", train=file, dev=file, epochs=1, precision=precision
    )
    truth = np.arange(len(rows))
    errors = {
        name: ((np.array([one["score"] for one in said]) - truth) ** 2).mean()
        for name, said in (
            ("default", predict(tmp_path / "run", file)),
            ("bf16", predict(tmp_path / "run", file, precision="bf16")),
            ("fp32", predict(tmp_path / "run", file, precision="fp32")),
        )
    }
    assert errors["default"] == errors[precision]
    assert errors["bf16"] != errors["fp32"]
    assert summary["mse"] == pytest.approx(errors[precision], rel=1e-6)


@pytest.mark.parametrize("task", ["classification", "multilabel"])
def test_a_rare_label_may_fall_into_the_share_to_measure_by(model, write, tmp_path, task):
    """Whichever part of the file it falls into, the run ends with a loss that is a number."""
    rows = [{"text": "a cat", "label": label} for label in ("x", "y", "x", "y", "z")]
    if task == "multilabel":
        rows = [row | {"label": [row["label"]]} for row in rows]
    file = write("rare.jsonl", rows)
    where = set()
    for seed in range(6):
        summary = finetune(
            FinetuneConfig(
                model=str(model), task=task, train=file, dev_share=0.2, epochs=1, seed=seed,
                class_weight=("balanced",), precision="fp32",
            ),
            tmp_path / str(seed),
        )  # fmt: skip
        support = {name: count for name, *_, count in summary["tables"][0]["rows"]}
        where.add(support["z"])
        assert math.isfinite(summary["history"][0]["loss"])
    assert where == {0, 1}
