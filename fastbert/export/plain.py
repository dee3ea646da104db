"""Every model of fastbert as a plain padded one, which an exporter can trace.

The trunk and the heads' parts are `fastbert/reference.py`'s, under Hugging Face's names, so that a
model's state_dict loads as it is. What comes out is what the packed model gives: zeros at padding,
the lowest number for a span's ends there, and a pooler that reads the first real token. B sequences
padded to S tokens, H hidden, V vocabulary, L labels, C choices.
"""

import dataclasses

import torch
from torch import Tensor, nn

from fastbert import reference
from fastbert.config.bert import BertConfig
from fastbert.modules.activations import activation

INPUTS = ("input_ids", "attention_mask", "token_type_ids")

Encoded = tuple[Tensor, Tensor]  # hidden states (B, S, H), zeros at padding, and what is real


class Trunk(nn.Module):
    """Embeddings, layers, and a pooler where the model has one."""

    def __init__(self, config: BertConfig, with_pooler: bool) -> None:
        super().__init__()
        self.embeddings = reference.Embeddings(config)
        self.encoder = reference.Encoder(config)
        self.pooler = reference.Pooler(config) if with_pooler else None

    def encode(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Encoded:
        is_real = attention_mask != 0
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.embeddings(input_ids, token_type_ids, positions.expand_as(input_ids))
        x = self.encoder(x, is_real)
        return x * is_real[..., None], is_real

    def pool(self, encoded: Encoded) -> Tensor:
        """(B, H)"""
        assert self.pooler is not None
        return torch.tanh(self.pooler.dense(first_real(encoded)))


def first_real(encoded: Encoded) -> Tensor:
    """(B, H), the hidden state of each sequence's first real token, zeros where there is none."""
    hidden, is_real = encoded
    column = is_real.int().argmax(1)[:, None, None].expand(-1, 1, hidden.shape[2])
    return hidden.gather(1, column)[:, 0]


class Plain(nn.Module):
    """A model whose forward takes `INPUTS`, int64, and gives the tensors that `outputs` names.

    They are float32 whatever the parameters are.
    """

    outputs: tuple[str, ...]
    has_pooler = False
    has_choices = False  # inputs are (B, C, S), else (B, S)

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        # by its name the reference knows fewer functions than models do
        config = dataclasses.replace(config, hidden_act=activation(config.hidden_act))
        self.bert = Trunk(config, self.has_pooler)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> dict[str, Tensor]:
        encoded = self.bert.encode(input_ids, attention_mask, token_type_ids)
        return self.named(*self.read(encoded))

    def named(self, *tensors: Tensor) -> dict[str, Tensor]:
        return {name: x.float() for name, x in zip(self.outputs, tensors, strict=True)}

    def read(self, encoded: Encoded) -> tuple[Tensor, ...]:
        """What the head makes of the hidden states."""
        raise NotImplementedError


class BareModel(Plain):
    outputs = ("last_hidden_state",)  # (B, S, H)

    def read(self, encoded: Encoded) -> tuple[Tensor, ...]:
        return (encoded[0],)


class PooledModel(Plain):
    outputs = ("last_hidden_state", "pooler_output")  # the latter (B, H)
    has_pooler = True

    def read(self, encoded: Encoded) -> tuple[Tensor, ...]:
        return encoded[0], self.bert.pool(encoded)


class MeanEmbedding(Plain):
    """Sentence-BERT's mean over all real tokens (Reimers & Gurevych 2019)."""

    outputs = ("last_hidden_state", "sentence_embedding")  # the latter (B, H)

    def read(self, encoded: Encoded) -> tuple[Tensor, ...]:
        hidden, is_real = encoded
        total = hidden.float().sum(1)  # 16 bits would overflow over a long text
        return hidden, total / is_real.sum(1, keepdim=True).clamp(min=1)


class FirstEmbedding(Plain):
    """The hidden state of the first real token."""

    outputs = MeanEmbedding.outputs

    def read(self, encoded: Encoded) -> tuple[Tensor, ...]:
        return encoded[0], first_real(encoded)


class _Heads(nn.Module):
    """What a pre-trained model keeps under the name `cls`."""

    predictions: reference.Predictions
    seq_relationship: nn.Linear


class _Words(Plain):
    """A decoder to the vocabulary, tied to the word embeddings as the model's is."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        config = dataclasses.replace(config, hidden_act=activation(config.hidden_act))
        self.cls = _Heads()
        self.cls.predictions = reference.Predictions(config)
        if config.tie_word_embeddings:
            words = self.bert.embeddings.word_embeddings
            self.cls.predictions.decoder.weight = words.weight

    def words(self, encoded: Encoded) -> Tensor:
        hidden, is_real = encoded
        return self.cls.predictions(hidden) * is_real[..., None]


class MaskedLM(_Words):
    outputs = ("logits",)  # (B, S, V)

    def read(self, encoded: Encoded) -> tuple[Tensor, ...]:
        return (self.words(encoded),)


class PreTraining(_Words):
    outputs = ("prediction_logits", "seq_relationship_logits")  # (B, S, V) and (B, 2)
    has_pooler = True

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.cls.seq_relationship = nn.Linear(config.hidden_size, 2)

    def read(self, encoded: Encoded) -> tuple[Tensor, ...]:
        return self.words(encoded), self.cls.seq_relationship(self.bert.pool(encoded))


class NextSentence(Plain):
    outputs = ("logits",)  # (B, 2)
    has_pooler = True

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.cls = _Heads()
        self.cls.seq_relationship = nn.Linear(config.hidden_size, 2)

    def read(self, encoded: Encoded) -> tuple[Tensor, ...]:
        return (self.cls.seq_relationship(self.bert.pool(encoded)),)


class SequenceClassification(Plain):
    """Of one label, of several, and regression: the scores are the same linear ones."""

    outputs = ("logits",)  # (B, L)
    has_pooler = True

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def read(self, encoded: Encoded) -> tuple[Tensor, ...]:
        return (self.classifier(self.bert.pool(encoded)),)


class TokenClassification(Plain):
    outputs = ("logits",)  # (B, S, L)

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def read(self, encoded: Encoded) -> tuple[Tensor, ...]:
        hidden, is_real = encoded
        return (self.classifier(hidden) * is_real[..., None],)


class QuestionAnswering(Plain):
    outputs = ("start_logits", "end_logits")  # (B, S) each

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)

    def read(self, encoded: Encoded) -> tuple[Tensor, ...]:
        hidden, is_real = encoded
        scores = self.qa_outputs(hidden).float()
        scores = scores.masked_fill(~is_real[..., None], torch.finfo(torch.float32).min)
        return scores[..., 0], scores[..., 1]


class MultipleChoice(Plain):
    outputs = ("logits",)  # (B, C)
    has_pooler = True
    has_choices = True

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, 1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> dict[str, Tensor]:
        by_sequence = (x.flatten(0, 1) for x in (input_ids, attention_mask, token_type_ids))
        pooled = self.bert.pool(self.bert.encode(*by_sequence))
        return self.named(self.classifier(pooled).view(input_ids.shape[:2]))


HEADS: dict[str, type[Plain]] = {
    "BertModel": PooledModel,
    "BertForPreTraining": PreTraining,
    "BertForMaskedLM": MaskedLM,
    "BertForNextSentencePrediction": NextSentence,
    "BertForSequenceClassification": SequenceClassification,
    "BertForTokenClassification": TokenClassification,
    "BertForQuestionAnswering": QuestionAnswering,
    "BertForMultipleChoice": MultipleChoice,
}
EMBEDDINGS: dict[str, type[Plain]] = {"mean": MeanEmbedding, "cls": FirstEmbedding}
