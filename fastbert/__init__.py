"""fastbert: BERT at the speed of packed batches and fused kernels, under Hugging Face's names."""

from fastbert._version import __version__
from fastbert.config.bert import BertConfig
from fastbert.explain import explain
from fastbert.hf import is_patched, patch, patched_class, register_attention, unpatch
from fastbert.models import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from fastbert.modules.encoder import BertEncoder
from fastbert.ops.mlm_gather import mlm_gather
from fastbert.packing import IGNORE_INDEX, PackedBatch

__all__ = [
    "IGNORE_INDEX",
    "BertConfig",
    "BertEncoder",
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertModel",
    "PackedBatch",
    "__version__",
    "explain",
    "is_patched",
    "mlm_gather",
    "patch",
    "patched_class",
    "register_attention",
    "unpatch",
]
