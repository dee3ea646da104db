"""The pooler and the pre-training heads."""

from typing import Any

from torch import Tensor, nn

from fastbert.modules.activations import activation, dense_and_activate
from fastbert.modules.embeddings import normalized
from fastbert.modules.linear import Leaf, is_plain


def maps_rows(head: nn.Module) -> bool:
    """Whether a head's modules compute each token independently, and no hook sees their input."""
    return all(type(m) in _BY_ROW and is_plain(m, type(m)) for m in head.modules())


class BertPooler(nn.Module):
    """A linear layer and tanh over each sequence's first token."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.Tanh()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, H) first real token of each sequence, or (B, S, H) all tokens, -> (B, H)"""
        if hidden_states.ndim == 3:
            hidden_states = hidden_states[:, 0]
        return self.activation(self.dense(hidden_states))


class BertPredictionHeadTransform(nn.Module):
    """The masked-LM head before its decoder: linear, activation, LayerNorm."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.transform_act_fn = activation(config.hidden_act)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(C, H) -> (C, H)"""
        x = dense_and_activate(hidden_states, Leaf(self.dense), self.transform_act_fn)
        return normalized(x, self.LayerNorm)


class BertLMPredictionHead(nn.Module):
    """Maps rows to logits over the vocabulary; the model ties `decoder.weight`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = self.decoder.bias

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(C, H) -> (C, V)"""
        return self.decoder(self.transform(hidden_states))


class BertOnlyMLMHead(nn.Module):
    """The masked-LM head under Hugging Face's name for it without a next-sentence head."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.predictions(hidden_states)


class BertOnlyNSPHead(nn.Module):
    """The next-sentence head."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, H) -> (B, 2)"""
        return self.seq_relationship(pooled)


class BertPreTrainingHeads(nn.Module):
    """The masked-LM head and the next-sentence head."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.predictions = BertLMPredictionHead(config)
        self.seq_relationship = nn.Linear(config.hidden_size, 2)

    def forward(self, hidden_states: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """(T, H), (B, H) -> (T, V), (B, 2)"""
        return self.predictions(hidden_states), self.seq_relationship(pooled)


_BY_ROW = {
    *(nn.Linear, nn.LayerNorm, nn.Dropout),
    *(BertPredictionHeadTransform, BertLMPredictionHead, BertOnlyMLMHead, BertPreTrainingHeads),
}
