"""Whole models over Triton's kernels, in the interpreter or on a GPU, against the plain bodies."""

import copy

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import fastbert
from fastbert import backend, events
from fastbert.modules.sequences import Sequences
from tests.models.pretraining_case import (
    SHAPE,
    errors_by_limit,
    loss_and_gradients,
    make_batch,
    make_model,
    plain_loss_and_gradients,
)

LENGTHS = [5, 1, 18]


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["plain", "dropout"])
def test_a_training_step_is_that_of_the_plain_bodies(dropout, device):
    model = make_model(dropout, device, noise=0.02)
    batch = make_batch(LENGTHS).to(device)
    truth, expected = plain_loss_and_gradients(model, batch)
    with backend.use("triton"):
        actual = loss_and_gradients(model, batch)
    wrong = errors_by_limit(model, actual, expected, truth)
    assert max(wrong.values()) <= 1, max(wrong, key=wrong.get)


@pytest.mark.parametrize("bug", ["site", "step"])
def test_other_masks_would_be_seen(bug, device, monkeypatch):
    """By orders of magnitude: here one dropout of each layer has another's masks, or a step's.

    By the plain bodies: whose masks they are is not the kernels' to say.
    """
    model = make_model(0.1, device, noise=0.02)
    batch = make_batch(LENGTHS).to(device)
    truth, expected = plain_loss_and_gradients(model, batch)
    if bug == "site":
        right = Sequences.wanted_rng
        monkeypatch.setattr(Sequences, "wanted_rng", lambda s, n: right(s, 1 if n == 2 else n))
    else:
        batch.dropout_state[1] += 1
    with backend.use("reference"):
        actual = loss_and_gradients(model, batch)
    wrong = errors_by_limit(model, actual, expected, truth)
    # the bias of the keys changes all scores of a row alike: its gradient is 0 whatever is dropped
    found = sorted(value for name, value in wrong.items() if not name.endswith("key.bias"))
    assert found[0] > 10
    assert found[len(found) // 2] > 1000


def test_torch_compile_of_a_step_over_kernels_gives_the_eager_result(device):
    compiler, layers = ("inductor", 2) if device == "cuda" else ("aot_eager", 1)
    model = make_model(device=device, num_hidden_layers=layers)
    batch = make_batch([3, 1, 4]).to(device)
    with backend.use("triton"):
        expected = loss_and_gradients(model, batch)
        compiled = torch.compile(model, fullgraph=True, backend=compiler)
        actual = loss_and_gradients(compiled, batch)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


class Sums(TorchDispatchMode):
    """The shapes of what PyTorch adds up over rows."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.sum.dim_IntList:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("kind", ["own", "patched"])
def test_attention_has_the_gradient_of_the_bias_of_queries_keys_and_values(kind, device):
    """For models of two layers, also where all but the biases is frozen."""
    shape = {**SHAPE, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    if kind == "own":
        model = fastbert.BertModel(fastbert.BertConfig(**shape))
    else:
        model = fastbert.patch(transformers.BertModel(transformers.BertConfig(**shape)))
    model = model.to(device).train()
    ids = torch.randint(1, 61, (3, 20), device=device)
    mask = torch.arange(20, device=device) < torch.tensor([[20], [1], [7]], device=device)
    rows, size = 28, 3 * SHAPE["hidden_size"]

    def gradients(model, dtype=torch.float32):
        y = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        weights = torch.linspace(-1, 1, y.numel(), dtype=dtype, device=device).view_as(y)
        model.zero_grad()
        (y * weights * mask[..., None]).sum().backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    with backend.use("reference"), Sums() as sums:
        expected = gradients(model)
        truth = gradients(copy.deepcopy(model).double(), torch.float64)
    assert sums.shapes.count((rows, size)) == 4
    for trains in ("", "bias"):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith(trains))
        with backend.use("triton"):
            with events.listen() as heard, Sums() as sums:
                gradients(model)
            actual = gradients(model)
        assert (rows, size) not in sums.shapes
        runs = [event for event in heard if isinstance(event, events.OperatorRun)]
        calls = [run.call for run in runs if run.operator == "attention_qkvpacked"]
        assert len(calls) == 2
        assert all(call.qkv_bias.shape == (size,) for call in calls)
        assert actual.keys() == {name for name in expected if name.endswith(trains)}
        for name, gradient in actual.items():
            error, allowed = ((g - truth[name]).abs().max() for g in (gradient, expected[name]))
            assert error <= 8 * allowed + 1e-6 * truth[name].abs().max() + 1e-9, name
            assert not name.endswith("key.bias") or not gradient.any()
