"""The losses of patched Hugging Face models: the masked-LM head on the masked positions alone.

Differences from Hugging Face, all meant: no logits in training with labels unless asked for, a
finite 0 where nothing is to be predicted, `num_items_in_batch` honoured, and labels at padded
positions ignored.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert import events
from fastbert.hf.encode import encode, output_class
from fastbert.hf.families import MaskedHead, Unsupported, family_of, patched_base, runs_patched
from fastbert.hf.hooks import is_hooked
from fastbert.modules.heads import first_tokens
from fastbert.modules.layer import Rows
from fastbert.modules.linear import is_plain
from fastbert.ops.linear_cross_entropy import linear_cross_entropy
from fastbert.ops.mlm_gather import mlm_gather
from fastbert.ops.unpad import Unpadding
from fastbert.packing import IGNORE_INDEX

_HEADS_OWN = ("labels", "next_sentence_label", "return_dict")
_LOGIT_OPTIONS = ("return_logits", "skip_logits")


class _Masked(NamedTuple):
    """rows: (C, H), the hidden states that have a target; targets: (C,); first: (B, H), each
    sequence's first token after the pooler, if there is one; outputs: of the bare model, if it ran
    whole."""

    rows: Tensor
    targets: Tensor
    pooled: Tensor | None
    outputs: Any


def run_masked_lm(model: Any, original: Callable, arguments: dict[str, Any]) -> Any:
    """The forward of `BertForMaskedLM`, `RobertaForMaskedLM`, ..."""
    if arguments.get("labels") is None or getattr(model.config, "is_decoder", False):
        return original(**_without(arguments, _LOGIT_OPTIONS))
    masked, head, wants_logits = _run_masked(model, arguments, with_first=False)
    loss_sum, count = _masked_loss(head, masked)
    output = output_class("MaskedLMOutput")(
        loss=_per_item(loss_sum, count, arguments.get("num_items_in_batch")),
        logits=_logits(head, masked) if wants_logits else None,
        hidden_states=masked.outputs and masked.outputs.hidden_states,
        attentions=masked.outputs and masked.outputs.attentions,
    )
    return _returned(model, output, arguments)


def run_pretraining(model: Any, original: Callable, arguments: dict[str, Any]) -> Any:
    """The forward of `BertForPreTraining`.

    With num_items_in_batch, the number of masked tokens in all shares of a batch, the pair loss
    counts by this share's part of them, so that the shares add up to about the batch's mean.
    """
    pair_labels, num_items = (
        arguments.get(name) for name in ("next_sentence_label", "num_items_in_batch")
    )
    if arguments.get("labels") is None or pair_labels is None:
        return original(**_without(arguments, _LOGIT_OPTIONS))
    masked, head, wants_logits = _run_masked(model, arguments, with_first=True)
    loss_sum, count = _masked_loss(head, masked)
    pair_logits = model.cls.seq_relationship(masked.pooled)
    pair_sum, num_pairs = _cross_entropy(pair_logits, pair_labels.view(-1))
    pair_loss = pair_sum / num_pairs.clamp(min=1)
    if num_items is not None:
        pair_loss = pair_loss * count / num_items
    output = sys.modules[patched_base(model).__module__].BertForPreTrainingOutput(
        loss=_per_item(loss_sum, count, num_items) + pair_loss,
        prediction_logits=_logits(head, masked) if wants_logits else None,
        seq_relationship_logits=pair_logits,
        hidden_states=masked.outputs and masked.outputs.hidden_states,
        attentions=masked.outputs and masked.outputs.attentions,
    )
    return _returned(model, output, arguments)


def run_head(model: Any, original: Callable, arguments: dict[str, Any]) -> Any:
    """The forward of any other head: Hugging Face's, with its mean loss per labelled item.

    Where no item is labelled, the loss is a finite 0; with num_items_in_batch, it is the sum over
    the items divided by that number, so that the shares of a batch add up to its mean.
    """
    labels, num_items = (arguments.get(name) for name in ("labels", "num_items_in_batch"))
    if labels is None:
        return original(**arguments)
    output = original(**{**arguments, "return_dict": True})
    if output.loss is not None:
        counted = labels != IGNORE_INDEX if not labels.is_floating_point() else labels == labels
        count = counted.sum()
        loss = torch.where(count > 0, output.loss, 0.0)
        output.loss = loss if num_items is None else loss * count / num_items
    return _returned(model, output, arguments)


def _run_masked(
    model: Any, arguments: dict[str, Any], with_first: bool
) -> tuple[_Masked, MaskedHead, bool]:
    """Runs the bare model, its last layer on the wanted rows alone where that is all it is for."""
    family = family_of(patched_base(model))
    assert family is not None
    head = family.head(model)
    wants_logits = _wants_logits(model, arguments)
    base = getattr(model, model.base_model_prefix)
    rest = _without(arguments, (*_HEADS_OWN, *_LOGIT_OPTIONS))
    labels = _of_real_tokens(arguments["labels"], rest.get("attention_mask"))
    if not wants_logits and runs_patched(base) and not is_hooked(base):
        try:
            return _run_rows(base, rest, labels, with_first), head, False
        except Unsupported as reason:
            events.tell(events.Route(type(model).__name__, "all rows", str(reason)))
    outputs = base(**rest, return_dict=True)
    hidden_states = outputs.last_hidden_state.flatten(0, 1)
    rows, targets, _, _ = mlm_gather(hidden_states, labels.flatten())
    pooled = outputs.pooler_output if with_first else None
    return _Masked(rows, targets, pooled, outputs), head, wants_logits


def _run_rows(base: Any, rest: dict[str, Any], labels: Tensor, with_first: bool) -> _Masked:
    packed_labels: Tensor | None = None

    def rows_of(padding: Unpadding) -> Rows:
        nonlocal packed_labels
        packed_labels = padding.pack(labels)
        wanted = packed_labels != IGNORE_INDEX
        if with_first:
            starts = padding.cu_seqlens[:-1].long()
            has_tokens = padding.cu_seqlens.diff() > 0
            wanted[starts[has_tokens]] = True
        return Rows.where(wanted, padding.cu_seqlens, padding.max_seqlen, int(wanted.sum()))

    encoded = encode(base, rest, rows_of)
    rows = encoded.rows
    if rows is None:
        raise Unsupported("hidden states, which all rows have")
    assert packed_labels is not None
    targets = packed_labels[rows.index.long()]
    if not with_first:
        return _Masked(encoded.x, targets, None, None)
    first = first_tokens(encoded.x, rows.cu_seqlens)
    pooled = base.pooler(first.to(encoded.dtype)[:, None])
    masked, targets, _, _ = mlm_gather(encoded.x, targets)
    return _Masked(masked, targets, pooled, None)


def _masked_loss(head: MaskedHead, masked: _Masked) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over the rows with a target, and how many there are."""
    rows, decoder, targets = head.transform(masked.rows), head.decoder, masked.targets
    if not is_plain(decoder):
        return _cross_entropy(decoder(rows), targets)
    loss = linear_cross_entropy(rows, decoder.weight, decoder.bias, targets, reduction="sum")
    return loss, (targets != IGNORE_INDEX).sum()


def _cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    loss = F.cross_entropy(logits.to(wide), targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return loss, (targets != IGNORE_INDEX).sum()


def _per_item(loss_sum: Tensor, count: Tensor, num_items: Tensor | int | None) -> Tensor:
    return loss_sum / (count.clamp(min=1) if num_items is None else num_items)


def _logits(head: MaskedHead, masked: _Masked) -> Tensor:
    """(B, S, V)"""
    hidden_states = masked.outputs.last_hidden_state
    logits = head.decoder(head.transform(hidden_states.flatten(0, 1)))
    return logits.unflatten(0, hidden_states.shape[:2])


def _of_real_tokens(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is None or attention_mask.ndim != 2:
        return labels
    return labels.masked_fill(attention_mask == 0, IGNORE_INDEX)


def _wants_logits(model: Any, arguments: dict[str, Any]) -> bool:
    if arguments.get("skip_logits"):
        return False
    wanted = arguments.get("return_logits")
    return not model.training if wanted is None else wanted


def _returned(model: Any, output: Any, arguments: dict[str, Any]) -> Any:
    return_dict = arguments.get("return_dict")
    if return_dict is None:
        return_dict = model.config.return_dict
    return output if return_dict else output.to_tuple()


def _without(arguments: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in names}
