"""The loss of linear_cross_entropy and its gradients, beside plain PyTorch's."""

import pytest
import torch
import torch.nn.functional as F

from fastbert import backend
from fastbert.ops.linear_cross_entropy import linear_cross_entropy
from tests.ops.linear_cross_entropy.case import compare, inputs, ours, plain
from tests.oracle import gradients

# rows, hidden size, classes: less than a tile and more (of 4,096), padded and not
SHAPES = [(1, 1, 1), (3, 7, 5), (37, 24, 1003), (12, 16, 128), (9, 32, 4500), (0, 16, 40)]
# NumPy, in the interpreter, remarks on infinities that are meant
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


@pytest.mark.pairs(within="body")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1, "reduction": "sum"}],
    ids=["mean", "smoothed-sum"],
)
@pytest.mark.usefixtures("body")
def test_is_as_accurate_as_pytorch(options, dtype, shape, device):
    compare(*inputs(*shape, dtype, device), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [768, 1024], ids=["base", "large"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=["plain", "smoothed"])
def test_is_as_accurate_as_pytorch_at_berts_sizes(options, dtype, size):
    with backend.use("triton"):
        compare(*inputs(4915, size, 30522, dtype, "cuda"), **options)


@pytest.mark.gpu
@pytest.mark.slow
def test_offsets_do_not_wrap_beyond_2_to_the_31_logits(monkeypatch):
    monkeypatch.setattr("fastbert.ops.linear_cross_entropy.MAX_LOGITS_BYTES", 1 << 34)
    rows = 2**31 // 30528 + 200
    tensors, targets = inputs(rows, 64, 30522, torch.bfloat16, "cuda")
    tensors[0][-1], targets[-1] = tensors[0][0], targets[0]
    with backend.use("triton"):
        _, dhidden, _, _ = gradients(
            ours(targets, reduction="sum"), *tensors, dy=torch.tensor(1.0, device="cuda")
        )
        last = slice(-10, None)
        _, expected, _, _ = gradients(
            ours(targets[last], reduction="sum"),
            *(tensors[0][last], *tensors[1:]),
            dy=torch.tensor(1.0, device="cuda"),
        )
    torch.testing.assert_close(dhidden[-1], dhidden[0])
    torch.testing.assert_close(dhidden[last], expected)


@pytest.mark.slow
@pytest.mark.usefixtures("body")
def test_small_fp16_gradients_survive_with_a_loss_scale(device):
    """Smoothed so that no target stands out, of so many rows and classes each gradient is 1e-6.

    Without the scale, fp16 knows no more than two digits of it.
    """
    tensors, targets = inputs(256, 16, 4003, torch.float16, device)
    compare(tensors, targets, dy=65536.0, label_smoothing=1.0)


@pytest.mark.usefixtures("body")
def test_float32_parameters_with_half_precision_rows(device):
    (hidden, weight, bias), targets = inputs(37, 24, 1003, torch.float32, device)
    hidden, dy = hidden.half(), torch.tensor(3.0, device=device)
    loss, dhidden, dweight, dbias = gradients(ours(targets), hidden, weight, bias, dy=dy)
    expected = gradients(plain(targets), hidden.float(), weight, bias, dy=dy)
    assert (loss.dtype, dhidden.dtype) == (torch.float32, torch.float16)
    assert (dweight.dtype, dbias.dtype) == (torch.float32, torch.float32)
    for a, e in zip((loss, dhidden, dweight, dbias), expected, strict=True):
        torch.testing.assert_close(a.float(), e, rtol=5e-3, atol=3e-3)


@pytest.mark.usefixtures("body")
def test_under_autocast_the_product_is_in_its_dtype(device):
    tensors, targets = inputs(12, 24, 200, torch.float32, device)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    with torch.autocast(device, torch.bfloat16):
        loss = linear_cross_entropy(*leaves, targets)
        expected = F.cross_entropy(F.linear(*leaves).float(), targets)
        grads = torch.autograd.grad(loss, leaves)  # inside, where autocast could meddle again
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for a, e in zip(grads, torch.autograd.grad(expected, leaves), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, e, rtol=0.02, atol=2e-3)


def test_a_backward_under_autocast_is_that_without(device, triton):
    tensors, targets = inputs(12, 24, 200, torch.float32, device)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    expected = torch.autograd.grad(linear_cross_entropy(*leaves, targets), leaves)
    loss = linear_cross_entropy(*leaves, targets)
    with torch.autocast(device, torch.bfloat16):
        actual = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.usefixtures("body")
def test_rows_that_do_not_count_add_nothing(ignore_index, device):
    tensors, targets = inputs(20, 8, 9, torch.float32, device)
    targets[:] = targets.clamp(min=0)
    targets[::3] = ignore_index
    compare(tensors, targets, ignore_index=ignore_index, label_smoothing=0.1)
    _, dhidden, _, _ = gradients(
        ours(targets, ignore_index=ignore_index), *tensors, dy=torch.ones((), device=device)
    )
    assert torch.equal((dhidden == 0).all(1), targets == ignore_index)


@pytest.mark.parametrize("rows", [0, 6])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.usefixtures("body")
def test_without_a_row_that_counts_all_is_zero(reduction, rows, device):
    tensors, targets = inputs(rows, 8, 9, torch.float32, device)
    targets[:] = -100
    function = ours(targets, reduction=reduction, label_smoothing=0.1)
    for value in gradients(function, *tensors, dy=torch.ones((), device=device)):
        assert torch.equal(value, torch.zeros_like(value))


@pytest.mark.usefixtures("body")
def test_counts_correct_rows_as_argmax_does(device):
    classes = 4500  # more than a tile
    targets = torch.tensor([0, 7, 4321, 4321, 4499, 2, -100, 4400, 4200], device=device)
    logits = torch.zeros(9, classes, device=device)
    logits[range(1, 9), [7, 4321, 4321, 4499, 3, 0, 4400, 4200]] = 1.0  # row 0: all are equal
    logits[3, 5] = logits[7, 4399] = 1.0  # an equal score before the target's
    logits[4, 5], logits[8, 4201] = 0.5, 1.0  # a lower one before it, an equal one behind it
    weight = logits.t().contiguous()  # times the unit matrix
    loss, correct = linear_cross_entropy(
        torch.eye(9, device=device), weight, None, targets, return_correct=True
    )
    assert correct.item() == (logits.argmax(-1) == targets).sum().item() == 5
    assert (correct.dtype, correct.shape, loss.requires_grad) == (torch.int64, (), False)


@pytest.mark.usefixtures("body")
def test_counts_no_row_that_is_ignored_as_correct(device):
    hidden, targets = torch.eye(4, device=device) * 5, torch.arange(4, device=device)
    _, correct = linear_cross_entropy(
        hidden, torch.eye(4, device=device), None, targets, ignore_index=2, return_correct=True
    )
    assert correct.item() == 3


@pytest.mark.usefixtures("body")
def test_a_class_that_is_ruled_out_has_no_part_in_the_loss(device):
    (hidden, weight, bias), targets = inputs(12, 8, 40, torch.float32, device)
    bias[5], targets[targets == 5] = -float("inf"), 6
    dy = torch.ones((), device=device)
    actual = gradients(ours(targets), hidden, weight, bias, dy=dy)
    for a, e in zip(actual, gradients(plain(targets), hidden, weight, bias, dy=dy), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.usefixtures("body")
def test_rows_that_overflow_show(device):
    """A GradScaler must see them."""
    (hidden, weight, bias), targets = inputs(6, 8, 40, torch.float16, device)
    hidden[2] = 6e4
    loss, dhidden, *_ = gradients(
        ours(targets), hidden, weight * 100, bias, dy=torch.ones((), device=device)
    )
    assert not loss.isfinite()
    assert not dhidden[2].isfinite().any()


@pytest.mark.parametrize("target", [-1, 40, 2**32])
def test_an_impossible_target(target, device):
    (hidden, weight, bias), targets = inputs(6, 8, 40, torch.float32, device)
    targets[2] = target
    with backend.use("triton"):
        loss, dhidden, *_ = gradients(
            ours(targets), hidden, weight, bias, dy=torch.ones((), device=device)
        )
    assert loss.isnan()
    assert torch.equal(dhidden.isnan().any(1), torch.arange(6, device=device) == 2)
    if device == "cpu":
        with pytest.raises(IndexError, match="out of bounds"):
            linear_cross_entropy(hidden, weight, bias, targets)


@pytest.mark.parametrize("bias_is_given", [True, False], ids=["bias", "no-bias"])
@pytest.mark.usefixtures("body")
def test_reads_tensors_as_they_lie(bias_is_given, device):
    wide = torch.randn(9, 64, device=device)
    hidden, weight = wide[:, 3:27], torch.randn(24, 100, device=device).t()
    bias = torch.randn(200, device=device)[::2] if bias_is_given else None
    targets = torch.randint(100, (9, 2), device=device)[:, 0]
    leaves = [t.requires_grad_() for t in (hidden, weight, bias) if t is not None]
    loss = linear_cross_entropy(hidden, weight, bias, targets)
    expected = F.cross_entropy(F.linear(hidden, weight, bias), targets)
    torch.testing.assert_close(loss, expected)
    for a, e in zip(*(torch.autograd.grad(y, leaves) for y in (loss, expected)), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.usefixtures("body")
def test_the_backward_gives_the_same_bits_each_time(device):
    rows = 70 if device == "cuda" else 20
    tensors, targets = inputs(rows, 8, 100, torch.float32, device)
    dy = torch.ones((), device=device)
    first, second = (gradients(ours(targets), *tensors, dy=dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("garbage", [float("nan"), 9.0])
def test_columns_behind_the_classes_count_for_nothing(garbage, device):
    kernels = backend.load("triton", "linear_cross_entropy", device)
    logits = torch.randn(5, 64, device=device)
    logits[:, 50:] = garbage
    targets = torch.tensor([0, 49, -100, 3, 4], device=device)
    loss, _, *statistics = kernels.cross_entropy_fwd(logits, targets, 50, -100, 0.1, True)
    leaf = logits[:, :50].clone().requires_grad_()
    expected = F.cross_entropy(leaf, targets, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(loss, expected)
    scale = torch.tensor(2.0, device=device)
    column_sums = kernels.cross_entropy_bwd(logits, targets, *statistics, scale, 50, -100, 0.1)
    expected.sum().mul(2).backward()
    torch.testing.assert_close(logits[:, :50], leaf.grad)
    assert not logits[:, 50:].any()
    torch.testing.assert_close(column_sums, logits.sum(0))


def test_column_sums_are_of_gradients_that_are_not_rounded_yet(device):
    kernels = backend.load("triton", "linear_cross_entropy", device)
    logits = torch.randn(5, 64, device=device).half()
    targets, scale = torch.arange(5, device=device), torch.tensor(1e-9, device=device)
    expected = (logits.float().softmax(-1) - torch.eye(64, device=device)[:5]).sum(0) * scale
    _, _, *statistics = kernels.cross_entropy_fwd(logits, targets, 64, -100, 0.0, True)
    column_sums = kernels.cross_entropy_bwd(logits, targets, *statistics, scale, 64, -100, 0.0)
    assert not logits.any()  # too small for fp16
    torch.testing.assert_close(column_sums, expected, rtol=1e-4, atol=1e-14)


def test_a_forced_backend_never_falls_back():
    tensors, targets = inputs(3, 8, 9, torch.float32, "cpu")
    hidden, weight, bias = tensors
    with backend.use("triton"):
        with pytest.raises(backend.BackendUnavailable, match=r"linear_cross_entropy.*float64"):
            linear_cross_entropy(hidden.double(), weight, bias, targets)
        with pytest.raises(backend.BackendUnavailable, match=r"a weight of torch.float64"):
            linear_cross_entropy(hidden, weight.double(), bias, targets)
        with pytest.raises(backend.BackendUnavailable, match=r"a bias of torch.float64"):
            linear_cross_entropy(hidden, weight, bias.double(), targets)
        with pytest.raises(backend.BackendUnavailable, match=r"hidden on cpu and bias on meta"):
            linear_cross_entropy(hidden, weight, bias.to("meta"), targets)
        with pytest.raises(backend.BackendUnavailable, match=r"hidden on cpu and targets on meta"):
            linear_cross_entropy(hidden, weight, bias, targets.to("meta"))


@pytest.mark.usefixtures("body")
def test_wrong_arguments_are_named(device):
    (hidden, weight, bias), targets = inputs(3, 8, 9, torch.float32, device)
    for arguments, options, message in (
        ((hidden[0], weight, bias, targets), {}, r"hidden of shape \(rows, hidden\), got \(8,\)"),
        ((hidden, weight[:, :7], bias, targets), {}, r"weight of shape \(classes, 8\), got \(9, 7"),
        ((hidden, weight[:0], bias[:0], targets), {}, r"weight of shape \(classes, 8\), got"),
        ((hidden, weight, bias[:8], targets), {}, r"bias of shape \(9,\), got \(8,\)"),
        ((hidden, weight, bias, targets[:2]), {}, r"targets of shape \(3,\), got \(2,\)"),
        ((hidden, weight, bias, targets.int()), {}, r"targets of dtype int64, got torch.int32"),
        ((hidden, weight, bias, targets), {"label_smoothing": 1.5}, "from 0 to 1, got 1.5"),
        ((hidden, weight, bias, targets), {"reduction": "none"}, '"mean" or "sum", got none'),
    ):
        with pytest.raises(ValueError, match="linear_cross_entropy: expected .*" + message):
            linear_cross_entropy(*arguments, **options)


def test_float64_is_computed_in_float64():
    tensors, targets = inputs(5, 8, 9, torch.float64, "cpu")
    loss = linear_cross_entropy(*tensors, targets, label_smoothing=0.1)
    assert loss.dtype == torch.float64
    assert loss == F.cross_entropy(F.linear(*tensors), targets, label_smoothing=0.1)
