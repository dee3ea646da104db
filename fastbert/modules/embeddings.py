"""Word, position and segment embeddings, summed and normalized."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.ops.layer_norm import layer_norm


def stream_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the packed stream: autocast's where it is on, x's own elsewhere.

    Keeping the residual in the low precision halves the traffic of every memory-bound operator;
    statistics stay in float32.
    """
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class BertEmbeddings(nn.Module):
    """Token ids to vectors: any leading shape, so packed (T,) as well as padded (B, S)."""

    def __init__(self, config) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.word_embeddings = nn.Embedding(
            config.vocab_size, hidden, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, hidden)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """(...) int64 ids -> (..., H); token_type_ids of None means all zeros."""
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if token_type_ids is None:
            x = x + self.token_type_embeddings.weight[0]
        else:
            x = x + self.token_type_embeddings(token_type_ids)
        x = x + self.position_embeddings(position_ids)
        norm = self.LayerNorm
        x = layer_norm(x, norm.weight, norm.bias, norm.eps).to(stream_dtype(x))
        return F.dropout(x, self.dropout.p, self.training)
