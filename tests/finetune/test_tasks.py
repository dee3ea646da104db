"""Every task end to end by the command line: learns a rule, keeps the best epoch, predicts."""

import csv
import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

from fastbert.data import load_tokenizer

COMMAND = [sys.executable, "-m", "fastbert.cli"]
FAST = ["--epochs", "6", "--learning-rate", "3e-3", "--batch-size", "16", "--dropout", "0"]
WORDS = "the cat sat on a mat while dogs ran away from birds in".split()  # noqa: SIM905


def cli(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True)


def finetune(model, out, task, train, dev, *options):
    done = cli("finetune", "--task", task, "--train", train, "--dev", dev, "--model", model,
               "--out", out, *FAST, *options)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads((out / "summary.json").read_text()), done.stdout


def predict(model, path, tmp_path):
    out = tmp_path / "predictions.jsonl"
    done = cli("predict", "--model", model, "--input", path, "--out", out)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()]


def sentence(rng, *marks):
    words = rng.choices(WORDS, k=rng.randint(3, 12))
    for mark in marks:
        words.insert(rng.randrange(len(words) + 1), mark)
    return " ".join(words)


def write_table(path, columns, rows):
    if path.suffix == ".jsonl":
        lines = (json.dumps(dict(zip(columns, row, strict=True))) for row in rows)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path
    with path.open("w", newline="", encoding="utf-8") as file:
        kind = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
        csv.writer(file, **kind).writerows([columns, *rows])
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_classification(model, tmp_path, suffix):
    rng = random.Random(0)
    rows = [(sentence(rng, mark), mark) for mark in ["good", "bad"] * 80]
    train = write_table(tmp_path / f"train{suffix}", ("text", "label"), rows[:120])
    dev = write_table(tmp_path / f"dev{suffix}", ("text", "label"), rows[120:])
    summary, said = finetune(model, tmp_path / "out", "classification", train, dev)
    assert summary["accuracy"] > 0.95
    assert summary["majority"] == 0.5
    assert "confusion" in said
    # as the dev file says, and as Hugging Face computes it
    found = predict(tmp_path / "out", dev, tmp_path)
    right = [row["label"] == label for row, (_, label) in zip(found, rows[120:], strict=True)]
    assert np.mean(right) == pytest.approx(summary["accuracy"])
    latest = tmp_path / "out" / "latest"
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(latest)
    assert theirs.config.id2label == {0: "bad", 1: "good"}
    ids = transformers.AutoTokenizer.from_pretrained(latest)(rows[121][0], return_tensors="pt")
    probabilities = theirs(**ids).logits.softmax(-1)[0].tolist()
    assert found[1]["probabilities"]["good"] == pytest.approx(probabilities[1], abs=1e-4)


def test_pairs_in_chinese_with_layer_decay_and_balance(model, tmp_path):
    rng = random.Random(0)
    rows = [
        ("北京" if rng.random() < 0.5 else "上海", rng.choice(["天气好", "天气坏", "我喜欢"]))
        for _ in range(160)
    ]
    rows = [(a, b, "yes" if b.endswith("好") else "no") for a, b in rows]
    columns = ("city", "said", "fine")
    train = write_table(tmp_path / "train.csv", columns, rows[:120])
    dev = write_table(tmp_path / "dev.csv", columns, rows[120:])
    names = ("--text-column", "city", "--pair-column", "said", "--label-column", "fine")
    options = (*names, "--layer-decay", "0.9", "--balance", "--patience", "2")
    summary, _ = finetune(model, tmp_path / "out", "classification", train, dev, *options)
    assert summary["accuracy"] == 1.0
    assert len(summary["history"]) < 6  # nothing better than all right
    # tokenised as Hugging Face's own tokenizer does
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path / "out" / "latest")
    encoding = load_tokenizer(tmp_path / "out" / "latest").encode("北京", "天气好,Paris")
    assert encoding.ids == theirs("北京", "天气好,Paris")["input_ids"]
    assert encoding.type_ids == theirs("北京", "天气好,Paris")["token_type_ids"]


def test_multilabel(model, tmp_path):
    rng = random.Random(0)
    rows = []
    for _ in range(200):
        marks = [mark for mark in ("good", "bad", "Paris") if rng.random() < 0.4]
        rows.append((sentence(rng, *marks), "|".join(marks)))
    train = write_table(tmp_path / "train.csv", ("text", "label"), rows[:150])
    dev = write_table(tmp_path / "dev.csv", ("text", "label"), rows[150:])
    summary, _ = finetune(model, tmp_path / "out", "multilabel", train, dev, "--epochs", "15")
    assert summary["micro_f1"] > 0.9
    found = predict(tmp_path / "out", dev, tmp_path)
    exact = np.mean(
        [set(row["labels"]) == set(filter(None, labels.split("|")))
         for row, (_, labels) in zip(found, rows[150:], strict=True)]
    )  # fmt: skip
    assert exact == pytest.approx(summary["exact_match"])


def test_regression(model, tmp_path):
    rng = random.Random(0)
    rows = []
    for _ in range(200):
        value = rng.choice([0.0, 1.0, 2.0])
        rows.append((sentence(rng, *["good"] * int(value)), value))
    train = write_table(tmp_path / "train.jsonl", ("text", "label"), rows[:150])
    dev = write_table(tmp_path / "dev.jsonl", ("text", "label"), rows[150:])
    summary, _ = finetune(model, tmp_path / "out", "regression", train, dev)
    assert summary["r2"] > 0.5
    values = np.array([row["value"] for row in predict(tmp_path / "out", dev, tmp_path)])
    truth = np.array([value for _, value in rows[150:]])
    residual = ((values - truth) ** 2).sum() / ((truth - truth.mean()) ** 2).sum()
    assert summary["r2"] == pytest.approx(1 - residual, abs=1e-4)
    assert summary["pearson"] == pytest.approx(np.corrcoef(values, truth)[0, 1], abs=1e-4)


def test_ner_with_windows(model, tmp_path):
    rng = random.Random(0)
    labels = {"Ann": "B-PER", "Bob": "B-PER", "Paris": "B-LOC", "北": "B-LOC", "京": "I-LOC"}

    def text():
        words = []
        for _ in range(rng.randint(4, 90)):  # some are longer than the model
            words += rng.choice(
                [["Ann"], ["Bob"], ["Paris"], ["北", "京"], *[["cat"], ["sat"]] * 2]
            )
        return words

    def write(path, sentences, labelled=True):
        lines = (
            "\n".join(f"{word} {labels.get(word, 'O')}" if labelled else word for word in words)
            for words in sentences
        )
        path.write_text("-DOCSTART- O\n\n" + "\n\n".join(lines) + "\n", encoding="utf-8")
        return path

    sentences = [text() for _ in range(60)]
    train = write(tmp_path / "train.txt", sentences[:45])
    dev = write(tmp_path / "dev.txt", sentences[45:])
    summary, said = finetune(model, tmp_path / "out", "ner", train, dev, "--stride", "8")
    assert summary["f1"] > 0.9
    assert "by entity" in said
    new = write(tmp_path / "new.txt", sentences[45:], labelled=False)
    found = predict(tmp_path / "out", new, tmp_path)
    assert [row["words"] for row in found] == sentences[45:]
    right = [
        label == labels.get(word, "O")
        for row in found
        for word, label in zip(row["words"], row["labels"], strict=True)
    ]
    assert np.mean(right) == pytest.approx(summary["accuracy"])


def test_choice(model, tmp_path):
    rng = random.Random(0)
    rows = []
    for _ in range(160):
        right = rng.randrange(3)
        choices = [sentence(rng, "good" if i == right else "bad") for i in range(3)]
        rows.append((sentence(rng), choices, right))
    columns = ("text", "choices", "label")
    train = write_table(tmp_path / "train.jsonl", columns, rows[:120])
    dev = write_table(tmp_path / "dev.jsonl", columns, rows[120:])
    summary, _ = finetune(model, tmp_path / "out", "choice", train, dev)
    assert summary["accuracy"] > 0.9
    found = predict(tmp_path / "out", dev, tmp_path)
    right = [row["label"] == label for row, (*_, label) in zip(found, rows[120:], strict=True)]
    assert np.mean(right) == pytest.approx(summary["accuracy"])
    assert found[0]["choice"] == rows[120][1][found[0]["label"]]


@pytest.mark.parametrize("language", ["english", "chinese"])
def test_reading_comprehension(model, tmp_path, language):
    rng = random.Random(0)
    between, names, fill = (
        (" ", ["Ann", "Bob", "Paris"], WORDS)
        if language == "english"
        else ("", ["北京", "上海"], list("今天气好坏我不他在"))
    )
    question = "who is it" if language == "english" else "在哪"

    def entry(number):
        words = rng.choices(fill, k=rng.randint(5, 70))  # some are longer than the model
        name = rng.choice(names)
        place = rng.randrange(len(words))
        answerable = rng.random() < 0.75
        if answerable:
            words.insert(place, name)
        context = between.join(words)
        start = len(between.join(words[:place])) + (len(between) if place else 0)
        answers = [{"text": name, "answer_start": start}] if answerable else []
        qa = {"id": f"q{number}", "question": question, "answers": answers,
              "is_impossible": not answerable}  # fmt: skip
        return {"paragraphs": [{"context": context, "qas": [qa]}], "title": "t"}

    data = [entry(number) for number in range(220)]
    for name, part in (("train", data[:170]), ("dev", data[170:])):
        content = {"version": "v2.0", "data": part}
        (tmp_path / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False))
    files = (tmp_path / "train.json", tmp_path / "dev.json")
    summary, _ = finetune(model, tmp_path / "out", "qa", *files, "--stride", "10", "--epochs", "12")
    assert summary["f1"] > 0.85
    assert summary["unanswerable_f1"] > 0.5
    found = predict(tmp_path / "out", files[1], tmp_path)
    truth = [article["paragraphs"][0] for article in data[170:]]
    exact = []
    for row, paragraph in zip(found, truth, strict=True):
        assert row["id"] == paragraph["qas"][0]["id"]
        answers = [answer["text"] for answer in paragraph["qas"][0]["answers"]] or [""]
        exact.append(row["answer"] in answers)
        if row["answer"]:
            context = paragraph["context"]
            assert context[row["start"] :].startswith(row["answer"])
    assert np.mean(exact) == pytest.approx(summary["exact_match"], abs=0.02)  # the, an and so on


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embeddings_are_those_of_hugging_face(model, tmp_path, pooling):
    texts = ["the cat sat", "北京很大", "Ann met Bob in Paris and ran away from bad birds ."]
    (tmp_path / "texts.txt").write_text("\n\n".join(texts), encoding="utf-8")
    out = tmp_path / "new" / "embeddings.npy"
    arguments = ("--input", tmp_path / "texts.txt", "--out", out, "--pooling", pooling)
    done = cli("embed", "--model", model, *arguments)
    assert done.returncode == 0, done.stderr
    found = np.load(out)
    assert found.dtype == np.float32
    theirs = transformers.BertModel.from_pretrained(model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    for row, text in zip(found, texts, strict=True):
        with torch.no_grad():
            states = theirs(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected = states.mean(0) if pooling == "mean" else states[0]
        np.testing.assert_allclose(row, expected.numpy(), atol=1e-5)
    cli("embed", "--model", model, *arguments, "--normalize")
    np.testing.assert_allclose(np.linalg.norm(np.load(out), axis=1), 1, rtol=1e-5)


def assert_one_clear_line(done, pattern):
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("fastbert: error: ")
    assert done.stderr.count("\n") == 1
    assert re.search(pattern, done.stderr), done.stderr


LONG = " ".join(["cat"] * 100)
QA = '{"data": [{"paragraphs": [{"context": "the cat", "qas": [{"id": "q", "question": "who", '
BAD = {
    "an unseen label": (
        *("classification", "d.csv", "text,label\na cat,good\na dog,bad\n"),
        *("text,label\na cat,fine\n", r"dev_d\.csv, line 2: the label 'fine' is not in the tr"),
    ),
    "no such column": (
        *(
            "classification",
            "d.csv",
            "words,label\na,b\n",
            "",
            r"no column 'text'; there are words",
        ),
    ),
    "fields that do not fit": (
        *("classification", "d.csv", "text,label\na,b,c\n", "", "line 2: 3 fields, and the header"),
    ),
    "one label": (
        "classification",
        "d.csv",
        "text,label\na,b\nc,b\n",
        "",
        "have the one label 'b'",
    ),
    "an empty file": ("classification", "d.csv", "", "", r"train_d\.csv: holds no examples"),
    "a header alone": ("classification", "d.tsv", "text\tlabel\n", "", "holds no examples"),
    "not JSON": ("classification", "d.jsonl", "text\n", "", "line 1: expected one JSON object"),
    "a suffix": ("classification", "d.xls", "text\n", "", r"expected \.csv, \.tsv or \.jsonl"),
    "a long text": (
        *("classification", "d.csv", f"text,label\n{LONG},a\nb,c\n", "text,label\nb,c\n"),
        "102 tokens, and the model reads 64; --truncate cuts",
    ),
    "not a number": (
        "regression",
        "d.csv",
        "text,label\na,b\n",
        "",
        "expected a number in 'label'",
    ),
    "no labels": ("multilabel", "d.csv", "text,label\na,\n", "", "no example has a label"),
    "a choice too many": (
        *(
            "choice",
            "d.csv",
            "text,choices,label\na,x|y,0\na,x|y|z,0\n",
            "",
            "3 choices, and the f",
        ),
    ),
    "a choice that is not there": (
        *("choice", "d.csv", "text,choices,label\na,x|y,2\n", "", "from 0 to 1, got '2'"),
    ),
    "a field too many": ("ner", "d.txt", "a O\nb x O\n", "", "line 2: 3 fields, and the lines be"),
    "a word without a label": ("ner", "d.txt", "a\n", "", "line 1: a word without a label"),
    "an unseen entity": ("ner", "d.txt", "a O\nb B-X\n", "a B-Y\n", "'B-Y' is not in the training"),
    "a long sentence": (
        *("ner", "d.txt", "a O\n" * 99, "a O\n", "tokens, and the model reads 64; --stride splits"),
    ),
    "an answer elsewhere": (
        *("qa", "d.json", QA + '"answers": [{"text": "cat", "answer_start": 3}]}]}]}]}', ""),
        "question q: the answer 'cat' does not stand at 3",
    ),
    "no answer": ("qa", "d.json", QA + '"answers": []}]}]}]}', "", "not marked as is_impossible"),
    "not SQuAD": ("qa", "d.json", '{"data": 3}', "", "not in the form of SQuAD"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_bad_data_is_one_clear_line(case, model, tmp_path):
    task, name, train, dev, pattern = case
    (tmp_path / f"train_{name}").write_text(train)
    (tmp_path / f"dev_{name}").write_text(dev or train)
    files = ("--train", tmp_path / f"train_{name}", "--dev", tmp_path / f"dev_{name}")
    done = cli("finetune", "--task", task, "--model", model, "--out", tmp_path / "out", *files)
    assert_one_clear_line(done, pattern)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        (["--task", "x"], "--task: one of classification, multilabel"),
        (["--epochs", "0"], "--epochs: at least 1, got 0"),
        (["--layer-decay", "0"], "--layer-decay: above 0 and at most 1"),
        (["--stride", "8"], "--stride: for ner and qa; for classification --truncate"),
        (["--task", "ner", "--balance"], "--balance: for classification, not for ner"),
        (["--train", ""], "cannot be read|expected .csv"),
        (["--model", "nowhere/at all"], "nowhere/at all"),
        (["--max-seq-len", "500"], "--max-seq-len 500: the model reads 64 tokens"),
    ],
)
def test_bad_options_are_one_clear_line(options, pattern, model, tmp_path):
    train = write_table(tmp_path / "d.csv", ("text", "label"), [("a", "x"), ("b", "y")])
    files = ("--train", train, "--dev", train, "--model", model, "--out", tmp_path / "out")
    assert_one_clear_line(cli("finetune", *files, *options), pattern)


def test_predict_needs_a_fine_tuned_model(model, tmp_path):
    done = cli("predict", "--model", model, "--input", tmp_path / "d.csv")
    assert_one_clear_line(done, "not a fine-tuned model")


def test_a_run_is_not_overwritten(model, tmp_path):
    train = write_table(tmp_path / "d.csv", ("text", "label"), [("a", "x"), ("b", "y")])
    files = ("--train", train, "--dev", train, "--model", model, "--out", tmp_path / "out")
    assert cli("finetune", *files, "--epochs", "1").returncode == 0
    assert_one_clear_line(cli("finetune", *files), "holds a run already")
