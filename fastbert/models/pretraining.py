"""The pre-training models: masked language modelling, alone or with next-sentence prediction."""

from typing import Any, ClassVar, Unpack

from torch import Tensor, nn

from fastbert.models.base import BertPreTrainedModel
from fastbert.models.bert import BertModel
from fastbert.models.heads import BertOnlyMLMHead, BertPreTrainingHeads
from fastbert.models.inputs import ForwardOptions, Inputs
from fastbert.models.losses import (
    Scored,
    masked_rows,
    pretraining_loss,
    score_classes,
    score_words,
    wants_logits,
)
from fastbert.models.request import Request
from fastbert.models.users import may_be_left_out, through
from fastbert.outputs import BertForPreTrainingOutput, MaskedLMOutput
from fastbert.packing import PackedBatch


class _PredictsWords(BertPreTrainedModel):
    """A model with a decoder to the vocabulary, tied to the word embeddings.

    In training mode with labels, the head runs on the masked positions only, and no logits are
    returned. `return_logits=True` always returns them; `return_logits=False` or `skip_logits=True`
    never does. If neither logits nor hidden states are requested, the last layer computes only the
    tokens that the losses read.
    """

    cls: Any
    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    _keys_to_ignore_on_save: ClassVar[list[str] | None] = [*_tied_weights_keys]

    def get_output_embeddings(self) -> nn.Linear:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, decoder: nn.Linear) -> None:
        self.cls.predictions.decoder = decoder
        self.cls.predictions.bias = decoder.bias

    def tie_weights(self) -> None:
        super().tie_weights()
        self.cls.predictions.decoder.bias = self.cls.predictions.bias

    def _predict_words(
        self, request: Request, with_pairs: bool, **asked: bool | None
    ) -> tuple[Any, Scored | None, Tensor | None, Any]:
        """The encoder's output; the masked-LM score, None without a loss; the word logits, None if
        they are not wanted; the pair logits, None without pairs.

        asked: return_logits and skip_logits
        """
        labels, head = request.labels, self.cls
        # a hook, or a user's own forward, must see every token
        has_hook = not (may_be_left_out(head) and may_be_left_out(head.predictions))
        has_loss = labels is not None and not (with_pairs and request.pair_labels is None)
        with_logits = wants_logits(self, has_loss, **asked)
        if has_loss and not (with_logits or has_hook):
            request = request.only(first=with_pairs, labelled=True)
        encoded = self.encode(request)
        x, pooled = encoded.last_hidden_state, encoded.pooler_output
        words: Scored | None = None
        logits: Any = None
        pairs: Any = None
        if with_logits or has_hook:
            logits = through(head, x, request, *([pooled] if with_pairs else []))
            logits, pairs = logits if with_pairs else (logits, None)
        elif with_pairs:
            pairs = head.seq_relationship(pooled)
        if labels is not None and has_loss:
            words = (
                score_classes(logits, labels)
                if has_hook
                else score_words(head.predictions, masked_rows(x, request.batch, request.rows))
            )
        return encoded, words, request.padded(logits) if with_logits else None, pairs


class BertForPreTraining(_PredictsWords):
    """BERT with both pre-training heads (Devlin et al. 2018), as in Hugging Face."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.cls = BertPreTrainingHeads(config)
        self.initialize()

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        *,
        return_logits: bool | None = None,
        skip_logits: bool | None = None,
        **options: Unpack[ForwardOptions],
    ) -> BertForPreTrainingOutput | tuple[Any, ...]:
        """The sum of both losses if both labels are given, and the heads' logits.

        labels: (B, S) int64, the token to predict or -100; next_sentence_label: (B,) int64, 0 if
        the second segment follows the first; for the other arguments see `BertModel`. Returns
        prediction_logits (B, S, V), or (T, V) for a PackedBatch, or None in training with both
        labels unless return_logits=True; and seq_relationship_logits (B, 2).

        num_items_in_batch: the number of masked tokens in an optimizer step. This batch's share of
        them weights the sum of both mean losses. The step's masked-LM loss is then the mean over
        all its masked tokens, and its next-sentence loss is the mean of its batches' losses with
        the same weights.
        """
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        return self.run(
            inputs,
            options,
            labels=labels,
            next_sentence_label=next_sentence_label,
            return_logits=return_logits,
            skip_logits=skip_logits,
        )

    def predict(
        self,
        request: Request,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        **asked: bool | None,
    ) -> BertForPreTrainingOutput:
        request = request.labelled(labels).labelled_pairs(next_sentence_label)
        encoded, words, logits, pair_logits = self._predict_words(request, True, **asked)
        loss = None
        if words is not None:
            assert request.pair_labels is not None
            pairs = score_classes(pair_logits, request.pair_labels)
            loss = pretraining_loss(words, pairs, request.num_items)
        return BertForPreTrainingOutput(
            loss=loss,
            prediction_logits=logits,
            seq_relationship_logits=pair_logits,
            hidden_states=encoded.hidden_states,
        )


class BertForMaskedLM(_PredictsWords):
    """BERT with the masked-LM head only, as in Hugging Face."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.initialize()

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        encoder_hidden_states: None = None,
        encoder_attention_mask: None = None,
        labels: Tensor | None = None,
        *,
        return_logits: bool | None = None,
        skip_logits: bool | None = None,
        **options: Unpack[ForwardOptions],
    ) -> MaskedLMOutput | tuple[Any, ...]:
        """The masked-LM loss if labels are given, and the logits; see `BertForPreTraining`.

        encoder_hidden_states, encoder_attention_mask: arguments of a decoder, which only keep
        Hugging Face's order of arguments; raises ValueError unless they are None.
        """
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        decoding = {
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
        }
        return self.run(
            inputs,
            options | decoding,
            labels=labels,
            return_logits=return_logits,
            skip_logits=skip_logits,
        )

    def predict(
        self,
        request: Request,
        labels: Tensor | None = None,
        **asked: bool | None,
    ) -> MaskedLMOutput:
        request = request.labelled(labels)
        encoded, words, logits, _ = self._predict_words(request, False, **asked)
        return request.output(MaskedLMOutput, encoded, logits, words)
