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


class _Scored(NamedTuple):
    """What a masked-LM head makes of a batch.

    loss_sum, num_targets: cross-entropy summed over the tokens that have a target, and how many
    these are, each (); logits: (B, S, V) if wanted; pair_logits: (B, 2) if asked for; outputs: what
    has the hidden states, None where only some rows were computed.
    """

    loss_sum: Tensor
    num_targets: Tensor
    logits: Tensor | None
    pair_logits: Tensor | None
    outputs: Any

    def loss(self, num_items: Tensor | int | None) -> Tensor:
        return self.loss_sum / (self.num_targets.clamp(min=1) if num_items is None else num_items)

    def states(self) -> dict[str, Any]:
        names = ("hidden_states", "attentions")
        return {name: self.outputs and self.outputs.get(name) for name in names}


def run_masked_lm(model: Any, original: Callable, arguments: dict[str, Any]) -> Any:
    """The forward of `BertForMaskedLM`, `RobertaForMaskedLM`, ..."""
    is_decoder = getattr(model.config, "is_decoder", False)
    if arguments.get("labels") is None or is_decoder or not _is_usual(model):
        return original(**_without(arguments, _LOGIT_OPTIONS))
    scored = _score(model, original, arguments, with_pairs=False)
    output = output_class("MaskedLMOutput")(
        loss=scored.loss(arguments.get("num_items_in_batch")),
        logits=scored.logits,
        **scored.states(),
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
    scored = _score(model, original, arguments, with_pairs=True)
    assert scored.pair_logits is not None
    pair_sum, num_pairs = _cross_entropy(scored.pair_logits, pair_labels.view(-1))
    pair_loss = pair_sum / num_pairs.clamp(min=1)
    if num_items is not None:
        pair_loss = pair_loss * scored.num_targets / num_items
    output = sys.modules[patched_base(model).__module__].BertForPreTrainingOutput(
        loss=scored.loss(num_items) + pair_loss,
        prediction_logits=scored.logits,
        seq_relationship_logits=scored.pair_logits,
        **scored.states(),
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


def _score(model: Any, original: Callable, arguments: dict[str, Any], with_pairs: bool) -> _Scored:
    """The head on the masked rows alone, or where that will not do, on all of them."""
    labels = _of_real_tokens(arguments["labels"], arguments.get("attention_mask"))
    if not _wants_logits(model, arguments):
        try:
            return _score_rows(model, arguments, labels, with_pairs)
        except Unsupported as reason:
            events.tell(events.Route(type(model).__name__, "logits of all tokens", str(reason)))
    rest = _without(arguments, (*_HEADS_OWN, *_LOGIT_OPTIONS))
    outputs = original(**rest, return_dict=True)
    logits = outputs.prediction_logits if with_pairs else outputs.logits
    loss_sum, count = _cross_entropy(logits.flatten(0, 1), labels.flatten())
    pair_logits = outputs.seq_relationship_logits if with_pairs else None
    wanted = logits if _wants_logits(model, arguments) else None
    return _Scored(loss_sum, count, wanted, pair_logits, outputs)


def _score_rows(model: Any, arguments: dict[str, Any], labels: Tensor, with_pairs: bool) -> _Scored:
    """Without logits; the last layer too computes the wanted rows alone, if that is all it is for.

    Raises Unsupported where something looks at what the head is given or gives.
    """
    if labels.is_meta:
        raise Unsupported("the meta device: nothing tells which tokens have a target")
    family = family_of(patched_base(model))
    assert family is not None
    head = family.head(model)
    base = getattr(model, model.base_model_prefix)
    rest = _without(arguments, (*_HEADS_OWN, *_LOGIT_OPTIONS))
    num_labels = int((labels != IGNORE_INDEX).sum())  # the host waits here, before anything runs
    masked = None
    if runs_patched(base) and not is_hooked(base):
        try:
            masked = _run_rows(base, rest, labels, num_labels, with_pairs)
        except Unsupported as reason:
            events.tell(events.Route(type(model).__name__, "all rows", str(reason)))
    if masked is None:
        outputs = base(**rest, return_dict=True)
        rows, targets, _, _ = mlm_gather(
            outputs.last_hidden_state.flatten(0, 1), labels.flatten(), capacity=num_labels
        )
        masked = _Masked(rows, targets, outputs.pooler_output if with_pairs else None, outputs)
    loss_sum, count = _masked_loss(head, masked)
    pair_logits = model.cls.seq_relationship(masked.pooled) if with_pairs else None
    return _Scored(loss_sum, count, None, pair_logits, masked.outputs)


class _Masked(NamedTuple):
    """rows: (C, H), the hidden states that have a target; targets: (C,); pooled: (B, H), each
    sequence's first token after the pooler, if there is one; outputs: of the bare model, if it ran
    whole."""

    rows: Tensor
    targets: Tensor
    pooled: Tensor | None
    outputs: Any


def _run_rows(
    base: Any, rest: dict[str, Any], labels: Tensor, num_labels: int, with_pairs: bool
) -> _Masked:
    packed_labels: Tensor | None = None

    def rows_of(padding: Unpadding) -> Rows:
        nonlocal packed_labels
        packed_labels = padding.pack(labels)
        return Rows.read_by_losses(
            padding.cu_seqlens,
            padding.max_seqlen,
            padding.num_tokens,
            first=with_pairs,
            has_label=packed_labels != IGNORE_INDEX,
            num_labels=num_labels,
        )

    encoded = encode(base, rest, rows_of)
    rows = encoded.rows
    if rows is None:
        raise Unsupported("hidden states, which all rows have")
    assert packed_labels is not None
    targets = rows.take(packed_labels, IGNORE_INDEX)
    if not with_pairs:
        return _Masked(encoded.x, targets, None, None)
    first = first_tokens(encoded.x, rows.cu_seqlens)
    pooled = base.pooler(first.to(encoded.dtype)[:, None])
    masked, targets, _, _ = mlm_gather(encoded.x, targets, capacity=num_labels)
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


def _is_usual(model: Any) -> bool:
    """Whether the loss is the mean cross-entropy; DistilBERT holds it as a module."""
    loss = getattr(model, "mlm_loss_fct", None)
    if loss is None:
        return True
    usual = {"ignore_index": IGNORE_INDEX, "reduction": "mean", "label_smoothing": 0.0}
    return (
        is_plain(loss, torch.nn.CrossEntropyLoss)
        and loss.weight is None
        and all(getattr(loss, name) == value for name, value in usual.items())
    )


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
