"""Measures beside values computed by hand, and rarely seen paths of the readers and the loop."""

import types

import pytest
import torch

from fastbert.check import InputError
from fastbert.data import load_tokenizer, squad
from fastbert.data.tables import Sentence, read_conll, read_table
from fastbert.finetune.config import FinetuneConfig
from fastbert.finetune.ner import Ner, _owned
from fastbert.finetune.qa import QuestionAnswering, _place
from fastbert.finetune.sequences import Classification, MultiLabel, Text
from fastbert.finetune.task import Feature
from fastbert.finetune.train import _optimizer, by_length


def config(task, **options):
    return FinetuneConfig(task=task, train="t", dev="d", model="m", **options)


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("the Eiffel Tower!", ["Eiffel tower"], 1, 1),
        ("in Paris France", ["Paris", "Paris, France"], 0, 0.8),  # 2 of 3 and 2 of 2 words
        ("London", ["Paris"], 0, 0),
        ("", [], 1, 1),
        ("Paris", [], 0, 0),
        ("", ["Paris"], 0, 0),
        ("a b", ["a b b"], 0, 2 / 3),  # "a" is an article: 1 of 1 and 1 of 2 words
        ("北京大学", ["北京"], 0, 2 / 3),  # a run of 2 of 4 and 2 of 2 characters
        ("北京。", ["北京"], 1, 1),
        ("北天京", ["北京天"], 0, 1 / 3),  # the longest common run is one character
        ("1998年", ["1998 年"], 1, 1),
    ],
)
def test_exact_match_and_f1(prediction, answers, exact, f1):
    assert squad.exact_match(prediction, answers) == exact
    assert squad.f1(prediction, answers) == pytest.approx(f1)


def test_classification_measures():
    task = Classification(config("classification"), None, ["a", "b", "c"], 64)
    truth, guess = "aaaabbbcc", "aaabbbacc"
    examples = [Text("", label, "") for label in truth]
    found, (by_label, confusion) = task.metrics(examples, [{"label": label} for label in guess])
    assert found["accuracy"] == pytest.approx(7 / 9)
    assert found["majority"] == pytest.approx(4 / 9)
    # precision and recall: a 3/4 3/4, b 2/3 2/3, c 1 1
    assert found["macro_f1"] == pytest.approx((3 / 4 + 2 / 3 + 1) / 3)
    assert by_label.lines[1] == ("b", "0.667", "0.667", "0.667", "3")
    assert confusion.lines == [("a", "3", "1", "0"), ("b", "1", "2", "0"), ("c", "0", "0", "2")]


def test_multilabel_measures():
    task = MultiLabel(config("multilabel"), None, ["a", "b"], 64)
    examples = [Text("", list(label), "") for label in ("ab", "a", "", "b")]
    predictions = [{"labels": list(labels)} for labels in ("a", "a", "b", "b")]
    found, _ = task.metrics(examples, predictions)
    # a: 2 of 2 found, none wrong; b: 1 of 2 found, 1 wrong
    assert found["micro_f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert found["macro_f1"] == pytest.approx((1 + 0.5) / 2)
    assert found["exact_match"] == 0.5


def test_entities_count_whole():
    task = Ner(config("ner"), None, ["O", "B-X", "I-X"], 64)
    examples = [Sentence(["w"] * 5, ["B-X", "I-X", "O", "B-X", "O"], "")]
    found, _ = task.metrics(examples, [{"labels": ["B-X", "O", "O", "B-X", "B-X"]}])
    assert found["f1"] == pytest.approx(2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2))
    assert found["accuracy"] == pytest.approx(3 / 5)


def test_rare_labels_weigh_more(model):
    task = Classification(config("classification", balance=True), None, ["a", "b"], 64)
    task.balance([Feature((), target, 0) for target in (0, 0, 0, 1)])
    torch.testing.assert_close(task.weights, torch.tensor([4 / 6, 4 / 2]))
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.5]])
    batch = types.SimpleNamespace(device="cpu")
    features = [Feature((), target, 0) for target in (0, 1)]
    loss = task.loss(lambda _: types.SimpleNamespace(logits=logits), batch, features)
    one, two = (-logits[i].log_softmax(-1)[i] for i in (0, 1))
    torch.testing.assert_close(loss, (4 / 6 * one + 2 * two) / (4 / 6 + 2))


def test_each_word_belongs_to_the_window_that_shows_most_around_it(model):
    task = Ner(config("ner", stride=4), load_tokenizer(model), ["O"], 12)
    words = ["cat"] * 20
    windows = task.windows(words, where="", is_pretokenized=True)
    assert len(windows) > 2
    owned = _owned(windows)
    assert sorted(word for first_pieces in owned for _, word in first_pieces) == list(range(20))
    for window, first_pieces in zip(windows, owned, strict=True):
        for token, word in first_pieces:
            assert window.word_ids[token] == word
            contexts = [
                min(t, len(other) - 1 - t)
                for other in windows
                for t, w in enumerate(other.word_ids)
                if w == word
            ]
            assert min(token, len(window) - 1 - token) == max(contexts)


def test_an_answer_is_trained_on_where_a_window_shows_all_of_it(model):
    context = "the cat sat on a mat while good dogs ran away from bad birds in Paris"
    start = context.index("good dogs")
    question = squad.Question("q", "who ran", context, [squad.Answer("good dogs", start)], "")
    task = QuestionAnswering(config("qa", stride=2), load_tokenizer(model), [], 12)
    seen = 0
    for feature in task.features([question], labelled=True):
        window, (first, last) = feature.sequences[0], feature.target
        shown = [
            part for token, part in enumerate(window.offsets) if window.sequence_ids[token] == 1
        ]
        whole = shown[0][0] <= start and shown[-1][1] >= start + len("good dogs")
        if whole:
            seen += 1
            assert context[window.offsets[first][0] : window.offsets[last][1]] == "good dogs"
        else:
            assert (first, last) == (0, 0)
    assert seen
    none = question._replace(answers=[])
    assert _place(task.features([none], labelled=True)[0].sequences[0], none) == (0, 0)


def test_learning_rates_fall_from_the_head_down(model):
    from fastbert.models.classification import BertForSequenceClassification

    network = BertForSequenceClassification.from_pretrained(model)
    optimizer = _optimizer(network, config("classification", layer_decay=0.5))
    scales = {
        name: group["scale"]
        for group in optimizer.param_groups
        for parameter in group["params"]
        for name, one in network.named_parameters()
        if one is parameter
    }
    assert len(scales) == len(list(network.parameters()))
    for name, scale in {
        "classifier.weight": 1.0,
        "bert.pooler.dense.bias": 1.0,
        "bert.encoder.layer.1.output.dense.weight": 0.5,
        "bert.encoder.layer.0.attention.self.query.weight": 0.25,
        "bert.embeddings.word_embeddings.weight": 0.125,
        "bert.embeddings.LayerNorm.bias": 0.125,
    }.items():
        assert scales[name] == scale
    decayed = [g for g in optimizer.param_groups if g["weight_decay"]]
    assert all(p.ndim > 1 for group in decayed for p in group["params"])


def test_batches_hold_every_feature_once_longest_first():
    lengths = [3, 9000, 100, 5000, 4000, 7]
    features = [Feature((range(n),), None, 0) for n in lengths]
    batches = list(by_length(features))
    assert batches == [[1], [3], [4, 2, 5, 0]]


def test_readers(tmp_path):
    (tmp_path / "a.csv").write_bytes('\ufefftext,label\n"a, b\nc",x\n'.encode())
    [row] = read_table(tmp_path / "a.csv")
    assert row.values == {"text": "a, b\nc", "label": "x"}
    (tmp_path / "a.tsv").write_text('text\tlabel\n"a\tx\n')
    [row] = read_table(tmp_path / "a.tsv")
    assert row.values == {"text": '"a', "label": "x"}
    (tmp_path / "latin.csv").write_bytes(b"text\n\xe9\n")
    with pytest.raises(InputError, match="not UTF-8"):
        read_table(tmp_path / "latin.csv")
    with pytest.raises(InputError, match=r"none\.csv: cannot be read"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "c.txt").write_text("-DOCSTART- X O\n\na x O\nb y B\n\n\nc z O")
    found = read_conll(tmp_path / "c.txt")
    assert [(s.words, s.labels) for s in found] == [(["a", "b"], ["O", "B"]), (["c"], ["O"])]
    assert found[1].where.endswith("line 7")
