"""A layer as one node of autograd gives what its operators give one by one."""

import contextlib

import pytest
import torch
from torch import nn

import fastbert
from fastbert.modules import layer as layers
from fastbert.modules import whole_layer
from fastbert.modules.bert_layer import parts_of
from fastbert.modules.layer import Stream, run_layer
from tests.modules.graphs.case import Counter
from tests.modules.whole_layer.case import (
    adapt,
    assert_same,
    both,
    make,
    one_by_one,
    results,
    sequences_of,
    stream_of,
)


@pytest.mark.parametrize("wanted", [None, 0, 1])
@pytest.mark.parametrize("act", ["gelu", "gelu_new"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_outputs_and_gradients_are_those_of_the_operators(dropout, act, wanted, device, runs):
    layer, sequences = make(device, dropout=dropout, act=act), sequences_of(device, dropout=dropout)
    assert_same(*both(layer, stream_of(device), sequences, wanted))
    assert runs == [True]


@pytest.mark.parametrize("in_fp32", [True, False], ids=["fp32-stream", "low-stream"])
def test_under_autocast_only_weight_gradients_differ_and_are_closer(in_fp32, device, runs):
    """They are sums in float32, which autocast's product rounds to half precision."""
    layer, sequences = make(device), sequences_of(device)
    half = torch.float16  # the interpreter has no product of bfloat16
    x = stream_of(device, torch.float32 if in_fp32 else half)

    def context():
        return torch.autocast(device, half)

    actual, expected = both(layer, x, sequences, context=context)
    assert runs == [True]
    assert_same(actual, expected, rtol=2e-3, atol=2e-2)
    names = ["y", "residual", "x", *(name for name, _ in layer.named_parameters())]
    for name, a, e in zip(names, actual, expected, strict=True):
        is_product = name.endswith("weight") and a.ndim == 2
        assert is_product or torch.equal(a, e), name
    if device == "cuda":  # a CPU's products of half precision have no other result
        assert not any(a.ndim == 2 and torch.equal(a, a.half().float()) for a in actual[3:])


@pytest.mark.parametrize("how", [contextlib.nullcontext, one_by_one], ids=["whole", "operators"])
def test_a_second_layer_reads_what_the_first_has_rounded(how, device):
    """With the residual stream in float32 no layer behind the first casts its input."""
    layer, sequences, half = make(device).eval(), sequences_of(device), torch.float16
    x = stream_of(device).detach()
    with torch.no_grad(), torch.autocast(device, half), how():
        first = run_layer(parts_of(layer), Stream(x, x), sequences)
        assert (first.x.dtype, first.residual.dtype) == (half, torch.float32)
        assert torch.equal(first.x, first.residual.half())
        second = run_layer(parts_of(layer), first, sequences)
        plain = Stream(first.residual, first.residual)
        assert_same(second, run_layer(parts_of(layer), plain, sequences), rtol=0, atol=0)
        with Counter() as counter:
            run_layer(parts_of(layer), first, sequences)
        with Counter() as casting:
            run_layer(parts_of(layer), plain, sequences)
    assert casting.calls["_to_copy"] == counter.calls["_to_copy"] + 1


@pytest.mark.parametrize("name", ["attention.self.key", "intermediate.dense"])
def test_a_module_that_is_called_reads_the_residual_stream(name, device):
    """In float32 under autocast, as Hugging Face's; only plain layers read it rounded."""
    layer, sequences, half, seen = make(device).eval(), sequences_of(device), torch.float16, []
    x = stream_of(device).detach()
    layer.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad(), torch.autocast(device, half):
        run_layer(parts_of(layer), Stream(x.half(), x), sequences)
    assert [one.dtype for one in seen] == [torch.float32]


def test_without_gradients_nothing_is_saved_and_both_branches_are_one(device, runs):
    layer, sequences = make(device, training=False), sequences_of(device, dropout=False)
    x = stream_of(device)
    with one_by_one(), torch.no_grad():
        expected = run_layer(parts_of(layer), Stream(x, x), sequences)
    with torch.no_grad():
        y, residual = run_layer(parts_of(layer), Stream(x, x), sequences)
    assert y is residual
    assert y.grad_fn is None
    assert_same([y], expected[:1])
    assert runs == [True]


@pytest.mark.parametrize("save", ["z", "y"])
def test_the_norms_save_what_the_module_says(save, device, runs):
    layer, sequences = make(device), sequences_of(device)
    layer.attention.output.save = layer.output.save = save
    assert_same(*both(layer, stream_of(device), sequences))
    assert runs == [True]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("names", [["query", "value"], ["key"]], ids="-".join)
def test_projections_that_are_called_are_a_part_before(names, autocast, device, runs):
    layer, sequences = make(device), sequences_of(device)
    adapt(layer, names)
    contexts = {True: lambda: torch.autocast(device, torch.float16), False: contextlib.nullcontext}
    x = stream_of(device, torch.float16 if autocast else torch.float32)
    assert_same(*both(layer, x, sequences, context=contexts[autocast]))
    with torch.no_grad(), contexts[autocast]():
        assert not run_layer(parts_of(layer), Stream(x, x), sequences).x.requires_grad
    assert runs == [True, True]


def test_a_called_projection_is_called_once(device, runs):
    layer, sequences, x = make(device), sequences_of(device), stream_of(device)
    calls = []
    layer.attention.self.value.register_forward_hook(lambda *_: calls.append(1))
    assert_same(*both(layer, x, sequences))
    assert len(calls) == 2
    assert runs == [True]


def test_attention_is_in_the_products_dtype_whatever_an_adapter_returns(device, monkeypatch):
    """As autocast has it for PyTorch's own attention."""
    layer, sequences, x = make(device), sequences_of(device), stream_of(device)
    adapt(layer, ["query", "value"])
    layer.attention.self.query.forward = lambda x: x.float()
    seen, forward = [], whole_layer.AttentionFunction.forward
    monkeypatch.setattr(
        whole_layer.AttentionFunction,
        "forward",
        lambda ctx, kernels, q, *others: (seen.append(q.dtype), forward(ctx, kernels, q, *others))[
            1
        ],
    )
    results(layer, x, sequences, context=lambda: torch.autocast(device, torch.float16))
    assert seen == [torch.float16]


def test_parameters_that_change_later_are_seen(device, runs):
    """A whole layer is kept with the parts, its parameters are not."""
    layer, sequences, x = make(device), sequences_of(device), stream_of(device)
    parts = parts_of(layer)
    run_layer(parts, Stream(x, x), sequences)
    layer.output.dense.weight.data = layer.output.dense.weight.data.clone() * 2
    layer.intermediate.dense.bias = nn.Parameter(torch.ones(64, device=device))
    y, _ = run_layer(parts, Stream(x, x), sequences)
    with one_by_one():
        expected, _ = run_layer(parts, Stream(x, x), sequences)
    torch.testing.assert_close(y, expected)
    layer.intermediate.dense.bias = None
    run_layer(parts, Stream(x, x), sequences)
    assert runs == [True, True, False]


def test_layers_that_train_use_it(device, runs):
    """Models' layers do: the last, of which a model reads few rows, may not."""
    config = fastbert.BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64,
    )  # fmt: skip
    model = fastbert.BertModel(config).to(device).train()
    model(torch.randint(40, (2, 9), device=device)).last_hidden_state.sum().backward()
    assert runs == [True, True]
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())
    assert layers.WholeLayer is whole_layer.WholeLayer
