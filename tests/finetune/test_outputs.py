"""Every command with its output on an input, a link, a FIFO, a full disk, a read-only directory."""

import contextlib
import itertools
import json
import os
import resource
import shutil
import signal
import tempfile
import threading
from pathlib import Path

import hypothesis
import hypothesis.strategies as st

from tests import processes
from tests.command_line import call
from tests.command_line import main as fastbert_alone
from tests.finetune.case import ROWS, command

FILES = {"predict": "train.csv", "embed": "texts.txt"}
DIRECTORIES = {"finetune": "model", "pretrain": "corpus.txt", "distill": "teacher"}
KINDS = ("input", "link", "fifo", "full", "read-only")
ENDING = {"predict": ".jsonl", "embed": ".npy"}


def snapshot(root: Path) -> dict:
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in sorted(root.rglob("*"))
    }


@contextlib.contextmanager
def as_nobody():
    """The superuser may write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@contextlib.contextmanager
def small_files(limit: int):
    """A limit on the size of files fails a write as a full disk does, without needing one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@hypothesis.given(st.sampled_from(list(itertools.product([*FILES, *DIRECTORIES], KINDS))))
@hypothesis.settings(max_examples=25)
def test_no_output_costs_an_input(place, case):
    name, kind = case
    outs = Path(tempfile.mkdtemp(dir=place.parent))
    outs.chmod(0o755)
    before = snapshot(place)
    is_file = name in FILES
    out = outs / ("out" + ENDING.get(name, ""))
    around, read = contextlib.nullcontext(), []
    if kind == "input":
        out = place / (FILES | DIRECTORIES)[name]
        if name == "embed":  # by a name that it would take
            out = outs / "link.npy"
            out.symlink_to(place / "texts.txt")
    elif kind == "link":
        out.symlink_to(outs / "target")
    elif kind == "fifo" and is_file:
        os.mkfifo(out)
        reader = threading.Thread(target=lambda: read.append(out.read_bytes()))
        reader.start()
    elif kind == "fifo":
        os.mkfifo(out)
    elif kind == "full" and is_file and name == "predict":
        out = Path("/dev/full")
    elif kind == "full":
        around = small_files(100)
    else:
        outs.chmod(0o555)
        around = as_nobody()
    with around:
        status, _, error = call(*command(place, name), "--out", out)
    good = kind == "link" or (kind == "fifo" and is_file)
    assert status == (0 if good else 2), (case, error)
    assert snapshot(place) == before
    if good and kind == "fifo":
        reader.join()
        assert (read[0].count(b"\n") == 2) if name == "predict" else read[0].startswith(b"\x93NUM")
    elif good:
        assert out.is_symlink()
        assert (outs / "target").exists()
    else:
        last = error.splitlines()[-1]
        assert last.startswith("fastbert: error: ")
        assert "Traceback" not in error
        left = [path for path in outs.rglob("*") if path.is_file() and not path.is_symlink()]
        assert not [p for p in left if kind != "full" or p.name == out.name], left
    shutil.rmtree(outs)


def test_every_case_of_the_property(place):
    """The draws above are a part; these are the two that lost data."""
    status, _, error = call(*command(place, "predict"), "--out", place / "train.csv")
    assert status == 2
    assert "is the input" in error
    assert (place / "train.csv").read_text() == ROWS


def test_two_runs_into_one_directory_at_once_are_one(place, tmp_path):
    run = (fastbert_alone, *command(place, "finetune"), "--out", tmp_path / "run")
    with processes.started(*run) as (one, by_one), processes.started(*run) as (other, by_other):
        said = by_one.read() + by_other.read()
        one.join()
        other.join()
    assert sorted((one.exitcode, other.exitcode)) == [0, 2], said
    assert "another process is writing there" in said or "holds a run" in said
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 1


def test_an_interrupted_run_does_not_look_finished(place, tmp_path, monkeypatch):
    from fastbert.finetune.train import _Trainer

    step, out = _Trainer._step, tmp_path / "run"

    def stop(self, numbers):
        if self.step == 2:
            raise KeyboardInterrupt
        return step(self, numbers)

    arguments = command(place, "finetune")
    arguments[-1] = 5
    with monkeypatch.context() as patch:
        patch.setattr(_Trainer, "_step", stop)
        status, _, error = call(*arguments, "--out", out)
    assert status == 130
    assert "the best epoch so far, is kept" in error
    assert "--overwrite starts again" in error
    assert not (out / "latest").exists()
    status, _, error = call("predict", "--model", out, "--input", place / "train.csv", "--out",
                            tmp_path / "x.jsonl")  # fmt: skip
    assert (status, "the run is not finished" in error) == (2, True)
    status, _, error = call(*arguments, "--out", out)
    assert (status, "holds a run that was not finished" in error) == (2, True)
    assert call(*arguments, "--out", out, "--overwrite")[0] == 0
    assert (out / "latest").exists()
