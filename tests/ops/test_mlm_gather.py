import shutil

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fastbert.ops.mlm_gather import mlm_gather

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def batch(tokens, hidden, share, *, ignore_index=-100, dtype=torch.float32, device="cpu"):
    is_masked = torch.rand(tokens) < share
    labels = torch.where(is_masked, torch.randint(1, 30522, (tokens,)), ignore_index)
    return torch.randn(tokens, hidden).to(device, dtype), labels.to(device)


def check(hidden, labels, ignore_index, capacity):
    """Against plain indexing, forward and backward, for an upstream gradient."""
    chosen = [i for i, label in enumerate(labels.tolist()) if label != ignore_index]
    room = len(chosen) if capacity is None else capacity
    placed, spare = chosen[:room], max(0, room - len(chosen))
    leaf = hidden.detach().requires_grad_()
    rows, targets, positions, count = mlm_gather(
        leaf, labels, ignore_index=ignore_index, capacity=capacity
    )
    assert torch.equal(rows, F.pad(hidden[placed], (0, 0, 0, spare)))
    assert rows.dtype == hidden.dtype
    assert targets.tolist() == [labels[i].item() for i in placed] + [ignore_index] * spare
    assert targets.dtype == labels.dtype
    assert positions.tolist() == placed + [-1] * spare
    assert (count.shape, count.dtype, count.item()) == ((), torch.int32, len(chosen))

    dy = torch.randn(rows.shape, device=rows.device).to(rows.dtype)
    (grad,) = torch.autograd.grad(rows, leaf, dy)
    expected = torch.zeros_like(hidden)
    expected[placed] = dy[: len(placed)]
    assert torch.equal(grad, expected)


@given(data=st.data())
def test_mlm_gather_is_plain_indexing(implementation, device, data):
    tokens, hidden = data.draw(st.integers(0, 50)), data.draw(st.sampled_from([1, 3, 8, 33]))
    share = data.draw(st.sampled_from([0.0, 0.15, 1.0]))
    ignore_index = data.draw(st.sampled_from([-100, 0, -1]))
    dtype = data.draw(st.sampled_from(FLOATS))
    capacity = data.draw(st.none() | st.integers(0, 60))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    drawn = batch(tokens, hidden, share, ignore_index=ignore_index, dtype=dtype, device=device)
    check(*drawn, ignore_index, capacity)


@pytest.mark.parametrize("capacity", [None, 2000, 4000, 6000])
def test_mlm_gather_of_many_tokens(implementation, device, capacity):
    torch.manual_seed(0)
    hidden, labels = batch(20000, 65, 0.2, device=device)
    assert 2000 < (labels != -100).sum() < 6000
    check(hidden, labels, -100, capacity)


def test_mlm_gather_of_views(implementation, device):
    torch.manual_seed(0)
    hidden, labels = batch(24, 10, 0.5, device=device)
    check(hidden[::2, 1:8], labels[::2], -100, 9)


def test_spare_rows_add_nothing_to_a_loss(implementation, device):
    torch.manual_seed(0)
    hidden, labels = batch(40, 6, 0.3, device=device)
    labels = labels.clamp(max=5)
    loss = []
    for capacity in (None, 40):
        leaf = hidden.clone().requires_grad_()
        rows, targets, _, count = mlm_gather(leaf, labels, capacity=capacity)
        loss.append(F.cross_entropy(rows, targets, reduction="sum") / count)
        loss[-1].backward()
        direct = hidden.clone().requires_grad_()
        F.cross_entropy(direct, labels).backward()
        torch.testing.assert_close(leaf.grad, direct.grad)
    torch.testing.assert_close(loss[0], loss[1])


def test_gradients_of_first_and_second_order(implementation, device):
    torch.manual_seed(0)
    hidden, labels = batch(9, 3, 0.5, dtype=torch.float64, device=device)

    def squared(x):
        return mlm_gather(x, labels, capacity=6).rows.square()

    hidden.requires_grad_()
    assert torch.autograd.gradcheck(squared, hidden)
    assert torch.autograd.gradgradcheck(squared, hidden)


def test_autocast_leaves_the_dtypes(implementation, device):
    hidden, labels = batch(9, 4, 0.5, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        rows, targets, *_ = mlm_gather(hidden, labels, capacity=4)
    assert (rows.dtype, targets.dtype) == (torch.float32, torch.int64)


def needs_compiler():
    return pytest.mark.skipif(
        not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a compiler"
    )


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=[needs_compiler(), pytest.mark.slow])]
)
def test_mlm_gather_compiles_whole(implementation, device, compiler):
    """The third capacity is a symbol by then: it may change from batch to batch."""
    torch._dynamo.reset()
    compiled = torch.compile(mlm_gather, fullgraph=True, backend=compiler)
    torch.manual_seed(0)
    for capacity in (6, 9, 5):
        hidden, labels = batch(16, 8, 0.4, device=device)
        eager, traced = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
        expected = mlm_gather(eager, labels, capacity=capacity)
        result = compiled(traced, labels, capacity=capacity)
        for x, y in zip(result, expected, strict=True):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)
        dy = torch.randn_like(expected.rows)
        expected.rows.backward(dy)
        result.rows.backward(dy)
        assert torch.equal(traced.grad, eager.grad)


@pytest.mark.parametrize(
    ("hidden", "labels", "message"),
    [
        (torch.zeros(4), torch.zeros(4).long(), r"hidden of shape \(tokens, hidden\), got \(4,\)"),
        (
            torch.zeros(4, 2),
            torch.zeros(3).long(),
            r"labels of shape \(tokens,\) = \(4,\), got \(3,\)",
        ),
        (torch.zeros(4, 2), torch.zeros(4, device="meta").long(), "labels on cpu, where hidden is"),
        (torch.zeros(4, 2), torch.zeros(4), "labels of an integer dtype, got torch.float32"),
        (torch.zeros(4, 2), torch.zeros(4).cfloat(), "labels of an integer dtype, got torch.c"),
    ],
    ids=["1-D", "short labels", "devices", "numbers", "complex"],
)
@pytest.mark.parametrize("device", ["cpu"], indirect=True)
def test_mlm_gather_refuses(implementation, device, hidden, labels, message):
    with pytest.raises(ValueError, match=f"mlm_gather: expected {message}"):
        mlm_gather(hidden, labels)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_mlm_gather_runs_in_a_cuda_graph(implementation, device):
    """Which also means that with a capacity nothing waits for the device."""
    hidden, labels = batch(512, 64, 0.2, device=device)
    hidden.requires_grad_()
    dy = torch.randn(128, 64, device=device)

    def step():
        result = mlm_gather(hidden, labels, capacity=128)
        return *result, *torch.autograd.grad(result.rows, hidden, dy)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    new_hidden, new_labels = batch(512, 64, 0.25, device=device)
    with torch.no_grad():
        hidden.copy_(new_hidden)
    labels.copy_(new_labels)
    graph.replay()
    for replayed, expected in zip(captured, step(), strict=True):
        assert torch.equal(replayed, expected)
