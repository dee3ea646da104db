"""BERT with its heads, over packed batches."""

from fastbert.models.bert import BertModel
from fastbert.models.pretraining import BertForMaskedLM, BertForPreTraining

__all__ = ["BertForMaskedLM", "BertForPreTraining", "BertModel"]
