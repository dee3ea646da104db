"""Small models of fastbert's own, and rows that they train on."""

import torch

import fastbert

SHAPE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "num_labels": 3,
}


def own(**options):
    torch.manual_seed(0)
    config = fastbert.BertConfig(**{**SHAPE, **options})
    return fastbert.BertForSequenceClassification(config)


def rows():
    torch.manual_seed(1)
    one = {"attention_mask": torch.ones(10, dtype=torch.long)}
    return [
        {**one, "input_ids": torch.randint(5, 99, (10,)), "labels": torch.tensor(number % 3)}
        for number in range(16)
    ]


def masked_lm():
    torch.manual_seed(0)
    return fastbert.BertForMaskedLM(fastbert.BertConfig(**SHAPE))
