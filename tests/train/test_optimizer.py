"""A clipped step is what clipping the gradients and then updating would be."""

import copy

import pytest
import torch
from torch import nn

from fastbert.train.optimizer import clipped_step, make_optimizer


def model_of(scale, dtype=torch.float32):
    """A small model with gradients of norm `scale`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).to(dtype)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    for parameter in model.parameters():
        parameter.grad *= scale / norm
    return model


def optimizer_of(model, name):
    optimizer = make_optimizer(model, 0.01, name)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    return optimizer


def state_of(optimizer):
    return [x.clone() for state in optimizer.state.values() for x in state.values()]


@pytest.mark.parametrize("name", ["adamw", "lamb"])
@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 50.0, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_clipping_and_an_update(dtype, scale, name):
    model = model_of(scale, dtype)
    other = copy.deepcopy(model)
    for parameter, same in zip(other.parameters(), model.parameters(), strict=True):
        parameter.grad = same.grad.clone()
    optimizer, plain = optimizer_of(model, name), optimizer_of(other, name)
    skipped = clipped_step(optimizer, model.parameters(), 0.5)
    nn.utils.clip_grad_norm_(other.parameters(), 0.5)
    plain.step()
    assert skipped.item() == 0
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()))
    torch.testing.assert_close(state_of(optimizer), state_of(plain))


@pytest.mark.parametrize("name", ["adamw", "lamb"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_gradients_that_are_not_finite_change_nothing(value, name):
    model = model_of(1.0)
    optimizer = optimizer_of(model, name)
    clipped_step(optimizer, model.parameters(), 1.0)
    weights, state = copy.deepcopy(model.state_dict()), state_of(optimizer)
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, value if number == 2 else 1.0)
    assert clipped_step(optimizer, model.parameters(), 1.0).item() == 1
    assert all(torch.equal(weights[name], x) for name, x in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(state, state_of(optimizer), strict=True))
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")


def test_parameters_without_a_gradient_stay():
    model = model_of(1.0)
    model[0].weight.grad = None
    before = model[0].weight.detach().clone()
    clipped_step(optimizer_of(model, "adamw"), model.parameters(), 1.0)
    assert torch.equal(model[0].weight, before)


def test_it_makes_no_pass_over_the_gradients_but_for_their_norm(monkeypatch):
    model = model_of(3.0)
    for name in ("mul_", "div_"):
        monkeypatch.setattr(torch, f"_foreach_{name}", None)
    clipped_step(optimizer_of(model, "adamw"), model.parameters(), 1.0)
