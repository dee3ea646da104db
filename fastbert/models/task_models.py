"""The task models: sequence, pair and token classification, multiple choice, extractive answers."""

from typing import Any, Unpack

import torch
from torch import Tensor, nn

from fastbert.check import require
from fastbert.config.bert import BertConfig
from fastbert.models.base import BertPreTrainedModel
from fastbert.models.bert import BertModel
from fastbert.models.heads import BertOnlyNSPHead
from fastbert.models.inputs import ForwardOptions, Inputs
from fastbert.models.losses import problem_type_of, score_classes, score_sequences, span_loss
from fastbert.models.request import Request
from fastbert.models.users import through
from fastbert.outputs import (
    MultipleChoiceModelOutput,
    NextSentencePredictorOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from fastbert.packing import PackedBatch


class LabelledModel(BertPreTrainedModel):
    """A model whose only target is the argument `labels`."""

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Unpack[ForwardOptions],
    ) -> Any:
        """The loss if labels are given, and the logits; the class describes its labels.

        input_ids: (B, S) int64, or a PackedBatch; attention_mask: see `read_mask`; token_type_ids,
        position_ids: (B, S), by default zeros and the column; inputs_embeds: (B, S, H) instead of
        input_ids; options: see `ForwardOptions`. Raises ValueError for arguments that do not fit.
        """
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        return self.run(inputs, options, labels=labels)


class BertForNextSentencePrediction(LabelledModel):
    """BERT with the next-sentence head only, as in Hugging Face.

    labels: (B,) int64, 0 if the second segment follows the first, 1 if it is a random one; by
    default a PackedBatch's next_sentence_label. Logits are (B, 2).
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = BertModel(config)
        self.cls = BertOnlyNSPHead(config)
        self.initialize()

    def predict(
        self, request: Request, labels: Tensor | None = None
    ) -> NextSentencePredictorOutput:
        request = request.labelled_pairs(labels)
        encoded = self.encode(request, "pooled")
        logits, labels = self.cls(encoded.pooler_output), request.pair_labels
        scored = None if labels is None else score_classes(logits, labels)
        return request.output(NextSentencePredictorOutput, encoded, logits, scored)


class _Classifier(LabelledModel):
    """BERT, dropout and a linear classifier with `num_classes` outputs."""

    def __init__(self, config: Any, num_classes: int, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer)
        p = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if p is None else p)
        self.classifier = nn.Linear(config.hidden_size, num_classes)
        self.initialize()


class BertForSequenceClassification(_Classifier):
    """BERT with a classifier of whole sequences, as in Hugging Face; logits (B, num_labels).

    labels: depending on config.problem_type, (B,) classes, (B, num_labels) numbers, or
    (B, num_labels) floats 0 and 1; see `score_sequences`. If problem_type is None, it is inferred
    from the first labels and written to the configuration, where pipelines read whether to apply a
    softmax or sigmoids (under torch.compile only to Hugging Face's configuration).
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config, config.num_labels)

    def predict(self, request: Request, labels: Tensor | None = None) -> SequenceClassifierOutput:
        encoded = self.encode(request, "pooled")
        logits, scored = self.classifier(self.dropout(encoded.pooler_output)), None
        if labels is not None:
            problem = self.config.problem_type or problem_type_of(labels, logits.shape[1])
            scored = score_sequences(logits, labels, problem)
            # a trace cannot change a `BertConfig`, which validates each assignment
            is_fixed = isinstance(self.config, BertConfig) and torch.compiler.is_compiling()
            if self.config.problem_type is None and not is_fixed:
                self.config.problem_type = problem
        return request.output(SequenceClassifierOutput, encoded, logits, scored)


class BertForTokenClassification(_Classifier):
    """BERT with a classifier of tokens, as in Hugging Face.

    labels: (B, S) classes or -100, by default a PackedBatch's labels (T,). Logits are
    (B, S, num_labels), or (T, num_labels) for a PackedBatch.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config, config.num_labels, add_pooling_layer=False)

    def predict(self, request: Request, labels: Tensor | None = None) -> TokenClassifierOutput:
        request = request.labelled(labels)
        encoded = self.encode(request)
        x = through(self.dropout, encoded.last_hidden_state, request)
        logits, labels = through(self.classifier, x, request), request.labels
        scored = None if labels is None else score_classes(logits, labels)
        return request.output(TokenClassifierOutput, encoded, request.padded(logits), scored)


class BertForMultipleChoice(_Classifier):
    """BERT with a logit for each of a question's choices, as in Hugging Face."""

    def __init__(self, config: Any) -> None:
        super().__init__(config, 1)

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        num_choices: int | None = None,
        **options: Unpack[ForwardOptions],
    ) -> MultipleChoiceModelOutput | tuple[Any, ...]:
        """The loss if labels are given, and the logits (B, C) of C choices.

        input_ids and the other inputs: as in `BertModel`, but of shape (B, C, S), inputs_embeds
        (B, C, S, H); or a PackedBatch of B * C sequences, in which the choices of a question follow
        each other, with num_choices = C. labels: (B,) int64, the right choice or -100. Raises
        ValueError for other shapes, and for a PackedBatch without num_choices.
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        if isinstance(given, Tensor):
            require(
                given.ndim == (3 if inputs_embeds is None else 4),
                "BertForMultipleChoice",
                "input_ids (batch, choices, seqlen) or inputs_embeds with one more dimension",
                tuple(given.shape),
            )
            num_choices = given.shape[1]
        require(
            num_choices is not None,
            "BertForMultipleChoice",
            "num_choices with a PackedBatch",
            None,
        )
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        by_sequence = (x.flatten(0, 1) if isinstance(x, Tensor) else x for x in inputs)
        return self.run(Inputs._make(by_sequence), options, labels=labels, num_choices=num_choices)

    def predict(
        self, request: Request, labels: Tensor | None = None, num_choices: int = 1
    ) -> MultipleChoiceModelOutput:
        encoded = self.encode(request, "pooled")
        logits = self.classifier(self.dropout(encoded.pooler_output)).view(-1, num_choices)
        scored = None if labels is None else score_classes(logits, labels)
        return request.output(MultipleChoiceModelOutput, encoded, logits, scored)


class BertForQuestionAnswering(BertPreTrainedModel):
    """BERT with logits for where an answer begins and ends, as in Hugging Face.

    The softmax is over the real tokens of a sequence. In Hugging Face's model it includes padding,
    so the loss depends on the width of the batch. Here the logits at padding are the dtype's lowest
    number, which adds nothing to the softmax and is never the argmax.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        require(
            self.num_labels == 2,
            "BertForQuestionAnswering",
            "num_labels = 2, for a start and an end",
            self.num_labels,
        )
        self.bert = BertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.initialize()

    def forward(
        self,
        input_ids: Tensor | PackedBatch | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **options: Unpack[ForwardOptions],
    ) -> QuestionAnsweringModelOutput | tuple[Any, ...]:
        """The mean of start and end loss if both positions are given, and both logits.

        start_positions, end_positions: (B,) int64, a column of the batch, or for packed input the
        position in the sequence or document. Negative positions count as 0, as in Hugging Face;
        positions at padding or beyond the end are left out of the loss. For the other arguments see
        `BertModel`. Returns start_logits and end_logits, (B, S), or (T,) for a PackedBatch.
        """
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        return self.run(
            inputs, options, start_positions=start_positions, end_positions=end_positions
        )

    def predict(
        self,
        request: Request,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
    ) -> QuestionAnsweringModelOutput:
        encoded = self.encode(request)
        tokens, loss = through(self.qa_outputs, encoded.last_hidden_state, request), None
        lowest = torch.finfo(tokens.dtype).min
        logits = request.padded(tokens, lowest)
        if start_positions is not None and end_positions is not None:
            columns, scores, is_real = (start_positions, end_positions), logits, request.is_real
            if request.is_packed and (rows := request.by_sequence) is not request.padding:
                scores, is_real = rows.pad(tokens, lowest), rows.is_real
            loss = span_loss(scores.unbind(-1), columns, is_real, request.num_items)
        starts, ends = logits.unbind(-1)
        return QuestionAnsweringModelOutput(
            loss=loss, start_logits=starts, end_logits=ends, hidden_states=encoded.hidden_states
        )
