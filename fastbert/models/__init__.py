"""BERT and its task heads, computed on packed batches."""

from fastbert.models.bert import BertModel
from fastbert.models.pretraining import BertForMaskedLM, BertForPreTraining
from fastbert.models.task_models import (
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)

__all__ = [
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
]
