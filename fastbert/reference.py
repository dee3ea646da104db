"""BERT as in the paper (Devlin et al. 2018): padded, unfused, in any dtype. The tests' oracle.

B sequences padded to S tokens, H hidden, N heads, D head size, V vocabulary. Parameter names are
Hugging Face's, so weights move between this model and the packed ones. Read it top to bottom; it
shares no code with the packed model, so that no bug can hide in both.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.config.bert import BertConfig

GELU_TANH = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")


class Embeddings(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor) -> Tensor:
        """(B, S) ids -> (B, S, H)"""
        words = self.word_embeddings(input_ids)
        types = self.token_type_embeddings(token_type_ids)
        positions = self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(words + types + positions))


class SelfAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, x: Tensor, is_real: Tensor) -> Tensor:
        """(B, S, H), (B, S) bool -> (B, S, H)"""
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, N, S, D)
            for layer in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, N, S, S)
        scores = scores.masked_fill(~is_real[:, None, None], torch.finfo(scores.dtype).min)
        probabilities = self.dropout(scores.softmax(-1))
        return (probabilities @ v).transpose(1, 2).flatten(2)


class AddAndNorm(nn.Module):
    def __init__(self, in_features: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(residual + self.dropout(self.dense(x)))


class Attention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = AddAndNorm(config.hidden_size, config)

    def forward(self, x: Tensor, is_real: Tensor) -> Tensor:
        return self.output(self.self(x, is_real), x)


class Activated(nn.Module):
    """A linear layer and the activation that the config names; `gelu` is the exact erf formula."""

    def __init__(self, out_features: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, out_features)
        self.hidden_act = config.hidden_act

    def forward(self, x: Tensor) -> Tensor:
        x = self.dense(x)
        if callable(self.hidden_act):
            return self.hidden_act(x)
        if self.hidden_act == "gelu":
            return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        if self.hidden_act in GELU_TANH:
            return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return getattr(F, self.hidden_act)(x)


class Layer(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Activated(config.intermediate_size, config)
        self.output = AddAndNorm(config.intermediate_size, config)

    def forward(self, x: Tensor, is_real: Tensor) -> Tensor:
        x = self.attention(x, is_real)
        return self.output(self.intermediate(x), x)


class Encoder(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor, is_real: Tensor) -> Tensor:
        for layer in self.layer:
            x = layer(x, is_real)
        return x


class Pooler(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, is_real: Tensor) -> Tensor:
        """Each sequence's first real token, wherever the padding is: (B, S, H) -> (B, H)"""
        first = is_real.int().argmax(1)
        return torch.tanh(self.dense(x[torch.arange(len(x)), first]))


class Bert(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.pooler = Pooler(config)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(B, S) each -> hidden states (B, S, H), pooled (B, H)"""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        is_real = attention_mask != 0
        x = self.encoder(self.embeddings(input_ids, token_type_ids, position_ids), is_real)
        return x, self.pooler(x, is_real)


class Transform(Activated):
    def __init__(self, config: BertConfig) -> None:
        super().__init__(config.hidden_size, config)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(super().forward(x))


class Predictions(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = Transform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = self.decoder.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform(x))


class Heads(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.predictions = Predictions(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)


class ReferenceBert(nn.Module):
    """BERT with both pre-training heads; the decoder is tied to the word embeddings."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.bert = Bert(config)
        self.cls = Heads(config)
        self.cls.predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """The loss (None without labels), MLM scores (B, S, V) and next-sentence scores (B, 2)."""
        x, pooled = self.bert(input_ids, attention_mask, token_type_ids, position_ids)
        words, pairs = self.cls.predictions(x), self.cls.seq_relationship(pooled)
        loss = None
        if labels is not None and next_sentence_label is not None:
            loss = F.cross_entropy(words.flatten(0, 1), labels.flatten())
            loss = loss + F.cross_entropy(pairs, next_sentence_label)
        return loss, words, pairs
