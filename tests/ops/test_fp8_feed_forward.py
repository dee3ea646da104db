"""Two products of FP8 casts with GELU between them, which casts its own results."""

import pytest
import torch
import torch.nn.functional as F

from fastbert import backend
from fastbert.ops.fp8_linear import fp8_feed_forward, fp8_linear
from fastbert.ops.fp8_plain import E4M3, E5M2, quantised

SCALE = 64.0, 1024.0, 2.0**20
OUTPUT_SCALE = 32.0, 512.0, 2.0**18


def tensors(rows=40, size=32, inner=48, outputs=16, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, output_weight, dy = (
        torch.randn(shape, generator=generator)
        for shape in ((rows, size), (inner, size), (inner,), (outputs, inner), (rows, outputs))
    )
    given = x, 0.1 * weight, 0.5 + bias, 0.1 * output_weight, 1e-4 * dy
    return [t.to(device, dtype) for t in given]


def run(function, x, weight, bias, output_weight, dy):
    """(result, dx, dweight, dbias, doutput_weight), and the largest values of both products."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias, output_weight)]
    scales = [torch.tensor(scale, device=x.device) for scale in (SCALE, OUTPUT_SCALE)]
    amaxes = [torch.zeros(3, device=x.device) for _ in scales]
    y = function(*leaves, scales[0], amaxes[0], scales[1], amaxes[1])
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)], torch.cat(amaxes)


def fused(approximate):
    return lambda *given: fp8_feed_forward(*given, approximate=approximate)


def apart(approximate):
    """The same by `fp8_linear`; in float32 there is nothing that this rounds in between."""

    def function(x, weight, bias, output_weight, scale, amax, output_scale, output_amax):
        inner = fp8_linear(x, weight, None, scale, amax) + bias
        inner = F.gelu(inner, approximate=approximate)
        return fp8_linear(inner, output_weight, None, output_scale, output_amax)

    return function


FORMULAS = pytest.mark.parametrize("approximate", ["none", "tanh"])


@FORMULAS
@pytest.mark.parametrize("rows", [40, 1])
def test_it_is_two_linear_layers_and_gelu(approximate, rows):
    given = tensors(rows)
    found, amax = run(fused(approximate), *given)
    expected, most = run(apart(approximate), *given)
    assert torch.equal(amax, most)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-6, atol=0)


@FORMULAS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(40, 32, 48, 16), (1, 16, 16, 16), (130, 16, 144, 32)], ids=str)
def test_kernels_give_what_the_emulation_gives(device, approximate, dtype, shape):
    given = tensors(*shape, device=device, dtype=dtype)
    with backend.use("reference"):
        expected, most = run(fused(approximate), *given)
    with backend.use("triton"):
        found, amax = run(fused(approximate), *given)
    torch.testing.assert_close(amax, most, rtol=1e-3, atol=0)  # by other formulas for GELU
    for actual, wanted in zip(found, expected, strict=True):
        # A GELU that lies between two numbers of FP8 may be rounded to either. Of steps of 2^-3
        # that is a share of 2 e / 2^-3, for formulas within e, on a GPU 2^-11 in 16 bits and less
        # in float32, and their RMS 2^-3 / sqrt(3) times the root of that share.
        most_apart = 3e-3
        if device == "cuda":
            most_apart = 1e-2 if dtype == torch.float16 else 5e-3
        error = (actual.float() - wanted.float()).square().mean().sqrt()
        size = wanted.float().square().mean().sqrt()
        least = 2e-7 if actual.dtype == torch.float16 else 0.0  # gradients are its subnormals here
        assert error <= most_apart * size + least, (error / size).item()
        assert actual.dtype == wanted.dtype


@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("shape", [(5, 16), (64, 128), (70, 144)], ids=str)
def test_a_kernels_casts_are_of_gelu_and_its_gradient(device, tanh, shape):
    if device == "cpu" and not backend.INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    from fastbert.kernels import fp8_linear as kernels

    torch.manual_seed(1)
    x, dy = (3 * torch.randn(shape, device=device) for _ in range(2))
    dy = F.pad(1e-4 * dy, (0, 3))[:, : shape[1]]  # its rows lie farther apart than those of x
    bias = 1 + torch.randn(shape[1], device=device)
    x[0, :2] = torch.tensor([torch.nan, 300.0])
    dy[1, 5] = -torch.inf
    z = (x.double() + bias).requires_grad_()
    y = F.gelu(z, approximate="tanh" if tanh else "none")
    (dz,) = torch.autograd.grad(y, z, dy.double())

    scales = [torch.tensor(s, device=device) for s in (OUTPUT_SCALE[0], SCALE[2])]
    amax, most = torch.zeros(2, device=device).unbind()
    casts = kernels.gelu_cast_transpose(x, bias, tanh, scales[0], amax)
    *gradients, dbias = kernels.gelu_bwd_cast_transpose(dy, x, bias, tanh, scales[1], most)

    limits = {"rtol": 1e-4, "atol": 1e-8, "equal_nan": True}
    torch.testing.assert_close(dbias, dz.sum(0).float(), **limits)
    for (cast, transposed), largest, exact, scale, format in (
        (casts, amax, y.detach(), scales[0], E4M3),
        (gradients, most, dz, scales[1], E5M2),
    ):
        finite = exact[exact.isfinite()].abs().max().float()
        torch.testing.assert_close(largest, finite, rtol=1e-6, atol=0)
        assert cast.shape == (kernels.padded(shape[0]), shape[1])
        assert torch.equal(transposed.view(torch.uint8), cast.view(torch.uint8).t())
        # the bias alone has a GELU, which rows that do not exist must not show
        assert not cast.float()[shape[0] :].any()  # -0 is as good
        actual = cast[: shape[0]].float()
        expected = quantised(exact.float(), scale, format).float()
        assert torch.equal(actual.isnan(), expected.isnan())
        differ = (actual != expected) & ~expected.isnan()
        assert differ.sum() <= 1 + differ.numel() // 500  # what lies between two numbers
        size, step = expected.abs()[differ], (actual - expected).abs()[differ]
        bits, least = (3, 2.0**-9) if format == E4M3 else (2, 2.0**-16)
        assert (step <= torch.maximum(size * 2.0**-bits, torch.tensor(least))).all()


def test_leading_dimensions_autocast_and_frozen_weights():
    x, weight, bias, output_weight, _ = tensors(12)
    x = x.view(3, 4, -1).requires_grad_()
    numbers = [torch.tensor(SCALE), torch.zeros(3), torch.tensor(OUTPUT_SCALE), torch.zeros(3)]
    with torch.autocast("cpu", torch.bfloat16):
        y = fp8_feed_forward(x, weight, bias, output_weight, *numbers)
    assert y.shape == (3, 4, 16)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.shape == x.shape
    output_weight.requires_grad_()
    x = x.detach()
    y = fp8_feed_forward(x, weight, bias, output_weight, *numbers)
    numbers[1].zero_()
    y.sum().backward()
    assert output_weight.grad is not None
    assert not numbers[1][2]  # nothing behind GELU wants a gradient


@pytest.mark.parametrize("place", range(4), ids=["x", "weight", "bias", "output_weight"])
def test_each_gradient_may_be_wanted_alone(place, body):
    given = tensors()
    expected, _ = run(fused("none"), *given)
    leaves = [t.clone().requires_grad_(number == place) for number, t in enumerate(given[:4])]
    numbers = [torch.tensor(SCALE), torch.zeros(3), torch.tensor(OUTPUT_SCALE), torch.zeros(3)]
    y = fp8_feed_forward(*leaves, *numbers)
    (alone,) = torch.autograd.grad(y, leaves[place], given[4])
    assert torch.equal(alone, expected[1 + place])


def test_a_wide_biases_gradient_is_summed_in_float32(body):
    """In half precision 1024 + 1024 + 1 would be 2048; GELU has the slope 1 here."""
    x, weight, identity = torch.zeros(3, 16).half(), torch.ones(16, 16), torch.eye(16)
    bias = torch.full((16,), 40.0, requires_grad=True)
    numbers = [torch.ones(3), torch.zeros(3)] * 2
    y = fp8_feed_forward(x, weight, bias, identity, *numbers)
    dy = torch.tensor([1024.0, 1024.0, 1.0])[:, None].expand(3, 16)
    (dbias,) = torch.autograd.grad(y, bias, dy.half())
    assert dbias.tolist() == [2049.0] * 16


def test_reads_tensors_as_they_lie(body):
    *given, dy = tensors()
    expected, _ = run(fused("none"), *given, dy)
    x, weight, bias, output_weight = given
    apart = [t.t().contiguous().t() for t in (x, weight, output_weight)]
    apart.insert(2, torch.stack([bias] * 2, 1)[:, 0])
    leaves = [t.requires_grad_() for t in apart]
    numbers = [torch.tensor(SCALE), torch.zeros(3), torch.tensor(OUTPUT_SCALE), torch.zeros(3)]
    y = fp8_feed_forward(*leaves, *numbers)
    actual = [y, *torch.autograd.grad(y, leaves, dy.t().contiguous().t())]
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_a_forced_backend_never_falls_back():
    x, weight, bias, output_weight, _ = tensors()
    numbers = [torch.tensor(SCALE), torch.zeros(3), torch.tensor(OUTPUT_SCALE), torch.zeros(3)]
    for wrong, message in (
        (output_weight.double(), "weight of torch.float64"),
        (output_weight[:15], r"a weight of \(15, 48\), whose sizes are not multiples of 16"),
        (output_weight.to("meta"), "tensors on several devices"),
    ):
        with backend.use("triton"), pytest.raises(backend.BackendUnavailable, match=message):
            fp8_feed_forward(x, weight, bias, wrong, *numbers)


def test_refuses_other_shapes_and_a_second_derivative():
    x, weight, bias, output_weight, _ = tensors()
    numbers = [torch.tensor(SCALE), torch.zeros(3), torch.tensor(OUTPUT_SCALE), torch.zeros(3)]
    with pytest.raises(ValueError, match=r"expected weight of shape \(inner, 32\)"):
        fp8_feed_forward(x, weight.t(), bias, output_weight, *numbers)
    with pytest.raises(ValueError, match=r"bias of shape \(48,\)"):
        fp8_feed_forward(x, weight, bias[:3], output_weight, *numbers)
    with pytest.raises(ValueError, match=r"output_weight of shape \(outputs, 48\)"):
        fp8_feed_forward(x, weight, bias, output_weight.t(), *numbers)
    with pytest.raises(ValueError, match='approximate "none" or "tanh", got erf'):
        fp8_feed_forward(x, weight, bias, output_weight, *numbers, approximate="erf")
    with pytest.raises(ValueError, match="output_amax of 3 float32"):
        fp8_feed_forward(x, weight, bias, output_weight, *numbers[:3], numbers[3].double())
    x.requires_grad_()
    y = fp8_feed_forward(x, weight, bias, output_weight, *numbers)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="fp8_feed_forward: its gradients cannot be"):
        dx.sum().backward()
