"""Reads the arguments of a call, for models, encoders and patched modules alike."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastbert.check import require
from fastbert.modules.masks import document_boundaries, read_mask
from fastbert.modules.sequences import pays_to_count
from fastbert.ops.unpad import Unpadding, unpad

# Hugging Face's arguments for the boundaries of documents packed into one row.
DOCUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")

# Accepted, without effect on a bidirectional encoder; the last line's come from tokenizers. The
# first two have an effect, but callers read or refuse them separately.
_IGNORED = {
    *("output_hidden_states", "output_attentions"),
    *("num_items_in_batch", "seq_idx", "cache_position", "use_cache", "return_dict"),
    *("special_tokens_mask", "length", "offset_mapping", "overflow_to_sample_mapping"),
}


def read_layout(
    given: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    *,
    hidden_size: int | None,
    keeps_padding: bool = False,
    **documents: Any,
) -> tuple[Unpadding, Tensor | None]:
    """How `given` (B, S, ...), ids or embeddings, is packed, and a further mask for `attention`.

    attention_mask: see `read_mask`; position_ids, documents: see `document_boundaries`;
    hidden_size: of the model if its layers may replay a CUDA graph, else None; keeps_padding:
    whether padded tokens are computed too, though no token attends to them. With a mask the host
    waits for a GPU, but where a graph had better compute all places. Raises ValueError for
    arguments that do not fit together.
    """
    batch, seqlen = given.shape[:2]
    boundaries = document_boundaries(
        batch, seqlen, attention_mask, position_ids=position_ids, **documents
    )
    if boundaries is not None:
        return Unpadding(None, None, *boundaries, (1, seqlen)), None
    padding, general = read_mask(attention_mask, batch, seqlen)
    if padding is None:
        return Unpadding.dense(batch, seqlen, given.device), general
    padding = padding.to(given.device)
    waits = keeps_padding or _waits(given.device, batch * seqlen, hidden_size)
    real = unpad(padding, None if waits else batch * seqlen)
    if keeps_padding and real.num_tokens < batch * seqlen:
        return Unpadding.dense(batch, seqlen, given.device), padding[:, None, None]
    return real, None


def _waits(device: torch.device, num_places: int, hidden_size: int | None) -> bool:
    """Whether the host learns how many tokens are real."""
    if device.type == "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return True
    if hidden_size is None:  # layers without a graph take the host longer than a GPU
        return True
    return not num_places or pays_to_count(num_places, hidden_size)


def asked(config: Any, arguments: Mapping[str, Any], name: str) -> Any:
    """The argument `name` of a call, or where it is None the configuration's value."""
    value = arguments.get(name)
    return getattr(config, name) if value is None else value


def unknown_argument(arguments: dict[str, Any]) -> str | None:
    """The name of the first argument that has a value and is not ignored; None if none has."""
    for name, value in arguments.items():
        is_none = value is None or value is False or _all_none(value)
        if not (is_none or name in _IGNORED):
            return name
    return None


def _all_none(value: Any) -> bool:
    """Whether `value` is a list of None, which transformers 4.57 makes of a head_mask of None."""
    return isinstance(value, (list, tuple)) and all(one is None for one in value)


def refuse_unknown(who: str, arguments: dict[str, Any]) -> None:
    """Raises ValueError for output_attentions and for arguments without a use."""
    refuse_attentions(arguments.get("output_attentions"))
    name = unknown_argument(arguments)
    require(
        name is None,
        who,
        "only arguments that an encoder has a use for",
        name,
        "leave it out, or use a model patched by fastbert.patch",
    )


def refuse_attentions(output_attentions: bool | None) -> None:
    """Raises ValueError if attention probabilities are wanted."""
    require(
        not output_attentions,
        "output_attentions",
        "False",
        True,
        "the fused attention never forms the probabilities; a model patched by fastbert.patch "
        "takes Hugging Face's path for such a call",
    )
