"""What logs and plots a run is in the extra `train`: without it, one sentence and nothing begun."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fastbert.check import InputError
from fastbert.config.pretrain import PretrainConfig
from fastbert.train.distill.run import Distillation
from fastbert.train.pretrain import pretrain
from fastbert.train.report import LIBRARIES, require_libraries

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("missing", LIBRARIES)
def test_a_missing_library_is_named_before_anything_is_done(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError) as error:
        pretrain(PretrainConfig(corpus=(tmp_path / "none",)), tmp_path / "run")
    assert str(error.value) == f"pretrain needs {missing}: pip install 'fastbert[train]'"
    with pytest.raises(InputError, match=f"^distill needs {missing}: pip install"):
        require_libraries(Distillation.command)
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
