"""A small model, patched or own, and what it gives now."""

import torch
import transformers

import fastbert

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 61,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
IDS = torch.arange(2, 22).view(2, 10)
MASK = (torch.arange(10) < torch.tensor([[10], [6]])).long()


def build(kind):
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**SHAPE)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    if kind == "patched":
        return fastbert.patch(model)
    own = fastbert.BertModel(fastbert.BertConfig(**SHAPE)).eval()
    own.load_state_dict(model.state_dict())
    return own


def result(model):
    torch.manual_seed(7)
    with torch.no_grad():
        return model(IDS, MASK).last_hidden_state
