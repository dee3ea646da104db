"""`BertConfig`: the contents of Hugging Face's config.json."""

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from fastbert.check import InputError, require
from fastbert.system.files import read_json

# the names in `fastbert.modules.activations`, which this layer may not import
ACTIVATIONS = (
    *("gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
    *("relu", "silu", "swish", "tanh"),
)
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# Keys of config.json that change the mathematics, with the only value that fastbert supports.
_ONLY = {
    "model_type": "bert",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "quantization_config": None,
}
# Fields on which no parameter depends: a model reads them at each call, so they may be set later.
_SETTABLE = {
    *("output_hidden_states", "output_attentions", "return_dict", "residual_in_fp32"),
    *("problem_type", "id2label", "label2id"),
}


@dataclasses.dataclass(kw_only=True)
class BertConfig:
    """The shape of BERT (Devlin et al. 2018, https://arxiv.org/abs/1810.04805), by default base.

    Names, defaults and meanings are those of Hugging Face's `BertConfig`. A classifier's labels
    follow from num_labels (2 by default) or from id2label, whose length is num_labels.

    residual_in_fp32: whether the residual stream is in float32 under autocast; None means only in
        eval mode (see `fastbert.modules.embeddings.stream_dtype`)
    extra: the keys of a config.json that fastbert does not use. They are attributes too, can be set
        (as Trainer sets use_cache), and are written back unchanged.

    Raises TypeError for an unknown option, ValueError for an unsupported value, and
    FrozenInstanceError if a field that a model only reads when it is made gets another value.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str | Callable[..., Any] = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True
    classifier_dropout: float | None = None
    problem_type: str | None = None
    num_labels: int = None  # type: ignore[assignment]  # never None once the object is made
    id2label: Mapping[int, str] = None  # type: ignore[assignment]
    label2id: Mapping[str, int] = None  # type: ignore[assignment]
    output_hidden_states: bool = False
    output_attentions: bool = False
    return_dict: bool = True
    residual_in_fp32: bool | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    model_type = "bert"  # other libraries read it
    _commit_hash = None  # transformers' pipelines read the commit of a download here

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.field_names():
            self.extra[name] = value
            return
        if name in vars(self) and value != getattr(self, name):
            if name not in _SETTABLE:
                remedy = "use dataclasses.replace before the model is made"
                raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}; {remedy}")
            value = getattr(dataclasses.replace(self, **{name: value}), name)  # checks the value
        # a copy, so that later settings do not change the caller's dictionary
        object.__setattr__(self, name, dict(value) if name == "extra" else value)

    def __getattr__(self, name: str) -> Any:
        extra = vars(self).get("extra", {})
        if name in extra:
            return extra[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __new__(cls, **fields: Any) -> "BertConfig":
        known = cls.field_names()
        for name in fields.keys() - known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise TypeError(f"BertConfig: unknown option {name!r}{hint}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
            "num_hidden_layers",
        ):
            value, least = getattr(self, name), int(name != "num_hidden_layers")
            is_possible = hasattr(value, "__index__") and value >= least
            require(is_possible, "BertConfig", f"a whole {name} of at least {least}", repr(value))
        padding = self.pad_token_id
        require(
            padding is None or (hasattr(padding, "__index__") and padding < self.vocab_size),
            "BertConfig",
            f"a whole pad_token_id below the vocab_size {self.vocab_size}, or None",
            repr(padding),
        )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            value = getattr(self, name)
            # the probabilities that `fastbert.rng` can draw
            is_possible = hasattr(value, "__float__") and 0 <= value <= 4095 / 4096
            require(is_possible, "BertConfig", f"{name} in [0, 4095/4096]", repr(value))
        for name in ("layer_norm_eps", "initializer_range"):
            value = getattr(self, name)
            is_possible = hasattr(value, "__float__") and value >= 0
            require(is_possible, "BertConfig", f"{name} of at least 0", repr(value))
        self._complete_labels()
        self._check_classifier()
        check_config(self)

    def _complete_labels(self) -> None:
        given, count = self.id2label, self.num_labels
        if given is None:
            names = _default_names(2 if count is None else count)
        else:
            require(isinstance(given, Mapping), "BertConfig", "id2label to be a mapping", given)
            names = {int(number): name for number, name in given.items()}
            if count is not None and names == _default_names(len(names)):
                # default names follow num_labels, so that replace(config, num_labels=...) works
                names = _default_names(count)
        require(
            count in (None, len(names)),
            "BertConfig",
            f"num_labels = {len(names)}, the number of names in id2label",
            count,
            "with a new id2label, pass num_labels=None",
        )
        numbers = self.label2id
        if numbers is None or given is None or len(given) != len(names):
            numbers = {name: number for number, name in names.items()}
        for field, value in (
            ("num_labels", len(names)), ("id2label", names), ("label2id", numbers)
        ):  # fmt: skip
            object.__setattr__(self, field, value)

    def _check_classifier(self) -> None:
        require(
            self.problem_type in (None, *PROBLEM_TYPES),
            "BertConfig",
            f"problem_type to be one of {', '.join(PROBLEM_TYPES)}",
            repr(self.problem_type),
        )
        require(
            self.problem_type != "single_label_classification" or self.num_labels > 1,
            "BertConfig",
            "num_labels of at least 2 for single_label_classification, or the loss is always 0",
            self.num_labels,
        )
        p = self.classifier_dropout
        require(p is None or 0 <= p < 1, "BertConfig", "classifier_dropout in [0, 1) or None", p)

    @property
    def labels(self) -> list[str]:
        """The names of the classes, in order; InputError if id2label is not numbered from 0."""
        if sorted(self.id2label) != [*range(self.num_labels)]:
            numbers = sorted(self.id2label)
            raise InputError(f"config.json: id2label: expected numbers from 0, got {numbers}")
        return [self.id2label[number] for number in range(self.num_labels)]

    @classmethod
    def field_names(cls) -> set[str]:
        return {field.name for field in dataclasses.fields(cls)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "BertConfig":
        """A configuration from the contents of a config.json; unknown keys are kept in `extra`.

        Raises InputError for an unsupported value that would change the mathematics of the model.
        """
        for key, only in _ONLY.items():
            value = values.get(key, only)
            if value != only and (value or only):
                raise InputError(
                    f"config.json: {key} = {value!r} would change the mathematics of the model; "
                    f"only {only!r} is supported"
                )
        act = values.get("hidden_act", "gelu")
        if act not in ACTIVATIONS and not callable(act):
            raise InputError(
                f"config.json: hidden_act: expected one of {', '.join(ACTIVATIONS)}, got {act!r}"
            )
        known = cls.field_names() - {"extra"}
        own = {key: value for key, value in values.items() if key in known}
        rest = {k: v for k, v in values.items() if k not in known and k != "model_type"}
        return cls(**own, extra=rest)

    def to_dict(self) -> dict[str, Any]:
        """The contents of a config.json: all fields but num_labels, and `extra`."""
        own = {name: getattr(self, name) for name in self.field_names()}
        # as in Hugging Face's config.json, num_labels is the length of id2label
        del own["extra"], own["num_labels"]
        if self.residual_in_fp32 is None:  # a key that Hugging Face's config.json does not have
            del own["residual_in_fp32"]
        return {"model_type": "bert", **self.extra, **own}

    @classmethod
    def from_pretrained(cls, directory: str | Path, **changes: Any) -> "BertConfig":
        """Reads `directory`/config.json; `changes` replace its values.

        Raises InputError if the file is missing, is not JSON or has an unsupported value.
        """
        path = Path(directory) / "config.json"
        values = read_json(path)
        if values is None:
            raise InputError(f"{directory}: has no config.json, so it is not a model")
        # new labels replace those of the checkpoint's classifier
        if changes.keys() & {"num_labels", "id2label"}:
            values = {k: v for k, v in values.items() if k not in ("id2label", "label2id")}
        try:
            return cls.from_dict(values | changes)
        except InputError as error:
            raise InputError(f"{directory}/{error}") from None
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: {error}") from None

    def to_json_string(self, use_diff: bool = True) -> str:
        """The text of a config.json, always whole; ValueError if hidden_act is a function."""
        if callable(self.hidden_act):
            raise ValueError("BertConfig: config.json cannot hold a function as hidden_act")
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `directory`/config.json; ValueError if hidden_act is a function."""
        (Path(directory) / "config.json").write_text(self.to_json_string(), encoding="utf-8")

    def get_text_config(self, **_: Any) -> Self:
        """The configuration itself, as in Hugging Face's text-only models; peft calls this."""
        return self


def _default_names(count: int) -> dict[int, str]:
    return {number: f"LABEL_{number}" for number in range(count)}


def changed(config: Any, **changes: Any) -> Any:
    """The configuration with other values: a copy of a `BertConfig`, else the same object."""
    if isinstance(config, BertConfig):
        padding, count = config.pad_token_id, changes.get("vocab_size", config.vocab_size)
        if padding is not None and padding >= count:  # its row is gone
            changes.setdefault("pad_token_id", None)
        return dataclasses.replace(config, **changes)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def check_config(config: Any) -> None:
    """Raises ValueError for values that the packed model does not support.

    config: a `BertConfig`, or Hugging Face's configuration
    """
    require(
        config.hidden_size % config.num_attention_heads == 0,
        "BertConfig",
        "hidden_size to be a multiple of num_attention_heads",
        f"{config.hidden_size} and {config.num_attention_heads}",
    )
    for name, only in _ONLY.items():
        value = getattr(config, name, only)
        require(
            value == only or not (value or only),
            "BertConfig",
            f"{name} = {only!r} (another value would change the mathematics)",
            repr(value),
        )
