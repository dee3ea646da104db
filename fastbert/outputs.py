"""The outputs of models: Hugging Face's field names, and the behaviour of its ModelOutput.

An output is a dataclass and an ordered mapping of its fields that are not None, so that scripts may
read `output.loss`, `output["loss"]`, `output[0]` or `output[1:]`. Each class is a pytree node,
because DistributedDataParallel, FSDP and torch.compile find the tensors inside that way.
"""

import dataclasses
from collections import OrderedDict
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


class ModelOutput(OrderedDict[str, Any]):
    """Base of the outputs; subclasses are dataclasses whose fields default to None.

    Raises TypeError if a field is deleted or popped, or the mapping is updated.
    """

    def __init_subclass__(cls) -> None:
        pytree.register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output.keys())),
            lambda values, keys: cls(**dict(zip(keys, values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__name__}",
        )

    def __post_init__(self) -> None:
        name, *others = self.__dataclass_fields__  # type: ignore[attr-defined]
        first = getattr(self, name)
        # Accelerate and DDP rebuild a mapping by calling type(output)({name: value})
        if isinstance(first, dict) and all(getattr(self, other) is None for other in others):
            object.__setattr__(self, name, None)
            self.clear()
            for name, value in first.items():
                self[name] = value

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name not in self.__dataclass_fields__:  # type: ignore[attr-defined]
            return  # an attribute that the caller adds
        if value is not None:
            super().__setitem__(name, value)
        elif name in self:
            super().__delitem__(name)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self, name, value)
        if name not in self.__dataclass_fields__:  # type: ignore[attr-defined]
            super().__setitem__(name, value)  # joins the mapping, as in Hugging Face's class

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, f.name) for f in dataclasses.fields(self))  # type: ignore[arg-type]

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        return tuple(self.values())

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{type(self).__name__}: its fields are fixed; set one to None instead")

    __delitem__ = setdefault = pop = popitem = update = _refuse


@dataclasses.dataclass
class BaseModelOutputWithPastAndCrossAttentions(ModelOutput):
    """`BaseModelOutputWithPooling` without the pooler's field, but with a decoder's, all None."""

    last_hidden_state: Tensor | None = None
    past_key_values: None = None
    cache: None = None  # its name in transformers from 5.24 on
    hidden_states: tuple[Tensor | None, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


@dataclasses.dataclass
class BaseModelOutputWithPooling(ModelOutput):
    """last_hidden_state: (B, S, H), or (T, H) packed; pooler_output: (B, H).

    hidden_states: the embeddings and each layer's output, in last_hidden_state's shape, and None
    for those that output_hidden_states leaves out.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclasses.dataclass
class BertForPreTrainingOutput(ModelOutput):
    """loss: (); prediction_logits: (B, S, V) or (T, V) packed; seq_relationship_logits: (B, 2)."""

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclasses.dataclass
class _LossAndLogits(ModelOutput):
    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclasses.dataclass
class MaskedLMOutput(_LossAndLogits):
    """loss: (); logits: (B, S, V), or (T, V) packed."""


@dataclasses.dataclass
class NextSentencePredictorOutput(_LossAndLogits):
    """loss: (); logits: (B, 2)."""


@dataclasses.dataclass
class SequenceClassifierOutput(_LossAndLogits):
    """loss: (); logits: (B, num_labels)."""


@dataclasses.dataclass
class TokenClassifierOutput(_LossAndLogits):
    """loss: (); logits: (B, S, num_labels), or (T, num_labels) packed."""


@dataclasses.dataclass
class MultipleChoiceModelOutput(_LossAndLogits):
    """loss: (); logits: (B, num_choices)."""


@dataclasses.dataclass
class QuestionAnsweringModelOutput(ModelOutput):
    """loss: (); start_logits, end_logits: (B, S), or (T,) packed."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
