"""fastbert inside Hugging Face models; transformers is imported only when it is used."""

from fastbert.hf.attention import register_attention
from fastbert.hf.classes import is_patched, patch, patched_class, unpatch

__all__ = ["is_patched", "patch", "patched_class", "register_attention", "unpatch"]
