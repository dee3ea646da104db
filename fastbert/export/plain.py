"""Every model of fastbert as a plain padded model that an exporter can trace.

Encoder and heads use the modules of `fastbert/reference.py` and Hugging Face's names, so a model's
state_dict loads unchanged. Outputs equal the packed model's: zeros at padding, the lowest float32
for start and end logits there, and a pooler that reads the first real token. B sequences padded to
S tokens, H hidden, V vocabulary, L labels, C choices.
"""

import dataclasses

import torch
from torch import Tensor, nn

from fastbert import reference
from fastbert.config.bert import BertConfig
from fastbert.modules.activations import activation

INPUTS = ("input_ids", "attention_mask", "token_type_ids")

Encoded = tuple[Tensor, Tensor]  # hidden states (B, S, H), zeros at padding; is_real (B, S) bool


class Trunk(nn.Module):
    """BERT without a head: embeddings, encoder layers and, for some heads, the pooler."""

    def __init__(self, config: BertConfig, with_pooler: bool) -> None:
        super().__init__()
        self.embeddings = reference.Embeddings(config)
        self.encoder = reference.Encoder(config)
        self.pooler = reference.Pooler(config) if with_pooler else None

    def encode(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Encoded:
        """(B, S) int64 inputs -> hidden states (B, S, H), zeros at padding, and is_real (B, S)."""
        is_real = attention_mask != 0
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.embeddings(input_ids, token_type_ids, positions.expand_as(input_ids))
        x = self.encoder(x, is_real)
        return x * is_real[..., None], is_real

    def pool(self, encoded: Encoded) -> Tensor:
        """The pooler's output (B, H)."""
        assert self.pooler is not None
        return torch.tanh(self.pooler.dense(first_real(encoded)))


def first_real(encoded: Encoded) -> Tensor:
    """Hidden states (B, H) of each sequence's first real token; zeros if it has none."""
    hidden, is_real = encoded
    column = is_real.int().argmax(1)[:, None, None].expand(-1, 1, hidden.shape[2])
    return hidden.gather(1, column)[:, 0]


class Plain(nn.Module):
    """A model whose forward takes `INPUTS`, int64, and returns the tensors that `outputs` names.

    Outputs are float32 even if the parameters are fp16.
    """

    outputs: tuple[str, ...]
    has_pooler = False
    has_choices = False  # inputs are (B, C, S), else (B, S)

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        # the reference knows fewer names of activations than models do, so it gets the function
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
        """Applies the head: one tensor for each name in `outputs`."""
        raise NotImplementedError


class BareModel(Plain):
    """`BertModel` without its pooler."""

    outputs = ("last_hidden_state",)  # (B, S, H)

    def read(self, encoded: Encoded) -> tuple[Tensor, ...]:
        return (encoded[0],)


class PooledModel(Plain):
    """`BertModel` with its pooler."""

    outputs = ("last_hidden_state", "pooler_output")  # the latter (B, H)
    has_pooler = True

    def read(self, encoded: Encoded) -> tuple[Tensor, ...]:
        return encoded[0], self.bert.pool(encoded)


class MeanEmbedding(Plain):
    """The mean of the hidden states of all real tokens (Sentence-BERT: Reimers & Gurevych 2019)."""

    outputs = ("last_hidden_state", "sentence_embedding")  # the latter (B, H)

    def read(self, encoded: Encoded) -> tuple[Tensor, ...]:
        hidden, is_real = encoded
        total = hidden.float().sum(1)  # the sum over a long text would overflow fp16
        return hidden, total / is_real.sum(1, keepdim=True).clamp(min=1)


class FirstEmbedding(Plain):
    """The hidden state of the first real token."""

    outputs = MeanEmbedding.outputs

    def read(self, encoded: Encoded) -> tuple[Tensor, ...]:
        return encoded[0], first_real(encoded)


class _Heads(nn.Module):
    """Holds the heads that Hugging Face's pre-training models keep under the name `cls`."""

    predictions: reference.Predictions
    seq_relationship: nn.Linear


class _Words(Plain):
    """A model with a masked-LM head; its decoder is tied to the word embeddings if configured."""

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
    """`BertForMaskedLM`: logits of each token, zeros at padding."""

    outputs = ("logits",)  # (B, S, V)

    def read(self, encoded: Encoded) -> tuple[Tensor, ...]:
        return (self.words(encoded),)


class PreTraining(_Words):
    """`BertForPreTraining`: masked-LM and next-sentence logits."""

    outputs = ("prediction_logits", "seq_relationship_logits")  # (B, S, V) and (B, 2)
    has_pooler = True

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.cls.seq_relationship = nn.Linear(config.hidden_size, 2)

    def read(self, encoded: Encoded) -> tuple[Tensor, ...]:
        return self.words(encoded), self.cls.seq_relationship(self.bert.pool(encoded))


class NextSentence(Plain):
    """`BertForNextSentencePrediction`."""

    outputs = ("logits",)  # (B, 2)
    has_pooler = True

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.cls = _Heads()
        self.cls.seq_relationship = nn.Linear(config.hidden_size, 2)

    def read(self, encoded: Encoded) -> tuple[Tensor, ...]:
        return (self.cls.seq_relationship(self.bert.pool(encoded)),)


class SequenceClassification(Plain):
    """`BertForSequenceClassification`, whose logits are the same for every problem_type."""

    outputs = ("logits",)  # (B, L)
    has_pooler = True

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def read(self, encoded: Encoded) -> tuple[Tensor, ...]:
        return (self.classifier(self.bert.pool(encoded)),)


class TokenClassification(Plain):
    """`BertForTokenClassification`: logits of each token, zeros at padding."""

    outputs = ("logits",)  # (B, S, L)

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def read(self, encoded: Encoded) -> tuple[Tensor, ...]:
        hidden, is_real = encoded
        return (self.classifier(hidden) * is_real[..., None],)


class QuestionAnswering(Plain):
    """`BertForQuestionAnswering`; the logits at padding are the lowest float32."""

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
    """`BertForMultipleChoice`: a score for each choice, from inputs (B, C, S)."""

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
