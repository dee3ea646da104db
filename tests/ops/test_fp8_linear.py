"""Products of FP8 casts: the emulation against float64, and the kernels against the emulation."""

import pytest
import torch

from fastbert import backend
from fastbert.ops.fp8_linear import fp8_linear, inverse_of, multiplies_fp8
from fastbert.ops.fp8_plain import E4M3, E5M2, LARGEST, cast_transpose, quantised

FORMATS = pytest.mark.parametrize("format", [E4M3, E5M2], ids=["E4M3", "E5M2"])


def values(format):
    """All finite numbers of the format that are not negative, in order, float64."""
    every = torch.arange(128, dtype=torch.uint8).view(format).double()
    return every[every.isfinite()]


def nearest(x, format):
    """The number of the format that is nearest to each of x (N,) float64, ties to the even byte."""
    table = values(format)
    size = x.abs().clamp(max=table[-1])
    apart = (size[:, None] - table).abs()
    candidates = apart == apart.min(1, keepdim=True).values
    odd = torch.arange(len(table)) % 2
    place = (candidates.int() * (2 - odd)).argmax(1)
    return table[place] * x.sign()


@FORMATS
def test_casts_are_to_the_nearest_number_ties_to_even(format):
    table = values(format)
    middles = (table[1:] + table[:-1]) / 2
    near = torch.cat([table, middles, middles * (1 + 2**-20), middles * (1 - 2**-20)])
    torch.manual_seed(0)
    wide = torch.randn(4000).double() * torch.exp2(torch.randint(-24, 20, (4000,)).double())
    x = torch.cat([near, -near, wide]).float()
    for scale in (1.0, 0.25, 64.0):
        found = quantised(x / scale, torch.tensor(scale), format).double()
        assert torch.equal(found, nearest(x.double(), format))


@FORMATS
def test_what_is_too_large_saturates_and_what_is_not_finite_is_nan(format):
    most = LARGEST[format]
    x = torch.tensor([most, 2 * most, -1e30, torch.inf, -torch.inf, torch.nan])
    found = quantised(x, torch.tensor(1.0), format).float()
    assert found[:3].tolist() == [most, most, -most]
    assert found[3:].isnan().all()


def tensors(rows=40, size=32, outputs=48, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias, dy = (
        torch.randn(shape, generator=generator).to(device)
        for shape in ((rows, size), (outputs, size), (outputs,), (rows, outputs))
    )
    return x, 0.1 * weight, bias, 1e-4 * dy


SCALE = (64.0, 1024.0, 2.0**20)


def run(x, weight, bias, dy, scale=SCALE):
    """(result, dx, dweight, dbias), and the largest values that were met."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    scale = torch.tensor(scale, device=x.device)
    amax = torch.zeros(3, device=x.device)
    y = fp8_linear(*leaves, scale, amax)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)], amax


def exact(x, weight, bias, dy):
    """What the products of the casts are, summed in float64."""
    of = [torch.tensor(scale) for scale in SCALE]
    x8, w8 = (quantised(t, s, E4M3).double() / s for t, s in zip((x, weight), of, strict=False))
    dy8 = quantised(dy, of[2], E5M2).double() / of[2]
    return x8 @ w8.t() + bias.double(), dy8 @ w8, dy8.t() @ x8, dy.double().sum(0)


def test_products_are_of_the_casts_and_nothing_else_is_rounded():
    given = tensors()
    found, amax = run(*given)
    for actual, expected in zip(found, exact(*given), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=expected.std() * 1e-5)
    assert amax.tolist() == [t.abs().max().item() for t in (given[0], given[1], given[3])]


def test_the_error_is_that_of_three_bits_of_mantissa_and_of_two():
    """Of a number with m bits the cast's relative error is uniform within 2^-(m+1) at most, so its
    RMS is 2^-(m+1) / sqrt(3) for the least mantissa and half of that for the largest; two casts
    that do not know of each other add their squares."""
    x, weight, bias, dy = tensors(512, 256, 256)
    (y, dx, dweight, _), _ = run(x, weight, bias, dy)
    x, weight, bias, dy = (t.double() for t in (x, weight, bias, dy))
    error = {3: 2**-4 / 3**0.5, 2: 2**-3 / 3**0.5}
    for actual, expected, bits in (
        (y, x @ weight.t() + bias, (3, 3)),
        (dx, dy @ weight, (2, 3)),
        (dweight, dy.t() @ x, (2, 3)),
    ):
        product = expected - bias if actual is y else expected
        wrong = (actual.double() - expected).square().mean().sqrt()
        relative = wrong / product.square().mean().sqrt()
        most = sum(error[b] ** 2 for b in bits) ** 0.5
        assert 0.5 * most < relative < most


@pytest.mark.parametrize(("rows", "size", "outputs"), [(40, 32, 48), (1, 16, 16), (130, 144, 16)])
def test_kernels_give_what_the_emulation_gives(device, rows, size, outputs):
    given = tensors(rows, size, outputs, device)
    with backend.use("reference"):
        expected, most = run(*given)
    with backend.use("triton"):
        found, amax = run(*given)
    assert torch.equal(amax, most)
    for number, (actual, wanted) in enumerate(zip(found, expected, strict=True)):
        # a GPU sums the forward's product with some 14 bits, as TransformerEngine has it do
        most_apart = 1e-3 if device == "cuda" and number == 0 else 1e-4
        limits = {"rtol": most_apart, "atol": most_apart * wanted.abs().max().item()}
        torch.testing.assert_close(actual, wanted, **limits)


@FORMATS
@pytest.mark.parametrize("shape", [(5, 16), (64, 128), (70, 144)])
def test_a_kernels_casts_are_the_emulations_bits(device, format, shape):
    if device == "cpu" and not backend.INTERPRETED:
        pytest.skip("needs TRITON_INTERPRET=1")
    from fastbert.kernels import fp8_linear as kernels

    torch.manual_seed(1)
    x = torch.randn(shape) * torch.exp2(torch.randint(-20, 12, shape).float())
    x[0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30])
    x, scale = x.to(device), torch.tensor(4.0, device=device)
    amax, most = torch.zeros(2, device=device).unbind()
    cast, transposed = kernels.cast_transpose(x, scale, amax, format == E5M2)
    expected, _ = cast_transpose(x, scale, most, format == E5M2)
    assert torch.equal(amax, most)
    rows = kernels.padded(shape[0])
    assert cast.shape == (rows, shape[1])
    same = cast.float()[: shape[0]] == expected.float()
    assert torch.equal(same, ~expected.float().isnan())  # NaN is not equal to itself
    assert torch.equal(cast.float().isnan()[: shape[0]], expected.float().isnan())
    assert not cast.float()[shape[0] :].any()
    assert torch.equal(transposed.view(torch.uint8), cast.view(torch.uint8).t())


def test_an_infinite_gradient_is_not_made_finite():
    x, weight, bias, dy = tensors()
    dy[3, 5] = torch.inf
    (_, dx, dweight, _), amax = run(x, weight, bias, dy)
    assert dx[3].isnan().all()
    assert dweight[5].isnan().all()
    assert dx[:3].isfinite().all()
    assert amax[2].isfinite()


def test_leading_dimensions_autocast_and_no_bias():
    x, weight, _, _ = tensors(12)
    x, weight = x.view(3, 4, -1).requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = fp8_linear(x, weight, None, torch.tensor(SCALE), torch.zeros(3))
    assert y.shape == (3, 4, 48)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.shape == x.shape
    assert weight.grad.dtype == torch.float32


def test_refuses_other_shapes_and_a_second_derivative():
    x, weight, bias, _ = tensors()
    scale, amax = torch.tensor(SCALE), torch.zeros(3)
    with pytest.raises(ValueError, match=r"fp8_linear: expected weight of shape \(outputs, 32\)"):
        fp8_linear(x, weight.t(), bias, scale, amax)
    with pytest.raises(ValueError, match=r"bias of shape \(48,\)"):
        fp8_linear(x, weight, bias[:3], scale, amax)
    for wrong in (scale[:2], scale.double()):
        with pytest.raises(ValueError, match="scale of 3 float32"):
            fp8_linear(x, weight, bias, wrong, amax)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(
        fp8_linear(x, weight, bias, scale, amax).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        dx.sum().backward()


def test_a_forced_backend_never_falls_back():
    x, weight, bias, _ = tensors()
    for arguments, message in (
        ((x.double(), weight, bias), "torch.float64"),
        ((x, weight.double(), bias), "weight of torch.float64"),
        ((x, weight[:47], None), r"a weight of \(47, 32\), whose sizes are not multiples of 16"),
        ((x[:, :31], weight[:, :31], bias), r"a weight of \(48, 31\)"),
        ((x, weight[:0], None), r"a weight of \(0, 32\)"),
        ((x, weight, bias.to("meta")), "tensors on several devices"),
    ):
        with backend.use("triton"), pytest.raises(backend.BackendUnavailable, match=message):
            fp8_linear(*arguments, torch.tensor(SCALE), torch.zeros(3))


@pytest.mark.parametrize(
    ("capability", "multiplies"), [((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)]
)
def test_which_gpus_multiply_fp8(capability, multiplies, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert multiplies_fp8(torch.device("cuda")) == multiplies
    assert not multiplies_fp8(torch.device("cpu"))


def test_inverses_lie_where_cublas_takes_them():
    inverse = inverse_of(torch.tensor(SCALE))
    assert inverse.tolist() == [1 / scale for scale in SCALE]
    assert [x.data_ptr() % 16 for x in inverse] == [0, 0, 0]


def test_the_largest_values_are_raised_alone(body):
    leaf = torch.ones(3, 16, requires_grad=True)
    amax = torch.tensor([9.0, 0.5, 9.0])
    fp8_linear(leaf, torch.ones(16, 16), None, torch.ones(3), amax).sum().backward()
    assert amax.tolist() == [9.0, 1.0, 9.0]


def test_no_rows(body):
    (y, dx, dweight, dbias), amax = run(*tensors(0))
    assert (y.shape, dx.shape) == ((0, 48), (0, 32))
    assert dweight.abs().max() == dbias.abs().max() == amax[0] == amax[2] == 0


def test_a_wide_biases_gradient_is_summed_in_float32(body):
    """In half precision 1024 + 1024 + 1 would be 2048."""
    x, weight = torch.ones(3, 16).half(), torch.ones(16, 16)
    bias = torch.zeros(16, requires_grad=True)
    y = fp8_linear(x, weight, bias, torch.ones(3), torch.zeros(3))
    dy = torch.tensor([1024.0, 1024.0, 1.0])[:, None].expand(3, 16)
    (dbias,) = torch.autograd.grad(y, bias, dy.half())
    assert dbias.tolist() == [2049.0] * 16


def test_reads_tensors_as_they_lie(body):
    x, weight, bias, dy = tensors()
    expected, _ = run(x, weight, bias, dy)
    apart = x.t().contiguous().t(), weight.t().contiguous().t(), torch.stack([bias] * 2, 1)[:, 0]
    leaves = [t.requires_grad_() for t in apart]
    y = fp8_linear(*leaves, torch.tensor(SCALE), torch.zeros(3))
    actual = [y, *torch.autograd.grad(y, leaves, dy.t().contiguous().t())]
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("rows", [16, 5])
def test_the_result_may_be_changed_in_place(rows, body):
    x, weight, bias, dy = tensors(rows)
    expected, _ = run(x, weight, bias, dy)
    leaf = x.clone().requires_grad_()
    y = fp8_linear(leaf, weight, bias, torch.tensor(SCALE), torch.zeros(3))
    y.add_(1).backward(dy)
    assert torch.equal(leaf.grad, expected[1])


def test_a_backward_under_autocast_is_that_without():
    x, weight, bias, dy = tensors()
    expected, _ = run(x, weight, bias, dy)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    y = fp8_linear(*leaves, torch.tensor(SCALE), torch.zeros(3))
    with torch.autocast("cpu", torch.bfloat16):
        y.backward(dy)
    for leaf, one in zip(leaves, expected[1:], strict=True):
        assert torch.equal(leaf.grad, one)


def test_without_values_it_has_shapes():
    x, weight, bias, _ = (t.to("meta").requires_grad_() for t in tensors())
    y = fp8_linear(x, weight, bias, torch.ones(3, device="meta"), torch.zeros(3, device="meta"))
    y.sum().backward()
    assert (y.shape, y.dtype) == ((len(x), len(weight)), x.dtype)
    assert weight.grad.shape == weight.shape


def test_refuses_function_transforms():
    x, weight, bias, _ = tensors()
    scale, amax = torch.tensor(SCALE), torch.zeros(3)
    with pytest.raises(RuntimeError, match="do not go through casts to FP8"):
        torch.func.grad(lambda x: fp8_linear(x, weight, bias, scale, amax).sum())(x)
    with pytest.raises(RuntimeError, match="do not go through casts to FP8"):
        torch.func.jvp(lambda x: fp8_linear(x, weight, bias, scale, amax), (x,), (x,))
