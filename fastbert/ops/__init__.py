"""Operators: one a file, each a plain PyTorch body with faster ones behind `fastbert.backend`."""

from fastbert.ops.compact import compact
from fastbert.ops.gather_rows import gather_rows
from fastbert.ops.mlm_gather import mlm_gather
from fastbert.ops.unpad import Unpadding, unpad

__all__ = ["Unpadding", "compact", "gather_rows", "mlm_gather", "unpad"]
