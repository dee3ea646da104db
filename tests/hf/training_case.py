"""Small Hugging Face models, the same patched, and padded batches, for tests of training."""

import copy

import torch
import transformers

import fastbert

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
LENGTHS = (11, 1, 16, 7)


def make_model(kind=transformers.BertForMaskedLM, dropout=0.0, **options):
    """Hugging Face's model in training mode, with biases and norms that are not zeros and ones."""
    torch.manual_seed(0)
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = transformers.BertConfig(**SHAPE | dropouts | options)
    model = kind(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.train()


def make_pair(kind=transformers.BertForMaskedLM, dropout=0.0, **options):
    """(patched, Hugging Face's) on the same weights."""
    theirs = make_model(kind, dropout, **options)
    return fastbert.patch(copy.deepcopy(theirs)), theirs


def make_batch(lengths=LENGTHS, seed=1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = (len(lengths), max(lengths))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(5, SHAPE["vocab_size"], size, generator=generator) * mask
    masked = mask & (torch.rand(size, generator=generator) < 0.4)
    masked[:, 0] = True
    return {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "token_type_ids": torch.randint(0, 2, size, generator=generator) * mask,
        "labels": ids.where(masked, -100),
    }


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs, tolerance=1e-5) -> None:
    """Relative to the largest entry of each; a key bias's is 0 but for rounding."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        scale = theirs.get(name.replace("key.bias", "key.weight"), expected).abs().max()
        error = (ours[name] - expected).abs().max()
        assert error <= tolerance * scale, f"{name}: off by {error:.3g} of {scale:.3g}"
