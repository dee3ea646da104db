"""A run's directory: what it goes on from, who may write there, and how its end is told."""

import dataclasses
import errno
import multiprocessing
import time
from pathlib import Path

import pytest
import torch

from fastbert import checkpoint
from fastbert.check import InputError, Stopped
from fastbert.config.pretrain import PretrainConfig
from fastbert.system import locks
from fastbert.train import state as run_state
from fastbert.train.pretrain import pretrain
from fastbert.train.run_directory import read_run
from tests import processes
from tests.train.prepare.case import TEXT


def test_a_run_goes_on_from_anywhere(config, corpus, tmp_path, monkeypatch):
    """Its paths are kept absolute, compared by what they point to, and may move."""
    monkeypatch.chdir(tmp_path)
    relative = dataclasses.replace(config, corpus=(Path("corpus.txt"),), cache=None)
    pretrain(relative, Path("run"))
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    kept = read_run(tmp_path / "run", PretrainConfig)
    assert kept.corpus == (corpus,)
    for given in (corpus, Path("../corpus.txt"), Path("../deep/../corpus.txt")):
        again = kept.same_run(corpus=(given,))
        assert pretrain(again, tmp_path / "run", resume=True)["steps"] == 1
    other = tmp_path / "other.txt"
    other.write_text(TEXT + "One more.\n")
    with pytest.raises(InputError, match=r"--corpus .*other\.txt: the run was started with /"):
        kept.same_run(corpus=(other,))
    corpus.rename(tmp_path / "moved.txt")
    moved = kept.same_run(corpus=(tmp_path / "moved.txt",))
    with pytest.raises(InputError, match=r"the corpus \(or its files.*\) or the tokenizer has ch"):
        pretrain(moved, tmp_path / "run", resume=True)  # its name is a part of it
    # or the run would keep the refused path, and refuse the right one as another
    assert read_run(tmp_path / "run", PretrainConfig).corpus == (corpus,)
    (tmp_path / "new").mkdir()
    (tmp_path / "moved.txt").rename(tmp_path / "new" / "corpus.txt")
    moved = kept.same_run(corpus=(tmp_path / "new" / "corpus.txt",))
    assert pretrain(moved, tmp_path / "run", resume=True)["steps"] == 1
    assert read_run(tmp_path / "run", PretrainConfig).corpus == moved.corpus


def test_auto_is_the_precision_that_a_run_has(config, tmp_path, monkeypatch):
    """Though this hardware would begin a run in another one."""
    out, auto = tmp_path / "run", dataclasses.replace(config, precision="auto")
    pretrain(dataclasses.replace(config, precision="fp32"), out)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert pretrain(auto, out, resume=True)["steps"] == 1
    assert read_run(out, PretrainConfig).precision == "fp32"


def test_a_new_run_that_cannot_be_set_up_leaves_nothing(config, tmp_path, monkeypatch):
    import fastbert.train.pretrain as module

    def refuse(*_, **__):
        raise InputError("no such model")

    monkeypatch.setattr(module, "_set_up", refuse)
    for out, parallel, said in (("run", "ddp", "no such model"), ("other", "foo", "--parallel")):
        with pytest.raises(InputError, match=said):
            pretrain(config, tmp_path / out, parallel=parallel)
        assert not (tmp_path / out).exists()


def test_more_steps_say_what_to_do():
    with pytest.raises(InputError, match=r"--steps 20: .* started with 9; the learning rate falls"):
        PretrainConfig(steps=9).same_run(steps=20)


def test_a_stopped_run_says_how_to_go_on(config, tmp_path, monkeypatch):
    import fastbert.train.pretrain as module

    def stop(*_, **__):
        raise KeyboardInterrupt

    out = tmp_path / "my run"
    with monkeypatch.context() as patch:
        patch.setattr(module, "EagerStep", stop)
        with pytest.raises(Stopped, match=r"no checkpoint is written yet; .*--out '/.*my run'"):
            pretrain(config, out)
    pretrain(config, out, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_finish", stop)
        with pytest.raises(Stopped, match="checkpoint-1 is kept; go on with: fastbert pretrain"):
            pretrain(config, out, resume=True)


@pytest.mark.parametrize("read_first", [False, True])
def test_the_death_of_a_loaders_process_is_told(read_first, config, tmp_path, monkeypatch):
    import fastbert.train.pretrain as module

    others = {*multiprocessing.active_children()}

    def step(*_):
        [loading] = {*multiprocessing.active_children()} - others
        loading.kill()
        if read_first:  # the queue of a dead process, before its death is known
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
        time.sleep(60)

    monkeypatch.setattr(module, "as_graph", lambda *_: step)
    with pytest.raises(InputError, match=r"prepares batches was killed.* fewer --workers"):
        pretrain(dataclasses.replace(config, workers=1), tmp_path / "run")


def hold(directory):
    with locks.claimed(directory):
        print("held")
        time.sleep(60)


def test_a_live_run_is_not_resumed(config, tmp_path):
    """By another process; a loader's processes do not keep the lock of one that was killed."""
    out = tmp_path / "run"
    pretrain(config, out)
    with processes.started(hold, out) as (_, said):
        assert said.readline() == "held\n"
        with pytest.raises(InputError, match="another process is writing there"):
            pretrain(config, out, resume=True)
    assert pretrain(config, out, resume=True)["steps"] == 1


def test_weights_and_state_are_of_one_checkpoint(config, tmp_path, monkeypatch):
    """Though `latest` moves between the two."""
    out = tmp_path / "run"
    pretrain(dataclasses.replace(config, steps=2, save_every=1), out)
    read = []
    read_weights, load = checkpoint.read_weights, run_state.load

    def moved(directory):
        read.append(directory)
        weights = read_weights(directory)
        checkpoint.point_latest(out / "checkpoint-1")
        return weights

    monkeypatch.setattr(checkpoint, "read_weights", moved)
    monkeypatch.setattr(run_state, "load", lambda d, *a: read.append(d) or load(d, *a))
    pretrain(dataclasses.replace(config, steps=2, save_every=1), out, resume=True)
    assert read == [out / "checkpoint-2"] * 2
    assert checkpoint.resolve(out) == out / "checkpoint-1"
