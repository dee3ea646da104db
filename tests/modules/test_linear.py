"""Linear layers of one input side by side, and who adds their bias."""

import pytest
import torch
from torch import nn

from fastbert import backend
from fastbert.modules.linear import (
    PRODUCTS,
    Leaf,
    fused_linear,
    is_defined_in,
    is_plain_table,
    split_bias,
)
from fastbert.ops.attention import attention_qkvpacked
from fastbert.ops.bias_gelu import bias_gelu
from tests.hf.changes import give_another_kind_of_weight


@pytest.mark.parametrize("rows", [0, 3, 31, 32, 90])
@pytest.mark.parametrize("bias", ["all", "none", "some"])
def test_layers_of_one_input_are_side_by_side(rows, bias):
    """However many rows there are, though few take a product for each layer."""
    torch.manual_seed(0)
    has_bias = {"all": (True,) * 3, "none": (False,) * 3, "some": (True, False, True)}[bias]
    layers = [nn.Linear(32, n, bias=b) for n, b in zip((32, 32, 8), has_bias, strict=True)]
    x, dy = torch.randn(rows, 32, requires_grad=True), torch.randn(rows, 72)
    parameters = [x, *(p for layer in layers for p in layer.parameters())]
    separate = torch.cat([layer(x) for layer in layers], dim=-1)
    expected = torch.autograd.grad(separate, parameters, dy)
    y, _ = fused_linear(x, [*map(Leaf, layers)], None)
    torch.testing.assert_close(y, separate)
    for a, e in zip(torch.autograd.grad(y, parameters, dy), expected, strict=True):
        torch.testing.assert_close(a, e)


def test_copies_weights_only_where_there_are_rows_enough(monkeypatch):
    layers, sizes = [nn.Linear(256, 256) for _ in range(3)], []
    product = torch.nn.functional.linear

    def seen(x, weight, bias=None):
        sizes.append(len(weight))
        return product(x, weight, bias)

    monkeypatch.setattr("torch.nn.functional.linear", seen)
    leaves = [*map(Leaf, layers)]
    fused_linear(torch.randn(255, 256), leaves, None)
    fused_linear(torch.randn(256, 256), leaves, None)
    with torch.autocast("cpu", torch.bfloat16):
        fused_linear(torch.randn(255, 256), leaves, None)
    for layer in layers:
        layer.to("meta")
    fused_linear(torch.randn(1, 256, device="meta"), leaves, None)
    fused_linear(torch.randn(1, 32), [Leaf(nn.Linear(32, 32)) for _ in range(3)], None)
    assert sizes == [256, 256, 256, 768, 768, 768, 96]


def test_a_bias_is_left_to_an_operator_that_has_a_kernel_here():
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 24), torch.randn(5, 16)
    expected = layer(x)
    with backend.use("triton"):
        y, bias = split_bias(x, Leaf(layer), bias_gelu)
        assert bias is layer.bias
        torch.testing.assert_close(y + bias, expected)
        assert torch.equal(split_bias(x, Leaf(layer), None)[0], expected)
    with backend.use("reference"):
        y, bias = split_bias(x, Leaf(layer), bias_gelu)
        assert bias is None
        assert torch.equal(y, expected)
    with torch.autocast("cpu", torch.bfloat16):  # where its sum with the product would be rounded
        assert split_bias(x, Leaf(layer), bias_gelu)[1] is layer.bias
    assert split_bias(x.bfloat16(), Leaf(layer.bfloat16()), bias_gelu)[1] is layer.bias
    layer.register_forward_hook(lambda *_: None)
    with backend.use("triton"):
        assert split_bias(x.bfloat16(), Leaf(layer), bias_gelu)[1] is None


def test_the_gradient_of_a_joined_bias_is_left_to_an_operator_that_has_a_kernel_here():
    torch.manual_seed(0)
    layers, x = [nn.Linear(16, 16) for _ in range(3)], torch.randn(5, 16, requires_grad=True)
    weights, biases = ([getattr(layer, n) for layer in layers] for n in ("weight", "bias"))

    def joined(into=attention_qkvpacked):
        y, bias = fused_linear(x, [*map(Leaf, layers)], into)
        torch.testing.assert_close(y, fused_linear(x, [*map(Leaf, layers)], None)[0])
        if y.requires_grad:
            assert None not in torch.autograd.grad(y.sum(), [x, *weights], retain_graph=True)
            found = torch.autograd.grad(y.sum(), biases, allow_unused=True)
            assert [g is None for g in found] == [bias is not None] * 3
        return bias

    with backend.use("triton"):
        bias = joined()
        assert torch.equal(bias, torch.cat(biases))
        dy = torch.arange(48.0)
        for a, e in zip(torch.autograd.grad(bias, biases, dy), dy.split(16), strict=True):
            assert torch.equal(a, e)
        assert joined(None) is None
        with torch.no_grad():
            assert joined() is None
    with backend.use("reference"):
        assert joined() is None
    with backend.use("triton"):
        handle = layers[1].register_forward_hook(lambda *_: None)
        assert joined() is None
        handle.remove()
        assert joined() is not None
        for layer in layers:
            layer.bias.requires_grad_(False)
        assert fused_linear(x, [*map(Leaf, layers)], attention_qkvpacked)[1] is None


@pytest.mark.parametrize("reads_each", [True, False])
def test_products_get_biases_as_they_read_them(reads_each):
    """Joining them once more would take a launch for every layer."""
    given = []

    class Products:
        reads_each_bias = reads_each

        def product(self, x, weights, biases):
            given.append(biases)
            return

    layers = [nn.Linear(8, 8) for _ in range(3)]
    for layer in layers:
        vars(layer)[PRODUCTS] = Products()
    with backend.use("triton"):
        leaves = [*map(Leaf, layers)]
        _, bias = fused_linear(torch.randn(4, 8), leaves, attention_qkvpacked)
    (biases,) = given
    assert [len(one) for one in biases] == ([8] * 3 if reads_each else [24])
    assert not any(one.requires_grad for one in biases)
    assert bias.requires_grad


def test_a_table_of_another_kind_is_called():
    table = nn.Embedding(5, 4)
    assert is_plain_table(table)
    give_another_kind_of_weight(table)  # which kernels cannot read
    assert not is_plain_table(table)


def test_who_defines_a_function_is_asked_of_all_that_it_wraps():
    def own(x):
        return x

    packages = ("torch",)
    assert is_defined_in(nn.Linear.forward, packages)
    assert not is_defined_in(own, packages)
    assert not is_defined_in(torch.no_grad()(own), packages)
