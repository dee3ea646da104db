"""Whole models over Triton's kernels, in the interpreter or on a GPU, against the plain bodies."""

import pytest
import torch

from fastbert import backend
from fastbert.modules.sequences import Sequences
from tests.models.pretraining_case import (
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
        monkeypatch.setattr(Sequences, "wanted_rng", lambda s, n=0: right(s, 1 if n == 2 else n))
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
