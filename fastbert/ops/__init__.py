"""Operators: one a file, each a plain PyTorch body with faster ones behind `fastbert.backend`."""

from fastbert.ops.attention import attention, attention_qkvpacked
from fastbert.ops.bias_gelu import bias_gelu
from fastbert.ops.compact import compact
from fastbert.ops.embedding import embedding_layer_norm
from fastbert.ops.gather_rows import gather_rows
from fastbert.ops.layer_norm import dropout_add_layer_norm, layer_norm
from fastbert.ops.linear_cross_entropy import linear_cross_entropy
from fastbert.ops.mlm_gather import mlm_gather
from fastbert.ops.unpad import Unpadding, unpad

__all__ = [
    "Unpadding",
    "attention",
    "attention_qkvpacked",
    "bias_gelu",
    "compact",
    "dropout_add_layer_norm",
    "embedding_layer_norm",
    "gather_rows",
    "layer_norm",
    "linear_cross_entropy",
    "mlm_gather",
    "unpad",
]
