"""Checkpoints to resume a run from: a model's directory that also has the training state.

The file STATE has the state of the run and of its optimizer in unsharded tensors, so that any
number of processes can resume from it.
"""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from fastbert import checkpoint
from fastbert.check import InputError, first_line
from fastbert.data import save_tokenizer
from fastbert.models.base import BertPreTrainedModel
from fastbert.modules.products import fp8
from fastbert.system.files import new_directory
from fastbert.train import distributed
from fastbert.train.distributed import Ranks

STATE = "training_state.pt"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclasses.dataclass
class TrainingState:
    """The state of a run that a checkpoint keeps in addition to its tensors.

    text: fingerprint of the corpus and the tokenizer; teacher: fingerprint of the teacher model,
    None without one; step: finished optimizer steps, which is also the position in the data;
    seconds: training time so far; real_tokens: tokens read so far, without padding; skipped_steps:
    steps skipped so far because their gradients were not finite; history: the reported rows
    """

    text: str
    teacher: str | None = None
    step: int = 0
    seconds: float = 0.0
    real_tokens: int = 0
    skipped_steps: int = 0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)


def save(
    run: Path,
    model: BertPreTrainedModel,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    state: TrainingState,
    ranks: Ranks,
) -> None:
    """Writes run/checkpoint-STEP atomically, points run/latest to it, and keeps one other.

    A collective call, in which the first rank writes. Raises Unwritable.
    """
    directory = run / f"checkpoint-{state.step}"
    weights = distributed.whole_weights(model, ranks)
    saved = {
        "state": dataclasses.asdict(state),
        "scaler": scaler.state_dict(),
        "fp8": fp8.state(model),
        "rng": _rng_states(),
        "optimizer": distributed.whole_state(optimizer, ranks),
    }
    if not ranks.is_first:
        return
    with new_directory(directory) as writing:
        model.save_pretrained(writing, state_dict=weights)
        save_tokenizer(tokenizer, writing, max_length=model.config.max_position_embeddings)
        with (writing / STATE).open("wb") as file:  # given a path, torch hides the system's error
            torch.save(saved, file)
    checkpoint.point_latest(directory)
    # the others may have higher numbers, if the run lost its link `latest` and began again
    others = [path for path in _checkpoints(run) if path != directory]
    for old in others[:-1]:
        # a reader on a network file system may block the removal; the next checkpoint retries it
        shutil.rmtree(old, ignore_errors=True)


def load(
    directory: Path,
    model: BertPreTrainedModel,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> TrainingState:
    """Restores the optimizer, the scaler, the random generators and the state from a checkpoint.

    The number of ranks may differ from the number that saved the checkpoint. Raises InputError for
    a missing or damaged file. Other errors, such as too little device memory, are not converted.
    """
    path = directory / STATE
    saved = _read(path)
    try:
        state = TrainingState(**saved["state"])
        cpu, cuda = saved["rng"]["cpu"], saved["rng"].get("cuda", [])
        optimizer.load_state_dict(distributed.shard_state(optimizer, saved["optimizer"]))
    except _DAMAGE as error:
        raise _damaged(path, error) from None
    try:
        scaler.load_state_dict(saved["scaler"])
        fp8.load(model, saved["fp8"])
        torch.set_rng_state(cpu)
    except (*_DAMAGE, RuntimeError) as error:  # these three allocate no device memory
        raise _damaged(path, error) from None
    if torch.cuda.is_available() and cuda:
        torch.cuda.set_rng_state_all(cuda[: torch.cuda.device_count()])
    return state


# Raised by values of a wrong form. RuntimeError is not here, because a device raises it too.
_DAMAGE = (KeyError, IndexError, ValueError, TypeError, AttributeError)


def _read(path: Path) -> dict[str, Any]:
    """The contents of a state file, on the CPU.

    The tensors are the file's pages, so that the ranks of a host share one copy. Changing a tensor
    copies its pages and leaves the file as it is.
    """
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return saved
    except FileNotFoundError:
        raise InputError(f"{path}: missing, so the run cannot resume from it") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except MemoryError:
        raise
    except Exception as error:  # the zip archive and the unpickler raise almost anything
        if "allocate memory" in str(error):  # torch's own MemoryError
            raise
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> InputError:
    directory = path.parent
    return InputError(
        f"{path}: truncated or corrupt ({first_line(error)}); remove {directory} and point "
        f"{directory.parent}/{checkpoint.LATEST} to an older checkpoint"
    )


def discard_partial(run: Path) -> None:
    """Removes incomplete checkpoints of a run that was killed."""
    for leftover in run.glob(".checkpoint-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _rng_states() -> dict[str, Any]:
    states: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _checkpoints(run: Path) -> list[Path]:
    numbered = [(int(m[1]), path) for path in run.iterdir() if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]
