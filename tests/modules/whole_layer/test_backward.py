"""What a layer as one node of autograd saves, computes and refuses for its gradients."""

import contextlib
import gc
import weakref

import pytest
import torch

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


@pytest.mark.parametrize("trained", ["none", "x", "weights", "biases", "one"])
def test_what_is_not_trained_gets_no_gradient_and_no_product(trained, device, runs):
    layer, sequences = make(device), sequences_of(device)
    x = stream_of(device).detach().requires_grad_(trained == "x")
    for name, parameter in layer.named_parameters():
        is_trained = {"weights": name.endswith("weight"), "biases": name.endswith("bias")}
        is_one = name == "attention.self.key.weight"
        parameter.requires_grad_(is_trained.get(trained, trained == "one" and is_one))
    if trained == "none":
        with one_by_one():
            expected = run_layer(parts_of(layer), Stream(x, x), sequences)
        actual = run_layer(parts_of(layer), Stream(x, x), sequences)
        assert_same(actual, expected)
        assert not actual.x.requires_grad
    else:
        actual, expected = both(layer, x, sequences)
        assert_same(actual, expected)
        with Counter() as counter:
            results(layer, x, sequences)
        # four backwards of products beside the six of the forward, and those of weights
        weights = {"x": 0, "weights": 4, "biases": 0, "one": 1}[trained]
        products = counter.calls["mm"] + counter.calls["addmm"]
        assert products == 4 + 3 + (trained == "x") + weights
    assert all(runs)


def test_a_second_backward_and_hooks_on_saved_tensors(device):
    layer, sequences = make(device), sequences_of(device)
    x, packed = stream_of(device), []

    def pack(tensor):
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = run_layer(parts_of(layer), Stream(x, x), sequences)
    assert len(packed) > 8
    first = torch.autograd.grad(y.sum(), [x, *layer.parameters()], retain_graph=True)
    second = torch.autograd.grad(y.sum(), [x, *layer.parameters()])
    assert_same(first, second, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), [x])


def test_a_weight_that_changes_before_the_backward_is_an_error(device):
    layer, sequences = make(device), sequences_of(device)
    x = stream_of(device)
    for module in (layer.output.dense, layer.intermediate.dense, layer.output.LayerNorm):
        y, _ = run_layer(parts_of(layer), Stream(x, x), sequences)
        with torch.no_grad():
            module.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_gradients_cannot_be_differentiated(device):
    layer, sequences = make(device), sequences_of(device)
    x = stream_of(device)
    y, _ = run_layer(parts_of(layer), Stream(x, x), sequences)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    refused = "a layer: its gradients cannot be differentiated"
    with pytest.raises(RuntimeError, match=refused):
        dx.sum().backward(retain_graph=True)
    y, _ = run_layer(parts_of(layer), Stream(x, x), sequences)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)  # of a constant
    for parameter in layer.parameters():  # not all are saved
        with pytest.raises(RuntimeError, match=refused):
            torch.autograd.grad(dx.sum(), parameter, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("trained", ["all", "norms", "adapters"])
def test_no_more_is_saved_than_by_the_operators(trained, device, runs):
    """What a product reads is kept for its weight's gradient only."""
    layer, sequences, x = make(device), sequences_of(device), stream_of(device)
    if trained == "norms":
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_("LayerNorm" in name)
    if trained == "adapters":
        adapt(layer, ["query"])
    sizes = []
    for context in (one_by_one, contextlib.nullcontext):
        saved = {}

        def pack(tensor, saved=saved):
            saved[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with context(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = run_layer(parts_of(layer), Stream(x, x), sequences)
        sizes.append(sum(saved.values()))
        del outputs
    assert sizes[1] <= sizes[0]
    assert runs == [True]


def test_what_was_saved_is_freed_by_the_backward(device):
    """Not only with the node, which the loss keeps."""
    layer, sequences, x = make(device), sequences_of(device), stream_of(device)
    saved = []

    def pack(tensor):
        saved.append(weakref.ref(copied := tensor.clone()))
        return copied

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = run_layer(parts_of(layer), Stream(x, x), sequences)
    y.sum().backward()
    assert saved
    assert not any(one() is not None for one in saved)


@pytest.mark.parametrize("wanted", [0, 1])
def test_a_branch_without_a_gradient_is_no_pass_over_zeros(wanted, device, monkeypatch):
    layer, sequences, x = make(device), sequences_of(device), stream_of(device)
    given, backward = [], whole_layer.LayerNormFunction.backward
    monkeypatch.setattr(
        whole_layer.LayerNormFunction,
        "backward",
        lambda ctx, *gradients: (given.append(gradients), backward(ctx, *gradients))[1],
    )
    results(layer, x, sequences, wanted)
    assert [one is None for one in given[0]] == [wanted == 1, wanted == 0]


def test_a_step_has_fewer_operators(device):
    """Autocast's casts of weights and gradients, and sums of branches, which operators have."""
    layer, sequences = make(device), sequences_of(device)
    counts = []
    for context in (one_by_one, contextlib.nullcontext):
        x = stream_of(device, torch.float16)
        with context(), Counter() as counter:
            results(layer, x, sequences, context=lambda: torch.autocast(device, torch.float16))
        counts.append(counter.calls.total())
    assert counts[1] < counts[0]


@pytest.mark.parametrize("training", [False, True])
def test_a_model_that_nobody_has_is_freed_at_once(training, device):
    """Not when the garbage collector finds a cycle: weights are most of a GPU's memory."""
    layer, x = make(device, training), stream_of(device)
    sequences = sequences_of(device, dropout=training)
    parts = parts_of(layer)
    gc.collect()
    gc.disable()
    try:
        y, _ = run_layer(parts, Stream(x, x), sequences)
        y.sum().backward()
        weight = weakref.ref(layer.output.dense.weight)
        del layer, parts, y, _
        assert weight() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("trained", "count"),
    [
        ("", 4),
        ("none", 0),
        ("attention.output.LayerNorm", 1),
        ("attention.output.dense.bias", 1),
        ("output.LayerNorm", 1),
        ("output.dense.bias", 1),
        ("intermediate.dense.bias", 1),
        ("attention.self.key.bias", 1),
    ],
)
def test_sums_for_trained_parameters_alone_in_one_launch(trained, count, device, monkeypatch):
    """Those of a frozen layer, as under LoRA, would be thrown away. trained: how names begin."""
    from fastbert.kernels import partial_sums

    launches, launch = [], partial_sums._launch
    layer, x, sequences = make(device), stream_of(device), sequences_of(device)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    with one_by_one():
        expected = results(layer, x, sequences)
    monkeypatch.setattr(partial_sums, "_launch", lambda p: (launches.append(len(p)), launch(p)))
    actual = results(layer, x, sequences)
    assert not any(one is None for one in actual)
    assert_same(actual, expected, rtol=1e-4, atol=1e-5)
    assert launches == [count] * bool(count)
