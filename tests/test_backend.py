"""Which way a call takes: through torch.library or not, through autograd or not, or plain."""

import importlib
import inspect
import pkgutil

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

import fastbert
import fastbert.ops
from fastbert import backend, events
from fastbert.ops.bias_gelu import bias_gelu
from fastbert.ops.layer_norm import layer_norm

SHAPE = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 8,
}
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
MASK = (IDS != 0).long()


@pytest.mark.parametrize("name", [m.name for m in pkgutil.iter_modules(fastbert.ops.__path__)])
def test_an_operators_module_is_not_hidden_by_the_operator(name):
    module = importlib.import_module(f"fastbert.ops.{name}")
    assert getattr(fastbert.ops, name) is module


def test_a_signature_is_that_of_the_check_and_the_result_of_the_body():
    signature = inspect.signature(bias_gelu)
    assert list(signature.parameters) == ["x", "bias", "approximate"]
    assert signature.return_annotation is torch.Tensor


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    with backend.use("triton"):
        yield torch.randn(3, 8), torch.randn(8)


def test_an_eager_launch_does_not_cross_torch_library(inputs):
    """As torch's profiler, which lists what the dispatcher runs, shows."""
    x, bias = inputs
    for tensors in ((x, bias), (x, torch.nn.Parameter(bias))):
        with torch.profiler.profile() as profile:
            bias_gelu(*tensors).sum()
        names = {event.name for event in profile.events()}
        assert not any("fastbert_triton" in name for name in names)
        assert "aten::sum" in names


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_whoever_traces_sees_the_operator(inputs):
    x, bias = inputs
    expected = bias_gelu(x, bias)
    with Seen() as seen:
        assert torch.equal(bias_gelu(x, bias), expected)
    assert "fastbert_triton.bias_gelu_fwd.default" in seen.names
    traced = make_fx(lambda *tensors: bias_gelu(*tensors))(x, bias)
    assert "fastbert_triton.bias_gelu_fwd" in traced.code
    assert torch.equal(traced(x, bias), expected)
    compiled = torch.compile(bias_gelu, fullgraph=True, backend=_expecting("bias_gelu_fwd"))
    assert torch.equal(compiled(x, bias), expected)
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(t) for t in inputs]
    assert bias_gelu(*fakes).shape == expected.shape  # also outside of the mode
    with mode:
        assert bias_gelu(*fakes).shape == expected.shape


def _expecting(name):
    def compiler(graph, _):
        assert name in graph.code
        return graph.forward

    return compiler


class Tokens(torch.Tensor):
    """A subclass, as distributed tensors are."""


def test_a_tensor_subclass_goes_to_the_dispatcher(inputs):
    from fastbert.kernels.runtime import is_traced

    x, bias = inputs
    assert not is_traced((x, torch.nn.Parameter(bias), None, 1, True, 0.5, "z", torch.half))
    assert is_traced((x.as_subclass(Tokens), bias))


def test_no_function_of_autograd_where_no_gradient_is_wanted(inputs, monkeypatch):
    x, bias = inputs
    weight = torch.randn(8, requires_grad=True)
    expected = layer_norm(x, weight, bias)
    assert expected.grad_fn is not None
    unit = importlib.import_module("fastbert.kernels.layer_norm")
    kept, launch = [], unit.layer_norm_fwd

    def counting(*arguments):
        outputs = launch(*arguments)
        kept.append(len(outputs))
        return outputs

    monkeypatch.setattr(unit, "layer_norm_fwd", counting)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(layer_norm(x, weight, bias), expected)
    assert layer_norm(x, weight.detach(), bias).grad_fn is None
    assert kept == [1, 1, 1]


def models():
    torch.manual_seed(0)
    own = fastbert.BertForSequenceClassification(fastbert.BertConfig(**SHAPE))
    config = transformers.BertConfig(**SHAPE)
    patched = fastbert.patch(transformers.BertForSequenceClassification(config))
    return {"own": own.eval(), "patched": patched.eval()}


@pytest.fixture(params=["own", "patched"])
def model(request):
    return models()[request.param]


def loss_of(model, parameters):
    batch = {"input_ids": IDS, "attention_mask": MASK}
    logits = functional_call(model, parameters, args=(), kwargs=batch).logits
    return logits.square().sum()


@pytest.mark.parametrize("choice", ["triton", None])
def test_function_transforms_differentiate_the_plain_bodies(model, choice):
    parameters = dict(model.named_parameters())
    expected = torch.autograd.grad(loss_of(model, parameters), [*parameters.values()])
    with backend.use(choice), events.listen() as heard:
        actual = torch.func.grad(lambda p: loss_of(model, p))(parameters)
        rows = torch.func.jacrev(lambda p: loss_of(model, p).expand(2))(parameters)
    for e, name in zip(expected, parameters, strict=True):
        torch.testing.assert_close(actual[name], e, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rows[name], torch.stack([e, e]), rtol=1e-4, atol=1e-5)
    runs = [event for event in heard if isinstance(event, events.OperatorRun)]
    assert {run.backend for run in runs} == {"reference"}
    norms = {run.reason for run in runs if run.operator == "dropout_add_layer_norm"}
    assert norms == {
        "triton does not support function transforms (torch.func)"
        if choice == "triton"
        else "its only implementation for this device"
    }


def test_forward_mode_differentiates_the_plain_bodies(inputs):
    x, bias = inputs
    _, actual = torch.func.jvp(lambda x: bias_gelu(x, bias), (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(bias_gelu(dual, bias)).tangent
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(bias_gelu(leaf, bias).sum(), leaf)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-5)


def penalty(model):
    """The squared norm of a loss's gradient, and the gradient of that."""
    parameters = dict(model.named_parameters())
    leaves = list(parameters.values())
    gradients = torch.autograd.grad(loss_of(model, parameters), leaves, create_graph=True)
    total = sum(gradient.square().sum() for gradient in gradients)
    return torch.autograd.grad(total, leaves)


def test_a_gradient_penalty_under_the_reference(model):
    parameters = dict(model.named_parameters())
    with backend.use("reference"):
        actual = penalty(model)

    def total(parameters):
        gradients = torch.func.grad(lambda p: loss_of(model, p))(parameters)
        return sum(gradient.square().sum() for gradient in gradients.values())

    expected = torch.func.grad(total)(parameters)
    for a, e in zip(actual, expected.values(), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4)
    assert sum(a.abs().sum() for a in actual) > 0


def test_a_gradient_penalty_over_kernels_names_the_remedy(model):
    with (
        backend.use("triton"),
        pytest.raises(RuntimeError, match=r'inside `with fastbert\.backend\.use\("reference"\):`'),
    ):
        penalty(model)
