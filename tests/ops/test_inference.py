"""Without gradients the kernels run alone and write nothing for a backward: the same result."""

import pytest
import torch

from fastbert import backend
from fastbert import rng as random
from fastbert.ops.attention import attention, attention_qkvpacked
from fastbert.ops.bias_gelu import bias_gelu
from fastbert.ops.dropout import dropout
from fastbert.ops.embedding import embedding_layer_norm
from fastbert.ops.layer_norm import dropout_add_layer_norm, layer_norm
from fastbert.ops.linear_cross_entropy import linear_cross_entropy

ROWS, HEADS, WIDTH = 23, 2, 32


def calls(device, dtype):
    """{name: (function, tensors that may have gradients)}"""
    cu = torch.tensor([0, 5, 6, ROWS - 2], dtype=torch.int32, device=device)
    state = random.DropoutState(
        random.new_state(torch.device(device)), random.token_keys(cu, ROWS), 3
    )

    def normal(*shape):
        return torch.randn(shape, device=device).to(dtype)

    x, residual, weight, bias = normal(ROWS, WIDTH), normal(ROWS, WIDTH), *normal(2, WIDTH)
    mask = torch.rand(3, 1, 17, 17, device=device) < 0.7
    drops = {"dropout_p": 0.3, "rng": state}
    q, k, v = normal(3, ROWS, HEADS, 16)
    ids = torch.arange(ROWS, device=device)
    tables = (normal(ROWS, WIDTH), normal(ROWS, WIDTH), normal(2, WIDTH), weight, bias)
    targets = ids % 11
    return {
        "attention": (lambda *t: attention(*t, cu, cu, 17, 17), (q, k, v)),
        "attention, mask and dropout": (
            lambda *t: attention(*t, cu, cu, 17, 17, mask=mask, **drops),
            (q, k, v),
        ),
        "attention_qkvpacked": (
            lambda qkv: attention_qkvpacked(qkv, cu, 17, **drops),
            (normal(ROWS, 3, HEADS, 16),),
        ),
        "attention_qkvpacked, bias": (
            lambda qkv, bias: attention_qkvpacked(qkv, cu, 17, qkv_bias=bias),
            (normal(ROWS, 3, HEADS, 16), normal(3 * HEADS * 16)),
        ),
        "bias_gelu": (bias_gelu, (x, bias)),
        "dropout": (lambda x: dropout(x, **drops), (x,)),
        "layer_norm": (layer_norm, (x, weight, bias)),
        "dropout_add_layer_norm": (
            lambda *t: dropout_add_layer_norm(*t, **drops),
            (x, residual, weight, bias),
        ),
        "dropout_add_layer_norm from y": (
            lambda *t: dropout_add_layer_norm(*t, x_bias=bias, save="y"),
            (x, residual, weight, bias),
        ),
        "embedding_layer_norm": (
            lambda *t: embedding_layer_norm(ids, ids, ids % 2, *t, **drops),
            tables,
        ),
        "linear_cross_entropy": (
            lambda *t: torch.stack(
                linear_cross_entropy(*t, targets, label_smoothing=0.1, return_correct=True)
            ),
            (x, normal(11, WIDTH), normal(11)),
        ),
    }


@pytest.mark.parametrize("name", calls("cpu", torch.float32))
@pytest.mark.usefixtures("triton")
def test_the_result_is_that_of_training(name, dtype, device):
    function, tensors = calls(device, dtype)[name]
    expected = function(*(t.clone().requires_grad_() for t in tensors))
    assert expected.grad_fn is not None
    assert expected.isfinite().all()
    leaves = [t.clone().requires_grad_() for t in tensors]
    with torch.no_grad():
        without = function(*leaves)
    with torch.inference_mode():
        inference = function(*leaves)
    for actual in (function(*tensors), without, inference):
        assert torch.equal(actual, expected)
        assert not actual.requires_grad


@pytest.mark.parametrize("dy", ["constant-gradient", "gradient-of-the-result"])
@pytest.mark.parametrize("name", sorted(calls("cpu", torch.float32).keys() - {"dropout"}))
@pytest.mark.usefixtures("triton")
def test_a_second_derivative_is_refused_of_whatever_gradient(name, dy, device):
    """Also where the first gradient is a constant, which no graph leads to."""
    function, tensors = calls(device, torch.float32)[name]
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    of = y if dy == "constant-gradient" else y.square()
    slopes = torch.autograd.grad(of.sum(), leaves, create_graph=True)
    assert all(slope.requires_grad for slope in slopes)
    total = sum(slope.square().sum() for slope in slopes)
    refused = r'cannot be differentiated again; .*with fastbert\.backend\.use\("reference"\)'
    with pytest.raises(RuntimeError, match=refused):
        torch.autograd.grad(total, leaves, retain_graph=True)
    for leaf in leaves:
        with pytest.raises(RuntimeError, match=refused):
            torch.autograd.grad(total, leaf, retain_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match=refused):
        total.backward()


@pytest.mark.usefixtures("triton")
def test_a_second_derivative_is_refused_where_nothing_is_saved_as_it_was_given(device):
    """A padded copy of the weight is."""
    hidden, weight = torch.randn(4, 8, device=device), torch.randn(11, 8, device=device)
    loss = linear_cross_entropy(hidden, weight.requires_grad_(), None, torch.arange(4).to(device))
    (slope,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        slope.sum().backward()


@pytest.mark.usefixtures("triton")
def test_a_trace_computes_with_other_numbers(device):
    x, other = torch.randn(2, 3, 8, device=device)
    one = torch.ones(8, device=device)
    traced = torch.jit.trace(lambda x: layer_norm(x, one, one), x, check_trace=False)
    assert torch.equal(traced(other), layer_norm(other, one, one))


@pytest.mark.parametrize("shape", [(2, 3, 8), (6, 8), (8,)], ids=str)
@pytest.mark.usefixtures("triton")
def test_results_of_any_shape_may_be_changed_in_place(shape, device):
    x = torch.randn(shape, device=device).requires_grad_()
    weight, bias = torch.randn(2, 8, device=device)
    ids = torch.zeros(shape[:-1], dtype=torch.int64, device=device)
    table = torch.randn(4, 8, device=device).requires_grad_()
    results = [
        bias_gelu(x, bias),
        layer_norm(x, weight, bias),
        dropout_add_layer_norm(x, x, weight, bias),
        dropout(x, 0.5),
        embedding_layer_norm(ids, ids, None, table, table, None, weight, bias),
    ]
    sum(y.add_(1).sum() for y in results).backward()
    assert x.grad.isfinite().all()
    assert table.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 3, 0)], ids=str)
def test_rows_without_columns(shape, device, body):
    x, nothing = torch.randn(shape, device=device).requires_grad_(), torch.randn(0, device=device)
    operators = [bias_gelu, dropout] if body == "triton" else [bias_gelu, dropout, layer_norm]
    for operator in operators:
        arguments = {dropout: (0.5,), layer_norm: (nothing, nothing)}.get(operator, (nothing,))
        if body == "triton" and operator is bias_gelu:
            with pytest.raises(backend.BackendUnavailable, match="0 columns"):
                operator(x, *arguments)
            continue
        y = operator(x, *arguments)
        y.sum().backward()
        assert y.shape == x.grad.shape == shape


def test_integers_are_refused():
    """Whose results would be integers too, rounded."""
    x, vector = torch.ones(4, 8, dtype=torch.int64), torch.ones(8)
    cu, qkv = torch.tensor([0, 4], dtype=torch.int32), torch.ones(4, 3, 2, 8, dtype=torch.int64)
    ids = torch.arange(4)
    for name, function in {
        "x": lambda: layer_norm(x, vector, vector),
        "residual": lambda: dropout_add_layer_norm(x.float(), x, vector, vector),
        "x of": lambda: bias_gelu(x, vector),
        "x of a": lambda: dropout(x, 0.5),
        "word": lambda: embedding_layer_norm(ids, ids, None, x, x, None, vector, vector),
        "hidden": lambda: linear_cross_entropy(x, vector[None], None, ids),
        "q": lambda: attention(*qkv.unbind(1), cu, cu, 4, 4),
        "qkv": lambda: attention_qkvpacked(qkv, cu, 4),
    }.items():
        with pytest.raises(ValueError, match=rf": expected {name}.* floating-point dtype, got"):
            function()


def test_an_export_of_any_number_of_rows(device, body):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.randn(WIDTH, device=device))

        def forward(self, x):
            return bias_gelu(x, self.bias)

    x = torch.randn(3, 5, WIDTH, device=device)
    sizes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)
    program = torch.export.export(Model(), (x,), dynamic_shapes=sizes, strict=False)
    assert program.module()(x[:2, :4]).shape == (2, 4, WIDTH)
