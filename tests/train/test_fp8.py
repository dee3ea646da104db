"""Pre-training in FP8, emulated: it learns, resumes to the same bits, and is refused elsewhere."""

import dataclasses

import pytest
import torch

from fastbert import backend
from fastbert.check import InputError
from fastbert.config.pretrain import PretrainConfig
from fastbert.train import pretrain as module
from fastbert.train import state as run_state
from fastbert.train.pretrain import pretrain


@pytest.fixture
def config(corpus, tmp_path):
    return PretrainConfig(
        corpus=(corpus,),
        cache=tmp_path / "cache",
        preset="tiny",
        vocab_size=300,
        batch_tokens=512,
        steps=6,
        save_every=3,
        eval_every=6,
        eval_batches=1,
        workers=0,
        precision="fp8",
    )


def scales(run):
    """What the last checkpoint has of the scales."""
    (one,) = torch.load(run / "checkpoint-6" / run_state.STATE, weights_only=True)["fp8"]
    return one


def test_a_run_that_was_stopped_ends_with_the_same_bits(config, tmp_path, monkeypatch):
    with backend.use("reference"):
        whole = pretrain(config, tmp_path / "whole")
        with monkeypatch.context() as stopping:
            save = run_state.save

            def stop(*arguments, **options):
                save(*arguments, **options)
                raise KeyboardInterrupt

            stopping.setattr(module.run_state, "save", stop)
            with pytest.raises(Exception, match="checkpoint-3 is kept"):
                pretrain(config, tmp_path / "stopped")
        resumed = pretrain(config, tmp_path / "stopped", resume=True)
        bf16 = pretrain(dataclasses.replace(config, precision="bf16"), tmp_path / "bf16")
    loss = "heldout_mlm_loss"
    assert resumed[loss] == whole[loss]
    of_whole, of_resumed = (scales(tmp_path / name) for name in ("whole", "stopped"))
    assert torch.equal(of_whole["history"], of_resumed["history"])
    assert torch.equal(of_whole["amax"], of_resumed["amax"])
    # the first pass began with what is assumed; those of the five after it were seen
    assert (of_whole["history"][..., 4] != of_whole["history"][..., 5]).any()
    assert 0 < abs(bf16[loss] - whole[loss]) < 0.05


def test_hardware_without_it_is_one_clear_sentence(config, tmp_path):
    with pytest.raises(InputError, match=r"fp8: needs a GPU that multiplies FP8.*use bf16"):
        pretrain(config, tmp_path / "run")
