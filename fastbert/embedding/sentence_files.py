"""Reads the files of sentence-transformers that define how a model's texts become vectors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastbert.check import InputError
from fastbert.config.options import POOLINGS
from fastbert.system.files import read_json

_KNOWN = ("Transformer", "Pooling", "Normalize")  # modules that fastbert computes
_NO_LIMIT = 1e30  # tokens; transformers writes this number if a tokenizer has no limit
_LEGACY = "pooling_mode_"  # prefix of a mode in files of older releases
_LEGACY_NAMES = {"cls_token": "cls", "mean_tokens": "mean"}


class SentenceFiles(NamedTuple):
    """pooling: one of POOLINGS, None if no file has it; normalizes: whether vectors are scaled to
    length 1; max_seq_len: in tokens, perhaps more than the model's limit, or None; prompts: what to
    put before a text, by name; default_prompt: name of the default prompt, or None.
    """

    pooling: str | None = None
    normalizes: bool = False
    max_seq_len: int | None = None
    prompts: Mapping[str, str] = {}
    default_prompt: str | None = None

    @classmethod
    def read(cls, directory: Path) -> "SentenceFiles":
        """Reads a model's directory; InputError for a pipeline that fastbert cannot compute."""
        file = directory / "modules.json"
        if not file.is_file():
            return cls()
        modules = read_json(file, list)
        pooling, pools, normalizes = None, False, False
        for module in modules:
            if not isinstance(module, dict):
                raise InputError(f"{file}: expected a list of modules")
            kind = str(module.get("type")).rpartition(".")[2]
            if kind not in _KNOWN:
                raise InputError(
                    f"{file}: the model has a {kind} module, which fastbert cannot compute"
                )
            normalizes |= kind == "Normalize"
            if kind == "Pooling":
                pools = True
                pooling = _pooling(directory / str(module.get("path")) / "config.json")
        max_seq_len = _max_seq_len(directory)
        if not pools:
            return cls(max_seq_len=max_seq_len)  # a cross-encoder has no pooling
        about = read_json(directory / "sentence_bert_config.json") or {}
        prompts = read_json(directory / "config_sentence_transformers.json") or {}
        if about.get("do_lower_case"):
            raise InputError(
                f"{directory}: do_lower_case in sentence_bert_config.json is not supported; "
                "use a tokenizer that lower-cases"
            )
        default = prompts.get("default_prompt_name")
        named = prompts.get("prompts") or {}
        if default is not None and default not in named:
            raise InputError(
                f"{directory}: config_sentence_transformers.json has no prompt {default!r}, which "
                "it names as the default"
            )
        return cls(pooling, normalizes, max_seq_len, named, default)


def _max_seq_len(directory: Path) -> int | None:
    """The most tokens of a text; sentence-transformers 6 only writes it to the tokenizer's file."""
    for name, key in (
        ("sentence_bert_config.json", "max_seq_length"),
        ("tokenizer_config.json", "model_max_length"),
    ):
        limit = (read_json(directory / name) or {}).get(key)
        if limit is None:
            continue
        if type(limit) not in (int, float) or not limit >= 3:  # `not`: for NaN, too
            raise InputError(f"{directory / name}: {key}: expected at least 3, got {limit!r}")
        return None if limit >= _NO_LIMIT else int(limit)
    return None


def _pooling(file: Path) -> str:
    config: Any = read_json(file) or {}
    found = config.get("pooling_mode")
    modes: list[str] = found if isinstance(found, list) else [found]
    if found is None:
        names = [
            k.removeprefix(_LEGACY) for k, on in config.items() if k.startswith(_LEGACY) and on
        ]
        modes = [_LEGACY_NAMES.get(name, name) for name in names] or ["mean"]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise InputError(
            f"{file}: the model uses the pooling {' and '.join(map(str, modes))}; fastbert "
            f"computes {' or '.join(POOLINGS)}"
        )
    if config.get("include_prompt", True) is False:
        raise InputError(f"{file}: include_prompt = false is not supported")
    return modes[0]
