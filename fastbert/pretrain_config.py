"""`PretrainConfig`, the options of a pre-training run, and the presets that they go by."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from fastbert.check import InputError


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
    residual_in_fp32: bool = option(
        False, "Under autocast, keep the residual stream in float32, as Hugging Face: slower."
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
