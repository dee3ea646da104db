"""The classification models: of sequences, of tokens, and of a question's choices."""

from typing import Any, Unpack

from torch import Tensor, nn

from fastbert.check import require
from fastbert.models.bert import BertModel
from fastbert.models.inputs import ForwardOptions, Inputs, Request
from fastbert.models.labelled import LabelledModel
from fastbert.models.losses import score_classes, score_sequences
from fastbert.outputs import (
    MultipleChoiceModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from fastbert.packing import PackedBatch


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

    labels: by config.problem_type (B,) classes, (B, num_labels) numbers, or (B, num_labels) floats
    0 and 1; `score_sequences` has the details, and what a problem_type of None means.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config, config.num_labels)

    def predict(self, request: Request, labels: Tensor | None = None) -> SequenceClassifierOutput:
        request = request.only(self.config.hidden_size, first=True)
        encoded = self.encode(request)
        logits, scored = self.classifier(self.dropout(encoded.pooler_output)), None
        if labels is not None:
            scored = score_sequences(logits, labels, self.config.problem_type)
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
        logits = self.classifier(self.dropout(encoded.last_hidden_state))
        labels = request.batch.labels
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

        input_ids and the other inputs: as in `BertModel`, but (B, C, S), inputs_embeds
        (B, C, S, H); or a PackedBatch of B * C sequences, each question's choices one after the
        other, with num_choices = C. labels: (B,) int64, the right choice or -100. Raises ValueError
        for other shapes, and for a PackedBatch without num_choices.
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        if isinstance(given, Tensor):
            require(
                given.ndim == (3 if inputs_embeds is None else 4),
                "BertForMultipleChoice",
                "input_ids (batch, choices, seqlen) or inputs_embeds of one dimension more",
                tuple(given.shape),
            )
            num_choices = given.shape[1]
        require(
            num_choices is not None,
            "BertForMultipleChoice",
            "num_choices beside a PackedBatch",
            None,
        )
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        by_sequence = (x.flatten(0, 1) if isinstance(x, Tensor) else x for x in inputs)
        return self.run(Inputs._make(by_sequence), options, labels=labels, num_choices=num_choices)

    def predict(
        self, request: Request, labels: Tensor | None = None, num_choices: int = 1
    ) -> MultipleChoiceModelOutput:
        request = request.only(self.config.hidden_size, first=True)
        encoded = self.encode(request)
        logits = self.classifier(self.dropout(encoded.pooler_output)).view(-1, num_choices)
        scored = None if labels is None else score_classes(logits, labels)
        return request.output(MultipleChoiceModelOutput, encoded, logits, scored)
