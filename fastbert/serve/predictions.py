"""Predictions from fine-tuned models: classes, numbers, entities and answers."""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fastbert.data.formats.conll import Sentence
from fastbert.data.formats.squad import Question
from fastbert.finetune.features import Feature, WindowEncoder, collate
from fastbert.finetune.infer import TASK_OF
from fastbert.finetune.sequences import TextExample
from fastbert.finetune.task import Settings, softmax
from fastbert.packing import IGNORE_INDEX
from fastbert.serve.abilities import CUT, Ability, Tokens, windows_or_refusal
from fastbert.serve.refusal import Refusal

SEQUENCES = ("classification", "multilabel", "regression")
SERVED = (*SEQUENCES, "ner", "qa")

# A word is one Chinese character, letters and digits joined with marks (U.S, e-mail), or one mark.
# An accent (here: any combining mark) belongs to the character before it. So does a soft hyphen
# (here: any invisible character), but without a character it is no word.
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f"
_ACCENT, _HIDDEN = "\u0301", "\u00ad"
_ON = f"[{_ACCENT}{_HIDDEN}]"
_RUN = rf"[^\W{_HAN}]+(?:{_ON}+[^\W{_HAN}]*)*"
_WORD = re.compile(rf"[{_HAN}]{_ON}*|{_RUN}(?:[-.&@/]{_RUN})*|[^\s{_HIDDEN}]{_ON}*")


class Prediction(Ability):
    """Runs the task that the model was fine-tuned for.

    An input is a tuple of texts: one or two, for qa (question, context), for ner (text,). settings:
    the fine-tuning's; labels: names of the model's outputs, in order; num_texts: how many texts an
    input may have; max_sequences: the most windows of a request
    """

    def __init__(
        self,
        settings: Settings,
        labels: Sequence[str],
        tokenizer: Tokenizer,
        num_texts: tuple[int, ...],
        max_sequences: int,
    ) -> None:
        self.num_texts, self.max_sequences = num_texts, max_sequences
        self.task = TASK_OF[settings.task](settings, labels)
        self.settings, self.labels = settings, list(labels)
        self.cuts = settings.task in SEQUENCES
        longest, stride = settings.max_seq_len, settings.stride
        advice = (CUT, CUT) if self.cuts else ("shorten it", "shorten the question")
        tokens: Any = Tokens(tokenizer)
        self.encoders = {
            cut: WindowEncoder(
                tokens, longest, None if cut else stride, cut, advice[0], max_sequences, advice[1]
            )
            for cut in (False, True)
        }

    def examples(self, inputs: Sequence[tuple[str, ...]]) -> list[Any]:
        """The inputs as the task's examples."""
        task = self.settings.task
        if task == "qa":
            return [
                Question(f"input {i}", str(i), question, context, (), False)
                for i, (question, context) in enumerate(inputs)
            ]
        if task == "ner":
            words = [tuple(text[a:b] for a, b in word_places(text)) for (text,) in inputs]
            return [Sentence(f"input {i}", some, None) for i, some in enumerate(words)]
        return [TextExample(f"input {i}", texts, None) for i, texts in enumerate(inputs)]

    def features(self, inputs: Sequence[tuple[str, ...]], truncate: bool) -> list[Feature]:
        if truncate and not self.cuts:
            raise Refusal(422, f"truncate: not for {self.settings.task}, which reads whole texts")
        features: list[Feature] = []
        for number, example in enumerate(self.examples(inputs)):
            own = windows_or_refusal(self.task.features, [example], self.encoders[truncate])
            features += [feature._replace(example=number) for feature in own]
            if len(features) > self.max_sequences:
                raise Refusal(
                    413, f"the texts make more than {self.max_sequences} windows; send fewer"
                )
        return features

    def scores(self, model: Any, features: Sequence[Feature]) -> Sequence[NDArray[np.float32]]:
        batch = collate(features).to(model.device)
        return self.task.scores(self.task.forward(model, batch, features), features)

    def answers(
        self,
        inputs: Sequence[tuple[str, ...]],
        features: Sequence[Feature],
        scores: Sequence[NDArray[np.float32]],
        raw_scores: bool,
    ) -> list[Any]:
        """The JSON answer for each input, in order."""
        if self.settings.task in SEQUENCES:
            return [self._labels(own, raw_scores) for own in self.means(inputs, features, scores)]
        examples = self.examples(inputs)
        said = self.task.predict(examples, features, scores)
        if self.settings.task == "qa":
            return [_answer(one) for one in said]
        sure = _word_probabilities(examples, features, scores)
        return [
            _entities(text, one, own) for (text,), one, own in zip(inputs, said, sure, strict=True)
        ]

    def means(
        self,
        inputs: Sequence[Any],
        features: Sequence[Feature],
        scores: Sequence[NDArray[np.float32]],
    ) -> list[NDArray[np.float32]]:
        """(L,) scores of each input, the mean over its windows; only for tasks in SEQUENCES."""
        task: Any = self.task
        means: list[NDArray[np.float32]] = task.means(inputs, features, scores)
        return means

    def shares(self, scores: NDArray[np.float32], raw: bool) -> list[float]:
        """(L,) scores as probabilities; unchanged for `raw` and for regression."""
        if raw or self.settings.task == "regression":
            numbers: list[float] = scores.tolist()
            return numbers
        if self.settings.task == "multilabel" or len(self.labels) == 1:
            return torch.from_numpy(scores).sigmoid().tolist()
        return softmax(scores)

    def _labels(self, scores: NDArray[np.float32], raw: bool) -> list[dict[str, Any]]:
        """Labels with scores, the highest score first."""
        pairs = zip(self.labels, self.shares(scores, raw), strict=True)
        by_label = [{"label": label, "score": share} for label, share in pairs]
        return sorted(by_label, key=lambda one: -one["score"])


def word_places(text: str) -> list[tuple[int, int]]:
    """Start and end of each word, in characters of the text.

    Invisible characters are Unicode's format characters, such as the zero-width joiners inside
    words of Persian and Hindi. Only the zero-width space divides words (Unicode's UAX 29).
    """
    kinds = {one: unicodedata.category(one) for one in set(text)}
    table: dict[int, str] = {
        ord(one): _HIDDEN if kind == "Cf" else _ACCENT
        for one, kind in kinds.items()
        if kind == "Cf" or kind[0] == "M"
    }
    return [match.span() for match in _WORD.finditer(text.translate(table | {0x200B: " "}))]


def _answer(said: dict[str, Any]) -> dict[str, Any]:
    """The answer in the fields of Hugging Face's pipeline; places in characters of the context."""
    names = {"answer": "answer", "score": "probability", "start": "start", "end": "end"}
    return {name: said[own] for name, own in names.items()}


def _word_probabilities(
    examples: Sequence[Sentence], features: Sequence[Feature], scores: Sequence[NDArray[np.float32]]
) -> list[list[float]]:
    """The probability of each word's predicted label."""
    sure = [[0.0] * len(example.words) for example in examples]
    for feature, own in zip(features, scores, strict=True):
        for word, row in zip(feature.target.words, own, strict=True):
            if word != IGNORE_INDEX:
                sure[feature.example][word] = max(softmax(row))
    return sure


def _entities(text: str, said: dict[str, Any], sure: Sequence[float]) -> dict[str, Any]:
    """Words and entities, with start and end in characters of the text."""
    places = word_places(text)
    words = [
        {"word": text[start:end], "start": start, "end": end, "label": label, "score": score}
        for (start, end), label, score in zip(places, said["labels"], sure, strict=True)
    ]
    entities = []
    for entity in said["entities"]:
        first, last = entity["start"], entity["end"] - 1
        start, end = places[first][0], places[last][1]
        score = float(np.mean(sure[first : last + 1]))
        entities.append(
            {
                "entity_group": entity["type"],
                "score": score,
                "word": text[start:end],
                "start": start,
                "end": end,
            }
        )
    return {"entities": entities, "words": words}
