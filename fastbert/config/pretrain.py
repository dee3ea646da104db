"""`PretrainConfig`: the options of a pre-training run."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from fastbert.check import InputError
from fastbert.config.bert import BertConfig
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
from fastbert.config.presets import PRESETS, nearest

AUTO = "auto"  # is resolved when a run begins, and the run keeps the resulting precision

# Options that do not change a run's results, so a resumed run may change them.
_FREE = ("workers", "tokenize_workers", "cache", "log_every")
_PATHS = ("corpus", "tokenizer", "model", "teacher")
_WAY_OUT = {
    "steps": "the learning rate falls to 0 at the last step, so another number is another run: "
    "omit the option to finish this run",
}
_NO_TOKENIZER = Only("tokenizer", (None,))
_OF_MODEL = ("tokenizer", "vocab_size", "lowercase", "strip_accents", "preset")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Everything that determines a pre-training run; its fields are the command line's options.

    An option that is None takes the preset's value, if the preset has one; with a model,
    `fitted_to` gives these values. Raises InputError, which names the option, for an unknown value,
    a value out of range, or an option that the model determines.
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
        "Longest example, in tokens; by default 32 for a width of tiny or mini, else 128.",
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
    model: str | None = of_model(
        None,
        "Directory of a model or a run, or a hub name, to train further; by default a new model.",
    )
    preset: str = of_model(
        None, f"Architecture: {', '.join(PRESETS)}; by default mini.", choices=PRESETS
    )
    dropout: float = of_model(
        None,
        "Dropout of hidden states and attention; by default the preset's or the model's.",
        bounds=BELOW_ONE,
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
        None,
        "Peak learning rate; by default that of the preset, or of the nearest in width to --model.",
        bounds=at_least(0),
    )
    nsp_weight: float = of_training(
        None,
        "Weight of the next-sentence loss; by default from the same preset.",
        bounds=at_least(0),
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
        if self.model is not None:
            self._require_free()
        self._complete()
        if self.gamma > 1 and self.masking != "bigram-kn":
            raise InputError(f"--gamma: expected above 0 and at most 1, got {self.gamma}")
        if self.max_seq_len is not None and self.batch_tokens < self.max_seq_len:
            raise InputError(
                f"--batch-tokens: expected at least --max-seq-len = {self.max_seq_len}, "
                f"got {self.batch_tokens}"
            )

    def _require_free(self) -> None:
        """Raises InputError for an option that the model determines."""
        for field in dataclasses.fields(self):
            if field.name in _OF_MODEL and getattr(self, field.name) != field.default:
                name = dashed(field.name)
                raise InputError(f"--{name}: not with --model, which has its own; omit one of them")

    def _complete(self) -> None:
        """Gives options that are None the preset's values, unless a model determines them."""
        if self.model is None:
            preset = self.preset or "mini"
            values = {"preset": preset} | PRESETS[preset]._asdict()
            for field in dataclasses.fields(self):
                if field.name in values and getattr(self, field.name) is None:
                    object.__setattr__(self, field.name, values[field.name])

    def fitted_to(self, model: BertConfig) -> Self:
        """A copy in which values that suit the model replace the options that are None.

        Raises InputError if the model reads fewer tokens than max_seq_len.
        """
        near, longest = PRESETS[nearest(model.hidden_size)], model.max_position_embeddings
        return self._fitted(
            longest,
            learning_rate=near.learning_rate,
            nsp_weight=near.nsp_weight,
            max_seq_len=min(near.max_seq_len, longest),
        )

    def _fitted(self, longest: int, **follows: Any) -> Self:
        """A copy in which `follows` replaces the options that are None; longest: the model's."""
        changed = {name: v for name, v in follows.items() if getattr(self, name) is None}
        fitted = dataclasses.replace(self, **changed)
        if fitted.max_seq_len > longest:
            raise InputError(
                f"--max-seq-len {fitted.max_seq_len}: the model reads at most {longest} tokens"
            )
        return fitted

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
        paths["model"] = None if self.model is None else placed(self.model)
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


def placed(model: str) -> str:
    """The absolute path of a model that is on disk; a name on the hub stays as it is."""
    return os.path.abspath(model) if os.path.exists(model) else model


def _alike(earlier: Any, given: Any) -> bool:
    """Whether paths point to the same files; an earlier path that is gone equals any other.

    A name on the hub, which is no absolute path, equals only itself.
    """
    pairs = [v if isinstance(v, tuple) else (v,) for v in (earlier, given)]
    if None in pairs[0] + pairs[1] or len(pairs[0]) != len(pairs[1]):
        return False
    return all(
        os.path.isabs(old)
        and (not os.path.exists(old) or os.path.realpath(old) == os.path.realpath(new))
        for old, new in zip(*pairs, strict=True)
    )


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
