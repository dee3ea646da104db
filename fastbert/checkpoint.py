"""Reads and writes weights in Hugging Face's files and under its parameter names."""

import contextlib
import difflib
import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub  # loads its parts, which takes a tenth of a second, when they are used
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastbert.check import InputError, first_line
from fastbert.system.files import new_file

WEIGHTS = "model.safetensors"
LEGACY_WEIGHTS = "pytorch_model.bin"
INDEX = ".index.json"  # suffix of either name, if the weights are in several files
LATEST, RUN = "latest", "run.json"  # in the directory of a run
DOWNLOADS = ["*.json", "*.txt", "model*.safetensors", "pytorch_model*.bin"]

# Task heads and the pooler: a checkpoint may have them where the model does not, and vice versa.
_TASK_HEADS = re.compile(r"^(cls|classifier|qa_outputs|score)\.")
_HEADS = re.compile(r"^(cls|classifier|qa_outputs|score|(bert\.)?pooler)\.")
_RENAMED = {"gamma": "weight", "beta": "bias"}
_BUFFERS = re.compile(r"(^|\.)embeddings\.(position_ids|token_type_ids)$")  # older transformers'


def latest(run: Path) -> Path | None:
    """The checkpoint that run/latest points to now; None if the run has none yet.

    Read files that belong together from the directory returned, because the link may point to
    another one a second later. Raises InputError if the link's target is gone.
    """
    link = run / LATEST
    if not link.is_symlink() and not link.exists():
        return None
    directory = link.resolve()
    if not directory.is_dir():
        raise InputError(
            f"{link}: points to {directory.name}, which is gone; point the link to another "
            "checkpoint"
        )
    return directory


def resolve(name_or_directory: str | Path, subfolder: str = "", **download: Any) -> Path:
    """A model's directory: a run's newest checkpoint, the directory named, or a hub download.

    subfolder: the model's folder inside; download: options of `huggingface_hub.snapshot_download`,
    such as revision and cache_dir. Raises InputError if there is no such directory, no config.json
    in it, or no such model.
    """
    directory = Path(name_or_directory, subfolder)
    for candidate in (directory / LATEST, directory):
        if (candidate / "config.json").is_file():
            # resolved, because a link may point to another model a second later
            return candidate.resolve() if candidate.is_symlink() else candidate
    if directory.exists():
        raise InputError(
            f"{directory}: no config.json there, so it is no model or run directory"
            f"{_unfinished(directory)}"
        )
    if _is_path(str(name_or_directory)):
        raise InputError(f"{name_or_directory}: no such directory{_meant(directory)}")
    try:
        wanted = [str(Path(subfolder, pattern)) for pattern in DOWNLOADS]
        name = str(name_or_directory)
        found = huggingface_hub.snapshot_download(name, allow_patterns=wanted, **download)
        return Path(found, subfolder)
    except (OSError, ValueError) as error:  # huggingface_hub's errors are subclasses of these
        raise InputError(
            f"{name_or_directory}: neither a directory nor a model that the hub provides "
            f"({first_line(error)})"
        ) from None


def _unfinished(run: Path) -> str:
    """The end of the error message for a run that has no `latest` yet, or for weights alone."""
    if (run / WEIGHTS).is_file():
        return "; model.config.save_pretrained writes it beside the weights that Trainer saves"
    if not (run / RUN).is_file():
        return ""
    kept = sorted(run.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    return "; the run is not finished" + (f", and {kept[-1]} is its best so far" if kept else "")


def _is_path(name: str) -> bool:
    """Whether a name means a directory, not a model on the hub such as google/bert."""
    inside = Path(name).parent
    is_there = inside != Path() and inside.is_dir()
    return is_there or name.startswith((".", "/", "~")) or name.count("/") > 1


def _meant(directory: Path) -> str:
    """The end of the error message: the most similar directory name beside a missing one."""
    with contextlib.suppress(OSError):
        names = [path.name for path in directory.parent.iterdir() if path.is_dir()]
        for name in difflib.get_close_matches(directory.name, names, 1):
            return f"; did you mean {directory.parent / name}?"
    return ""


def read_weights(directory: str | Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, or of a legacy pytorch_model.bin, by name, on the CPU.

    Either may be split into files that an index (model.safetensors.index.json) lists. Raises
    InputError if a file is missing or corrupt, or a legacy file holds more than tensors.
    """
    directory = Path(directory)
    for name in (WEIGHTS, LEGACY_WEIGHTS):
        if (directory / name).is_file():
            return _read_file(directory / name)
        index = directory / (name + INDEX)
        if index.is_file():
            weights: dict[str, Tensor] = {}
            for shard in _shards(index):
                weights |= _read_file(shard)
            return weights
    raise InputError(f"{directory}: holds neither {WEIGHTS} nor {LEGACY_WEIGHTS}")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        shards = [index.parent / Path(name).name for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{index}: not an index of weights with a weight_map") from None
    for shard in shards:
        if not shard.is_file():
            raise InputError(
                f"{shard}: missing, but {index.name} lists it; copy or download it again"
            )
    return shards


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = dict(torch.load(path, map_location="cpu", weights_only=True))
        if not all(isinstance(n, str) and isinstance(x, Tensor) for n, x in weights.items()):
            raise TypeError
        return weights
    except (pickle.UnpicklingError, TypeError):
        raise InputError(f"{path}: truncated, corrupt, or not a dictionary of tensors") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        if "allocate memory" in str(error):  # the file is not at fault
            raise
        raise InputError(f"{path}: truncated or corrupt ({first_line(error)})") from None


def load_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    source: str | Path,
    *,
    ignore_mismatched_sizes: bool = False,
) -> list[str]:
    """Copies `weights` into `model`; returns the model's parameters that `weights` lacks.

    Only parameters of heads and the pooler may be absent. Names are Hugging Face's, with or without
    the `bert.` prefix; the first releases' LayerNorm.gamma/beta are renamed, and heads of other
    models are ignored. With ignore_mismatched_sizes, a task head of another shape counts as absent.
    Raises InputError for other weights that are missing, unknown or of another shape.
    """
    own = model.state_dict()
    weights = _with_prefix_of(own, {_modern(name): tensor for name, tensor in weights.items()})
    tied = _tied_names(model)
    for alias, name in tied.items():
        if alias in weights:  # the alias of a tied weight is read only if the main name is absent
            found, main = weights.pop(alias), weights.get(name)
            is_other = main is not None and main.shape == found.shape and not main.equal(found)
            if is_other and alias.endswith("decoder.weight"):  # transformers 5 computes with it
                raise InputError(
                    f"{source}: {alias} is not {name}, to which the configuration ties it; set "
                    "tie_word_embeddings to false in its config.json, or in from_pretrained"
                )
            weights[name] = found if _is_apart(model, alias) else weights.get(name, found)

    reshaped = [n for n in weights if n in own and weights[n].shape != own[n].shape]
    if ignore_mismatched_sizes:
        for name in filter(_TASK_HEADS.match, reshaped):
            del weights[name]
        reshaped = [name for name in reshaped if name in weights]
    missing = [name for name in own if name not in weights and name not in tied]
    unknown = [
        n for n in weights if n not in own and not _HEADS.match(n) and not _BUFFERS.search(n)
    ]
    lost = [name for name in missing if not _HEADS.match(name)]
    for problem, names in (("lacks", lost), ("has unknown", unknown)):
        if names:
            raise InputError(f"{source}: the checkpoint {problem} {_some(names)}")
    if reshaped:
        name = reshaped[0]
        raise InputError(
            f"{source}: {name} has shape {tuple(weights[name].shape)}, "
            f"the configuration asks for {tuple(own[name].shape)}"
            f"{_remedy(model, name, len(weights[name]))}"
        )
    model.load_state_dict({n: t for n, t in weights.items() if n in own}, strict=False)
    return missing


def _remedy(model: Any, name: str, count: int) -> str:
    if not _TASK_HEADS.match(name):
        return ""
    rows = len(model.get_parameter(name))
    is_sized = name.startswith("classifier.") and rows == model.config.num_labels
    by_number = f"num_labels={count}, or with " if is_sized else ""
    return f"; load it with {by_number}ignore_mismatched_sizes=True to draw the head anew"


def save_weights(
    model: nn.Module, directory: str | Path, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Writes model.safetensors, with a tied parameter once, unless transformers 5 has it twice.

    weights: written instead of the model's parameters, for models that hold only shards
    """
    own = model.named_parameters() if weights is None else weights.items()
    tensors = {name: p.detach().cpu().contiguous() for name, p in own}
    for alias, name in _tied_names(model).items():
        if name in tensors:
            tensors.pop(alias, None)
            if _is_apart(model, alias):
                tensors[alias] = tensors[name].clone()
    with new_file(Path(directory) / WEIGHTS) as path:
        save_file(tensors, path, metadata={"format": "pt"})


def point_latest(directory: Path) -> None:
    """Makes the link `latest` beside `directory` point to it, atomically."""
    beside = directory.parent / f".{LATEST}.{os.getpid()}"
    beside.unlink(missing_ok=True)
    beside.symlink_to(directory.name)
    beside.replace(directory.parent / LATEST)


def _modern(name: str) -> str:
    """The current name of a parameter, whose checkpoint may be from 2018."""
    return re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: f"LayerNorm.{_RENAMED[m[1]]}", name)


def _with_prefix_of(own: Mapping[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds or removes the prefix `bert.`, so that the checkpoint's names match the model's."""
    ours = any(name.startswith("bert.") for name in own)
    theirs = any(name.startswith("bert.") for name in weights)
    if ours == theirs:
        return weights
    if theirs:
        return {name.removeprefix("bert."): tensor for name, tensor in weights.items()}
    return {n if _TASK_HEADS.match(n) else f"bert.{n}": t for n, t in weights.items()}


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Maps each further name of a tied parameter to its first name."""
    first: dict[nn.Parameter, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first[p] for name, p in named if first.setdefault(p, name) != name}


def _is_apart(model: Any, alias: str) -> bool:
    """Whether transformers 5 has a separate parameter under this name and computes with it."""
    return alias.endswith("decoder.bias") and not model.config.tie_word_embeddings


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
