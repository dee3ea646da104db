"""Reading comprehension: the span of a context that answers a question."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastbert.check import InputError
from fastbert.data.formats.squad import Question, read_squad
from fastbert.finetune.features import Feature, Window, WindowEncoder
from fastbert.finetune.metrics import Report
from fastbert.finetune.squad_metrics import score_answers
from fastbert.finetune.task import Prediction, Scores, Task, softmax, to_host
from fastbert.models.task_models import BertForQuestionAnswering
from fastbert.packing import PackedBatch

_BEST = 20  # the number of starts and ends per window, and of answers per question, to rank


class Span(NamedTuple):
    """The target of a window.

    start, end: positions of the answer's first and last token in the sequence, or both 0, the
    position of [CLS], if the window does not contain the answer; offsets: (start, end) of each of
    the window's context tokens, in characters of the context
    """

    start: int
    end: int
    offsets: list[tuple[int, int]]


class Answering(Task):
    """Predicts the likeliest start and end of the answer; [CLS] stands for no answer.

    Devlin et al. 2018, sections 4.2 (SQuAD v1.1) and 4.3 (SQuAD v2.0).
    """

    model_class = BertForQuestionAnswering
    metrics = ("f1", "exact")

    def read(self, path: Path, *, labelled: bool = True) -> list[Question]:
        return read_squad(path, labelled=labelled)

    def learn(self, examples: Sequence[Question]) -> None:
        impossible = any(example.is_impossible for example in examples)
        self.settings = self.settings._replace(may_be_impossible=impossible)

    def model_options(self) -> dict[str, Any]:
        return {"num_labels": 2, "problem_type": None}

    def features(self, examples: Sequence[Question], encoder: WindowEncoder) -> list[Feature]:
        features = []
        for number, example in enumerate(examples):
            context = encoder.tokenizer.encode(example.context, add_special_tokens=False)
            if not context.ids:
                raise InputError(f"{example.where}: the context {example.context!r} has no token")
            question = encoder.ids(example.question)
            answer = _tokens_of(example, context.offsets)
            for window in encoder.windows(example.where, question, context.ids):
                start, end = _in_window(window, answer)
                offsets = context.offsets[window.begin : window.end]
                features.append(Feature(number, (window,), Span(start, end, offsets)))
        return features

    def loss(
        self, model: Any, batch: PackedBatch, features: Sequence[Feature], total: float
    ) -> Tensor:
        starts, ends = (
            torch.tensor([getattr(feature.target, end) for feature in features]).to(batch.device)
            for end in ("start", "end")
        )
        loss: Tensor = model(
            batch, start_positions=starts, end_positions=ends, num_items_in_batch=int(total)
        ).loss
        return loss

    def scores(self, output: Any, features: Sequence[Feature]) -> list[NDArray[np.float32]]:
        """(T, 2) for each feature of T tokens: logits of the start and of the end."""
        ends = np.cumsum([feature.num_tokens for feature in features])
        scores = torch.stack([output.start_logits, output.end_logits], 1)
        return np.split(to_host(scores), ends[:-1])

    def prediction(self, example: Question, features: list[Feature], scores: Scores) -> Prediction:
        """id, answer; start, end: in characters of the context; probability.

        The answer is the best one of all windows, or none: the text "", with start and end None.
        "No answer" has the lowest score of [CLS] in any window. It is predicted if that exceeds the
        best answer's score by more than `null_threshold`. If training had questions without an
        answer, the prediction also has the difference of both scores, null_score_difference.
        """
        found = [
            candidate
            for feature, own in zip(features, scores, strict=True)
            for candidate in _candidates(feature, own, self.settings.max_answer_tokens)
        ]
        # an answer found in several windows has its best score, because `dict` keeps the last
        places = {(start, end): score for score, start, end in sorted(found)}
        best_first = sorted(places.items(), key=lambda place: -place[1])[:_BEST]
        candidates = [(score, *place) for place, score in best_first]
        null = float(min(own[0].sum() for own in scores))
        if self.settings.may_be_impossible:
            shares = softmax(np.array([null] + [score for score, _, _ in candidates]))[1:]
        else:
            shares = softmax(np.array([score for score, _, _ in candidates]))
        best, start, end = candidates[0]
        # a tokenizer that strips accents leaves a word's last combining mark out of its offsets
        while unicodedata.category(example.context[end : end + 1] or " ")[0] == "M":
            end += 1
        prediction: Prediction = {
            "id": example.id,
            "answer": example.context[start:end],
            "start": start,
            "end": end,
            "probability": shares[0],
        }
        if self.settings.may_be_impossible:
            prediction["null_score_difference"] = null - best
            if null - best > self.settings.null_threshold:
                prediction |= {"answer": "", "start": None, "end": None,
                               "probability": 1 - sum(shares)}  # fmt: skip
        return prediction

    def evaluate(self, examples: Sequence[Any], predictions: Sequence[Prediction]) -> Report:
        return score_answers(
            [[answer.text for answer in example.answers] for example in examples],
            [prediction["answer"] for prediction in predictions],
            [example.question for example in examples],
        )


def _tokens_of(example: Question, offsets: list[tuple[int, int]]) -> tuple[int, int] | None:
    """First and last context token of the first answer; None if the question has no answer."""
    if not example.answers:
        return None
    text, start = example.answers[0]
    places = np.array(offsets).reshape(-1, 2)
    inside = np.flatnonzero((places[:, 1] > start) & (places[:, 0] < start + len(text)))
    if not len(inside):
        raise InputError(f"{example.where}: the answer {text!r} has no token")
    return int(inside[0]), int(inside[-1])


def _in_window(window: Window, answer: tuple[int, int] | None) -> tuple[int, int]:
    """Positions of the answer's first and last token in the window's sequence, or 0 and 0."""
    if answer is None or answer[0] < window.begin or answer[1] >= window.end:
        return 0, 0
    shift = window.prefix - window.begin
    return answer[0] + shift, answer[1] + shift


def _candidates(
    feature: Feature, scores: NDArray[np.float32], longest: int
) -> list[tuple[float, int, int]]:
    """(score, start, end) of the window's best answers; places in characters of the context."""
    (window,) = feature.windows
    inside = scores[window.prefix : window.prefix + window.end - window.begin]
    starts, ends = (np.argsort(-inside[:, i], kind="stable")[:_BEST].tolist() for i in (0, 1))
    offsets = feature.target.offsets
    found = [
        (float(inside[first, 0] + inside[last, 1]), offsets[first][0], offsets[last][1])
        for first in starts
        for last in ends
        if first <= last < first + longest
    ]
    if found:
        return found
    best = int(inside.sum(1).argmax())  # no end is after its start: the best one-token answer
    return [(float(inside[best].sum()), *offsets[best])]
