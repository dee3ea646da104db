"""Finds patched heads that read only each sequence's first token, so the others can be left out."""

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from fastbert.hf.families import Forward, patched_base, runs_patched
from fastbert.hf.hooks import is_hooked, is_theirs
from fastbert.modules.sequences import Rows
from fastbert.ops.unpad import Unpadding

# The head whose own forward is calling its bare model now, in this thread.
_HEAD: ContextVar[Any] = ContextVar("head", default=None)


def called_by(head: Any, forward: Forward) -> Forward:
    """`forward`, inside which the bare model of `head` may return first tokens alone, (B, 1, H).

    It does so only if nobody could see the other tokens, and not under torch.compile, which cannot
    trace reading a context variable.
    """
    if torch.compiler.is_compiling():
        return forward

    def call(**arguments: Any) -> Any:
        token = _HEAD.set(head)
        try:
            return forward(**arguments)
        finally:
            _HEAD.reset(token)

    return call


def present_head(model: Any) -> Any:
    """The head whose own forward calls this bare model now, for the first time; else None.

    A module inside a head may call the model once more, and read all of its output.
    """
    head = None if torch.compiler.is_compiling() else _HEAD.get()
    if head is None or head.base_model is not model:
        return None
    _HEAD.set(None)
    return head


def first_rows(head: Any, padding: Unpadding, hidden_size: int) -> Rows | None:
    """The rows of first tokens, if `head` reads no others and computing only these saves time.

    head: may be None, here and in `reads_pooler`
    """
    if head is None or not padding.is_by_row:
        return None
    pays = Rows.pay(padding.num_tokens, hidden_size, padding.cu_seqlens.device)
    return Rows.read_by_losses(padding, first=True) if pays and reads_first_tokens(head) else None


def reads_pooler(head: Any, padding: Unpadding) -> bool:
    """Whether `head` reads nothing but the output of its model's pooler."""
    if head is None or not padding.is_by_row or not reads_first_tokens(head):
        return False
    classifier = getattr(head, "classifier", None)
    return classifier is None or not is_theirs(classifier)  # RoBERTa's reads the first column


def reads_first_tokens(model: Any) -> bool:
    """Whether a head's forward reads only first tokens of its bare model's output."""
    name, base = patched_base(model).__name__, model.base_model
    if is_hooked(base) or not runs_patched(base):
        return False
    pooler = getattr(base, "pooler", None)
    if not name.endswith(_POOLED) or not (pooler is None or is_plain_pooler(pooler)):
        return False
    if name.startswith(("Bert", "DistilBert")):  # a pooler's output, or the first column
        return True
    if name.endswith("ForMultipleChoice"):  # ELECTRA's, without a pooler, may summarize all tokens
        return pooler is not None
    return is_theirs(model.classifier) and not is_hooked(model.classifier)  # it gets all tokens


_POOLED = "ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction"


def is_plain_pooler(pooler: nn.Module | None) -> bool:
    """Whether `pooler` is transformers' own, which reads the first token, and has no hooks."""
    return pooler is not None and is_theirs(pooler) and not any(map(is_hooked, pooler.modules()))


def first_column(first: Tensor, padding: Unpadding) -> Tensor:
    """First tokens (B, H) -> (B, 1, H), the first column of the padded form: zeros at padding."""
    is_real = padding.is_real
    if is_real is not None:
        first = torch.where(is_real[:, :1], first, 0.0)
    return first[:, None]
