"""Which layers and calls run operator by operator, and which are refused."""

import pytest
import torch
from torch import nn

from fastbert import backend, events
from fastbert.modules.bert_layer import parts_of
from fastbert.modules.layer import Stream, run_layer
from fastbert.modules.sequences import Rows, Sequences
from tests.modules.whole_layer.case import (
    TOKENS,
    assert_same,
    both,
    make,
    results,
    sequences_of,
    stream_of,
)


def test_explain_sees_every_operator(device, runs):
    layer, sequences, x = make(device), sequences_of(device), stream_of(device)
    with events.listen() as heard:
        run_layer(parts_of(layer), Stream(x, x), sequences)
    names = [event.operator for event in heard if isinstance(event, events.OperatorRun)]
    norm = "dropout_add_layer_norm"
    assert names == ["attention_qkvpacked", norm, "bias_gelu", norm]
    assert runs == [False]


def test_what_the_kernels_would_read_beyond_is_refused(device):
    layer, sequences, x = make(device), sequences_of(device), stream_of(device)
    whole = parts_of(layer).whole
    strided = x.detach().T.contiguous().T
    dtype = torch.float32

    def fits(x, residual):
        return whole._fits(x, residual, sequences, whole.parameters(), dtype)

    assert fits(x, x)
    assert not fits(strided, x)
    assert not fits(x, strided)
    assert not fits(x, x[:5])
    for linear in (layer.intermediate.dense, layer.output.dense, layer.attention.output.dense):
        bias, linear.bias = linear.bias, nn.Parameter(linear.bias[:5].detach().clone())
        assert not fits(x, x)
        linear.bias = bias
    assert fits(x, x)


def drop_bias(layer, x, sequences):
    layer.attention.self.key.bias = None


def add_hook(layer, x, sequences):
    layer.intermediate.dense.register_forward_hook(lambda *_: None)


def swap_activation(layer, x, sequences):
    layer.intermediate.intermediate_act_fn = torch.tanh


def mix_dtypes(layer, x, sequences):
    layer.output.LayerNorm.double()


def transpose(layer, x, sequences):
    weight = layer.output.dense.weight
    layer.output.dense.weight = nn.Parameter(weight.detach().T.contiguous().T)


def subclass(layer, x, sequences):
    class Own(nn.Parameter):
        pass

    layer.output.dense.weight = Own(layer.output.dense.weight.detach())


def wide(layer, x, sequences):
    layer.attention.self.attention_head_size = 136
    for linear in (
        layer.attention.self.query,
        layer.attention.self.key,
        layer.attention.self.value,
    ):
        linear.weight = nn.Parameter(torch.randn(136, 32) / 6)
        linear.bias = nn.Parameter(torch.randn(136))
        linear.out_features = 136
    layer.attention.output.dense.weight = nn.Parameter(torch.randn(32, 136) / 12)


def few_rows(layer, x, sequences):
    rows = Rows.where(torch.arange(TOKENS) % 3 == 0, sequences.cu_seqlens, 3, 5)
    return x, sequences.only(rows)


def general_mask(layer, x, sequences):
    mask = torch.rand(3, 1, 7, 7) < 0.7
    return x, Sequences(
        sequences.cu_seqlens, 7, mask | torch.eye(7, dtype=torch.bool), sequences.rng
    )


def not_contiguous(layer, x, sequences):
    return x.detach().T.contiguous().T.requires_grad_(), sequences


CHANGES = [
    drop_bias, add_hook, swap_activation, transpose, subclass, few_rows, general_mask,
    not_contiguous,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_other_layers_and_calls_run_operator_by_operator(change, runs):
    layer, x, sequences = make("cpu"), stream_of("cpu"), sequences_of("cpu")
    x, sequences = change(layer, x, sequences) or (x, sequences)
    actual, expected = both(layer, x, sequences)
    assert_same(actual, expected)
    assert not any(runs)


@pytest.mark.parametrize("change", [wide, mix_dtypes], ids=lambda change: change.__name__)
def test_what_no_kernel_takes_runs_as_the_operators_say(change, runs):
    layer, x, sequences = make("cpu"), stream_of("cpu"), sequences_of("cpu")
    change(layer, x, sequences)
    with backend.use(None):  # on a CPU by plain PyTorch, as refused calls do on a GPU
        expected = results(layer, x, sequences)
    assert not any(runs)
    with pytest.raises(backend.BackendUnavailable):
        results(layer, x, sequences)
    assert not any(runs)
    assert expected[0].isfinite().all()


@pytest.mark.parametrize("part", ["attention.output", "output"])
def test_a_norm_of_another_size_is_an_error(part, device, runs):
    for name, module in (("LayerNorm", nn.LayerNorm(16)), ("dense", nn.Linear(64, 16))):
        layer = make(device)
        end = layer.get_submodule(part)
        if name == "dense" and part == "attention.output":
            module = nn.Linear(32, 16)
        setattr(end, name, module.to(device))
        with pytest.raises(ValueError, match="LayerNorm"):
            results(layer, stream_of(device), sequences_of(device))
    assert not any(runs)
