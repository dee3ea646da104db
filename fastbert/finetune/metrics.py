"""The standard metrics, computed with scikit-learn, SciPy and seqeval."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fastbert.check import require_libraries
from fastbert.data.formats.conll import LABEL

_PREFIXES = {"L-": "E-", "U-": "S-", "W-": "S-", "M-": "I-"}
_SCORES = ("precision", "recall", "f1-score", "support")

# Libraries that compute a task's metrics; qa and choice need none.
_LIBRARIES = {
    "classification": ("sklearn.metrics",),
    "multilabel": ("sklearn.metrics",),
    "regression": ("sklearn.metrics", "scipy.stats"),
    "ner": ("seqeval.metrics",),
}


class Table(NamedTuple):
    """A table to print and to keep in summary.json; each row begins with its name."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[Any, ...]]


class Report(NamedTuple):
    """metrics: figures for all examples, by name; tables: figures for each label."""

    metrics: dict[str, float]
    tables: tuple[Table, ...] = ()


def require_metrics(task: str, *, to_measure: bool = True) -> None:
    """Raises InputError unless the task's libraries, of the extra `finetune`, are installed.

    to_measure: False if the task only predicts; then only NER needs its library, seqeval, which
    finds the entities.
    """
    names = _LIBRARIES.get(task, ()) if to_measure or task == "ner" else ()
    require_libraries(f"--task {task}", names, "finetune")


def classification(truth: Sequence[str], predicted: Sequence[str], labels: list[str]) -> Report:
    """Accuracy, macro F1 and Matthews' correlation; a table by label and the confusion matrix.

    truth, predicted: the label of each example; labels: all labels, in the order of the tables.
    If only one label occurs in both, the correlation is undefined and is reported as 0.
    """
    from sklearn import metrics

    constant = len({*truth, *predicted}) == 1
    confusion = metrics.confusion_matrix(truth, predicted, labels=labels)
    scores = metrics.precision_recall_fscore_support(
        truth, predicted, labels=labels, zero_division=0
    )
    return Report(
        {
            "accuracy": float(metrics.accuracy_score(truth, predicted)),
            "macro_f1": float(scores[2].mean()),
            "mcc": 0.0 if constant else float(metrics.matthews_corrcoef(truth, predicted)),
        },
        (
            _by_label(labels, *scores),
            Table(
                "confusion: rows are true, columns predicted",
                ("label", *labels),
                [(name, *row) for name, row in zip(labels, confusion.tolist(), strict=True)],
            ),
        ),
    )


def multilabel(
    truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], labels: list[str]
) -> Report:
    """Micro and macro F1 over labels, and the share of examples with all labels right."""
    from sklearn import metrics

    y, z = _indicators(truth, labels), _indicators(predicted, labels)
    scores = metrics.precision_recall_fscore_support(y, z, zero_division=0)
    return Report(
        {
            "micro_f1": float(metrics.f1_score(y, z, average="micro", zero_division=0)),
            "macro_f1": float(scores[2].mean()),
            "exact": float((y == z).all(1).mean()),
        },
        (_by_label(labels, *scores),),
    )


def regression(truth: Sequence[float], predicted: Sequence[float]) -> Report:
    """Pearson's and Spearman's correlations, mean squared error and mean absolute error.

    A correlation with a constant is undefined and is reported as 0.
    """
    from scipy import stats
    from sklearn import metrics

    constant = np.ptp(truth) == 0 or np.ptp(predicted) == 0
    return Report(
        {
            "pearson": 0.0 if constant else float(stats.pearsonr(truth, predicted).statistic),
            "spearman": 0.0 if constant else float(stats.spearmanr(truth, predicted).statistic),
            "mse": float(metrics.mean_squared_error(truth, predicted)),
            "mae": float(metrics.mean_absolute_error(truth, predicted)),
        }
    )


def entities(truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> Report:
    """Precision, recall and F1 of whole entities, as conlleval counts, and accuracy of words.

    truth, predicted: the labels of each sentence's words. If neither has an entity, the first
    three are 0.
    """
    from seqeval.metrics import sequence_labeling as metrics

    y, z = ([as_iobes(labels) for labels in some] for some in (truth, predicted))
    if not any(label != "O" for labels in (*y, *z) for label in labels):
        return Report({"precision": 0.0, "recall": 0.0, "f1": 0.0, "accuracy": 1.0})
    types = sorted({entity[0] for some in (y, z) for entity in metrics.get_entities(some)})
    scores = metrics.precision_recall_fscore_support(y, z, average=None, zero_division=0)
    micro = metrics.precision_recall_fscore_support(y, z, average="micro", zero_division=0)
    return Report(
        {
            **dict(zip(("precision", "recall", "f1"), map(float, micro[:3]), strict=True)),
            "accuracy": float(
                metrics.accuracy_score(*([*map(list, some)] for some in (truth, predicted)))
            ),
        },
        (_by_label(types, *scores),),
    )


def as_iobes(labels: Sequence[str]) -> list[str]:
    """Translates the prefixes of BILOU, BMES and BMEWO to IOBES, which seqeval reads.

    An entity's last word, L, becomes E; its only word, U or W, becomes S; a middle word, M, becomes
    I. A label without a prefix, such as a part of speech from somebody else's checkpoint, becomes I
    too, so that neighbours with the same label form one entity, as in Hugging Face's pipeline.
    """
    return [
        _PREFIXES.get(label[:2], label[:2]) + label[2:] if LABEL.fullmatch(label) else f"I-{label}"
        for label in labels
    ]


def _by_label(labels: Sequence[str], *scores: np.ndarray) -> Table:
    """The table of `scores`, each an array (labels,)."""
    rows = list(zip(labels, *(score.tolist() for score in scores), strict=True))
    return Table("by label", ("label", *_SCORES), rows)


def _indicators(chosen: Sequence[Sequence[str]], labels: list[str]) -> np.ndarray:
    return np.array([[label in some for label in labels] for some in chosen], dtype=int)
