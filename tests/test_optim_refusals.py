"""What LAMB refuses."""

import pytest
import torch

from fastbert.optim import Lamb


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"variant": "google"}, "variant to be one of .*'google'"),
        ({"max_grad_norm": 0.0}, "max_grad_norm > 0"),
    ],
    ids=str,
)
def test_refuses_impossible_options_of_the_whole(options, pattern):
    with pytest.raises(ValueError, match=f"Lamb: expected {pattern}"):
        Lamb([torch.ones(2, requires_grad=True)], **options)


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"betas": (0.9, 1.0)}, "betas in"),
        ({"betas": (2.0, 0.9)}, "betas in"),
        ({"lr": -1.0}, "lr >= 0"),
        ({"eps": -1.0}, "eps >= 0"),
        ({"weight_decay": -1.0}, "weight_decay >= 0"),
    ],
    ids=str,
)
def test_refuses_impossible_options_of_all_groups_or_of_one(options, pattern):
    parameters = [torch.ones(2, requires_grad=True)]
    for make in (
        lambda: Lamb(parameters, **options),
        lambda: Lamb([{"params": parameters} | options]),
    ):
        with pytest.raises(ValueError, match=f"Lamb: expected {pattern}"):
            make()


@pytest.mark.parametrize("option", [{"variant": "nvidia"}, {"max_grad_norm": 0.5}])
def test_refuses_a_group_or_a_state_with_options_of_the_whole(option):
    parameters = [torch.ones(2, requires_grad=True)]
    pattern = f"one {next(iter(option))} for all groups"
    with pytest.raises(ValueError, match=pattern):
        Lamb([{"params": parameters} | option])
    with pytest.raises(ValueError, match=pattern):
        Lamb(parameters).load_state_dict(Lamb(parameters, **option).state_dict())


def test_refuses_to_clip_over_two_devices():
    parameters = [torch.ones(2, requires_grad=True, device=device) for device in ("cpu", "meta")]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match=r"gradients on one device to clip.*max_grad_norm=None"):
        Lamb(parameters, variant="nvidia").step()


def test_refuses_sparse_gradients():
    table = torch.nn.Embedding(4, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="dense gradients"):
        Lamb(table.parameters()).step()
