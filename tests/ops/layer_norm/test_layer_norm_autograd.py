"""What layer normalizations keep and give autograd, and graphs that torch.compile traces."""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastbert import backend
from fastbert.ops.layer_norm import dropout_add_layer_norm, layer_norm
from tests.ops.layer_norm.case import SUM_NAMES, inputs, native, sum_inputs
from tests.oracle import assert_as_accurate, gradients


@pytest.mark.usefixtures("triton")
def test_a_wide_input_of_a_narrow_residual_gets_a_wide_gradient(device):
    case = sum_inputs((5, 40), torch.float32, device)
    x, residual, weight, bias, _ = case.tensors
    leaf, residual = x.requires_grad_(), residual.half()
    y = dropout_add_layer_norm(leaf, residual, weight, bias)
    (dx,) = torch.autograd.grad(y, leaf, case.dy.half())
    assert (dx != dx.half()).any()


@pytest.mark.usefixtures("body")
def test_gradients_of_wide_parameters_are_summed_in_float32(device):
    """They miss only what the backward's rounded z misses, not what a rounded gradient would."""
    case = sum_inputs((300, 24), torch.float16, device)
    tensors = tuple(t if i < 2 else t.float() for i, t in enumerate(case.tensors))
    case = case._replace(tensors=tensors)
    actual, truth = case.results(), case.plain(torch.double)
    torch.testing.assert_close(actual[4].double(), truth[4], rtol=1e-6, atol=1e-5)  # dbias
    dx_bias = (actual[5].double() - truth[5]).abs().max()
    assert dx_bias < 0.02  # of rounded gradients, 300 rows miss about 0.1


@pytest.mark.usefixtures("triton")
def test_the_gradient_of_x_bias_is_of_gradients_that_are_not_rounded_yet(device):
    """Sums of small whole numbers are not rounded, so that the dtype of the rows matters alone."""
    x, residual = torch.randint(-8, 9, (2, 300, 24), device=device).float()
    weight, bias, dy = inputs((300, 24), torch.float32, device)[1:]
    found = []
    for dtype in (torch.float16, torch.float32):
        x_bias = torch.zeros(24, device=device, requires_grad=True)
        y = dropout_add_layer_norm(x.to(dtype), residual.to(dtype), weight, bias, x_bias=x_bias)
        found += torch.autograd.grad(y, x_bias, dy.half().to(dtype))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.usefixtures("body")
def test_the_backward_gives_the_same_bits_each_time(dropout_p, device):
    case = sum_inputs((200, 100), torch.float32, device)  # more rows than programs take at once
    first, second = (case.results(dropout_p=dropout_p) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    truth = case.plain(torch.double, dropout_p=dropout_p)
    assert_as_accurate(first, case.plain(dropout_p=dropout_p), truth, names=SUM_NAMES)


@pytest.mark.parametrize("place", range(5), ids=SUM_NAMES[1:])
@pytest.mark.parametrize("save", ["z", "y"])
@pytest.mark.usefixtures("body")
def test_each_gradient_may_be_wanted_alone(save, place, device):
    case = sum_inputs((5, 40), torch.float32, device)
    expected = case.results(save=save)[1 + place]
    tensors = [x.clone().requires_grad_(number == place) for number, x in enumerate(case.tensors)]
    y = dropout_add_layer_norm(*tensors[:4], x_bias=tensors[4], save=save)
    (alone,) = torch.autograd.grad(y, tensors[place], case.dy)
    torch.testing.assert_close(alone, expected)


@pytest.mark.usefixtures("body")
def test_gradients_of_both_inputs_share_no_memory(device):
    """Without dropout they are one tensor in the backward, and leaves must get one each."""
    case = sum_inputs((4, 16), torch.float32, device)
    x, residual = (t.clone().requires_grad_() for t in case.tensors[:2])
    weight, bias = case.tensors[2:4]
    for _ in range(2):  # the second time adds to what is there
        dropout_add_layer_norm(x, residual, weight, bias).backward(case.dy)
    once = (
        case.plain()[2] * 0
        + torch.autograd.grad(dropout_add_layer_norm(x, residual, weight, bias), x, case.dy)[0]
    )
    torch.testing.assert_close(x.grad, 2 * once)
    torch.testing.assert_close(residual.grad, 2 * once)
    x.grad.zero_()
    assert residual.grad.abs().sum() > 0


@pytest.mark.usefixtures("body")
def test_an_input_that_is_its_own_residual_gets_both_gradients(device):
    case = sum_inputs((4, 16), torch.float32, device)
    x, weight, bias = case.tensors[0], *case.tensors[2:4]
    both = gradients(lambda x: dropout_add_layer_norm(2 * x, x, weight, bias), x, dy=case.dy)
    expected = gradients(lambda x: native(1e-12)(3 * x, weight, bias), x, dy=case.dy)
    torch.testing.assert_close(both, expected, rtol=1e-4, atol=1e-5)


class Kept(TorchDispatchMode):
    """Notes how many elements each forward leaves for a backward, beside its result."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        if "layer_norm_fwd" in str(function):
            self.elements = sum(output.numel() for output in outputs[1:])
        return outputs


@pytest.mark.usefixtures("triton")
def test_nothing_is_kept_where_no_gradient_is_needed(device):
    case = sum_inputs((4, 16), torch.float32, device)
    x, residual, weight, bias, _ = case.tensors
    with Kept() as kept:
        y = dropout_add_layer_norm(x, residual, weight.requires_grad_(), bias)
        assert kept.elements == y.numel() + 2 * len(y)  # z, and of each row mean and rstd
        dropout_add_layer_norm(x, residual, weight, bias, save="y")
        assert kept.elements == len(y)  # rstd
        with torch.no_grad():
            bare = dropout_add_layer_norm(x, residual, weight, bias)
        assert kept.elements == 0
        dropout_add_layer_norm(x, residual, weight.detach(), bias)
        assert kept.elements == 0
    assert torch.equal(y, bare)


@pytest.mark.usefixtures("triton")
def test_torch_compile_gives_the_eager_result(device):
    case = sum_inputs((6, 40), torch.float32, device)
    compiled = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    for dropout_p in (0.0, 0.3):
        eager = case.results(dropout_p=dropout_p)
        torch._dynamo.reset()

        def function(x, residual, weight, bias, x_bias, p=dropout_p):
            return dropout_add_layer_norm(
                x, residual, weight, bias, x_bias=x_bias, dropout_p=p, rng=case.rng
            )

        traced = gradients(compiled(function), *case.tensors, dy=case.dy)
        assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))
    x, _, weight, bias, _ = case.tensors
    eager = gradients(layer_norm, x, weight, bias, dy=case.dy)
    traced = gradients(compiled(lambda *t: layer_norm(*t)), x, weight, bias, dy=case.dy)
    assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


def test_the_reference_is_differentiable_twice_in_float64():
    x, weight, bias, _ = inputs((2, 4), torch.float64, "cpu")
    leaves = [t.requires_grad_() for t in (x, x.detach() + 1, weight, bias)]
    with backend.use("reference"):
        torch.autograd.gradgradcheck(lambda *t: dropout_add_layer_norm(*t, eps=0.1), leaves)


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_the_first_call_may_be_a_traced_one(name, device):
    """The backend is then chosen, and its kernels imported, outside the trace."""
    x, weight = torch.randn(3, 8, device=device), torch.ones(8, device=device)
    torch.compiler.reset()
    with backend.use(name):
        compiled = torch.compile(layer_norm, fullgraph=True, backend="aot_eager")
        actual = compiled(x, weight, weight)
        torch.testing.assert_close(actual, layer_norm(x, weight, weight))
