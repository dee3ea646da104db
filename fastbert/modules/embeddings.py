"""Word, position and segment embeddings, summed and normalized."""

import torch
from torch import Tensor, nn

from fastbert.modules.linear import is_plain
from fastbert.ops.dropout import dropout
from fastbert.ops.embedding import embedding_layer_norm
from fastbert.ops.layer_norm import layer_norm
from fastbert.rng import DropoutState


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
        rng: DropoutState | None = None,
    ) -> Tensor:
        """(...) int64 ids -> (..., H); token_type_ids of None means all zeros."""
        words, positions = self.word_embeddings, self.position_embeddings
        types, norm = self.token_type_embeddings, self.LayerNorm
        dropout_p = self.dropout.p if self.training else 0.0
        if inputs_embeds is None:
            assert input_ids is not None
            if not all(is_plain(table, nn.Embedding) for table in (words, positions, types)):
                inputs_embeds = words(input_ids)
        if inputs_embeds is None:
            return embedding_layer_norm(
                input_ids,
                position_ids,
                token_type_ids,
                words.weight,
                positions.weight,
                types.weight,
                norm.weight,
                norm.bias,
                norm.eps,
                padding_idx=words.padding_idx,
                dropout_p=dropout_p,
                rng=rng,
                dtype=stream_dtype(words.weight),
            )
        segments = types.weight[0] if token_type_ids is None else types(token_type_ids)
        x = inputs_embeds + segments + positions(position_ids)
        x = layer_norm(x, norm.weight, norm.bias, norm.eps).to(stream_dtype(x))
        return dropout(x, dropout_p, rng)
