"""Named entities: a label for each word."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastbert.data.formats.conll import Sentence, read_conll
from fastbert.finetune.features import Feature, WindowEncoder, best_window
from fastbert.finetune.metrics import Report, as_iobes, entities
from fastbert.finetune.task import Prediction, Scores, Task, to_host
from fastbert.models.task_models import BertForTokenClassification
from fastbert.packing import IGNORE_INDEX


class WordPlaces(NamedTuple):
    """The target of a window: for each of its tokens, the word to label there, if any.

    words: index of the word in its sentence, or -100; labels: index of the word's label, or -100
    """

    words: list[int]
    labels: list[int]


class Entities(Task):
    """Labels each word at its first token (Devlin et al. 2018, section 5.3).

    Where windows overlap, a word is labelled only in the window with the most context on both
    sides of the word (`best_window`). A feature's target is a `WordPlaces`.
    """

    model_class = BertForTokenClassification
    metrics = ("f1", "precision", "recall", "accuracy")

    def read(self, path: Path, *, labelled: bool = True) -> list[Sentence]:
        return read_conll(path, labelled=labelled)

    def labels_of(self, example: Sentence) -> Iterable[str]:
        return example.labels or ()

    def features(self, examples: Sequence[Sentence], encoder: WindowEncoder) -> list[Feature]:
        return [
            feature
            for number, example in enumerate(examples)
            for feature in self._features_of(number, example, encoder)
        ]

    def _features_of(self, number: int, example: Sentence, encoder: WindowEncoder) -> list[Feature]:
        encoded = encoder.tokenizer.encode(
            list(example.words), is_pretokenized=True, add_special_tokens=False
        )
        by_word: list[list[int]] = [[] for _ in example.words]
        for token, word in zip(encoded.ids, encoded.word_ids, strict=True):
            assert word is not None  # there are no special tokens
            by_word[word].append(token)
        # a word that the normaliser deletes (a control character) needs some token for its label
        by_word = [tokens or [encoder.specials.unk] for tokens in by_word]
        starts = np.cumsum([0, *map(len, by_word)])[:-1].tolist()
        windows = encoder.windows(example.where, [token for word in by_word for token in word])
        words = [[IGNORE_INDEX] * len(window.input_ids) for window in windows]
        for word, start in enumerate(starts):
            best = best_window(start, windows)
            words[best][windows[best].prefix + start - windows[best].begin] = word
        return [
            Feature(number, (window,), WordPlaces(own, self._numbers(own, example)))
            for window, own in zip(windows, words, strict=True)
        ]

    def _numbers(self, words: list[int], example: Sentence) -> list[int]:
        """Index of the label at each token; -100 where `words` has no word, or without labels."""
        if example.labels is None:
            return [IGNORE_INDEX] * len(words)
        return [
            IGNORE_INDEX if word == IGNORE_INDEX else self.labels.index(example.labels[word])
            for word in words
        ]

    def count(self, feature: Feature) -> float:
        numbers = [number for number in feature.target.labels if number != IGNORE_INDEX]
        return len(numbers) if self.weights is None else float(self.weights[numbers].sum())

    def targets(self, features: Sequence[Feature]) -> list[int]:
        return [number for feature in features for number in feature.target.labels]

    def scores(self, output: Any, features: Sequence[Feature]) -> list[NDArray[np.float32]]:
        """(T, L) logits for each feature of T tokens."""
        ends = np.cumsum([feature.num_tokens for feature in features])
        return np.split(to_host(output.logits), ends[:-1])

    def prediction(self, example: Sentence, features: list[Feature], scores: Scores) -> Prediction:
        """words, and a label for each; entities: type, words, start and end (excluded) in words."""
        labels = ["O"] * len(example.words)
        for feature, own in zip(features, scores, strict=True):
            for word, label in zip(feature.target.words, own.argmax(1).tolist(), strict=True):
                if word != IGNORE_INDEX:
                    labels[word] = self.labels[label]
        found = _entities(example.words, labels)
        return {"words": list(example.words), "labels": labels, "entities": found}

    def evaluate(self, examples: Sequence[Any], predictions: Sequence[Prediction]) -> Report:
        return entities([e.labels for e in examples], [p["labels"] for p in predictions])


def _entities(words: Sequence[str], labels: list[str]) -> list[dict[str, Any]]:
    from seqeval.metrics.sequence_labeling import get_entities

    return [
        {"type": kind, "words": list(words[first : last + 1]), "start": first, "end": last + 1}
        for kind, first, last in get_entities(as_iobes(labels))
    ]
