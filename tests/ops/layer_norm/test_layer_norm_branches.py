"""The two branches of a LayerNorm's result, whose gradients its backward adds as it reads them."""

import pytest
import torch

from fastbert import BertConfig, BertEncoder, backend
from fastbert.modules import layer
from fastbert.modules.whole_layer import WholeLayer
from fastbert.ops.layer_norm import Norm, dropout_add_layer_norm
from tests.ops.layer_norm.case import SUM_NAMES, sum_inputs
from tests.oracle import assert_as_accurate, gradients


def branched(case, *, dropout_p=0.0, save="z", eps=0.5):
    """The two branches of the case's result, as a function of its tensors."""

    def function(x, residual, weight, bias, x_bias):
        rng = case.rng if dropout_p else None
        return dropout_add_layer_norm.run(
            Norm(x, residual, weight, bias, eps, x_bias, dropout_p, rng, save, branches=True)
        )

    return function


@pytest.mark.pairs(within="body")
@pytest.mark.parametrize("shape", [(3, 7), (67, 312), (3, 770), (6, 2060), (0, 16)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("save", ["z", "y"])
@pytest.mark.parametrize("second", ["contiguous", "strided"])
@pytest.mark.usefixtures("body")
def test_the_gradients_of_both_branches_are_added(dropout_p, dtype, shape, save, second, device):
    case = sum_inputs(shape, dtype, device)
    if save == "y":  # divides by the weights
        weights = case.tensors[2]
        weights.copy_(weights.sign() * (0.5 + weights.abs()))
    other = torch.randn(shape[0], 2 * shape[1], device=device, dtype=torch.double)
    other = other.to(dtype)[:, : shape[1]] if second == "strided" else other[:, ::2].to(dtype)
    leaves = [t.clone().requires_grad_() for t in case.tensors]
    outputs = branched(case, dropout_p=dropout_p, save=save)(*leaves)
    actual = torch.autograd.grad(outputs, leaves, [case.dy, other])
    options = {"dropout_p": dropout_p, "eps": 0.5}
    # the sum of both is not rounded, where autograd rounds it to the dtype
    plain = case._replace(dy=case.dy + other).plain(**options)
    truth = case._replace(dy=case.dy.double() + other.double()).plain(torch.double, **options)
    loose = {"worst": 2.5, "rms": 2.5} if save == "y" else {}
    assert_as_accurate([outputs[0].detach(), *actual], plain, truth, names=SUM_NAMES, **loose)


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.usefixtures("body")
def test_a_branch_may_be_unused(used, device):
    case = sum_inputs((5, 24), torch.float32, device)
    one = gradients(lambda *tensors: branched(case)(*tensors)[used], *case.tensors, dy=case.dy)
    for a, e in zip(one, case.results(eps=0.5), strict=True):
        assert torch.equal(a, e)


@pytest.mark.pairs(within="body")
@pytest.mark.parametrize("shape", [(3, 7), (67, 312), (6, 2060), (0, 16)], ids=str)
@pytest.mark.parametrize("save", ["z", "y"])
@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)], ids=str)
@pytest.mark.usefixtures("body")
def test_the_first_branch_is_in_the_dtype_of_the_product(shape, save, used, device):
    """The residual stream in float32 under autocast: the result twice, for one more rounding."""
    case = sum_inputs(shape, torch.float32, device)
    if save == "y":  # divides by the weights
        weights = case.tensors[2]
        weights.copy_(weights.sign() * (0.5 + weights.abs()))
    leaves = [t.clone() for t in case.tensors]
    leaves[0] = leaves[0].half()
    for leaf in leaves:
        leaf.requires_grad_()
    low, y = branched(case, save=save)(*leaves)
    assert (low.dtype, y.dtype) == (torch.float16, torch.float32)
    assert torch.equal(low, y.half())
    with torch.no_grad():
        again = branched(case, save=save)(*leaves)
    for a, e in zip(again, (low, y), strict=True):  # another kernel, which may round otherwise
        torch.testing.assert_close(a, e)
    given = [case.dy.half(), case.dy.flip(0)]
    actual = torch.autograd.grad([(low, y)[n] for n in used], leaves, [given[n] for n in used])
    whole = sum(given[n].float() for n in used)
    alone = dropout_add_layer_norm(*leaves[:4], 0.5, x_bias=leaves[4], save=save)
    for a, e in zip(actual, torch.autograd.grad(alone, leaves, whole), strict=True):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("body")
def test_branches_are_one_memory(device):
    case = sum_inputs((5, 24), torch.float32, device)
    leaves = [t.clone().requires_grad_() for t in case.tensors]
    for tensors in (leaves, case.tensors):
        y, other = branched(case)(*tensors)
        assert y.data_ptr() == other.data_ptr()
    with torch.inference_mode():
        y, other = branched(case)(*case.tensors)
    assert y.data_ptr() == other.data_ptr()


def test_a_second_derivative_by_either_branch_is_refused(device):
    case = sum_inputs((3, 8), torch.float32, device)
    x = case.tensors[0].requires_grad_()
    first = case.dy.clone()
    second = torch.ones_like(first, requires_grad=True)
    outputs = branched(case, save="y")(*case.tensors)
    (dx,) = torch.autograd.grad(outputs, x, [first, second], create_graph=True)
    with pytest.raises(RuntimeError, match="gradients cannot be differentiated again"):
        dx.sum().backward()


@pytest.mark.parametrize("whole", [True, False], ids=["whole-layers", "operators"])
@pytest.mark.usefixtures("body")
def test_a_layer_leaves_autograd_no_gradients_to_add(whole, monkeypatch, device, body):
    """Each sum of two gradients at a residual connection would be one more pass over the rows."""
    if not whole:
        monkeypatch.setattr(WholeLayer, "run", lambda *_: None)
    config = BertConfig(
        hidden_size=32, num_attention_heads=2, intermediate_size=64, num_hidden_layers=2
    )
    encoder = BertEncoder(config).to(device).train()
    x, dy = torch.randn(2, 6, 32, device=device).unbind()
    lengths = {"cu_seqlens": torch.tensor([0, 2, 6], dtype=torch.int32, device=device)}

    def run(rng=None):
        encoder.zero_grad()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(0)
        y = encoder(leaf, **lengths, max_seqlen=4).last_hidden_state
        nodes = branches_of(y)
        y.backward(dy)
        return nodes, [leaf.grad, *(p.grad for p in encoder.parameters())]

    both, found = run()
    with monkeypatch.context() as patch:
        stream = layer.Stream
        patch.setattr(layer, "Stream", lambda x, residual: stream(x, x))
        summed, expected = run()
    assert summed == set()
    # of two layers, or four LayerNorms, the last has one reader
    assert len(both) == ((1 if whole else 3) if body == "triton" else 0)
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wanted", [True, [0]])
@pytest.mark.usefixtures("body")
def test_a_returned_state_has_its_whole_gradient(wanted, device):
    """Callers differentiate by a hidden state, which must not be one branch of the stream alone."""
    config = BertConfig(
        hidden_size=32, num_attention_heads=2, intermediate_size=64, num_hidden_layers=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    encoder = BertEncoder(config).to(device).train()
    x, dy = torch.randn(2, 6, 32, device=device).unbind()
    x.requires_grad_()
    lengths = {"cu_seqlens": torch.tensor([0, 2, 6], dtype=torch.int32, device=device)}

    def gradient():
        output = encoder(x, **lengths, max_seqlen=4, output_hidden_states=wanted)
        state = output.hidden_states[1 if wanted is True else 0]
        return torch.autograd.grad(output.last_hidden_state, state, dy)[0]

    found = gradient()
    with backend.use("reference"):
        expected = gradient()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def branches_of(y):
    """The autograd nodes under y that have readers of a second output."""
    found, seen, todo = set(), set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for below, output in node.next_functions:
            if output == 1 and "Layer" in below.name():
                found.add(below)
            todo.append(below)
    return found
