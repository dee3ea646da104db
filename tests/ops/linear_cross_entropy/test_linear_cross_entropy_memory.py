"""What linear_cross_entropy keeps and computes again: rows in parts, wanted gradients, graphs."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert import backend
from fastbert.ops import linear_cross_entropy as unit
from fastbert.ops.linear_cross_entropy import linear_cross_entropy
from tests.ops.linear_cross_entropy.case import NAMES, compare, inputs, ours, plain
from tests.oracle import gradients

# NumPy, in the interpreter, remarks on infinities that are meant
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


@pytest.fixture
def small_parts(monkeypatch):
    """At most 10 rows of 1,024 float32 logits at a time."""
    monkeypatch.setattr(unit, "MAX_LOGITS_BYTES", 10 * 1024 * 4)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("wanted", range(3), ids=NAMES[1:])
def test_computes_no_gradient_that_nobody_asked_for(wanted, device):
    tensors, targets = inputs(7, 8, 9, torch.float32, device)
    dy = torch.ones((), device=device)
    expected = gradients(plain(targets), *tensors, dy=dy)[1 + wanted]
    tensors[wanted].requires_grad_()
    with backend.use("triton"):
        loss = linear_cross_entropy(*tensors, targets)
        with Products() as products:
            (gradient,) = torch.autograd.grad(loss, tensors[wanted], dy)
    torch.testing.assert_close(gradient, expected)
    assert products.count == (0 if wanted == 2 else 1)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["plain", "smoothed"])
def test_more_rows_than_fit_go_in_parts(options, dtype, device):
    tensors, targets = inputs(23, 24, 1003, dtype, device)
    shapes = []
    with (
        backend.use("triton"),
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: shapes.append(t.shape) or t, lambda t: t
        ),
    ):
        compare(tensors, targets, **options)
        _, correct = linear_cross_entropy(*tensors, targets, return_correct=True)
    assert (23, 1024) not in shapes  # kept by plain PyTorch only, which has 1,003 columns
    logits = F.linear(*tensors)
    assert correct == (logits.argmax(-1) == targets).sum()


@pytest.mark.usefixtures("small_parts")
def test_parts_sum_the_weight_gradient_in_float32(device):
    """In fp16 the first part's share, 7, would swallow the 0.0015 of each later one."""
    hidden = torch.full((100, 1), 0.0015 / 20, device=device).half()
    hidden[:20], hidden[:7] = 0, 1
    weight, bias = torch.zeros(1003, 1, device=device).half(), torch.zeros(1003, device=device)
    targets = torch.zeros(100, dtype=torch.int64, device=device)
    assert unit._rows_of_a_part(hidden, torch.empty(1024, 1, dtype=torch.half)) == 20
    with backend.use("triton"):
        _, _, dweight, _ = gradients(
            ours(targets, reduction="sum"), hidden, weight, bias, dy=torch.ones((), device=device)
        )
    truth = -hidden.double().sum().item() * (1 - 1 / 1003)
    assert abs(dweight[0].item() - truth) <= 2**-9  # one rounding


@pytest.mark.usefixtures("body", "small_parts")
def test_nothing_is_kept_where_nothing_needs_a_gradient(device):
    tensors, targets = inputs(23, 24, 1003, torch.float32, device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = linear_cross_entropy(*tensors, targets)
        with torch.no_grad():
            leaves = [tensor.requires_grad_() for tensor in tensors]
            torch.testing.assert_close(loss, linear_cross_entropy(*leaves, targets))
    assert not kept


@pytest.mark.parametrize("bound", [1 << 30, 3 * 1024 * 4], ids=["whole", "parts"])
def test_a_second_backward_computes_the_logits_again(bound, device, monkeypatch):
    """The first has overwritten them."""
    monkeypatch.setattr(unit, "MAX_LOGITS_BYTES", bound)
    tensors, targets = inputs(23, 8, 1003, torch.float32, device)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    with backend.use("triton"):
        loss = linear_cross_entropy(*leaves, targets)
    first, *others = [torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(3)]
    for other in others:
        assert all(map(torch.equal, first, other))


@pytest.mark.parametrize("bound", [1 << 30, 3 * 1024 * 4], ids=["whole", "parts"])
def test_is_traced_into_a_graph(bound, device, monkeypatch):
    monkeypatch.setattr(unit, "MAX_LOGITS_BYTES", bound)
    tensors, targets = inputs(7, 8, 1003, torch.float32, device)
    function = ours(targets, label_smoothing=0.1)
    with backend.use("triton"):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        dy = torch.tensor(3.0, device=device)
        eager = gradients(function, *tensors, dy=dy)
        for e, c in zip(eager, gradients(compiled, *tensors, dy=dy), strict=True):
            assert torch.equal(e, c)
        # a compiled backward works on a copy of the logits, so a second one is right as well
        loss = compiled(tensors[0].requires_grad_(), *tensors[1:])
        for _ in range(2):
            (dx,) = torch.autograd.grad(loss, tensors[0], dy, retain_graph=True)
            assert torch.equal(dx, eager[1])
