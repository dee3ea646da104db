"""Weights on disk: Hugging Face's files and names in and out, and directories written whole."""

import contextlib
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastbert.check import InputError

WEIGHTS = "model.safetensors"
LEGACY_WEIGHTS = "pytorch_model.bin"
LATEST = "latest"

# What a checkpoint or a model may have without the other: task heads and the pooler.
_HEADS = re.compile(r"^(cls|classifier|qa_outputs|score|(bert\.)?pooler)\.")
_BUFFERS = re.compile(r"(^|\.)embeddings\.(position_ids|token_type_ids)$")  # of older transformers


def resolve(name_or_directory: str | Path) -> Path:
    """A model's directory: the one named, a run's newest checkpoint, or a download from the hub."""
    directory = Path(name_or_directory)
    for candidate in (directory, directory / LATEST):
        if (candidate / "config.json").is_file():
            return candidate
    if directory.exists() or str(name_or_directory).startswith((".", "/", "~")):
        raise InputError(f"{directory}: no config.json there, so it is no model or run directory")
    try:
        return Path(
            snapshot_download(
                str(name_or_directory), allow_patterns=["*.json", "*.txt", WEIGHTS, LEGACY_WEIGHTS]
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{name_or_directory}: neither a directory nor a model that the hub gives ({reason})"
        ) from None


def read_weights(directory: str | Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, or of a legacy pytorch_model.bin, by name, on the CPU."""
    safe, legacy = Path(directory) / WEIGHTS, Path(directory) / LEGACY_WEIGHTS
    try:
        if safe.is_file():
            return load_file(safe)
        if legacy.is_file():
            return torch.load(legacy, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(f"{legacy}: truncated, corrupt, or holds more than tensors") from None
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        path = safe if safe.is_file() else legacy
        raise InputError(f"{path}: truncated or corrupt ({reason})") from None
    raise InputError(f"{directory}: holds neither {WEIGHTS} nor {LEGACY_WEIGHTS}")


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> list[str]:
    """Copies `weights` into `model` by Hugging Face's names; returns the names of absent heads.

    Accepts checkpoints of the bare encoder (without the `bert.` prefix) and of models with other
    heads, and the LayerNorm.gamma/beta of the first releases. Everything else that is missing,
    unknown or of another shape is an InputError.
    """
    own = model.state_dict()
    weights = _with_prefix_of(own, {_modern(name): tensor for name, tensor in weights.items()})
    tied = _tied_names(model)
    for alias, name in tied.items():
        if alias in weights:  # a tied name only counts where the main one is absent
            weights.setdefault(name, weights[alias])
            del weights[alias]

    missing = [name for name in own if name not in weights and name not in tied]
    unknown = [
        n for n in weights if n not in own and not _HEADS.match(n) and not _BUFFERS.search(n)
    ]
    reshaped = [n for n in weights if n in own and weights[n].shape != own[n].shape]
    lost = [name for name in missing if not _HEADS.match(name)]
    for problem, names in (("lacks", lost), ("has unknown", unknown)):
        if names:
            raise InputError(f"{source}: the checkpoint {problem} {_some(names)}")
    if reshaped:
        name = reshaped[0]
        raise InputError(
            f"{source}: {name} has shape {tuple(weights[name].shape)}, "
            f"the configuration asks for {tuple(own[name].shape)}"
        )
    model.load_state_dict({n: t for n, t in weights.items() if n in own}, strict=False)
    return missing


def save_weights(model: nn.Module, directory: str | Path) -> None:
    """Writes model.safetensors; a tied parameter is written once, under its first name."""
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    save_file(tensors, Path(directory) / WEIGHTS, metadata={"format": "pt"})


@contextlib.contextmanager
def new_directory(path: str | Path) -> Iterator[Path]:
    """A directory that appears at `path` whole or not at all, replacing what was there.

    The block writes into a sibling; it is renamed when the block ends, and removed if it raises.
    A failed write (a full disk, say) leaves as an InputError that names `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield beside
        for file in beside.rglob("*"):
            _sync(file)
            file.chmod(0o755 if file.is_dir() else 0o644)
        beside.chmod(0o755)  # mkdtemp's, and some libraries' files, are for their owner alone
        if path.exists():
            shutil.rmtree(path)
        beside.rename(path)
        _sync(path.parent)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(f"{path}: cannot be written ({str(error).splitlines()[0]})") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def point_latest(directory: Path) -> None:
    """Makes the link `latest` beside `directory` point to it, in one step."""
    beside = directory.parent / f".{LATEST}.{os.getpid()}"
    beside.unlink(missing_ok=True)
    beside.symlink_to(directory.name)
    beside.replace(directory.parent / LATEST)


def _sync(path: Path) -> None:
    if path.is_file() or path.is_dir():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _modern(name: str) -> str:
    return re.sub(r"LayerNorm\.(gamma|beta)$", _renamed, name)


def _renamed(match: re.Match) -> str:
    return "LayerNorm.weight" if match[1] == "gamma" else "LayerNorm.bias"


def _with_prefix_of(own: Mapping[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds or removes `bert.`, whichever makes the checkpoint's names those of the model."""
    ours = any(name.startswith("bert.") for name in own)
    theirs = any(name.startswith("bert.") for name in weights)
    if ours == theirs:
        return weights
    if theirs:
        return {name.removeprefix("bert."): tensor for name, tensor in weights.items()}
    return {name if name.startswith("cls.") else f"bert.{name}": t for name, t in weights.items()}


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Other names of a parameter -> its first name."""
    first: dict[nn.Parameter, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first[p] for name, p in named if first.setdefault(p, name) != name}


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
