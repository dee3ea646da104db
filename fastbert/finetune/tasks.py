"""The tasks by name."""

from fastbert.finetune.choice import Choice
from fastbert.finetune.ner import Ner
from fastbert.finetune.qa import QuestionAnswering
from fastbert.finetune.sequences import Classification, MultiLabel, Regression
from fastbert.finetune.task import Task

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "multilabel": MultiLabel,
    "regression": Regression,
    "ner": Ner,
    "qa": QuestionAnswering,
    "choice": Choice,
}
