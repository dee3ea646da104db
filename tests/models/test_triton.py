"""Whole models over Triton's kernels, in the interpreter or on a GPU, against the plain bodies."""

import pytest
import torch

from fastbert import backend
from tests.models.pretraining_case import loss_and_gradients, make_batch, make_model

LENGTHS = [5, 1, 18]


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["plain", "dropout"])
def test_a_training_step_is_that_of_the_plain_bodies(dropout, device):
    model = make_model(dropout, device)
    batch = make_batch(LENGTHS).to(device)
    with backend.use("reference"):
        truth = loss_and_gradients(model.double(), batch)
        expected = loss_and_gradients(model.float(), batch)
    with backend.use("triton"):
        actual = loss_and_gradients(model, batch)
    names = ["loss", *(name for name, _ in model.named_parameters())]
    for name, a, e, t in zip(names, actual, expected, truth, strict=True):
        assert a.dtype == e.dtype == torch.float32
        assert (a - t).abs().max() <= 8 * (e - t).abs().max() + 1e-6 * t.abs().max() + 1e-9, name


def test_torch_compile_of_a_step_over_kernels_gives_the_eager_result(device):
    model, batch = make_model(device=device), make_batch(LENGTHS).to(device)
    compiler = "inductor" if device == "cuda" else "aot_eager"
    with backend.use("triton"):
        expected = loss_and_gradients(model, batch)
        compiled = torch.compile(model, fullgraph=True, backend=compiler)
        actual = loss_and_gradients(compiled, batch)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
