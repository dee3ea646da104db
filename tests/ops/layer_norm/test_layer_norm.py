"""Layer normalizations, of a sum and alone, beside plain PyTorch's."""

import pytest
import torch
import torch.nn.functional as F

from fastbert import backend
from fastbert import rng as random
from fastbert.ops.layer_norm import dropout_add_layer_norm, layer_norm
from tests.ops.layer_norm.case import SUM_NAMES, inputs, native, sum_inputs
from tests.oracle import assert_as_accurate, gradients

SHAPES = [(3, 7), (2, 3, 768), (257, 100), (2, 1024), (17, 96), (2, 2060), (0, 16)]
SUM_SHAPES = [(3, 7), (5, 3), (2, 3, 768), (51, 312), (35, 128), (2, 2060), (2, 8200), (0, 16)]
NAMES = ("y", "dx", "dweight", "dbias")


def as_id(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else None


@pytest.mark.pairs(within="body")
@pytest.mark.parametrize(
    ("shape", "eps"),
    [*((shape, 0.5) for shape in SHAPES), ((17, 96), 1e-12)],  # 0.5: an eps that is dropped shows
    ids=as_id,
)
@pytest.mark.usefixtures("body")
def test_is_as_accurate_as_pytorch(eps, dtype, shape, device):
    x, weight, bias, dy = inputs(shape, dtype, device)
    actual = gradients(lambda *t: layer_norm(*t, eps), x, weight, bias, dy=dy)
    expected = gradients(native(eps), x, weight, bias, dy=dy)
    truth = gradients(native(eps), x.double(), weight.double(), bias.double(), dy=dy)
    assert_as_accurate(actual, expected, truth, names=NAMES)


@pytest.mark.pairs(within="body")
@pytest.mark.parametrize("shape", SUM_SHAPES, ids=as_id)
@pytest.mark.parametrize("dropout_p", [0.3, 0.0])
@pytest.mark.usefixtures("body")
def test_a_sum_is_normed_as_accurately_as_by_pytorch(dropout_p, dtype, shape, device):
    case = sum_inputs(shape, dtype, device)
    options = {"eps": 0.5, "dropout_p": dropout_p}
    actual, expected = case.results(**options), case.plain(**options)
    assert_as_accurate(actual, expected, case.plain(torch.double, **options), names=SUM_NAMES)


@pytest.mark.usefixtures("body")
def test_a_row_of_one_number_becomes_the_bias(device):
    case = sum_inputs((70, 1), torch.float32, device)
    y, dx, _, dweight, dbias, _ = case.results(eps=0.5)
    torch.testing.assert_close(y, case.tensors[3].expand(70, 1))
    torch.testing.assert_close(dbias, case.dy.sum(0))
    for zero in (dx, dweight):
        torch.testing.assert_close(zero, torch.zeros_like(zero), rtol=0, atol=1e-4)


@pytest.mark.usefixtures("body")
def test_only_the_whole_sum_is_rounded(device):
    """x + x_bias would be 2048 + 1 = 2048 in half precision, of which the residual leaves 0."""
    numbers = torch.arange(1.0, 17.0, device=device).half()
    x, one = torch.full((3, 16), 2048.0, device=device).half(), torch.ones(16, device=device)
    y = dropout_add_layer_norm(x, -x, one, 0 * one, x_bias=numbers.float())
    torch.testing.assert_close(y, layer_norm(numbers.expand(3, 16), one, 0 * one))


@pytest.mark.parametrize("place", [1, 2], ids=["weight", "bias"])
def test_the_reference_takes_one_parameter_of_another_dtype(place):
    x, *parameters, _ = inputs((3, 8), torch.float32, "cpu")
    tensors = [x, *parameters]
    tensors[place] = tensors[place].half()
    with backend.use("reference"):
        y = layer_norm(*tensors)
        torch.testing.assert_close(y, layer_norm(*(t.float() for t in tensors)))


@pytest.mark.usefixtures("body")
def test_what_is_normed_is_the_rounded_sum_that_the_backward_reads(device):
    x, residual, weight, bias, _ = sum_inputs((5, 64), torch.float16, device).tensors
    rounded = (x.float() + residual.float()).half()
    y = dropout_add_layer_norm(x, residual, weight, bias)
    assert torch.equal(y, layer_norm(rounded, weight, bias))


@pytest.mark.parametrize("site", [0, 5])
@pytest.mark.usefixtures("triton")
def test_drops_exactly_what_the_reference_drops(site, device):
    shape, dropout_p = (19, 72), 0.5
    case = sum_inputs(shape, torch.float32, device, site=site)
    x, residual, weight, bias, _ = case.tensors
    _, dx, dresidual, *_ = gradients(
        lambda x, residual: dropout_add_layer_norm(
            x, residual, weight, bias, dropout_p=dropout_p, rng=case.rng
        ),
        x,
        residual,
        dy=case.dy,
    )
    keep = random.hidden_keep_mask(case.rng, shape[-1], dropout_p)
    assert torch.equal(dx != 0, keep)
    torch.testing.assert_close(dx, dresidual * keep * 2)


@pytest.mark.usefixtures("body")
def test_dropout_without_numbers_takes_them_from_torchs_generator(device):
    x, weight, bias, _ = inputs((6, 64), torch.float32, device)

    def draw():
        return dropout_add_layer_norm(x, x, weight, bias, dropout_p=0.5)

    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)


@pytest.mark.usefixtures("body")
def test_a_probability_that_rounds_to_nothing_drops_nothing(device):
    case = sum_inputs((5, 16), torch.float32, device)
    for a, b in zip(case.results(dropout_p=1e-5), case.results(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.pairs(within="body")
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("x_dtype", "residual_dtype", "vector_dtype"),
    [
        (torch.float16, torch.float16, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.float16, torch.float16),
    ],
    ids=["half activations", "float residual", "half residual"],
)
@pytest.mark.usefixtures("body")
def test_dtypes_may_differ(x_dtype, residual_dtype, vector_dtype, dropout_p, device):
    case = sum_inputs((21, 40), torch.float32, device)
    dtypes = (x_dtype, residual_dtype, vector_dtype, vector_dtype, vector_dtype)
    tensors = tuple(t.to(d) for t, d in zip(case.tensors, dtypes, strict=True))
    case = case._replace(tensors=tensors, dy=case.dy.to(residual_dtype))
    actual = case.results(dropout_p=dropout_p)
    assert [t.dtype for t in actual] == [residual_dtype, *dtypes]
    truth = case.plain(torch.double, dropout_p=dropout_p)
    # PyTorch's own operators take no such mixture: compare with it in the lowest precision here
    lowest = case._replace(tensors=tuple(t.half() for t in tensors))
    expected = [
        t.to(a.dtype) for t, a in zip(lowest.plain(dropout_p=dropout_p), actual, strict=True)
    ]
    assert_as_accurate(actual, expected, truth, names=SUM_NAMES)


@pytest.mark.parametrize("gap", [24, 3])
@pytest.mark.usefixtures("body")
def test_reads_rows_that_lie_apart_and_mixed_dtypes(gap, device):
    x, dy = (torch.randn(9, 40, device=device).half() for _ in range(2))
    x = F.pad(x, (0, gap))[:, :40]
    assert not x.is_contiguous()
    weight, bias = torch.randn(2, 40, device=device)
    leaf = x.detach().requires_grad_()  # a clone would lie together
    y = layer_norm(leaf, weight, bias, 1e-5)
    dx = torch.autograd.grad(y, leaf, dy)[0]
    expected = gradients(native(1e-5), x.float(), weight, bias, dy=dy)
    assert (y.dtype, dx.dtype) == (torch.half, torch.half)
    torch.testing.assert_close(y, expected[0].half())
    torch.testing.assert_close(dx, expected[1].half())


@pytest.mark.parametrize("start", [0, 1])  # 1: addresses that are no multiples of 16 bytes
@pytest.mark.usefixtures("body")
def test_sums_rows_that_lie_apart(start, device):
    case = sum_inputs((9, 40), torch.float16, device)
    x, residual, weight, bias, x_bias = case.tensors
    apart = [
        F.pad(t, (start, width))[:, start : start + 40] for t, width in ((x, 8), (residual, 3))
    ]
    leaves = [t.detach().requires_grad_() for t in apart]
    dy = F.pad(case.dy, (0, 5))[:, :40]
    y = dropout_add_layer_norm(*leaves, weight, bias, x_bias=x_bias, dropout_p=0.3, rng=case.rng)
    actual = torch.autograd.grad(y, leaves, dy)
    expected = case.results(dropout_p=0.3)
    assert torch.equal(y, expected[0])
    assert torch.equal(actual[0], expected[1])
    assert torch.equal(actual[1], expected[2])


@pytest.mark.usefixtures("body")
def test_takes_columns_that_lie_apart_and_an_expanded_gradient(device):
    case = sum_inputs((6, 24), torch.float32, device)
    x, residual, weight, bias, _ = case.tensors
    transposed = x.t().contiguous().t().requires_grad_()
    y = dropout_add_layer_norm(transposed, residual, weight, bias)
    expected = dropout_add_layer_norm(x, residual, weight, bias)
    # not the same bits on a GPU: each stride has a kernel of its own, in which the compiler joins
    # other products and sums
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    (dx,) = torch.autograd.grad((y * 3).sum(), transposed)
    truth = gradients(lambda x: native(1e-12)(x + residual, weight, bias), x, dy=3 + 0 * x)[1]
    torch.testing.assert_close(dx, truth, rtol=1e-4, atol=1e-5)
    z = (transposed.detach()).requires_grad_()
    (dz,) = torch.autograd.grad((layer_norm(z, weight, bias) * 3).sum(), z)
    truth = gradients(lambda x: native(1e-12)(x, weight, bias), x, dy=3 + 0 * x)[1]
    torch.testing.assert_close(dz, truth, rtol=1e-4, atol=1e-5)


def refused(x, weight, bias, **options):
    return dropout_add_layer_norm(x, x, weight, bias, **options)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda x: layer_norm(x.double(), x[0], x[0]), "float64"),
        (lambda x: layer_norm(x, x[0].double(), x[0].double()), "float64"),
        (lambda x: layer_norm(x, x[0], x[0].half()), "several dtypes"),
        (lambda x: layer_norm(x, x[0, :1].expand(4), x[0]), "not contiguous"),
        (lambda x: layer_norm(x.new_ones(1, 20000), *x.new_ones(2, 20000)), "20000 columns"),
        (lambda x: refused(x.double(), x[0], x[0]), "float64"),
        (lambda x: refused(x, x[0], x[0], x_bias=x[0].half()), "several dtypes"),
        (lambda x: refused(x, x[0], x[0].to("meta")), "several devices"),
    ],
    ids=["double", "double weight", "mixed", "strided", "wide", "double sum", "x_bias", "devices"],
)
@pytest.mark.usefixtures("triton")
def test_a_forced_backend_never_falls_back(call, reason, device):
    with pytest.raises(backend.BackendUnavailable, match=f"layer_norm.*{reason}"):
        call(torch.ones(2, 4, device=device))


def short_key():
    return random.fresh(3, torch.device("cpu"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: layer_norm(x, x[0, :3], x[0]), r"expected weight of shape \(4,\), got \(3,\)"),
        (lambda x: refused(x, x[0], x[0, :3]), r"expected bias of shape \(4,\), got \(3,\)"),
        (lambda x: refused(x, x[0], x[0], x_bias=x), r"expected x_bias of shape \(4,\)"),
        (lambda x: dropout_add_layer_norm(x, x[0], x[0], x[0]), r"expected residual of shape"),
        (lambda x: refused(x, x[0], x[0], dropout_p=1.0), r"in \[0, 4095/4096\], got 1.0"),
        (lambda x: refused(x, x[0], x[0], dropout_p=0.9999), "got 0.9999"),
        (lambda x: refused(x, x[0], x[0], dropout_p=0.5, rng=short_key()), r"shape \(2,\).*\(3,\)"),
        (lambda x: refused(x, x[0], x[0], save="x"), 'expected a save of "z" or "y", got \'x\''),
    ],
    ids=["weight", "bias", "x_bias", "residual", "certain", "almost certain", "keys", "save"],
)
@pytest.mark.usefixtures("body")
def test_wrong_arguments_are_named(call, message, device):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 4, device=device))


@pytest.mark.usefixtures("body")
@pytest.mark.parametrize("call", [layer_norm, refused], ids=["alone", "of a sum"])
def test_a_number_without_a_row_is_refused(call, device):
    number = torch.ones((), device=device)
    with pytest.raises(ValueError, match=r"expected x of shape \(\.\.\., hidden\), got \(\)"):
        call(number, number, number)


def test_dropout_add_layer_norm_keeps_the_residuals_dtype():
    x, residual = torch.randn(5, 8).bfloat16(), torch.randn(5, 8)
    weight, bias = torch.randn(2, 8)
    y = dropout_add_layer_norm(x, residual, weight, bias)
    torch.testing.assert_close(y, native(1e-12)(residual + x, weight, bias))
    assert y.dtype == residual.dtype
    y = dropout_add_layer_norm(residual, x, weight, bias)
    assert y.dtype == x.dtype


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [128, 312, 384, 768, 1024, 4096])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_real_sizes_on_a_gpu(dropout_p, hidden):
    case = sum_inputs((8192 + 3, hidden), torch.bfloat16, "cuda")
    tensors = tuple(t if i < 2 else t.float() for i, t in enumerate(case.tensors))
    case = case._replace(tensors=tensors)
    with backend.use("triton"):
        actual = case.results(dropout_p=dropout_p)
    plain = case._replace(tensors=tuple(t.bfloat16() for t in tensors)).plain(dropout_p=dropout_p)
    expected = [t.to(a.dtype) for t, a in zip(plain, actual, strict=True)]
    truth = case.plain(torch.double, dropout_p=dropout_p)
    assert_as_accurate(actual, expected, truth, names=SUM_NAMES)


@pytest.mark.gpu
def test_more_elements_than_a_32_bit_offset_reaches():
    """The last rows of 2^31 + some elements are those of the same rows by themselves."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free GPU memory")
    hidden, num_rows, last = 1024, 2**21 + 8, 64
    x = torch.randn(last, hidden, device="cuda", dtype=torch.bfloat16).repeat(
        -(-num_rows // last), 1
    )[:num_rows]
    weight, bias = torch.randn(2, hidden, device="cuda")
    rng = random.fresh(num_rows, x.device)
    leaf = x.requires_grad_()
    with backend.use("triton"):
        y = dropout_add_layer_norm(leaf, leaf, weight, bias, dropout_p=0.1, rng=rng)
        (dx,) = torch.autograd.grad(y, leaf, y)
        part = x[-last:].detach().requires_grad_()
        tail = dropout_add_layer_norm(
            part, part, weight, bias, dropout_p=0.1, rng=rng.rows(torch.arange(-last, 0).cuda())
        )
        (dpart,) = torch.autograd.grad(tail, part, tail)
    assert torch.equal(y[-last:], tail)
    assert torch.equal(dx[-last:], dpart)
