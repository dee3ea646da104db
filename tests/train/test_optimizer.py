"""A clipped step is what clipping the gradients and then updating would be."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


class Passes(TorchDispatchMode):
    """The operators that write to one of these tensors, or to a list that has one."""

    def __init__(self, tensors):
        super().__init__()
        self.places, self.seen = {x.data_ptr() for x in tensors}, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        written = [
            given
            for argument, given in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if any(x.data_ptr() in self.places for x in tree_leaves(written) if torch.is_tensor(x)):
            self.seen.append(func._schema.name)
        return func(*args, **kwargs or {})


def test_only_the_optimizer_writes_to_the_gradients():
    """A pass of its own would read and write all of them."""
    model = model_of(3.0)
    optimizer = optimizer_of(model, "adamw")
    with Passes([p.grad for p in model.parameters()]) as passes:
        clipped_step(optimizer, model.parameters(), 1.0)
    assert set(passes.seen) == {"aten::_fused_adamw_"}
