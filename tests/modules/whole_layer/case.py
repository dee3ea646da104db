"""A BERT layer, a batch of it, and its results as one node and operator by operator."""

import contextlib

import pytest
import torch
from torch import nn

import fastbert
from fastbert.modules import whole_layer
from fastbert.modules.bert_layer import BertLayer, parts_of
from fastbert.modules.layer import Stream, run_layer
from fastbert.modules.sequences import Sequences
from fastbert.rng import for_batch

LENGTHS = [5, 1, 7]
TOKENS = sum(LENGTHS)


def make(device, training=True, dropout=0.1, act="gelu", **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    layer = BertLayer(fastbert.BertConfig(**sizes, **drops, hidden_act=act, **options))
    for parameter in layer.parameters():  # norms and biases too
        nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0.0, 0.1)
    return layer.to(device).train(training)


def sequences_of(device, lengths=LENGTHS, dropout=True):
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    state = torch.tensor([3, 5], device=device)
    rng = for_batch(bounds, sum(lengths), state=state) if dropout else None
    return Sequences(bounds, max(lengths), None, rng)


def stream_of(device, dtype=torch.float32, tokens=TOKENS, hidden=32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, hidden, generator=generator).to(device, dtype)
    return x.requires_grad_()


@contextlib.contextmanager
def one_by_one():
    """Has layers run operator by operator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_layer.WholeLayer, "run", lambda *_: None)
        yield


def results(layer, x, sequences, wanted=None, context=contextlib.nullcontext):
    """Both branches of the output, and the gradients of x and of parameters.

    wanted: of which branches a gradient is given, the first or the second or (None) both
    """
    parts = parts_of(layer)
    with context():
        outputs = run_layer(parts, Stream(x, x), sequences)
    generator = torch.Generator().manual_seed(2)
    given = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    loss = sum((y * dy).sum() for n, (y, dy) in enumerate(zip(outputs, given, strict=True))
               if wanted in (None, n))  # fmt: skip
    inputs = [x, *layer.parameters()]
    inputs = [one for one in inputs if one.requires_grad]
    return [*outputs, *torch.autograd.grad(loss, inputs, allow_unused=True)]


def both(*arguments, **options):
    with one_by_one():
        expected = results(*arguments, **options)
    return results(*arguments, **options), expected


def assert_same(actual, expected, **limits):
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            assert a.dtype == e.dtype
            torch.testing.assert_close(a, e, **limits)


class Adapted(nn.Module):
    """A linear layer with a low-rank sum, as LoRA makes it."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, 4, bias=False, device=base.weight.device)
        self.up = nn.Linear(4, base.out_features, bias=False, device=base.weight.device)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def adapt(layer, names):
    layer.requires_grad_(False)
    this = layer.attention.self
    for name in names:
        setattr(this, name, Adapted(getattr(this, name)))
