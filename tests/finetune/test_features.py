"""Sequences and windows, against Hugging Face's BertTokenizer and by their definitions."""

import contextlib
import itertools

import numpy as np
import pytest
import torch
import transformers

from fastbert.config.finetune import FinetuneConfig
from fastbert.data import load_tokenizer
from fastbert.data.formats.conll import Sentence
from fastbert.data.formats.squad import Answer, Question
from fastbert.finetune.choice import ChoiceExample
from fastbert.finetune.features import WindowEncoder, best_window, collate, cut, parts
from fastbert.finetune.infer import TASK_OF, evaluating, run
from fastbert.finetune.sequences import TextExample
from fastbert.finetune.task import Settings
from fastbert.packing import IGNORE_INDEX

TEXTS = [
    "the film was good",
    "我很喜欢这部电影,2018!",
    "北京 is the 首都 of 中国。Ünknown [SEP] dogs\u3000cat\u200bs",
]


@pytest.fixture
def encoder(model):
    return WindowEncoder(load_tokenizer(model), 48, None, False)


def task_of(name: str, labels=(), **changes):
    config = FinetuneConfig(task=name, train="x", dev="x", model="x", **changes)
    return TASK_OF[name](Settings.of(config, 48), labels)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("pair", [None, *TEXTS])
def test_sequences_are_those_of_hugging_face(model, encoder, text, pair):
    theirs = transformers.BertTokenizer.from_pretrained(model)(text, pair)
    second = None if pair is None else encoder.ids(pair)
    (window,) = encoder.windows("here", encoder.ids(text), second)
    assert window.input_ids == theirs["input_ids"]
    assert window.token_type_ids == theirs["token_type_ids"]


@pytest.mark.parametrize("lengths", [(30, None), (20, 3), (3, 20), (12, 12)])
def test_truncation_is_that_of_hugging_face(model, lengths):
    short = WindowEncoder(load_tokenizer(model), 13, None, True)
    texts = [None if n is None else " ".join(["cat", "dog"] * (n // 2)) for n in lengths]
    theirs = transformers.BertTokenizer.from_pretrained(model)(
        *texts, truncation="longest_first" if texts[1] else True, max_length=13
    )
    (window,) = short.windows("here", *[short.ids(text) for text in texts if text])
    assert window.input_ids == theirs["input_ids"]


@pytest.mark.parametrize(
    ("length", "room", "shared"), [(10, 4, 1), (11, 4, 3), (9, 8, 0), (4, 4, 2)]
)
def test_windows_cover_all_and_share_what_they_should(length, room, shared):
    windows = cut(length, room, shared)
    assert [b[1] for b in windows[:-1]] == [b[0] + room for b in windows[:-1]]
    assert all(a[1] - b[0] == shared for a, b in itertools.pairwise(windows))
    assert windows[0][0] == 0
    assert windows[-1][1] == length
    if len(windows) > 1:  # none is inside another
        assert windows[-1][1] > windows[-2][1]


def test_windows_of_a_pair_repeat_the_first_text(model):
    encoder = WindowEncoder(load_tokenizer(model), 10, 2, False)
    question, text = encoder.ids("where is john"), encoder.ids("one two three red blue green cat")
    windows = encoder.windows("here", question, text)
    assert [(w.begin, w.end) for w in windows] == [(0, 4), (2, 6), (4, 7)]
    for window in windows:
        assert window.input_ids[1:4] == question
        inside = window.input_ids[window.prefix : window.prefix + window.end - window.begin]
        assert inside == text[window.begin : window.end]
        assert window.token_type_ids == [0] * 5 + [1] * (len(inside) + 1)
    assert [best_window(place, windows) for place in range(7)] == [0, 0, 0, 1, 1, 2, 2]


def test_a_word_is_labelled_once_at_its_first_token(model):
    encoder = WindowEncoder(load_tokenizer(model), 8, 2, False)
    task = task_of("ner", ["B-X", "O"])
    words = ("dogs", "in", "\u200b", "北", "京", "cats", "red", "book")
    labels = ("B-X", "O", "O", "B-X", "O", "B-X", "O", "O")
    features = task.features([Sentence("here", words, labels)], encoder)
    vocab = encoder.tokenizer.get_vocab()
    found = {}
    for feature in features:
        ids = feature.windows[0].input_ids
        for token, word, label in zip(ids, *feature.target, strict=True):
            if word != IGNORE_INDEX:
                assert word not in found
                found[word] = (token, task.labels[label])
    first = ["dog", "in", "[UNK]", "北", "京", "cat", "red", "book"]
    assert len(features) > 1
    assert [found[i] for i in range(8)] == [
        (vocab[piece], label) for piece, label in zip(first, labels, strict=True)
    ]
    assert sum(map(task.count, features)) == 8


def test_an_answer_is_where_its_characters_are(model, encoder):
    context = "The dogs, 张三 lives in Paris."
    task = task_of("qa")
    for text in ("dogs", "张三", "三", "Paris.", "in Paris", "og"):
        question = Question("x", "1", "who?", context, (Answer(text, context.index(text)),), False)
        (feature,) = task.features([question], encoder)
        start, end, offsets = feature.target
        prefix = feature.windows[0].prefix
        found = context[offsets[start - prefix][0] : offsets[end - prefix][1]]
        assert found == {"og": "dog"}.get(text, text)


def test_an_answer_outside_a_window_is_cls(model):
    encoder = WindowEncoder(load_tokenizer(model), 9, 0, False)
    context = "one two three red blue green cat dog"
    question = Question("x", "1", "who ?", context, (Answer("red blue", 14),), False)
    features = task_of("qa").features([question], encoder)
    assert [f.target[:2] for f in features] == [(0, 0), (0, 0)]  # cut in two between windows
    encoder = WindowEncoder(load_tokenizer(model), 9, 3, False)
    features = task_of("qa").features([question], encoder)
    assert [f.target[:2] for f in features] == [(0, 0), (6, 7), (5, 6), (4, 5), (0, 0)]


def test_null_threshold_and_longest_answer(model, encoder):
    """The score of no answer is the least of the windows'; above the threshold it wins."""
    question = Question("x", "1", "who ?", "one two three four", (), True)
    for threshold, answer in ((0.5, ""), (1.5, "two three")):
        task = task_of("qa", null_threshold=threshold, max_answer_tokens=2)
        task.learn([question])
        features = task.features([question], encoder) * 2
        scores = np.zeros((len(features[0].windows[0].input_ids), 2), np.float32)
        prefix = features[0].windows[0].prefix
        scores[prefix + 1, 0] = scores[prefix + 2, 1] = scores[prefix, 0] = 2
        scores[prefix, 0] = 2.5  # a start that is too far from the best end
        scores[prefix, 1] = -9
        scores[prefix + 1, 1] = -9
        scores[0] = 2.5
        other = scores - 10
        other[0] = 3  # the window that is surer of nothing does not decide
        (said,) = task.predict([question], features, [scores, other])
        assert said["answer"] == answer
        assert said["null_score_difference"] == pytest.approx(1)


@pytest.mark.parametrize("context", ["the dog\u0301 in", "the dog\u0301\u0323", "the dog"])
def test_an_answer_has_the_accents_of_its_last_letter(model, encoder, context):
    """Which the tokenizer strips, and does not count among the word's characters."""
    question, task = Question("x", "1", "who ?", context, (), False), task_of("qa")
    (feature,) = task.features([question], encoder)
    scores = np.zeros((len(feature.windows[0].input_ids), 2), np.float32)
    scores[feature.windows[0].prefix + 1] = 9
    (said,) = task.predict([question], [feature], [scores])
    assert said["answer"] == context[said["start"] : said["end"]] == context.split()[1]


def test_an_answer_in_several_windows_is_one(model):
    """All windows are sure of it, and so is the prediction."""
    encoder = WindowEncoder(load_tokenizer(model), 9, 3, False)
    context = "one two three red blue green cat dog"
    question, task = Question("x", "1", "who ?", context, (), False), task_of("qa")
    features = task.features([question], encoder)
    scores = []
    for feature in features:
        (window,) = feature.windows
        scores.append(np.zeros((len(window.input_ids), 2), np.float32))
        if window.begin <= 3 < window.end:
            scores[-1][window.prefix + 3 - window.begin] = 20 + window.begin / 100
    (said,) = task.predict([question], features, scores)
    assert sum(window.max() > 0 for window in scores) > 1
    assert said["answer"] == "red"
    assert said["probability"] == pytest.approx(1, abs=1e-6)


def test_a_text_of_several_windows_has_the_mean_of_their_scores(model):
    texts = ["cat", " ".join(["cat", "dog"] * 8)]
    examples = [TextExample("here", (text,), None) for text in texts]
    task = task_of("classification", labels=("neg", "pos"))
    features = task.features(examples, WindowEncoder(load_tokenizer(model), 10, 2, False))
    assert [feature.example for feature in features] == [0, 1, 1, 1]
    scores = np.array([[1.0, 2.0], [3.0, 0.0], [0.0, 6.0], [0.0, 0.0]], dtype=np.float32)
    first, second = task.means(examples, features, scores)
    assert first.tolist() == [1.0, 2.0]
    assert second.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("batch_tokens", [1, 25, 1000])
def test_questions_with_other_numbers_of_choices_are_scored_each_by_itself(
    model, encoder, batch_tokens
):
    words = ["cat", "dog", "red book", "blue"]
    examples = [
        ChoiceExample(f"row {n}", "the big", tuple(words[:n]), None) for n in (3, 2, 4, 2, 2, 3)
    ]
    task = task_of("choice", choice_column=("choices",))
    trained = task.model_class.from_pretrained(model, ignore_mismatched_sizes=True)
    device = torch.device("cpu")

    def said(some, limit):
        features = task.features(some, encoder)
        scores = run(task, trained, features, limit, device, contextlib.nullcontext())
        assert [one.shape for one in scores] == [(len(e.choices),) for e in some]
        return task.predict(some, features, scores)

    together = said(examples, batch_tokens)
    for example, one in zip(examples, together, strict=True):
        (alone,) = said([example], 1000)
        assert len(one["probabilities"]) == len(example.choices)
        assert one["probabilities"] == pytest.approx(alone["probabilities"], abs=1e-6)
        assert one["text"] == example.choices[one["choice"]]


def test_of_an_answer_the_twenty_best_starts_and_ends_are_tried(model):
    """And where none of these ends follows a start, the best answer of one token is left."""
    encoder = WindowEncoder(load_tokenizer(model), 60, None, False)
    question = Question("x", "1", "who ?", " ".join(["cat"] * 50), (), False)
    task = task_of("qa", max_answer_tokens=50)
    features = task.features([question], encoder)
    prefix = features[0].windows[0].prefix
    scores = np.zeros((len(features[0].windows[0].input_ids), 2), np.float32)
    starts, ends = scores[prefix : prefix + 50].T
    ends[:20] = starts[20:40] = 9
    ends[25] = 6
    (said,) = task.predict([question], features, [scores])
    assert (said["start"], said["end"]) == (25 * 4, 25 * 4 + 3)
    ends[19] = ends[25] = 0
    ends[22], starts[21] = 8, 9.5  # the twentieth of the ends
    (said,) = task.predict([question], features, [scores])
    assert (said["start"], said["end"]) == (21 * 4, 22 * 4 + 3)


def test_evaluating_leaves_a_model_in_the_mode_that_it_had():
    for training in (True, False):
        model = torch.nn.Dropout().train(training)
        with evaluating(model):
            assert not model.training
            assert not torch.is_grad_enabled()
        assert model.training is training


def test_parts_and_collate(model, encoder):
    assert parts([3, 3, 5, 9, 1], 6) == [range(2), range(2, 3), range(3, 4), range(4, 5)]
    task = task_of("regression")
    texts = [("the cat", "a dog"), ("red", "blue")]
    features = task.features([TextExample("x", t, 1.0) for t in texts], encoder)
    batch = collate(features, [7, 4])
    assert batch.cu_seqlens.tolist() == [0, 7, 12]
    assert batch.token_type_ids.tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1]
    assert batch.position_ids.tolist() == [*range(7), *range(5)]
    assert torch.equal(batch.sequence_ids, torch.tensor([7, 4]))
    task = task_of("choice", choice_column=("choices",))
    questions = [ChoiceExample("x", "the", ("cat", "dog"), 0)] * 2
    batch = collate(task.features(questions, encoder), [7, 4])
    assert batch.sequence_ids.tolist() == [14, 15, 8, 9]  # each choice has dropout of its own
