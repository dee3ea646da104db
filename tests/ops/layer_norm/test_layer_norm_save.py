"""`save="y"`: a backward that rebuilds normalized values from the result, and needs no sum."""

import functools

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from fastbert import BertConfig, BertEncoder, backend
from fastbert.ops.layer_norm import dropout_add_layer_norm
from tests.ops.layer_norm.case import SUM_NAMES, sum_inputs
from tests.oracle import assert_as_accurate, gradients


def case_from_y(shape, dtype, device):
    """With weights of either sign whose size is from 0.1 to 1.1, as `save="y"` asks for."""
    case = sum_inputs(shape, dtype, device)
    x, residual, weight, bias, x_bias = case.tensors
    weight = weight.sign() * (0.1 + torch.rand_like(weight))
    return case._replace(tensors=(x, residual, weight, bias, x_bias))


@pytest.mark.pairs(within="body")
@pytest.mark.parametrize(
    "shape", [(3, 7), (2, 5, 768), (67, 312), (3, 770), (6, 2060), (0, 16)], ids=str
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.usefixtures("body")
def test_gradients_are_as_accurate_as_the_rounding_of_y_lets_them(dropout_p, dtype, shape, device):
    """All but dweight, the sum of dy * z_hat, keep to the limits of those from z.

    A z_hat from y has the rounding of y, divided by the weight. So dweight keeps to the limits in
    the distance from a float64 sum over the same rounded y; and from the true one it is at most
    that rounding away, as if it were of one sign in all rows, twice in float32, whose y also has
    the errors of its computation.
    """
    case = case_from_y(shape, dtype, device)
    options = {"eps": 0.5, "dropout_p": dropout_p}
    actual, plain = case.results(save="y", **options), case.plain(**options)
    truth = case.plain(torch.double, **options)

    dweight, plain_dweight, true_dweight = (values.pop(3) for values in (actual, plain, truth))
    names = [name for name in SUM_NAMES if name != "dweight"]
    assert_as_accurate(actual, plain, truth, names=names)
    if not dweight.numel() or not case.dy.numel():
        return
    y, dy = actual[0].double(), case.dy.double()
    weight, bias = (t.double() for t in case.tensors[2:4])
    from_y = (dy * (y - bias) / weight).sum_to_size(weight.shape)
    eps = torch.finfo(dtype).eps
    limit = 2 * (plain_dweight - true_dweight).abs().max() + eps * true_dweight.abs().max()
    assert (dweight - from_y).abs().max() <= limit
    roundings = (dy.abs() * y.abs()).sum_to_size(weight.shape) * eps
    assert ((dweight - true_dweight).abs() <= roundings / weight.abs() + limit).all()


@pytest.mark.pairs(within="body")
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_result_is_the_same(dropout_p, body, dtype, device):
    case = sum_inputs((9, 40), dtype, device)
    from_z, from_y = (case.results(dropout_p=dropout_p, save=save)[0] for save in "zy")
    if body == "triton" and device == "cuda":
        # two kernels, in which the compiler joins other products and sums; the sum is rounded to
        # the dtype before it is normalized, and the result once more
        limit = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(from_y, from_z, rtol=limit, atol=limit)
    else:
        assert torch.equal(from_z, from_y)


@pytest.mark.usefixtures("body")
def test_what_is_kept_of_the_rows_is_the_result_alone(device):
    x, residual, weight, bias, x_bias = (
        t.requires_grad_() for t in sum_inputs((16, 24), torch.float32, device).tensors
    )
    for save in "zy":
        saved = []
        with saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            y = dropout_add_layer_norm(
                x, residual, weight, bias, x_bias=x_bias, dropout_p=0.5, save=save
            )
        kept = {t.data_ptr() for t in saved if t.is_floating_point() and t.shape == y.shape}
        assert (kept == {y.data_ptr()}) == (save == "y")


@pytest.mark.usefixtures("body")
def test_dtypes_may_differ(device):
    case = case_from_y((21, 40), torch.float32, device)
    dtypes = (torch.float32, torch.float16, *[torch.float32] * 3)
    tensors = tuple(t.to(d) for t, d in zip(case.tensors, dtypes, strict=True))
    case = case._replace(tensors=tensors, dy=case.dy.half())
    from_z, from_y = (case.results(dropout_p=0.3, save=save) for save in "zy")
    assert [t.dtype for t in from_y] == [torch.float16, *dtypes]
    for name, a, e in zip(SUM_NAMES, from_y, from_z, strict=True):
        limit = torch.full_like(e, 0.02)
        if name == "dweight":  # the rounding of y, divided by the weight, in a sum over the rows
            y, weight = from_z[0].float(), tensors[2]
            limit += (case.dy * y).abs().sum(0) * torch.finfo(torch.float16).eps / weight.abs()
        assert ((a - e).abs() <= limit + 1e-3 * e.abs()).all(), name


@pytest.mark.usefixtures("body")
def test_a_weight_of_zero_shows(device):
    case = case_from_y((5, 24), torch.float32, device)
    case.tensors[2][3] = 0
    _, dx, dresidual, dweight, *_ = case.results(save="y")
    assert dx.isnan().all()
    assert dresidual.isnan().all()
    assert dweight[3].isnan()


@pytest.mark.usefixtures("body")
def test_a_result_that_was_changed_since_is_an_error(device):
    x, residual, weight, bias, _ = sum_inputs((4, 16), torch.float32, device).tensors
    y = dropout_add_layer_norm(x.requires_grad_(), residual, weight, bias, save="y")
    loss = y.sum()
    y.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_function_transforms_go_through_the_reference():
    case = sum_inputs((3, 8), torch.float64, "cpu")
    x, residual, weight, bias, _ = case.tensors

    def summed(x, save):
        y = dropout_add_layer_norm(x, residual, weight, bias, save=save)
        return (y * case.dy).sum()

    with backend.use("reference"):
        from_y, from_z = (torch.func.grad(summed)(x, save) for save in "yz")
        torch.testing.assert_close(from_y, from_z)


def test_a_second_derivative_is_refused(body, device):
    remedy = "run its forward inside" if body == "triton" else 'use save="z"'
    x, _, weight, bias, _ = sum_inputs((3, 8), torch.float32, device).tensors
    y = dropout_add_layer_norm(x.requires_grad_(), x, weight, bias, save="y")
    dy = torch.ones_like(y, requires_grad=True)
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    with pytest.raises(RuntimeError, match=remedy):
        dx.sum().backward()


@pytest.mark.usefixtures("body")
def test_torch_compile_gives_the_eager_result(device):
    case = case_from_y((6, 40), torch.float32, device)
    torch._dynamo.reset()

    @functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    def compiled(x, residual, weight, bias, x_bias):
        return dropout_add_layer_norm(
            x, residual, weight, bias, x_bias=x_bias, dropout_p=0.3, rng=case.rng, save="y"
        )

    traced = gradients(compiled, *case.tensors, dy=case.dy)
    for a, e in zip(traced, case.results(dropout_p=0.3, save="y"), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.usefixtures("body")
def test_an_encoder_may_keep_y(device):
    config = BertConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64
    )
    encoder = BertEncoder(config).eval().to(device)
    x = torch.randn(10, 32, device=device)
    cu_seqlens = torch.tensor([0, 4, 10], dtype=torch.int32, device=device)
    results = []
    for save in "zy":
        for layer in encoder.layer:
            layer.attention.output.save = layer.output.save = save
        encoder.zero_grad()
        saved = set()
        with saved_tensors_hooks(lambda t, saved=saved: saved.add(t.data_ptr()) or t, lambda t: t):
            y = encoder(x, cu_seqlens=cu_seqlens, max_seqlen=6).last_hidden_state
        y.square().sum().backward()
        results.append((len(saved), y.detach(), *(p.grad for p in encoder.parameters())))
    (more, *from_z), (fewer, *from_y) = results
    assert fewer < more
    for a, e in zip(from_y, from_z, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4)
