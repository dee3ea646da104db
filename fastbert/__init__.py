"""fastbert: BERT at the speed of packed batches and fused kernels, under Hugging Face's names."""

from fastbert._version import __version__
from fastbert.packing import IGNORE_INDEX, PackedBatch

__all__ = ["IGNORE_INDEX", "PackedBatch", "__version__"]
