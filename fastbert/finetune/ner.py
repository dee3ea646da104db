"""Named entities, or any other labels of words, from CoNLL files."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Encoding
from torch import Tensor

from fastbert.data.tables import Sentence, read_conll
from fastbert.finetune.config import FinetuneConfig
from fastbert.finetune.task import Feature, Table, Task, label_index, library
from fastbert.models.classification import BertForTokenClassification
from fastbert.packing import IGNORE_INDEX, PackedBatch

OUTSIDE = "O"


class Ner(Task):
    """A label for each word, read off its first piece.

    A word in several windows belongs to the one that shows the most on its poorer side.
    """

    head = BertForTokenClassification
    best = "f1"

    @staticmethod
    def read(config: FinetuneConfig, path: Path, *, labelled: bool) -> list[Sentence]:
        return read_conll(path, labelled=labelled)

    @staticmethod
    def labels_of(examples: list[Sentence]) -> list[str]:
        found = {label for example in examples for label in example.labels or ()}
        return [*([OUTSIDE] if OUTSIDE in found else []), *sorted(found - {OUTSIDE})]

    def features(self, examples: list[Sentence], *, labelled: bool) -> list[Feature]:
        found = []
        for number, example in enumerate(examples):
            labels = (example.labels or []) if labelled else []
            numbers = [label_index(self.labels, label, example.where) for label in labels]
            windows = self.windows(example.words, where=example.where, is_pretokenized=True)
            for window, first_pieces in zip(windows, _owned(windows), strict=True):
                target = [IGNORE_INDEX] * len(window)
                for token, word in first_pieces if numbers else ():
                    target[token] = numbers[word]
                found.append(Feature((window,), target, number))
        return found

    def loss(self, model: Any, batch: PackedBatch, features: Sequence[Feature]) -> Tensor:
        labels = torch.tensor([label for f in features for label in f.target], device=batch.device)
        return model(dataclasses.replace(batch, labels=labels)).loss

    def scores(
        self, model: Any, batch: PackedBatch, features: Sequence[Feature]
    ) -> Sequence[Tensor]:
        return model(batch).logits.float().split([len(f.sequences[0]) for f in features])

    def predictions(
        self, examples: list[Sentence], features: list[Feature], scores: list[Tensor]
    ) -> list[dict[str, Any]]:
        # words that were cut off, or of which no piece is left
        unknown = OUTSIDE if OUTSIDE in self.labels else self.labels[0]
        labels = [[unknown] * len(example.words) for example in examples]
        of: dict[int, list[tuple[Encoding, Tensor]]] = {}
        for feature, logits in zip(features, scores, strict=True):
            of.setdefault(feature.example, []).append((feature.sequences[0], logits))
        for number, found in of.items():
            owned = _owned([window for window, _ in found])
            for (_, logits), first_pieces in zip(found, owned, strict=True):
                best = logits.argmax(-1).tolist()
                for token, word in first_pieces:
                    labels[number][word] = self.labels[best[token]]
        return [
            {"words": example.words, "labels": row}
            for example, row in zip(examples, labels, strict=True)
        ]

    def metrics(
        self, examples: list[Sentence], predictions: list[dict[str, Any]]
    ) -> tuple[dict[str, float], list[Table]]:
        measure = library("seqeval.metrics")
        truth = [example.labels for example in examples]
        guess = [prediction["labels"] for prediction in predictions]
        report = measure.classification_report(truth, guess, output_dict=True, zero_division=0)
        lines = [
            (
                name,
                *(f"{row[key]:.3f}" for key in ("precision", "recall", "f1-score")),
                f"{row['support']:.0f}",
            )
            for name, row in report.items()
            if not name.endswith(" avg")
        ]
        found = {
            name: float(getattr(measure, f"{name}_score")(truth, guess, **options))
            for name, options in (
                ("f1", {"zero_division": 0}),
                ("precision", {"zero_division": 0}),
                ("recall", {"zero_division": 0}),
                ("accuracy", {}),
            )
        }
        header = ("entity", "precision", "recall", "F1", "entities")
        return found, [Table("by entity", header, lines)]


def _owned(windows: Sequence[Encoding]) -> list[list[tuple[int, int]]]:
    """For each window, (token, word) of the first pieces of the words that belong to it."""
    best: dict[int, tuple[int, int, int]] = {}  # of each word: context, window, token
    for number, window in enumerate(windows):
        before = None
        for token, word in enumerate(window.word_ids):
            if word is not None and word != before:
                context = min(token, len(window) - 1 - token)
                if word not in best or context > best[word][0]:
                    best[word] = (context, number, token)
            before = word
    owned: list[list[tuple[int, int]]] = [[] for _ in windows]
    for word, (_, number, token) in best.items():
        owned[number].append((token, word))
    return owned
