"""`PretrainConfig`: the options of a pre-training run, and presets with their defaults."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from fastbert.check import InputError
from fastbert.config.options import (
    BELOW_ONE,
    INSIDE,
    POSITIVE,
    SEED,
    SHARE,
    Only,
    at_least,
    check_options,
    dashed,
    of_model,
    of_output,
    of_training,
    option,
)


class Preset(NamedTuple):
    """A named architecture, with training options that suit it.

    The small presets are for runs of minutes on a few million tokens. Such runs need no dropout,
    cannot learn from long contexts, and a next-sentence loss at full weight adds too much noise.
    """

    shape: dict[str, Any]
    learning_rate: float
    dropout: float
    max_seq_len: int
    nsp_weight: float


def _shape(layers: int, hidden: int) -> dict[str, Any]:
    # every published BERT has a head_dim of 64 and a feed-forward layer four times as wide
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


AUTO = "auto"  # is resolved when a run begins, and the run keeps the resulting precision

# Options that do not change a run's results, so a resumed run may change them.
_FREE = ("workers", "tokenize_workers", "cache", "log_every")
_PATHS = ("corpus", "tokenizer", "teacher")
_WAY_OUT = {
    "steps": "the learning rate falls to 0 at the last step, so another number is another run: "
    "omit the option to finish this run",
}
_NO_TOKENIZER = Only("tokenizer", (None,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything that determines a pre-training run; its fields are the command line's options.

    An option that is None takes the preset's value, if the preset has one. Raises InputError, which
    names the option, for an unknown value or a value out of range.
    """

    corpus: tuple[Path, ...] = option(
        (),
        "Text files or directories: one sentence per line, a blank line between documents; JSON "
        "Lines with a `text`; WikiExtractor's; also compressed. Default: Python's documentation.",
    )
    tokenizer: Path | None = option(
        None, "A tokenizer.json or vocab.txt; by default, one is trained on the corpus."
    )
    cache: Path | None = option(
        None, "Directory for the tokenised corpus, which runs may share; by default OUT/text."
    )
    vocab_size: int = option(
        8192, "Size of the vocabulary to train.", bounds=at_least(100), only=_NO_TOKENIZER
    )
    lowercase: bool = option(True, "Lower-case the text.", only=_NO_TOKENIZER)
    strip_accents: bool | None = option(
        None, "Strip accents; by default if the text is lower-cased.", only=_NO_TOKENIZER
    )
    max_seq_len: int = option(
        None,
        "Longest example, in tokens; by default 32 for tiny and mini, else 128.",
        bounds=at_least(8),
    )
    short_seq_prob: float = option(
        0.1,
        "Share of sentence pairs that are shortened on purpose.",
        bounds=SHARE,
        only=Only("objective", ("mlm+nsp",)),
    )
    objective: str = option(
        "mlm+nsp",
        "mlm+nsp: sentence pairs and both losses; mlm: full sentences, as in RoBERTa.",
        choices=("mlm+nsp", "mlm"),
    )
    mlm_probability: float = option(0.15, "Share of tokens to predict.", bounds=INSIDE)
    masking: str = option(
        "bert",
        "What to mask: bert, whole-word or span (tokens, words or spans, 80/10/10), or the noise "
        "blank, unigram or bigram-kn (Xie et al. 2017).",
    )
    gamma: float = option(
        0.8,
        "For blank and unigram, share of predicted tokens that change; for bigram-kn, a factor.",
        bounds=POSITIVE,
        only=Only("masking", ("blank", "unigram", "bigram-kn")),
    )
    segmenter: str = option(
        "characters",
        "How whole-word and span find Chinese words: characters, spaces or jieba.",
        only=Only("masking", ("whole-word", "span")),
    )
    heldout_fraction: float = option(
        0.05, "Share of documents held out for validation.", bounds=INSIDE
    )
    workers: int = option(0, "Processes that prepare batches; 0: the main one.", bounds=at_least(0))
    tokenize_workers: int | None = option(
        None,
        "Processes that tokenise; 0: the main one; by default, all cores for a large corpus.",
        bounds=at_least(0),
    )
    preset: str = of_model("mini", f"Architecture: {', '.join(PRESETS)}.", choices=PRESETS)
    dropout: float = of_model(
        None, "Dropout of hidden states and attention; by default the preset's.", bounds=BELOW_ONE
    )
    residual_in_fp32: bool = of_model(
        False, "Under autocast, keep the residual stream in float32 (slower)."
    )
    steps: int = of_training(3000, "Optimizer steps.", bounds=at_least(1))
    batch_tokens: int = of_training(1024, "Tokens in one step's batch.", bounds=at_least(1))
    accumulation: int = of_training(
        1, "Micro-batches per step (gradient accumulation), to save memory.", bounds=at_least(1)
    )
    optimizer: str = of_training(
        "adamw",
        "adamw, or lamb for large batches, which needs another learning rate.",
        choices=("adamw", "lamb"),
    )
    learning_rate: float = of_training(
        None, "Peak learning rate; by default the preset's.", bounds=at_least(0)
    )
    nsp_weight: float = of_training(
        None, "Weight of the next-sentence loss; by default the preset's.", bounds=at_least(0)
    )
    warmup_ratio: float = of_training(
        0.1, "Share of the steps in which the learning rate rises.", bounds=SHARE
    )
    weight_decay: float = of_training(
        0.01, "Weight decay, except on biases and LayerNorm.", bounds=at_least(0)
    )
    max_grad_norm: float = of_training(1.0, "Clips gradients to this norm.", bounds=POSITIVE)
    precision: str = of_training(
        "auto",
        "auto, bf16, fp16, fp32 or fp8; auto is bf16 autocast if the hardware has it, else fp32; "
        "fp8 is bf16 with the encoder's matrix products in FP8.",
        choices=(AUTO, "bf16", "fp16", "fp32", "fp8"),
    )
    seed: int = of_training(0, "Seed of weights, order, masks and dropout.", bounds=SEED)
    eval_every: int = of_output(100, "Steps between validations.", bounds=at_least(1))
    eval_batches: int = of_output(
        32, "The most held-out batches in a validation.", bounds=at_least(1)
    )
    save_every: int = of_output(100, "Steps between checkpoints.", bounds=at_least(1))
    log_every: int = of_output(20, "Steps between reports.", bounds=at_least(1))

    def __post_init__(self) -> None:
        check_options(self)
        self._complete()
        if self.gamma > 1 and self.masking != "bigram-kn":
            raise InputError(f"--gamma: expected above 0 and at most 1, got {self.gamma}")
        if self.max_seq_len is not None and self.batch_tokens < self.max_seq_len:
            raise InputError(
                f"--batch-tokens: expected at least --max-seq-len = {self.max_seq_len}, "
                f"got {self.batch_tokens}"
            )

    def _complete(self) -> None:
        """Gives options that are None the preset's values."""
        for name in PRESETS[self.preset]._fields:
            if getattr(self, name, ...) is None:
                object.__setattr__(self, name, getattr(PRESETS[self.preset], name))

    def same_run(self, **changes: Any) -> Self:
        """This run with changed options, which must not change its results.

        Raises InputError for an option that would make it another run. A path may be another name
        of the same file, or any path if the old one is gone, because the contents are compared when
        they are read (see `prepare.CHANGED`). A precision of "auto" means the run's precision.
        """
        if changes.get("precision") == AUTO:
            changes["precision"] = self.precision
        for name, value in changes.items():
            earlier = getattr(self, name)
            if value == earlier or name in _FREE or (name in _PATHS and _alike(earlier, value)):
                continue
            got, had = (_shown(v) for v in (value, earlier))
            raise InputError(
                f"--{dashed(name)} {got}: the run was started with {had}; "
                f"{_WAY_OUT.get(name, 'omit the option')}, or start a new run in another directory"
            )
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """The options as JSON values, with paths as strings; `from_json` reads them."""
        values = dataclasses.asdict(self)
        values["corpus"] = [str(path) for path in self.corpus]
        for name in ("tokenizer", "cache"):
            values[name] = None if values[name] is None else str(values[name])
        return values

    def placed(self) -> Self:
        """A copy with absolute paths, which do not depend on the working directory."""
        paths: dict[str, Any] = {
            name: path and Path(os.path.abspath(path))
            for name, path in (("tokenizer", self.tokenizer), ("cache", self.cache))
        }
        corpus = tuple(Path(os.path.abspath(path)) for path in self.corpus)
        return dataclasses.replace(self, corpus=corpus, **paths)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The configuration whose `to_json` returned `values`."""
        paths: dict[str, Any] = {"corpus": tuple(map(Path, values["corpus"]))}
        for name in ("tokenizer", "cache"):
            if values.get(name) is not None:
                paths[name] = Path(values[name])
        return cls(**{**values, **paths})


def _alike(earlier: Any, given: Any) -> bool:
    """Whether paths point to the same files; an earlier path that is gone equals any other."""
    pairs = [v if isinstance(v, tuple) else (v,) for v in (earlier, given)]
    if None in pairs[0] + pairs[1] or len(pairs[0]) != len(pairs[1]):
        return False
    return all(
        not os.path.exists(old) or os.path.realpath(old) == os.path.realpath(new)
        for old, new in zip(*pairs, strict=True)
    )


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
