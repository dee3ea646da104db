import pytest
import torch
from torch import nn

from fastbert import backend, events
from fastbert.modules.activations import ACTIVATIONS, activation, dense_and_activate
from fastbert.modules.linear import Leaf


@pytest.fixture
def dense():
    torch.manual_seed(0)
    return nn.Linear(8, 7)


@pytest.mark.parametrize("hidden_act", [*ACTIVATIONS, torch.sin])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_and_its_function(hidden_act, dtype, dense):
    function, x = activation(hidden_act), torch.randn(5, 8)
    expected = function(dense(x))
    actual = dense_and_activate(x.to(dtype), Leaf(dense.to(dtype)), function)
    assert actual.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "form"), [("gelu", "none"), ("gelu_new", "tanh"), ("relu", None)])
def test_a_kernel_computes_bias_and_function(name, form, dense):
    """By erf where the name means it, by tanh where that is meant, which differ."""
    x, function = torch.randn(5, 8), activation(name)
    with backend.use("triton"), events.listen() as heard:
        actual = dense_and_activate(x, Leaf(dense), function)
    ran = [event.call.approximate for event in heard if event.operator == "bias_gelu"]
    assert ran == ([] if form is None else [form])
    torch.testing.assert_close(actual, function(dense(x)), rtol=1e-5, atol=1e-6)


def test_erf_and_tanh_are_not_taken_for_each_other():
    dense, x = nn.Linear(50, 50).double(), torch.linspace(-3, 3, 50, dtype=torch.double)
    nn.init.eye_(dense.weight)
    nn.init.zeros_(dense.bias)
    erf, tanh = (
        dense_and_activate(x, Leaf(dense), activation(name)) for name in ("gelu", "gelu_new")
    )
    assert 1e-5 < (erf - tanh).abs().max() < 1e-3
