"""The losses of patched Hugging Face models: the masked-LM head on the masked positions alone.

Intended differences from Hugging Face: no masked-LM logits in training with labels unless
requested, a loss of 0 instead of NaN without labelled items, `num_items_in_batch` in every head,
and labels at padded positions ignored.
"""

import sys
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from fastbert import events
from fastbert.backend import is_transformed
from fastbert.check import require
from fastbert.hf.encode import read_call
from fastbert.hf.families import (
    Forward,
    Unsupported,
    keeps_padding,
    leaf,
    patched_base,
    runs_patched,
)
from fastbert.hf.first_tokens import called_by, is_plain_pooler
from fastbert.hf.hooks import is_hooked
from fastbert.hf.replaced import has_usual_loss
from fastbert.hf.stack import family_of_module, makes_a_file, require_usual_functions
from fastbert.models.losses import (
    Scored,
    pretraining_loss,
    score_classes,
    score_words,
    span_loss,
    wants_logits,
    without_padding,
)
from fastbert.modules.linear import is_plain
from fastbert.modules.masks import real_tokens
from fastbert.modules.request import call_or_config
from fastbert.modules.sequences import Rows, first_tokens
from fastbert.ops.mlm_gather import MaskedRows, count_labels, mlm_gather
from fastbert.packing import IGNORE_INDEX

_LOGIT_OPTIONS = ("return_logits", "skip_logits")
_HEADS_OWN = (
    *("labels", "next_sentence_label", "num_items_in_batch", "return_dict"),
    *_LOGIT_OPTIONS,
)


def run_words(model: Any, original: Forward, arguments: dict[str, Any]) -> Any:
    """The patched forward of `BertForPreTraining`, `BertForMaskedLM`, `RobertaForMaskedLM`, ...

    num_items_in_batch counts masked tokens.
    """
    with_pairs = patched_base(model).__name__ == "BertForPreTraining"
    targets = ("labels", "next_sentence_label") if with_pairs else ("labels",)
    has_loss = all(arguments.get(name) is not None for name in targets)
    has_loss = has_loss and _is_usual(model)
    with_logits = wants_logits(model, has_loss, *map(arguments.get, _LOGIT_OPTIONS))
    if has_loss:
        words, fields = _score(model, original, arguments, with_logits, with_pairs)
        num_items = arguments.get("num_items_in_batch")
        if arguments.get("attention_mask") is not None:
            num_items = without_padding(num_items, arguments["labels"], words.num_rows)
        if with_pairs:
            pair_labels = arguments["next_sentence_label"].view(-1)
            pairs = score_classes(fields["seq_relationship_logits"], pair_labels)
            fields["loss"] = pretraining_loss(words, pairs, num_items)
        else:
            fields["loss"] = words.loss(num_items)
    else:  # a loss, if any, is Hugging Face's or the user's own
        rest = _without(arguments, (*_LOGIT_OPTIONS, "num_items_in_batch"))
        if with_logits:
            return original(**rest)
        fields = original(**{**rest, "return_dict": True})
    if not with_logits:
        name = type(model).__name__
        events.tell(events.Route(name, "no logits", "return_logits=True gives them"))
        fields = _without(fields, ("logits", "prediction_logits"))
    modeling = sys.modules[patched_base(model).__module__]
    name = "BertForPreTrainingOutput" if with_pairs else "MaskedLMOutput"
    return _returned(model, getattr(modeling, name)(**fields), arguments)


def run_head(model: Any, original: Forward, arguments: dict[str, Any]) -> Any:
    """The patched forward of any other head: Hugging Face's own forward, with a normalised loss.

    The loss is the mean over labelled items, a finite 0 without any. With num_items_in_batch it is
    the sum over the items divided by that number, so that the losses of micro-batches add up to the
    mean of the whole batch.
    """
    name = patched_base(model).__name__
    arguments = dict(arguments)
    original = called_by(model, original)
    num_items = arguments.pop("num_items_in_batch", None)  # unknown to the heads of 4.57
    if name.endswith("ForQuestionAnswering"):
        return _run_spans(model, original, arguments, num_items)
    labels = arguments.get("labels")
    if labels is None:
        return original(**arguments)
    by_token = name.endswith(("ForTokenClassification", "ForPreTraining"))
    given = labels
    if by_token:
        labels = _of_real_tokens(model, labels, arguments)
    elif labels.dtype == torch.int32:  # Hugging Face infers classes, but its loss needs int64
        labels = labels.long()
    output = original(**{**arguments, "labels": labels, "return_dict": True})
    if output.loss is not None:
        is_regression = getattr(model.config, "problem_type", None) == "regression"
        if by_token or not (is_regression or labels.is_floating_point()):
            count = (labels != IGNORE_INDEX).sum().to(output.loss.device)
        else:
            count = torch.full((), labels.numel(), device=output.loss.device)
        loss = torch.where(count > 0, output.loss, 0.0)
        if by_token:
            num_items = without_padding(num_items, given, count)
        output.loss = loss if num_items is None else Scored(loss * count, count).loss(num_items)
    return _returned(model, output, arguments)


def _run_spans(
    model: Any, original: Forward, arguments: dict[str, Any], num_items: Tensor | int | None
) -> Any:
    """The patched forward of `BertForQuestionAnswering`, ...

    The logits are Hugging Face's, but the lowest number at padding: padding's hidden states are
    zeros, whose score would be the head's bias, above most tokens, and lead a list of answers. The
    loss normalises starts and ends separately, because only one of them may be at padding.
    """
    names = ("start_positions", "end_positions")
    starts, ends = map(arguments.get, names)
    if not _is_usual(model):
        return original(**arguments)
    output = original(**_without(arguments, (*names, "return_dict")), return_dict=True)
    is_real, scores = _real_tokens(model, arguments), [output.start_logits, output.end_logits]
    if is_real is not None:
        is_real = is_real.to(scores[0].device).expand_as(scores[0])
        if not makes_a_file():
            is_padding = ~is_real
            scores = [x.masked_fill(is_padding, torch.finfo(x.dtype).min) for x in scores]
    fields = {**output, "start_logits": scores[0], "end_logits": scores[1]}
    if starts is not None and ends is not None:
        fields["loss"] = span_loss(scores, (starts, ends), is_real, num_items)
    return _returned(model, type(output)(**fields), arguments)


def _score(
    model: Any, original: Forward, arguments: dict[str, Any], with_logits: bool, with_pairs: bool
) -> tuple[Scored, dict[str, Any]]:
    """The masked-LM score, from the masked rows alone if possible, and the other output fields."""
    labels = _of_real_tokens(model, arguments["labels"], arguments)
    if not with_logits:
        try:
            return _score_rows(model, arguments, labels, with_pairs)
        except Unsupported as reason:
            events.refused(model, reason, "logits of all tokens")
    fields = dict(original(**_without(arguments, _HEADS_OWN), return_dict=True))
    logits = fields["prediction_logits" if with_pairs else "logits"]
    return score_classes(logits.flatten(0, 1), labels.flatten()), fields


def _score_rows(
    model: Any, arguments: dict[str, Any], labels: Tensor, with_pairs: bool
) -> tuple[Scored, dict[str, Any]]:
    """`_score` without logits; the last layer too computes only the wanted rows, if possible.

    Raises Unsupported if the head has hooks or modules of another library, because hooks must see
    every row.
    """
    # labels inside vmap cannot be counted, either
    if labels.is_meta or isinstance(labels, FakeTensor) or is_transformed():
        raise Unsupported("the meta device or torch.func: nothing tells which tokens have a target")
    head = family_of_module(model).head(model)
    leaf(head.decoder)  # raises Unsupported if the decoder must see every token
    base = getattr(model, model.base_model_prefix)
    rest = _without(arguments, _HEADS_OWN)
    num_labels = count_labels(labels)  # the host waits here, before anything runs
    found, fields = None, {}
    if runs_patched(base) and not is_hooked(base):
        try:
            found = _run_rows(base, rest, labels, num_labels, with_pairs)
        except Unsupported as reason:
            events.refused(model, reason, "all rows")
    if found is None:
        require_usual_functions(model)
        outputs = base(**rest, return_dict=True)
        states = outputs.last_hidden_state.flatten(0, 1)
        masked = mlm_gather(states, labels.flatten(), capacity=num_labels)
        found = masked, outputs.pooler_output if with_pairs else None
        fields = {name: outputs.get(name) for name in ("hidden_states", "attentions")}
    masked, pooled = found
    if with_pairs:
        fields["seq_relationship_logits"] = model.cls.seq_relationship(pooled)
    return score_words(head, masked), fields


def _run_rows(
    base: Any, rest: dict[str, Any], labels: Tensor, num_labels: int, with_pairs: bool
) -> tuple[MaskedRows, Tensor | None]:
    """The masked rows, and with pairs the pooler's output (B, H) for each sequence."""
    if with_pairs and not is_plain_pooler(base.pooler):
        raise Unsupported("a pooler of the user's own, or a hook on it")
    call = read_call(base, rest)
    if call.wanted:
        raise Unsupported("hidden states, which all rows have")
    padding, mask = call.read()
    targets, rows, cu_seqlens = padding.pack(labels, IGNORE_INDEX), None, padding.cu_seqlens
    size, device = base.config.hidden_size, targets.device
    if Rows.pay(padding.num_tokens, size, device, labelled=True):
        has_label = targets != IGNORE_INDEX
        rows = Rows.read_by_losses(
            padding, first=with_pairs, has_label=has_label, num_labels=num_labels
        )
    x, _ = call.run(padding, mask, rows)
    if rows is not None:
        targets, cu_seqlens = rows.take(targets, IGNORE_INDEX), rows.cu_seqlens
        if not with_pairs:
            return MaskedRows(x, targets, rows.index, cu_seqlens[-1]), None
    pooled = None
    if with_pairs:
        pooled = base.pooler(first_tokens(x, cu_seqlens).to(call.dtype)[:, None])
    return mlm_gather(x, targets, capacity=num_labels), pooled


def _is_usual(model: Any) -> bool:
    """Whether the model's loss is the mean cross-entropy; DistilBERT's loss is a module."""
    if getattr(model.config, "is_decoder", False) or not has_usual_loss(patched_base(model)):
        return False
    loss = getattr(model, "mlm_loss_fct", None)
    if loss is None:
        return True
    usual = {"ignore_index": IGNORE_INDEX, "reduction": "mean", "label_smoothing": 0.0}
    is_usual = all(getattr(loss, name, None) == value for name, value in usual.items())
    return is_plain(loss, torch.nn.CrossEntropyLoss) and loss.weight is None and is_usual


def _real_tokens(model: Any, arguments: dict[str, Any]) -> Tensor | None:
    """(B or 1, S) bool: the tokens whose labels are read; None for all tokens."""
    return None if keeps_padding(model) else real_tokens(arguments.get("attention_mask"))


def _of_real_tokens(model: Any, labels: Tensor, arguments: dict[str, Any]) -> Tensor:
    """One label per token, (B, S), int64 unless floating-point, with -100 at padding.

    labels: of any shape, as Hugging Face flattens them; raises ValueError for another number.
    """
    labels = labels if labels.is_floating_point() else labels.long()
    given = arguments.get("input_ids")
    given = arguments.get("inputs_embeds") if given is None else given
    if not isinstance(given, Tensor) or given.ndim < 2:  # which Hugging Face refuses
        return labels
    batch_size, seqlen = given.shape[:2]
    if labels.numel() != batch_size * seqlen:
        expected = f"one for each token, shape {(batch_size, seqlen)}"
        require(False, "labels", expected, tuple(labels.shape))
    by_row, is_real = labels.reshape(batch_size, seqlen), _real_tokens(model, arguments)
    if is_real is None or is_real.shape not in ((batch_size, seqlen), (1, seqlen)):
        return by_row  # a mask of another shape is refused as it is read
    is_padding = ~is_real.to(labels.device)
    if events.is_listening():
        count = int(((by_row != IGNORE_INDEX) & is_padding).sum())
        if count:
            events.tell(events.Route("labels", "as -100", f"{count} of them are at padding"))
    return by_row.masked_fill(is_padding, IGNORE_INDEX)


def _returned(model: Any, output: Any, arguments: dict[str, Any]) -> Any:
    return output if call_or_config(model.config, arguments, "return_dict") else output.to_tuple()


def _without(arguments: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in names}
