"""Switches off each optimization of a pre-training step alone, then all, beside Hugging Face's.

An optimization ("trick") is a property of the batch or of one function, so it is switched off from
outside: the batch is padded, or plain PyTorch replaces the function. With all of them off, the step
computes what Hugging Face's does, without that model's overheads.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastbert
from benchmarks.results import FASTBERT, SDPA, Options, Results
from benchmarks.steps.steps import (
    GRAPH,
    at_fixed_places,
    make_model,
    optimizer_step,
    training_step,
)
from benchmarks.timing import interleaved, recorded, summarize
from benchmarks.workloads import MAX_SEQLEN, Batch, pretraining_batch, sequence_lengths
from fastbert.models.losses import masked_rows, score_classes, score_words
from fastbert.modules import activations, embeddings, layer
from fastbert.modules.graphs.recorder import Work
from fastbert.modules.linear import Leaf
from fastbert.packing import PackedBatch

NOTHING, EVERYTHING = "nothing", "all of these"
NARROW = "narrow residual stream"


def run(options: Options, results: Results) -> None:
    """Measures the part "ablation": a row for each trick, and one for Hugging Face's SDPA."""
    preset, sequences, rounds = ("mini", 4, 4) if options.quick else ("base", 4, 8)
    if options.device.type == "cuda":
        preset, sequences, rounds = "base", 96, 12 if options.quick else 24
    torch.manual_seed(0)
    batch = pretraining_batch(sequence_lengths("wikipedia", sequences)).to(options.device)
    with options.device:
        model, theirs = make_model(FASTBERT, preset).train(), make_model(SDPA, preset)
    tricks = [*TRICKS, GRAPH] if options.device.type == "cuda" else [*TRICKS]
    if options.precision == "fp32":
        tricks.remove(NARROW)
    left_out = {NOTHING: (), **{name: (name,) for name in tricks}, EVERYTHING: (*tricks,)}
    steps: dict[str, Work] = {}
    refused: dict[str, dict[str, str]] = {}
    for name, without in left_out.items():
        steps[name] = ablated(model, batch, without, options)
        if options.device.type == "cuda" and GRAPH not in without:
            steps[name], reason = recorded(steps[name])
            if reason:
                refused[name] = {GRAPH: reason}
    steps[SDPA] = training_step(SDPA, theirs, batch, options)
    seconds = interleaved(steps, rounds)
    case = {"preset": preset, "lengths": "wikipedia", "sequences": sequences}
    for name, values in seconds.items():
        if name == SDPA:
            results.add("ablation", {**case, "without": "fastbert"}, {SDPA: summarize(values)})
        else:
            timings = {FASTBERT: summarize(values)}
            why = refused.get(name, {})
            results.add("ablation", {**case, "without": name}, timings, refused=why)


def ablated(
    model: fastbert.BertForPreTraining, batch: Batch, without: tuple[str, ...], options: Options
) -> Work:
    """A pre-training step, which a CUDA graph can record, without the tricks in `without`."""
    packed = at_fixed_places(padded(batch) if "unpadding" in without else batch.packed)
    loss_of = _loss
    if "masked-only head" in without:
        loss_of = _loss_of_every_position
    elif "last-layer subset" in without:
        loss_of = _loss_after_every_row
    step = optimizer_step(
        model, lambda: loss_of(model, packed), options, capturable=packed.cu_seqlens.is_cuda
    )

    def run_step() -> Tensor:
        with contextlib.ExitStack() as stack:
            for name in without:
                stack.enter_context(TRICKS.get(name, _by_data)())
            return step()

    return run_step


def padded(batch: Batch) -> PackedBatch:
    """The batch with its padding as tokens, which attention masks out."""
    inputs = batch.padded
    count = len(batch.lengths)
    places = torch.arange(MAX_SEQLEN, device=batch.packed.device)
    return dataclasses.replace(
        batch.packed,
        input_ids=inputs["input_ids"].flatten(),
        cu_seqlens=(torch.arange(count + 1, device=places.device) * MAX_SEQLEN).int(),
        max_seqlen=MAX_SEQLEN,
        position_ids=places.repeat(count),
        token_type_ids=inputs["token_type_ids"].flatten(),
        labels=inputs["labels"].flatten(),
        attention_mask=inputs["attention_mask"][:, None, None].bool(),
    )


def _loss(model: fastbert.BertForPreTraining, batch: PackedBatch) -> Tensor:
    return model(batch).loss


def _loss_after_every_row(model: fastbert.BertForPreTraining, batch: PackedBatch) -> Tensor:
    encoded = model.bert(batch)
    masked = masked_rows(encoded.last_hidden_state, batch)
    words = score_words(model.cls.predictions, masked)
    return words.loss() + _pair_loss(model, encoded.pooler_output, batch)


def _loss_of_every_position(model: fastbert.BertForPreTraining, batch: PackedBatch) -> Tensor:
    """Scores every position, for which the last layer must compute every row."""
    encoded = model.bert(batch)
    logits = model.cls.predictions(encoded.last_hidden_state)
    words = F.cross_entropy(logits.float(), batch.labels)
    return words + _pair_loss(model, encoded.pooler_output, batch)


def _pair_loss(model: fastbert.BertForPreTraining, pooled: Tensor, batch: PackedBatch) -> Tensor:
    return score_classes(model.cls.seq_relationship(pooled), batch.next_sentence_label).loss()


@contextlib.contextmanager
def _by_data() -> Iterator[None]:
    """For tricks that are not in a function: the batch, the loss or the caller leaves them out."""
    yield


@contextlib.contextmanager
def _three_products() -> Iterator[None]:
    def separate(x: Tensor, linears: tuple[nn.Module, ...], *_) -> tuple[Tensor, None]:
        return torch.cat([linear(x) for linear in linears], dim=-1), None

    with mock.patch.object(layer, "fused_linear", separate):
        yield


@contextlib.contextmanager
def _plain_norm() -> Iterator[None]:
    def add_and_norm(x, x_bias, residual, end, *_) -> layer.Stream:
        x = F.dropout(x, end.dropout, training=end.dropout > 0)
        y = end.norm(residual + x).to(residual.dtype)
        return layer.Stream(y, y)

    with (
        mock.patch.object(layer, "add_and_norm", add_and_norm),
        mock.patch.object(layer.End, "adds_bias", return_value=None),
    ):
        yield


@contextlib.contextmanager
def _one_branch() -> Iterator[None]:
    """Makes the residual the linear layers' input too, so that autograd adds the two gradients."""
    stream = layer.Stream
    with mock.patch.object(layer, "Stream", lambda x, _: stream(x, x)):
        yield


@contextlib.contextmanager
def _plain_gelu() -> Iterator[None]:
    def dense_and_activate(x: Tensor, dense: Leaf, function: Callable, *_) -> Tensor:
        return function(dense(x))

    with mock.patch.object(activations, "dense_and_activate", dense_and_activate):
        yield


@contextlib.contextmanager
def _wide_stream() -> Iterator[None]:
    with mock.patch.object(embeddings, "stream_dtype", lambda own, *_, **__: own):
        yield


TRICKS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "unpadding": _by_data,
    "masked-only head": _by_data,
    "last-layer subset": _by_data,
    "fused QKV": _three_products,
    "fused norm": _plain_norm,
    "fused GELU": _plain_gelu,
    "residual branches": _one_branch,
    NARROW: _wide_stream,
}
