"""What logs and plots a run is in the extra `train`: without it, one sentence and nothing begun.

And what TensorBoard shows of a run that was resumed.
"""

import itertools
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from fastbert.check import InputError, require_libraries
from fastbert.config.pretrain import PretrainConfig
from fastbert.train.distill.run import Distillation
from fastbert.train.pretrain import pretrain
from fastbert.train.report import LIBRARIES, Reporter

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("missing", LIBRARIES)
def test_a_missing_library_is_named_before_anything_is_done(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError) as error:
        pretrain(PretrainConfig(corpus=(tmp_path / "none",)), tmp_path / "run")
    assert str(error.value) == f"pretrain needs {missing}: pip install 'fastbert[train]'"
    with pytest.raises(InputError, match=f"^distill needs {missing}: pip install"):
        require_libraries(Distillation.command, LIBRARIES, "train")
    assert not (tmp_path / "run").exists()


def test_the_extra_train_has_these_libraries_and_an_installation_without_extras_none():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = project["optional-dependencies"]["train"]
    assert [requirement.partition(">")[0] for requirement in extra] == list(LIBRARIES)
    assert not [one for one in project["dependencies"] if one.startswith(LIBRARIES)]


def test_other_commands_load_neither():
    """Patching, fine-tuning and predicting, in a process where both are missing."""
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({LIBRARIES}))\n"
        "import fastbert.cli, fastbert.finetune.train, fastbert.finetune.predict\n"
        "import fastbert.fill_mask, fastbert.train.pretrain, fastbert.train.distill.run\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_resumed_run_has_each_value_once(tmp_path, monkeypatch):
    """Those of the checkpoint's step stay, and those that came after it are written anew."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    clock = itertools.count(1_000_000_000)  # the second in a file's name sorts it
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    shown = {"skipped_steps": 0.0, "real_tokens_per_second": 1.0}
    # killed before the first checkpoint, begun anew, killed after that of step 4, and finished
    for process, (start, end) in enumerate([(0, 1), (0, 5), (4, 6), (6, 6)]):
        with Reporter(tmp_path, start=start, steps=6) as reporter:
            for step in range(start + 1, end + 1):
                reporter.training({"step": step, "loss": process, **shown}, 0.0)
                reporter.validation({"step": step, "heldout_mlm_loss": process})
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    expected = [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0), (6, 2.0)]
    for name in ("train/loss", "heldout/heldout_mlm_loss"):
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected
