"""`BertConfig`, which is Hugging Face's config.json, and `PretrainConfig`, the options of a run."""

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from fastbert.check import InputError, require

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# Values of config.json that would change the mathematics, with the only one this model computes.
_ONLY = {
    "model_type": "bert",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
    "quantization_config": None,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """The shape of a BERT (Devlin et al. 2018, https://arxiv.org/abs/1810.04805), by default base.

    Names, defaults and meaning are those of Hugging Face's `BertConfig`. The labels of a classifier
    follow from num_labels (2 unless given) or from id2label, whose length is num_labels. `extra`
    holds the keys of a config.json that this model has no use for; they are written back as they
    came.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str | Callable = "gelu"
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
    num_labels: int = None  # type: ignore[assignment]  # a number once the object is made
    id2label: Mapping[int, str] = None  # type: ignore[assignment]
    label2id: Mapping[str, int] = None  # type: ignore[assignment]
    output_hidden_states: bool = False
    output_attentions: bool = False
    return_dict: bool = True
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)

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
        ):
            value = getattr(self, name)
            require(value >= 1, "BertConfig", f"{name} of at least 1", value)
        require(
            self.num_hidden_layers >= 0,
            "BertConfig",
            "num_hidden_layers of at least 0",
            self.num_hidden_layers,
        )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            value = getattr(self, name)
            require(0 <= value < 1, "BertConfig", f"{name} in [0, 1)", value)
        self._complete_labels()
        self._check_classifier()
        check_config(self)

    def _complete_labels(self) -> None:
        given, count = self.id2label, self.num_labels
        if given is None:
            names = _default_names(2 if count is None else count)
        else:
            names = {int(number): name for number, name in given.items()}
            if count is not None and names == _default_names(len(names)):
                names = _default_names(count)  # so that replace(config, num_labels=...) works
        require(
            count in (None, len(names)),
            "BertConfig",
            f"num_labels = {len(names)}, the number of names in id2label",
            count,
            "beside a new id2label give num_labels=None",
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
            "num_labels of at least 2 for single_label_classification, whose loss is else always 0",
            self.num_labels,
        )
        p = self.classifier_dropout
        require(p is None or 0 <= p < 1, "BertConfig", "classifier_dropout in [0, 1) or None", p)

    @property
    def hidden_size_per_head(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def field_names(cls) -> set[str]:
        return {field.name for field in dataclasses.fields(cls)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "BertConfig":
        """From the contents of a config.json; unknown keys are kept in `extra`."""
        for key, only in _ONLY.items():
            value = values.get(key, only)
            if value != only and (value or only):
                raise InputError(
                    f"config.json: {key} = {value!r} would change the mathematics of the model; "
                    f"only {only!r} is supported"
                )
        known = cls.field_names() - {"extra"}
        own = {key: value for key, value in values.items() if key in known}
        rest = {k: v for k, v in values.items() if k not in known and k != "model_type"}
        return cls(**own, extra=rest)

    def to_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in self.field_names()}
        del own["extra"], own["num_labels"]  # id2label says it, as in Hugging Face's config.json
        return {"model_type": "bert", **self.extra, **own}

    @classmethod
    def from_pretrained(cls, directory: str | Path, **changes: Any) -> "BertConfig":
        """Reads `directory`/config.json, as if `changes` stood there."""
        path = Path(directory) / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{directory}: no config.json there, so it is no model") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not readable as JSON ({error})") from None
        if not isinstance(values, dict):
            raise InputError(f"{path}: expected a JSON object, got {type(values).__name__}")
        if changes.keys() & {"num_labels", "id2label"}:  # not those of the checkpoint's classifier
            values = {k: v for k, v in values.items() if k not in ("id2label", "label2id")}
        try:
            return cls.from_dict(values | changes)
        except InputError:
            raise
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: {error}") from None

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes `directory`/config.json."""
        values = self.to_dict()
        if callable(self.hidden_act):
            raise ValueError(
                "BertConfig: a hidden_act that is a function has no form in config.json"
            )
        text = json.dumps(values, indent=2, sort_keys=True) + "\n"
        (Path(directory) / "config.json").write_text(text, encoding="utf-8")


def _default_names(count: int) -> dict[int, str]:
    return {number: f"LABEL_{number}" for number in range(count)}


def changed(config: Any, **changes: Any) -> Any:
    """The configuration with other values: a copy of ours, a Hugging Face object itself."""
    if isinstance(config, BertConfig):
        return dataclasses.replace(config, **changes)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def check_config(config: Any) -> None:
    """Refuses what the packed model does not compute; `config` is ours or a Hugging Face object."""
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


class Preset(NamedTuple):
    """A named architecture, and what it trains well with.

    The small ones are for runs of minutes, which see a few million tokens: too few to need dropout,
    to learn from long contexts, or to afford the noise of next-sentence prediction at full weight.
    """

    shape: dict[str, Any]
    learning_rate: float
    dropout: float
    max_seq_len: int
    nsp_weight: float


def _shape(layers: int, hidden: int) -> dict[str, Any]:
    # every published BERT has heads of 64 and a feed-forward layer four times as wide
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": hidden // 64,
        "intermediate_size": 4 * hidden,
    }


PRESETS = {
    "tiny": Preset(_shape(2, 128), 1e-3, dropout=0.0, max_seq_len=32, nsp_weight=0.1),
    "mini": Preset(_shape(4, 256), 1e-3, dropout=0.0, max_seq_len=32, nsp_weight=0.1),
    "base": Preset(_shape(12, 768), 1e-4, dropout=0.1, max_seq_len=128, nsp_weight=1.0),
    "large": Preset(_shape(24, 1024), 1e-4, dropout=0.1, max_seq_len=128, nsp_weight=1.0),
}


OPTIMIZERS = ("adamw", "lamb")
PRECISIONS = ("auto", "bf16", "fp16", "fp32")


def option(default: Any, text: str, *, hidden: bool = False) -> Any:
    """A field of a run's configuration with the help that the command line shows, unless hidden."""
    return dataclasses.field(default=default, metadata={"help": text, "hidden": hidden})


# Options that leave the results of a run alone, so that it may go on with others.
_FREE = ("workers", "tokenize_workers", "cache", "log_every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """All that determines a pre-training run; the command line's options are these fields.

    An option that is None takes the preset's value.
    """

    corpus: tuple[Path, ...] = option(
        (),
        "Text to train on: plain text (a sentence a line, a blank line between documents) or JSON "
        "Lines with a `text` field, files or directories, .gz too. Default: this Python's own "
        "documentation.",
    )
    tokenizer: Path | None = option(
        None, "An existing tokenizer.json or vocab.txt; by default one is trained on the corpus."
    )
    cache: Path | None = option(
        None,
        "Directory of the tokenised corpus, which runs with the same corpus and tokenizer share; "
        "by default OUT/text.",
    )
    vocab_size: int = option(8192, "Size of the vocabulary to train.")
    lowercase: bool = option(True, "Lower-case the text and strip accents.")
    preset: str = option("mini", f"Architecture: {', '.join(PRESETS)}.")
    max_seq_len: int = option(
        None, "Longest example, in tokens; by default the preset's, 32 for tiny and mini, else 128."
    )
    short_seq_prob: float = option(0.1, "Share of examples made shorter on purpose.")
    objective: str = option(
        "mlm+nsp",
        "mlm+nsp: sentence pairs and both losses; mlm: full sentences of one document, as RoBERTa.",
    )
    mlm_probability: float = option(0.15, "Share of tokens to predict.")
    masking: str = option(
        "bert",
        "What is predicted, and what stands there instead: bert, whole-word, span (80/10/10 of "
        "tokens, words, spans), blank, unigram, bigram-kn (Xie et al. 2017, of tokens).",
    )
    gamma: float = option(
        0.8, "Of blank, unigram, bigram-kn: how much of what is predicted is changed."
    )
    segmenter: str = option(
        "characters",
        "Chinese words, for whole-word and span: characters, spaces (the text has them), or jieba.",
    )
    steps: int = option(3000, "Optimizer steps.")
    batch_tokens: int = option(1024, "Tokens in the batch of one optimizer step.")
    accumulation: int = option(1, "Parts that a batch is run in, to save memory.")
    optimizer: str = option("adamw", "adamw, or lamb for large batches, with a rate of its own.")
    learning_rate: float = option(None, "Peak learning rate; by default the preset's.")
    dropout: float = option(
        None, "Of hidden states and attention probabilities; by default the preset's."
    )
    nsp_weight: float = option(
        None, "Of the next-sentence loss beside the MLM loss; by default the preset's."
    )
    warmup_ratio: float = option(0.1, "Share of the steps in which the learning rate rises.")
    weight_decay: float = option(0.01, "On all but biases and LayerNorm.")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm.")
    precision: str = option(
        "auto", "auto, bf16, fp16 or fp32; auto is bf16 autocast where it is fast, else fp32."
    )
    heldout_fraction: float = option(0.05, "Share of the documents held out for validation.")
    eval_every: int = option(100, "Steps between validations.")
    eval_batches: int = option(32, "Held-out batches that a validation reads at most.")
    save_every: int = option(100, "Steps between checkpoints.")
    log_every: int = option(20, "Steps between reports.")
    workers: int = option(0, "Processes that prepare batches; 0 prepares them in this one.")
    tokenize_workers: int | None = option(
        None,
        "Processes that tokenise the corpus, 0: this one; by default all cores if it is large.",
    )
    seed: int = option(0, "Seed of weights, order, masks and dropout.")

    def __post_init__(self) -> None:
        self._complete()
        least = {"steps": 1, "accumulation": 1, "vocab_size": 100, "max_seq_len": 8, "workers": 0}
        least |= dict.fromkeys(("eval_every", "eval_batches", "save_every", "log_every"), 1)
        for name, low in least.items():
            if self._is_below(name, low):
                raise InputError(f"--{_dashed(name)}: at least {low}, got {getattr(self, name)}")
        if self.tokenize_workers is not None and self.tokenize_workers < 0:
            raise InputError(f"--tokenize-workers: at least 0, got {self.tokenize_workers}")
        for name in ("short_seq_prob", "mlm_probability", "heldout_fraction", "warmup_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"--{_dashed(name)}: between 0 and 1, got {getattr(self, name)}")
        if self.objective not in ("mlm+nsp", "mlm"):
            raise InputError(f"--objective: mlm+nsp or mlm, got {self.objective!r}")
        if self._is_below("nsp_weight", 0):
            raise InputError(f"--nsp-weight: at least 0, got {self.nsp_weight}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise InputError(f"--dropout: at least 0 and below 1, got {self.dropout}")
        for name, known in (("optimizer", OPTIMIZERS), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                got = getattr(self, name)
                raise InputError(f"--{name}: one of {', '.join(known)}, got {got!r}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed: between 0 and 2^63 - 1, got {self.seed}")

    def _complete(self) -> None:
        """Takes what is None from the preset."""
        if self.preset not in PRESETS:
            raise InputError(f"--preset: one of {', '.join(PRESETS)}, got {self.preset!r}")
        for name in PRESETS[self.preset]._fields:
            if getattr(self, name, ...) is None:
                object.__setattr__(self, name, getattr(PRESETS[self.preset], name))

    def _is_below(self, name: str, low: float) -> bool:
        """A value that is still None is not."""
        value = getattr(self, name)
        return value is not None and value < low

    def same_run(self, **changes: Any) -> Self:
        """This run with other options, of which only those that leave its results alone may change.

        Raises InputError for an option that would make it another run.
        """
        for name, value in changes.items():
            if value != getattr(self, name) and name not in _FREE:
                raise InputError(
                    f"--{_dashed(name)} {value}: the run was started with {getattr(self, name)}; "
                    "leave the option out, or start a new run in another directory"
                )
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        values["corpus"] = [str(path) for path in self.corpus]
        for name in ("tokenizer", "cache"):
            values[name] = None if values[name] is None else str(values[name])
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        paths: dict[str, Any] = {"corpus": tuple(map(Path, values["corpus"]))}
        for name in ("tokenizer", "cache"):
            if values.get(name) is not None:
                paths[name] = Path(values[name])
        return cls(**{**values, **paths})


def _dashed(name: str) -> str:
    return name.replace("_", "-")
