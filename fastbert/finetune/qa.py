"""Reading comprehension: where in a context the answer to a question stands."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Encoding
from torch import Tensor

from fastbert.data import squad
from fastbert.data.squad import Question, read_squad
from fastbert.finetune.config import FinetuneConfig
from fastbert.finetune.task import Feature, Table, Task
from fastbert.models.question_answering import BertForQuestionAnswering
from fastbert.packing import PackedBatch

ANSWER, NO_ANSWER = "answer", "no answer"


class QuestionAnswering(Task):
    """Start and end of the answer; [CLS] stands for none (Devlin et al. 2018, section 4.3)."""

    head = BertForQuestionAnswering
    best = "f1"

    @staticmethod
    def read(config: FinetuneConfig, path: Path, *, labelled: bool) -> list[Question]:
        return read_squad(path, labelled=labelled)

    @staticmethod
    def labels_of(examples: list[Question]) -> list[str]:
        """With NO_ANSWER where the training data have such questions."""
        return [ANSWER] if all(e.answers for e in examples) else [ANSWER, NO_ANSWER]

    def model_options(self) -> dict[str, Any]:
        return {"num_labels": 2}

    def features(self, examples: list[Question], *, labelled: bool) -> list[Feature]:
        found = []
        for number, example in enumerate(examples):
            windows = self.windows(
                example.question, example.context, where=example.where, strategy="only_second"
            )
            for window in windows:
                target = _place(window, example) if labelled else None
                found.append(Feature((window,), target, number))
        return found

    def loss(self, model: Any, batch: PackedBatch, features: Sequence[Feature]) -> Tensor:
        places = torch.tensor([feature.target for feature in features], device=batch.device)
        return model(batch, start_positions=places[:, 0], end_positions=places[:, 1]).loss

    def scores(
        self, model: Any, batch: PackedBatch, features: Sequence[Feature]
    ) -> Sequence[Tensor]:
        output = model(batch)
        both = torch.stack([output.start_logits, output.end_logits], dim=1).float()
        return both.split([len(feature.sequences[0]) for feature in features])

    def predictions(
        self, examples: list[Question], features: list[Feature], scores: list[Tensor]
    ) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [
            {"id": example.id, "answer": "", "score": float("-inf")} for example in examples
        ]
        null = [float("inf")] * len(examples)
        for feature, ends in zip(features, scores, strict=True):
            window, row = feature.sequences[0], found[feature.example]
            null[feature.example] = min(null[feature.example], float(ends[0].sum()))
            best = _best_span(window, ends, self.config.max_answer_len)
            if best is not None and best[0] > row["score"]:
                score, start, end = best
                context = examples[feature.example].context
                begin, stop = window.offsets[start][0], window.offsets[end][1]
                row |= {"answer": context[begin:stop], "score": score, "start": begin}
        for row, none in zip(found, null, strict=True):
            if NO_ANSWER in self.labels:
                row["null_score"] = none
                if none - row["score"] > self.config.null_threshold:
                    row |= {"answer": "", "start": None}
        return found

    def metrics(
        self, examples: list[Question], predictions: list[dict[str, Any]]
    ) -> tuple[dict[str, float], list[Table]]:
        pairs = [
            (p["answer"], [answer.text for answer in e.answers])
            for p, e in zip(predictions, examples, strict=True)
        ]
        found = {
            "f1": sum(squad.f1(*pair) for pair in pairs) / len(pairs),
            "exact_match": sum(squad.exact_match(*pair) for pair in pairs) / len(pairs),
        }
        for name, wanted in (("answerable_f1", True), ("unanswerable_f1", False)):
            part = [squad.f1(*pair) for pair in pairs if bool(pair[1]) is wanted]
            if part and len(part) < len(pairs):
                found[name] = sum(part) / len(part)
        return found, []


def _in_context(window: Encoding) -> list[int]:
    return [token for token, part in enumerate(window.sequence_ids) if part == 1]


def _place(window: Encoding, example: Question) -> tuple[int, int]:
    """First and last token of the answer, (0, 0) where the window does not show all of it."""
    if not example.answers:
        return 0, 0
    text, begin = example.answers[0]
    end = begin + len(text)
    inside = [
        token
        for token in _in_context(window)
        if window.offsets[token][1] > begin and window.offsets[token][0] < end
    ]
    if not inside:
        return 0, 0
    before, after = inside[0] - 1, inside[-1] + 1
    cut_before = window.offsets[inside[0]][0] > begin and window.sequence_ids[before] != 1
    cut_after = window.offsets[inside[-1]][1] < end and window.sequence_ids[after] != 1
    return (0, 0) if cut_before or cut_after else (inside[0], inside[-1])


def _best_span(window: Encoding, ends: Tensor, longest: int) -> tuple[float, int, int] | None:
    """(score, first token, last token) of the best answer in the window's part of the context."""
    tokens = _in_context(window)
    if not tokens:
        return None
    start, end = ends[tokens].unbind(1)
    scores = start[:, None] + end[None, :]
    allowed = torch.ones_like(scores, dtype=torch.bool).triu().tril(longest - 1)
    best = int(scores.masked_fill(~allowed, float("-inf")).argmax())
    first, last = divmod(best, len(tokens))
    return float(scores[first, last]), tokens[first], tokens[last]
