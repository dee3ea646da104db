"""Backward graphs on a GPU: whose lane they run in, and what lives meanwhile."""

import sys

import pytest
import torch

from fastbert.modules.graphs import buckets, pool, replays
from tests.modules.graphs.case import layers_of, step
from tests.modules.graphs.gpu_case import assert_close, on_gpu, on_gpu_batch, reasons

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def at_the_first_use(monkeypatch):
    monkeypatch.setattr(pool, "RECORDED_AT", 1)


@pytest.mark.parametrize("wanted", [False, True], ids=["last", "states"])
def test_on_a_gpu_forwards_before_a_backward_have_a_lane_each(wanted):
    found = []
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    for model in (model.train() for model in on_gpu(head="Model", **still)):
        for _ in range(3):
            model.zero_grad()
            loss = 0
            for number, lengths in enumerate([[7, 3, 5, 6], [40, 2, 4], [7, 3, 6]]):
                inputs = on_gpu_batch(lengths, number)
                output = model(**inputs, output_hidden_states=wanted)
                states = output.hidden_states or (output.last_hidden_state,)
                loss = loss + sum(state.sin().sum() for state in states)
                with torch.no_grad():  # a teacher
                    model(**inputs)
            loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert_close(*found)
    assert len(buckets.pool_of(torch.device("cuda", 0)).lanes) >= 3
    assert set(reasons(model)) == {""}


@pytest.mark.parametrize("alive", ["the last loss", "another forward", "a forward of long ago"])
@pytest.mark.parametrize("kind", ["own", "Bert"])
def test_on_a_gpu_it_records_while_the_output_of_an_earlier_forward_lives(kind, alive, monkeypatch):
    """Which keeps gradient nodes of the parameters, of the stream that it ran on."""
    monkeypatch.setattr(pool, "RECORDED_AT", 2)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    inputs = on_gpu_batch([7, 3, 5, 6])
    labels, found, kept = (torch.arange(4) % 3).cuda(), [], []
    for model in (model.train() for model in on_gpu(kind, **still)):
        loss, kept = None, []
        if alive == "a forward of long ago":
            kept.append(model(**inputs).logits)
        for _ in range(4):
            model.zero_grad()
            loss = model(**inputs, labels=labels).loss  # the last one is alive meanwhile
            if alive == "another forward":
                loss = loss + model(**inputs, labels=labels.flip(0)).loss
            loss.backward()
        found.append([loss.detach(), *[p.grad for p in model.parameters()]])
    assert_close(*found)
    assert set(reasons(model)) == {""}


def test_on_a_gpu_graphs_keep_no_weights_that_have_moved():
    if "tests.cuda_stand_in.host_kernels" in sys.modules:
        pytest.skip("its recordings keep all that they have read")
    _, model = on_gpu(hidden_size=128, intermediate_size=512)
    inputs = on_gpu_batch([7, 3, 5, 6])
    for _ in range(3):
        step(model.train(), inputs, (torch.arange(4) % 3).cuda())
    assert reasons(model) == [""]
    model.zero_grad()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model.cpu()
    size = sum(p.nbytes for p in layers_of(model).parameters())
    assert before - torch.cuda.memory_allocated() >= size


def test_on_a_gpu_layers_have_several_backward_graphs(monkeypatch):
    for where in (pool, replays):
        monkeypatch.setattr(where, "num_segments", lambda: 2)
    plain, recorded = (m.train() for m in on_gpu(head="Model", num_hidden_layers=3))
    for number in range(4):
        found = []
        inputs = on_gpu_batch([7, 3, 5, 6], number)
        for model in (plain, recorded):
            torch.manual_seed(5)
            model.zero_grad()
            output = model(**inputs, output_hidden_states=True)
            sum(state.sin().sum() for state in output.hidden_states).backward()
            found.append([output.last_hidden_state, *[p.grad for p in model.parameters()]])
        assert_close(*found)
