"""Calls in Hugging Face's form, for hooked modules and users' modules that replace fastbert's own.

Such modules do not know packed tokens: T tokens of B sequences are passed as padded rows (B, S).
"""

from typing import Any

from torch import Tensor, nn

from fastbert.modules.linear import is_defined_in, is_watched
from fastbert.modules.request import read_layout, refuse_unknown
from fastbert.modules.sequences import Sequences
from fastbert.ops.unpad import Unpadding

Packed = tuple[Unpadding, Sequences]  # how rows are packed


def is_own(module: nn.Module) -> bool:
    """Whether the forward of the module's class is fastbert's."""
    return is_defined_in(type(module).forward, ("fastbert.",))


def takes_tokens(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` takes packed tokens: its class is fastbert's `kind` or one of torch's
    wrappers, which pass all arguments on, and no hook sees its input or output."""
    is_known = isinstance(module, kind) or is_defined_in(type(module).forward, ("torch.",))
    return is_known and not is_watched(module)


def in_rows(
    module: nn.Module, x: Tensor, sequences: Sequences, *, names_mask: bool = False
) -> Tensor:
    """(T, H) -> (T, H) or (M, H): calls a layer or an attention with rows, as Hugging Face does.

    names_mask: whether the mask is passed by its name, as to `attention.self`
    """
    rows = Unpadding.from_cu_seqlens(sequences.cu_seqlens, sequences.max_seqlen, len(x))
    mask = rows.mask if sequences.mask is None else sequences.mask
    # for the same dropout
    named = {"packed": (rows, sequences.only(None))} if is_own(module) else {}
    if names_mask:
        output = module(rows.pad(x), attention_mask=mask, **named)
    else:
        output = module(rows.pad(x), mask, **named)
    y = rows.pack(output[0] if isinstance(output, tuple) else output).to(x.dtype)
    return y if sequences.rows is None else sequences.rows.of(y)


def read_rows(
    module: nn.Module, x: Tensor, mask: Tensor | None, packed: Packed | None, others: dict[str, Any]
) -> Packed:
    """How hidden states x (B, S, H) of such a call are packed; mask: as in `read_mask`.

    packed: the answer, if it is known. Raises ValueError for `others` that have an effect.
    """
    refuse_unknown(type(module).__name__, others)
    if packed is not None:
        return packed
    padding, general = read_layout(x, mask, None, hidden_size=None)
    return padding, Sequences(padding.cu_seqlens, padding.max_seqlen, general)
