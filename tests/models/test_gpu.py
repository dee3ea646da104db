"""Whole models on an NVIDIA GPU: accuracy, bits, waits of the host, and captured graphs."""

import pytest
import torch

from tests.models.pretraining_case import (
    errors_by_limit,
    loss_and_gradients,
    make_batch,
    make_model,
    plain_loss_and_gradients,
)

pytestmark = pytest.mark.gpu
LENGTHS = [1, 128, 37, 200, 512, 5, 64, 333]
BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "vocab_size": 3001,
}


@pytest.fixture
def batch():
    return make_batch(LENGTHS, vocab_size=3001).to("cuda")


def base_model(dropout=0.0):
    return make_model(dropout, "cuda", noise=0.02, **BASE)


def named(model):
    return ["loss", *(name for name, _ in model.named_parameters())]


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["plain", "dropout"])
def test_twelve_layers_are_as_near_the_truth_as_the_plain_bodies(dropout, batch):
    model = base_model(dropout)
    truth, expected = plain_loss_and_gradients(model, batch)
    wrong = errors_by_limit(model, loss_and_gradients(model, batch), expected, truth)
    assert max(wrong.values()) <= 1, max(wrong, key=wrong.get)


def test_gradients_are_the_same_bits_each_time(batch):
    model = base_model(dropout=0.1).bfloat16()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (loss_and_gradients(model, batch) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for name, a, b in zip(named(model), first, second, strict=True):
        assert torch.equal(a, b), name


def test_a_step_never_makes_the_host_wait(batch):
    model = base_model(dropout=0.1)
    with torch.autocast("cuda", torch.bfloat16):
        loss_and_gradients(model, batch)  # compiles, and allocates workspaces
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss_and_gradients(model, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_captured_step_draws_fresh_masks_at_each_replay(batch):
    model = base_model(dropout=0.1)
    step = batch.dropout_state

    def run():
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return loss_and_gradients(model, batch)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    losses = []
    for number in (9, 10, 9):
        step[1] = number
        graph.replay()
        losses.append([output.clone() for output in outputs])
        expected = run()
        for a, e in zip(losses[-1], expected, strict=True):
            # a product that is captured may be summed in another order; other masks give other sums
            assert (a - e).norm() <= 1e-3 * e.norm()
    assert not torch.equal(losses[0][0], losses[1][0])
    assert all(torch.equal(a, b) for a, b in zip(losses[0], losses[2], strict=True))


def test_a_sequence_of_padding_alone_gives_zeros_and_finite_gradients():
    model = base_model()
    ids = torch.ones(2, 16, dtype=torch.long, device="cuda")
    mask = torch.ones_like(ids)
    mask[1] = 0
    with torch.autocast("cuda", torch.bfloat16):
        output = model.bert(ids, mask).last_hidden_state
    output.sum().backward()
    assert not output[1].any()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
