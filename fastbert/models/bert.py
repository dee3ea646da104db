"""`BertModel`: embeddings, encoder and pooler."""

from typing import Any, Unpack

from torch import Tensor

from fastbert.check import require
from fastbert.models.base import BertPreTrainedModel
from fastbert.models.heads import BertPooler
from fastbert.models.inputs import ForwardOptions, Inputs, Request
from fastbert.modules.embeddings import BertEmbeddings, own_dtype
from fastbert.modules.encoder import BertEncoder
from fastbert.modules.layer import Share, share_packed
from fastbert.modules.linear import is_plain_table
from fastbert.modules.sequences import Rows, first_tokens
from fastbert.modules.stack import share_padded
from fastbert.ops.unpad import Unpadding
from fastbert.outputs import BaseModelOutputWithPooling
from fastbert.packing import PackedBatch
from fastbert.rng import for_batch


class BertModel(BertPreTrainedModel):
    """BERT without a task head, as in Hugging Face."""

    def __init__(self, config: Any, add_pooling_layer: bool = True) -> None:
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
        rows: Rows | None = None,
        padding: Unpadding | None = None,
        **options: Unpack[ForwardOptions],
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Hidden states of every token, and each sequence's pooled first token.

        input_ids: (B, S) int64, or a PackedBatch alone; attention_mask: see `read_mask`;
        token_type_ids, position_ids: (B, S), by default zeros and the column; inputs_embeds:
        (B, S, H) instead of input_ids; options: see `ForwardOptions`. Returns last_hidden_state
        (B, S, H) with zeros at padded positions, or (T, H) for a PackedBatch, and pooler_output
        (B, H), which reads the first *real* token of each sequence or packed document.

        rows: with a PackedBatch, the only tokens that the last layer computes; last_hidden_state is
        then (M, H). With a pooler, they must include each sequence's first token. padding: with a
        PackedBatch, the padded form in which hidden_states are returned.

        Raises ValueError for arguments that do not fit together, unknown ones, and sequences longer
        than max_position_embeddings.
        """
        require(
            rows is None or isinstance(input_ids, PackedBatch),
            "BertModel",
            "rows with a PackedBatch",
            "with padded tensors",
        )
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        return self.run(inputs, options, rows=rows, padding=padding)

    def predict(
        self, request: Request, rows: Rows | None = None, padding: Unpadding | None = None
    ) -> BaseModelOutputWithPooling:
        batch, padding = request.batch, padding or request.padding
        self._check_positions(batch)
        rng = None
        # without a dropout nothing is drawn from torch's generator, as in Hugging Face
        drops = self.training and (self.embeddings.dropout.p > 0 or self.encoder.drops())
        if drops:
            rng = for_batch(
                batch.cu_seqlens,
                batch.num_tokens,
                sequence_ids=batch.sequence_ids,
                state=batch.dropout_state,
            )
        share: Share = share_packed
        if padding is not None:
            share = share_padded(padding, own_dtype(self.embeddings))
        ids, embeds, words = batch.input_ids, batch.inputs_embeds, self.embeddings.word_embeddings
        if padding is not None and ids is not None and not is_plain_table(words):
            # a hook, or a module of another library, may read the batch's shape
            embeds = padding.pack(words(padding.pad(ids)))
            ids = None
        x = self.embeddings(ids, batch.position_ids, batch.token_type_ids, embeds, rng)
        encoded = self.encoder(
            x,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
            mask=batch.attention_mask,
            output_hidden_states=request.output_hidden_states,
            rng=rng,
            rows=rows,
            share=share,
        )
        last = x = encoded.last_hidden_state
        if request.padding is not None:  # who reads the pooled output may read this, too
            last, x = share(x)
        pooled = None
        if self.pooler is not None:
            cu_seqlens = batch.cu_seqlens if rows is None else rows.cu_seqlens
            pooled = self.pooler(first_tokens(x, cu_seqlens))
        return BaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=pooled,
            hidden_states=encoded.hidden_states,
        )

    def _check_positions(self, batch: PackedBatch) -> None:
        longest = self.config.max_position_embeddings
        # positions are read, which makes the host wait, only if a sequence seems too long
        require(
            batch.max_seqlen <= longest or int(batch.position_ids.max()) < longest,
            "BertModel",
            f"sequences of at most max_position_embeddings = {longest} tokens",
            batch.max_seqlen,
            "truncate them",
        )
