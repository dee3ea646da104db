import pytest
import torch
import torch.nn.functional as F

from fastbert.ops import attention
from fastbert.ops.attention import attention_qkvpacked

LENGTHS = {"mixed": [5, 1, 0, 17, 3], "one": [9], "empty": [0, 0], "equal": [4, 4, 4]}


def naive(qkv, lengths, scale):
    """Each sequence by itself, softmax written out."""
    outputs = []
    for one in qkv.split(lengths):
        q, k, v = one.permute(1, 2, 0, 3)
        outputs.append(((q @ k.mT * scale).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture(params=["by sequence", "padded"])
def strategy(request, monkeypatch):
    """Both strategies run on a CPU here; which one runs is chosen by the device."""
    if request.param == "padded":
        monkeypatch.setattr(attention, "_attend_by_sequence", attention._attend_padded)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("dropout_p", [0.0, 1e-12])  # the second drops nothing, but runs its path
@pytest.mark.usefixtures("strategy")
def test_each_sequence_attends_to_itself_alone(lengths, scale, dropout_p):
    tokens, heads, head_dim = sum(lengths), 3, 6
    qkv = torch.randn(tokens, 3, heads, head_dim, dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    upstream = torch.randn(tokens, heads, head_dim, dtype=torch.float64)

    output = attention_qkvpacked(qkv, cu_seqlens, 20, softmax_scale=scale, dropout_p=dropout_p)
    expected = naive(qkv, lengths, scale or head_dim**-0.5)
    torch.testing.assert_close(output, expected)
    (gradient,) = torch.autograd.grad(output, qkv, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, qkv, upstream)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.usefixtures("strategy")
def test_dropout_drops_probabilities_and_keeps_their_mean():
    qkv = torch.zeros(400, 3, 2, 8)
    qkv[:, 2] = 1.0  # every output is the sum of the kept probabilities
    cu_seqlens = torch.tensor([0, 100, 400], dtype=torch.int32)
    output = attention_qkvpacked(qkv, cu_seqlens, 300, dropout_p=0.25)
    assert abs(output.mean() - 1) < 0.02
    kept = (output[:100, 0, 0] * 0.75 * 100).round()
    assert 60 < kept.min() < kept.max() < 90
    undropped = attention_qkvpacked(qkv, cu_seqlens, 300)
    torch.testing.assert_close(undropped, torch.ones(400, 2, 8))


def test_fullgraph_compile_gives_the_eager_result():
    def attend(qkv, cu_seqlens):
        return attention_qkvpacked(qkv, cu_seqlens, 17)

    cu_seqlens = torch.tensor([0, 5, 6, 23], dtype=torch.int32)
    qkv = torch.randn(23, 3, 2, 8)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(qkv, cu_seqlens), attend(qkv, cu_seqlens))


def test_a_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"attention_qkvpacked: expected qkv of shape"):
        attention_qkvpacked(torch.ones(4, 2, 3, 8), torch.tensor([0, 4]).int(), 4)


def test_scale_is_the_usual_one():
    q, k, v = torch.randn(3, 1, 2, 7, 8)
    qkv = torch.stack([q[0], k[0], v[0]]).permute(2, 0, 1, 3)  # (7, 3, 2, 8)
    output = attention_qkvpacked(qkv, torch.tensor([0, 7]).int(), 7)
    expected = F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)
    torch.testing.assert_close(output, expected)
