"""The files that people have, and what is learnt from them."""

import dataclasses

import pytest
import torch

import fastbert
from fastbert.check import InputError
from fastbert.config.finetune import FinetuneConfig
from fastbert.data import load_tokenizer
from fastbert.data.formats.conll import Sentence, read_conll
from fastbert.data.formats.squad import read_squad
from fastbert.data.formats.tables import read_table
from fastbert.finetune.choice import Choice
from fastbert.finetune.features import WindowEncoder, collate
from fastbert.finetune.infer import TASK_OF
from fastbert.finetune.predict import _with_copies
from fastbert.finetune.sequences import TextExample
from fastbert.finetune.task import Refused, Settings
from fastbert.finetune.train import _examples
from fastbert.train.optimizer import finetuning_optimizer


def test_csv_has_quotes_and_tsv_has_none(write):
    csv = write("a.csv", '\ufefftext,label\r\n"one, ""two""\nthree",x\r\n\r\nfour,y\r\n')
    rows = read_table(csv, ["text", "label"])
    assert [row.values for row in rows] == [
        {"text": 'one, "two"\nthree', "label": "x"},
        {"text": "four", "label": "y"},
    ]
    tsv = write("a.tsv", 'text\tlabel\n"one, two\tx\nfour"\ty\n')
    rows = read_table(tsv, ["text"])
    assert [row.text("text") for row in rows] == ['"one, two', 'four"']
    assert rows[1].where.endswith("a.tsv, line 3")


def test_labels_of_json_lines(write):
    file = write("a.jsonl", [{"label": value} for value in ("x", 3, True, 1.5)])
    assert [row.label("label") for row in read_table(file, ["label"])] == ["x", "3", "true", "1.5"]


@pytest.mark.parametrize(("name", "choices"), [("classification", ()), ("choice", ("a",))])
def test_a_row_of_json_lines_may_lack_columns_in_prediction_alone(name, choices, write):
    config = FinetuneConfig(task=name, train="x", dev="x", model="x", choice_column=choices)
    task = TASK_OF[name](Settings.of(config, 48))
    file = write("a.jsonl", [{"id": 3}, {"text": "good", "a": ["x", "y"], "label": 1}])
    task.copied = ("label", "id")
    refused, example = task.read(file, labelled=False)
    assert isinstance(refused, Refused)
    assert "line 1: expected a text in column" in refused.reason
    assert "good" in (example if choices else example.texts)
    assert _with_copies([{}, {}], task) == [{"label": None, "id": 3}, {"label": 1, "id": None}]
    task.copied = ("odd",)
    with pytest.raises(InputError, match=r"a\.jsonl: no column 'odd', only id, text, a, label"):
        task.read(file, labelled=False)
    task.copied = ()
    with pytest.raises(InputError, match=r"line 1: no column 'text', only id"):
        task.read(file)


def test_conll(write):
    text = "-DOCSTART- -X- O\n\nU.N. NNP B-ORG\r\n\u3000 SP O\n\n\nPeter\tNNP\tB-PER\n"
    first, second = read_conll(write("a.conll", text))
    assert (first.words, first.labels) == (("U.N.", "\u3000"), ("B-ORG", "O"))
    assert (second.words, second.labels) == (("Peter",), ("B-PER",))
    assert second.where.endswith("line 7")


def test_squad_of_both_versions(write):
    answers = [{"text": "b", "answer_start": 2}, {"text": "c", "answer_start": 4}]
    questions = [
        {"id": 1, "question": "?", "answers": answers},
        {"id": 2, "question": "?", "answers": [], "is_impossible": True,
         "plausible_answers": answers},
    ]  # fmt: skip
    file = write("a.json", {"data": [{"paragraphs": [{"context": "a b c", "qas": questions}]}]})
    one, two = read_squad(file)
    assert [tuple(answer) for answer in one.answers] == [("b", 2), ("c", 4)]
    assert (one.is_impossible, two.is_impossible, two.answers) == (False, True, ())


def test_a_question_stands_before_each_choice(write):
    """As in RACE: the text, and the question with an answer."""
    row = {"text": "It rained.", "question": "Why?", "a": "Clouds.", "b": "Sun.", "label": "a"}
    columns = {"pair_column": "question", "choice_column": ("a", "b")}
    config = FinetuneConfig(task="choice", train="x", dev="x", model="x", **columns)
    (example,) = Choice(Settings.of(config, 48)).read(write("a.jsonl", [row]))
    assert example.choices == ("Why? Clouds.", "Why? Sun.")
    assert (example.text, example.target) == ("It rained.", 0)


def make_task(name: str, *weights: str):
    config = FinetuneConfig(task=name, train="x", dev="x", model="x", class_weight=weights)
    return TASK_OF[name](Settings.of(config, 48)), config


def test_the_share_to_measure_by_is_drawn_by_the_seed():
    task, config = make_task("classification")
    task.read = lambda path: list(range(40))
    drawn = set()
    for seed in (0, 1, 0):
        options = {"dev": None, "dev_share": 0.25, "seed": seed}
        train, dev = _examples(task, dataclasses.replace(config, **options))
        assert len(dev) == 10
        assert sorted(train + dev) == list(range(40))
        drawn.add(tuple(dev))
    assert len(drawn) == 2


def test_weights_of_labels():
    examples = [TextExample("x", ("a",), label) for label in ("10", "9", "9", "9")]
    task, config = make_task("classification", "balanced")
    task.learn(examples)
    task.weigh(config, examples)
    assert task.labels == ["9", "10"]  # numbers in their order
    torch.testing.assert_close(task.weights, torch.tensor([4 / (2 * 3), 4 / (2 * 1)]))
    task, config = make_task("classification", "10=3")
    task.learn(examples)
    task.weigh(config, examples)
    assert task.weights.tolist() == [1, 3]
    task, config = make_task("classification", "e\u0301=3")  # spelt as the labels are not
    task.labels = ["a", "\u00e9"]
    task.weigh(config, [])
    assert task.weights.tolist() == [1, 3]
    examples = [TextExample("x", ("a",), labels) for labels in (("p", "q"), ("p",), ("p",), ())]
    task, config = make_task("multilabel", "balanced")
    task.learn(examples)
    task.weigh(config, examples)
    torch.testing.assert_close(task.weights, torch.tensor([1 / 3, 3 / 1]))


def test_a_label_that_is_only_measured_by_has_the_weight_1():
    """As --dev-share can leave one: labels are learnt from both parts, weights from one."""
    examples = [TextExample("x", ("a",), label) for label in ("a", "c", "c", "c", "b")]
    task, config = make_task("classification", "balanced")
    task.learn(examples)
    task.weigh(config, examples[:-1])
    torch.testing.assert_close(task.weights, torch.tensor([4 / 2, 1, 4 / (2 * 3)]))
    sentences = [Sentence("x", ("w", "w"), labels) for labels in (("O", "O"), ("O", "B-X"))]
    task, config = make_task("ner", "balanced")
    task.learn(sentences)
    task.weigh(config, sentences[:1])
    assert task.weights.tolist() == [1, 1]
    some = (("p", "q"), ("p",), ("p", "q"), ("p", "q"), ("r",))
    examples = [TextExample("x", ("a",), labels) for labels in some]
    task, config = make_task("multilabel", "balanced")
    task.learn(examples)
    task.weigh(config, examples[:-1])  # all have p, none has r
    torch.testing.assert_close(task.weights, torch.tensor([1, 1 / 3, 1]))


@pytest.mark.parametrize("weights", [(), ("9=3",)])
def test_the_loss_is_the_weighted_mean_over_all_parts(model, weights):
    examples = [
        TextExample("x", (text,), y) for text, y in (("cat", "9"), ("dog", "8"), ("a", "9"))
    ]
    task, config = make_task("classification", *weights)
    task.learn(examples)
    task.weigh(config, examples)

    features = task.features(examples, WindowEncoder(load_tokenizer(model), 48, None, False))
    head = fastbert.BertForSequenceClassification.from_pretrained(model, **task.model_options())
    total = sum(map(task.count, features))
    loss = sum(task.loss(head, collate(part), part, total) for part in (features[:1], features[1:]))
    with torch.no_grad():
        logits = head(collate(features)).logits.double()
    targets = torch.tensor([1, 0, 1])
    wanted = torch.nn.functional.cross_entropy(
        logits, targets, torch.tensor([1.0, 3.0]).double() if weights else None
    )
    torch.testing.assert_close(loss.double(), wanted, atol=1e-6, rtol=1e-5)


def test_layers_learn_at_decaying_rates(model):
    head = fastbert.BertForSequenceClassification.from_pretrained(model)
    optimizer = finetuning_optimizer(head, 2, weight_decay=0.1, layer_decay=0.5)
    names = {id(p): name for name, p in head.named_parameters()}
    found = {
        names[id(p)]: (group["share"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert found.keys() == set(names.values())
    assert found["classifier.weight"] == (1, 0.1)
    assert found["bert.pooler.dense.bias"] == (1, 0)
    assert found["bert.encoder.layer.1.output.dense.weight"] == (0.5, 0.1)
    assert found["bert.encoder.layer.0.output.LayerNorm.weight"] == (0.25, 0)
    assert found["bert.embeddings.word_embeddings.weight"] == (0.125, 0.1)
    assert found["bert.embeddings.LayerNorm.bias"] == (0.125, 0)
