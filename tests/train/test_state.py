"""What a checkpoint's state says when it cannot be restored, and of whom."""

import errno
import os
import re
from pathlib import Path

import pytest
import torch

from fastbert import checkpoint
from fastbert.check import InputError
from fastbert.data import train_tokenizer
from fastbert.train import distributed, state
from fastbert.train.optimizer import make_optimizer
from tests.models.pretraining_case import make_model

DAMAGED = r"training_state\.pt: truncated or corrupt .*; remove .*checkpoint-1 and point .*latest"


@pytest.fixture
def parts():
    """A model, an optimizer with a state, and a scaler."""
    model = make_model()
    optimizer = make_optimizer(model, 0.01, "adamw")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer, torch.amp.GradScaler("cpu", enabled=False)


@pytest.fixture
def directory(parts, tmp_path):
    """A checkpoint of one process, without weights."""
    directory = tmp_path / "checkpoint-1"
    directory.mkdir()
    _, optimizer, scaler = parts
    saved = {
        "state": {"text": "t", "step": 1},
        "scaler": scaler.state_dict(),
        "fp8": [],
        "rng": {"cpu": torch.get_rng_state()},
        "optimizer": optimizer.state_dict(),
    }
    torch.save(saved, directory / state.STATE)
    return directory


def without(directory, *names):
    """Saves the state again, without one of its values."""
    saved = torch.load(directory / state.STATE, weights_only=True)
    *above, last = names
    inside = saved
    for name in above:
        inside = inside[name]
    del inside[last]
    torch.save(saved, directory / state.STATE)


def test_what_latest_points_to_is_kept_beside_higher_numbers(parts, tmp_path):
    """A run whose link was removed begins again among its old checkpoints."""
    model, optimizer, scaler = parts
    for number in (90, 100):
        (tmp_path / f"checkpoint-{number}").mkdir()
    ranks = distributed.Ranks(torch.device("cpu"))
    tokenizer = train_tokenizer(["a text"], 100)
    for step, kept in ((10, ["10", "100"]), (20, ["100", "20"])):
        now = state.TrainingState("t", step=step)
        state.save(tmp_path, model, tokenizer, optimizer, scaler, now, ranks)
        assert checkpoint.latest(tmp_path).name == f"checkpoint-{step}"
        assert sorted(p.name.partition("-")[2] for p in tmp_path.glob("checkpoint-*")) == kept


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_run(parts, tmp_path, monkeypatch):
    """NFS keeps the directory of a file that a process still reads, until that is closed."""
    model, optimizer, scaler = parts

    def save(step):
        now, ranks = state.TrainingState("t", step=step), distributed.Ranks(torch.device("cpu"))
        state.save(tmp_path, model, tokenizer, optimizer, scaler, now, ranks)

    def in_use(path, **_):
        raise OSError(errno.ENOTEMPTY, "Directory not empty", path)

    tokenizer = train_tokenizer(["a text"], 100)
    save(1)
    save(2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", in_use)
        save(3)
    assert (tmp_path / "checkpoint-1").exists()
    save(4)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_a_state_comes_back(parts, directory):
    torch.manual_seed(1)
    assert state.load(directory, *parts) == state.TrainingState("t", step=1)


def test_the_scale_and_the_random_numbers_go_on(parts, tmp_path):
    """A scale that begins anew would skip steps until it is as low again."""
    model, optimizer, _ = parts
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9)
    scaler.scale(torch.ones(()))  # which makes the scale
    now, ranks = state.TrainingState("t", step=1), distributed.Ranks(torch.device("cpu"))
    tokenizer = train_tokenizer(["a text"], 100)
    torch.manual_seed(3)
    state.save(tmp_path, model, tokenizer, optimizer, scaler, now, ranks)
    expected, other = torch.rand(4), torch.amp.GradScaler("cpu")
    state.load(tmp_path / "checkpoint-1", model, optimizer, other)
    assert torch.equal(torch.rand(4), expected)
    assert other.get_scale() == 2.0**9


def of_its_own() -> int:
    """The bytes of memory that this process shares with no file."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", status)[1])


def test_the_processes_of_a_host_read_one_copy_which_keeps_its_bytes(tmp_path):
    path = tmp_path / state.STATE
    torch.save({"moments": torch.ones(2**24)}, path)
    before, content = of_its_own(), path.read_bytes()[-(2**20) :]
    moments = state._read(path)["moments"]
    assert moments.sum() == 2**24
    assert of_its_own() - before < moments.nbytes / 2
    moments.zero_()
    assert path.read_bytes()[-(2**20) :] == content


@pytest.mark.parametrize("size", [0, 7, 500, -1])
def test_a_truncated_file_is_damaged(parts, directory, size):
    path = directory / state.STATE
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=DAMAGED):
        state.load(directory, *parts)


@pytest.mark.parametrize(
    "names",
    [
        ("state",),
        ("state", "text"),
        ("rng", "cpu"),
        ("scaler",),
        ("fp8",),
        ("optimizer", "param_groups"),
        ("optimizer", "param_groups", 0),
        ("optimizer",),
    ],
)
def test_a_file_without_some_values_is_damaged(parts, directory, names):
    without(directory, *names)
    with pytest.raises(InputError, match=DAMAGED):
        state.load(directory, *parts)


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
    ],
)
def test_an_error_of_the_device_is_not_one_of_the_file(parts, directory, monkeypatch, error):
    _, optimizer, _ = parts
    monkeypatch.setattr(optimizer, "load_state_dict", failing(error))
    with pytest.raises(type(error), match="CUDA"):
        state.load(directory, *parts)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")],
)
def test_a_lack_of_memory_while_reading_is_not_one_of_the_file(
    parts, directory, monkeypatch, error
):
    monkeypatch.setattr(torch, "load", failing(error))
    with pytest.raises(type(error)):
        state.load(directory, *parts)


def test_a_file_that_cannot_be_read_or_is_missing_is_told(parts, directory, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", failing(PermissionError(errno.EACCES, "Permission denied")))
        with pytest.raises(InputError, match=r"state\.pt: cannot be read \(Permission denied\)$"):
            state.load(directory, *parts)
    (directory / state.STATE).unlink()
    with pytest.raises(InputError, match="missing, so the run cannot resume from it"):
        state.load(directory, *parts)
