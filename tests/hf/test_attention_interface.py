"""`attn_implementation="fastbert"` against transformers' sdpa, in encoders of several kinds."""

import copy

import pytest
import torch
import transformers
from torch import nn

import fastbert
from fastbert.hf.attention import attention_forward
from tests.hf.cases import IS_V4

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
}
TEXT = {"vocab_size": 37, "max_position_embeddings": 32, **SIZES}
ENCODERS = {
    "Roberta": {**TEXT, "pad_token_id": 1},
    "ModernBert": {
        **TEXT,
        "local_attention": 4,  # a sliding window
        "global_attn_every_n_layers": 2,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "cls_token_id": 2,
        "sep_token_id": 3,
    },
    "ViT": {**SIZES, "image_size": 8, "patch_size": 4},
    "Llama": {**TEXT, "num_key_value_heads": 1, "hidden_size": 24},  # causal, fewer keys
}
if not IS_V4:
    ENCODERS |= {"Bert": TEXT, "Electra": {**TEXT, "embedding_size": 8}}
LENGTHS = torch.tensor([9, 2, 5])


@pytest.fixture(autouse=True)
def registered():
    fastbert.register_attention()


def make(name, **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**ENCODERS[name], **options)
    theirs = getattr(transformers, f"{name}Model")(config)
    theirs.set_attn_implementation("sdpa")
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = copy.deepcopy(theirs)
    ours.set_attn_implementation("fastbert")
    assert theirs.config._attn_implementation == "sdpa"
    return theirs.double().eval(), ours.double().eval()


def batch_of(name, side):
    if name == "ViT":
        return {"pixel_values": torch.randn(3, 3, 8, 8, dtype=torch.float64)}, ...
    column = torch.arange(9)
    lengths = LENGTHS[:, None]
    real = {"right": column < lengths, "left": column >= 9 - lengths, "none": column < 9}[side]
    real = real.expand(3, 9)
    batch = {"input_ids": torch.randint(5, 37, (3, 9))}
    if side != "none":
        batch["attention_mask"] = real.long()
    return batch, real


@pytest.mark.parametrize("side", ["right", "left", "none"])
@pytest.mark.parametrize("name", ENCODERS)
def test_outputs_and_gradients_are_sdpas(name, side):
    theirs, ours = make(name)
    batch, real = batch_of(name, side)
    found = []
    for model in (theirs, ours):
        output = model(**batch).last_hidden_state[real]
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        (output * weights).sum().backward()
        found.append((output, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(found[1][0], found[0][0])
    for a, b in zip(found[1][1], found[0][1], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.skipif(IS_V4, reason="4.57's encoders do not let users choose their attention")
def test_keys_are_packed_once_for_all_layers():
    _, ours = make("Roberta")
    batch, _ = batch_of("Roberta", "right")
    rows = fastbert.explain(ours, **batch, show=False).rows
    assert [row.calls for row in rows if row.operator == "compact"] == [1]
    attention = [row for row in rows if row.operator == "attention"]
    assert sum(row.calls for row in attention) == 2


def test_a_query_without_a_key_gives_zeros_and_finite_gradients():
    q, k, v = torch.randn(3, 2, 2, 5, 8, requires_grad=True)
    mask = torch.tensor([[True, True, False, False, False], [False] * 5])
    out, weights = attention_forward(nn.Module(), q, k, v, mask)
    assert weights is None
    assert not out[1].any()
    assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()


def test_queries_and_keys_of_different_length():
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (4, 6, 6))
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
    out, _ = attention_forward(nn.Module(), q, k, v, mask)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    bias = torch.randn(1, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    added = bias.masked_fill(~mask[:, None, None], float("-inf"))
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=added)
    out, _ = attention_forward(nn.Module(), q, k, v, mask, position_bias=bias)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    assert torch.autograd.grad(out.square().sum(), bias)[0].any()


@pytest.mark.parametrize("name", ["softcap", "s_aux", "head_mask", "cu_seq_lens_q"])
def test_what_it_does_not_compute_is_refused_by_name(name):
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match=f"expected no {name}"):
        attention_forward(nn.Module(), q, q, q, None, **{name: torch.ones(2)})


def test_dropout_is_replayed_under_checkpointing():
    options = {"attention_probs_dropout_prob": 0.4, "hidden_dropout_prob": 0.0}
    _, ours = make("Roberta", **options)
    ours.train()
    batch, real = batch_of("Roberta", "right")
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            ours.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(4)
        ours.zero_grad()
        output = ours(**batch).last_hidden_state[real]
        (output * torch.arange(24)).sum().backward()
        found.append([p.grad for p in ours.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
