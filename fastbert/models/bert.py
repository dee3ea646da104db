"""`BertModel`: embeddings, encoder and pooler."""

import weakref
from typing import Any, Unpack

import torch
from torch import Tensor

from fastbert.check import require
from fastbert.models.base import BertPreTrainedModel
from fastbert.models.heads import BertPooler
from fastbert.models.inputs import ForwardOptions, Inputs
from fastbert.models.request import Request, drawn
from fastbert.models.users import (
    all_take_tokens,
    embedded_in_rows,
    predict_in_rows,
    tables_take_tokens,
)
from fastbert.modules.embeddings import BertEmbeddings, Tables, own_dtype, stream_dtype
from fastbert.modules.encoder import BertEncoder
from fastbert.modules.graphs.buckets import may_compute
from fastbert.modules.graphs.call import PaddedBatch
from fastbert.modules.layer import Share, share_packed
from fastbert.modules.linear import dropout_p_of, is_plain, is_plain_dropout
from fastbert.modules.plan import Reading
from fastbert.modules.sequences import Rows, first_tokens, pays_to_count
from fastbert.modules.stack import replay_padded, share_padded
from fastbert.ops.unpad import Unpadding
from fastbert.outputs import BaseModelOutputWithPooling
from fastbert.packing import PackedBatch


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
        input_ids: Tensor | PackedBatch | Request | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        rows: Rows | None = None,
        **options: Unpack[ForwardOptions],
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Hidden states of every token, and each sequence's pooled first token.

        input_ids: (B, S) int64, a PackedBatch without other tensors, or a head's request;
        attention_mask: see `read_mask`; token_type_ids, position_ids: (B, S), by default zeros and
        the column; inputs_embeds: (B, S, H) instead of input_ids; options: see `ForwardOptions`.
        Returns last_hidden_state (B, S, H) with zeros at padding, or (T, H) for a PackedBatch, and
        pooler_output (B, H), computed from the first *real* token of each sequence or packed
        document.

        rows: with a PackedBatch, the only M tokens that the last layer computes; last_hidden_state
        is then (M, H). A model with a pooler needs each sequence's first token among them.

        Raises ValueError for arguments that are unknown or do not fit together, and for sequences
        longer than max_position_embeddings.
        """
        if isinstance(input_ids, Request):
            return self.predict(input_ids)
        require(
            rows is None or isinstance(input_ids, PackedBatch),
            "BertModel",
            "rows with a PackedBatch",
            "with padded tensors",
        )
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        return self.run(inputs, options, rows=rows)

    def predict(self, request: Request, rows: Rows | None = None) -> BaseModelOutputWithPooling:
        request.rows = rows or request.rows
        if not all_take_tokens(self):
            self._check_positions(request.batch)
            return predict_in_rows(self, request)
        encoder = self.encoder
        reading = encoder.reading(request.inputs.given.device, trains=self.training)
        is_read = is_plain(encoder, BertEncoder)  # otherwise a hook on it may change its layers
        found = self._replayed(request, reading) if is_read and reading.may_replay else None
        if found is not None:
            last, first = found
            pooled = None if self.pooler is None else self.pooler(first)
            return BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=pooled)
        request = request.only(first=True) if request.reads == "pooled" else request
        batch, padding, rows = request.batch, request.padding, request.rows
        self._check_positions(batch)
        rng = None
        # as in Hugging Face, a model without dropout leaves torch's generator alone
        if reading.drops() or any(map(dropout_p_of, self.embeddings.children())):
            rng = drawn(batch)
        share: Share = share_packed
        if padding is not None:
            share = share_padded(padding, own_dtype(self.embeddings))
        if padding is None or tables_take_tokens(self.embeddings):
            tokens = batch.input_ids, batch.token_type_ids, batch.position_ids, batch.inputs_embeds
            x = self.embeddings(*tokens, rng=rng)
        else:
            x = request.by_sequence.pack(embedded_in_rows(self, request, rng))
        encoded = encoder(
            x,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
            mask=batch.attention_mask,
            output_hidden_states=request.output_hidden_states,
            rng=rng,
            rows=rows,
            share=share,
            reading=reading if is_read else None,
        )
        last = x = encoded.last_hidden_state
        if request.reads == "as given":
            last, x = share(x)  # a caller may read both this and the pooled output
        pooled = None
        if self.pooler is not None:
            bounds = batch if rows is None else rows
            seqlen = padding.seqlen if padding is not None and rows is None else 0
            pooled = self.pooler(first_tokens(x, bounds.cu_seqlens, seqlen))
        return BaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=pooled,
            hidden_states=encoded.hidden_states,
        )

    def _replayed(self, request: Request, reading: Reading) -> tuple[Tensor, Tensor] | None:
        """Last hidden states (B, S, H) and first tokens (B, H), from one CUDA graph of the call.

        None if no graph may run, or if one that begins after the embeddings is faster.
        """
        ids, mask, types, positions, embeds = request.inputs
        others = embeds, request.packed, *request.documents.values()
        if not isinstance(ids, Tensor) or any(one is not None for one in others):
            return None
        if request.output_hidden_states:
            return None
        embeddings, size = self.embeddings, self.config.hidden_size
        if request.reads == "packed" and pays_to_count(ids.numel(), size):
            return None  # the head would compute padding as well
        if request.reads == "pooled" and Rows.pay(ids.numel(), size, ids.device):
            return None  # the last layer may skip all but the first tokens
        if not (is_plain(embeddings, BertEmbeddings) and is_plain_dropout(embeddings.dropout)):
            return None
        if dropout_p_of(embeddings.dropout) or not may_compute(reading):
            return None
        owner: Any = weakref.ref(embeddings)

        def embed(
            ids: Tensor, types: Tensor | None, positions: Tensor | None, padding: Unpadding
        ) -> Tensor:
            if positions is None:
                positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
            packed = [None if one is None else padding.pack(one) for one in (ids, types, positions)]
            return owner()(*packed)

        own = own_dtype(embeddings)
        batch = PaddedBatch.of(
            Tables.of(embeddings),
            (ids, mask, types, positions),
            embed,
            widest=self.config.max_position_embeddings,
            hidden_size=size,
            dtype=stream_dtype(own, ids.device, embeddings),
        )
        outputs = None if batch is None else replay_padded(reading, batch)
        if outputs is None:
            return None
        last, first = outputs
        return last.to(own), first

    def _check_positions(self, batch: PackedBatch) -> None:
        longest = self.config.max_position_embeddings
        # reading positions makes the host wait for the GPU, so only if a sequence seems too long
        require(
            batch.max_seqlen <= longest or int(batch.position_ids.max()) < longest,
            "BertModel",
            f"sequences of at most max_position_embeddings = {longest} tokens",
            batch.max_seqlen,
            "truncate them",
        )
