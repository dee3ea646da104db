"""What the plan of embeddings was read from may change, and the next call sees it."""

import pytest
import torch
import transformers
from torch import nn

from tests.modules.plan_case import IDS, MASK, SHAPE, build, result


def a_shorter_row(embeddings):
    embeddings.word_embeddings.max_norm = 0.01


def another_table(embeddings):
    torch.manual_seed(1)
    embeddings.position_embeddings = nn.Embedding(512, 32)


def another_eps(embeddings):
    embeddings.LayerNorm.eps = 0.5


def no_bias(embeddings):
    embeddings.LayerNorm.bias = None


def a_hook_on_a_table(embeddings):
    embeddings.token_type_embeddings.register_forward_hook(lambda m, i, output: 9 * output.cos())


def a_hook(embeddings):
    embeddings.register_forward_hook(lambda m, i, output: 2 * output)


def a_norm_that_is_called(embeddings):
    embeddings.LayerNorm = nn.Sequential(embeddings.LayerNorm, nn.Tanh())


def a_forward(embeddings):
    own = embeddings.forward
    embeddings.forward = lambda *args, **kwargs: 3 * own(*args, **kwargs)


@pytest.mark.parametrize(
    "change",
    [
        *(a_shorter_row, another_table, another_eps, a_hook_on_a_table, a_hook),
        *(a_norm_that_is_called, a_forward, no_bias),
    ],
)
@pytest.mark.parametrize("kind", ["patched", "own"])
def test_changed_embeddings_are_seen(kind, change):
    model = build(kind)
    theirs = transformers.BertModel(transformers.BertConfig(**SHAPE)).eval()
    theirs.load_state_dict(model.state_dict(), strict=False)
    before = result(model)
    for one in (model, theirs):
        change(one.embeddings)
    if kind == "own" and change in (a_hook, a_forward):
        return  # which multiply what Hugging Face's embeddings return, of another shape
    expected = result(theirs)
    assert not torch.allclose(expected[MASK.bool()], before[MASK.bool()], atol=1e-3)
    torch.testing.assert_close(
        result(model)[MASK.bool()], expected[MASK.bool()], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("option", ["sparse", "scale_grad_by_freq"])
def test_a_tables_option_for_its_gradient_is_seen(option):
    model = build("patched")
    theirs = transformers.BertModel(transformers.BertConfig(**SHAPE)).eval()
    theirs.load_state_dict(model.state_dict())
    result(model)
    gradients = []
    for one in (model, theirs):
        table = one.embeddings.word_embeddings
        setattr(table, option, True)
        one(IDS % 3).pooler_output.square().sum().backward()
        gradients.append(table.weight.grad)
    assert gradients[0].is_sparse == gradients[1].is_sparse
    torch.testing.assert_close(*(one.to_dense() for one in gradients), rtol=1e-4, atol=1e-5)
