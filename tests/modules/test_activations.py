import pytest
import torch

from fastbert.modules.activations import ACTIVATIONS, activate, activation


@pytest.mark.parametrize("hidden_act", [*ACTIVATIONS, torch.sin])
def test_a_bias_is_added_before_the_function_whichever_it_is(hidden_act):
    function = activation(hidden_act)
    x, bias = torch.randn(7, 12, dtype=torch.double), torch.randn(12, dtype=torch.double)
    torch.testing.assert_close(activate(function, x, bias), function(x + bias))
    torch.testing.assert_close(activate(function, x, None), function(x))


def test_erf_and_tanh_are_not_taken_for_each_other():
    x, bias = torch.linspace(-3, 3, 50, dtype=torch.double), torch.zeros(50, dtype=torch.double)
    erf, tanh = (activate(activation(name), x, bias) for name in ("gelu", "gelu_new"))
    assert 1e-5 < (erf - tanh).abs().max() < 1e-3
