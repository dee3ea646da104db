"""`BertModel`: embeddings, encoder and pooler."""

from torch import Tensor

from fastbert.check import require
from fastbert.models.base import BertPreTrainedModel
from fastbert.models.inputs import pack_inputs
from fastbert.modules.embeddings import BertEmbeddings
from fastbert.modules.encoder import BertEncoder, pad_output, refuse_attentions
from fastbert.modules.heads import BertPooler, first_tokens
from fastbert.outputs import BaseModelOutputWithPooling
from fastbert.packing import PackedBatch
from fastbert.rng import for_batch


class BertModel(BertPreTrainedModel):
    """BERT without a task head, as in Hugging Face."""

    def __init__(self, config, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.initialize()

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
    ) -> BaseModelOutputWithPooling | tuple:
        """Hidden states of every token, and each sequence's pooled first token.

        input_ids: (B, S) int64, or a PackedBatch alone; attention_mask: see `read_mask`;
        token_type_ids, position_ids: (B, S), by default zeros and the column; inputs_embeds:
        (B, S, H) instead of input_ids. Returns last_hidden_state (B, S, H) with zeros at padded
        positions, or (T, H) for a PackedBatch, and pooler_output (B, H), which reads the first
        *real* token of each sequence.
        """
        refuse_attentions(output_attentions)
        batch, padding = pack_inputs(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds
        )
        self._check_positions(batch)
        rng = None
        if self.training:
            rng = for_batch(
                batch.cu_seqlens,
                batch.num_tokens,
                sequence_ids=batch.sequence_ids,
                state=batch.dropout_state,
            )
        x = self.embeddings(
            batch.input_ids, batch.position_ids, batch.token_type_ids, batch.inputs_embeds, rng
        )
        encoded = self.encoder(
            x,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
            mask=batch.attention_mask,
            output_hidden_states=output_hidden_states,
            rng=rng,
        )
        hidden_states = encoded.last_hidden_state
        pooled = None
        if self.pooler is not None:
            pooled = self.pooler(first_tokens(hidden_states, batch.cu_seqlens))
        output = BaseModelOutputWithPooling(
            last_hidden_state=hidden_states,
            pooler_output=pooled,
            hidden_states=encoded.hidden_states,
        )
        if padding is not None:
            output = pad_output(output, padding, self.embeddings.LayerNorm.weight.dtype)
        return output if return_dict else output.to_tuple()

    def _check_positions(self, batch: PackedBatch) -> None:
        longest = self.config.max_position_embeddings
        # reading the positions makes the host wait: only where a sequence is suspiciously long
        require(
            batch.max_seqlen <= longest or int(batch.position_ids.max()) < longest,
            "BertModel",
            f"sequences of at most max_position_embeddings = {longest} tokens",
            batch.max_seqlen,
            "truncate them",
        )
