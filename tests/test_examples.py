"""Each example runs, offline, to its end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))

# A process forks one for each example, so that what all of them import is imported once.
FORKS = """
import contextlib, os, runpy, sys
import fastbert, torch, transformers.trainer
with contextlib.suppress(ImportError):
    import peft
for example in sys.argv[1:]:
    folder = os.path.basename(example)
    os.mkdir(folder)
    if os.fork() == 0:
        os.chdir(folder)
        os.dup2(os.open("stderr", os.O_WRONLY | os.O_CREAT), 2)
        sys.argv = [example]
        runpy.run_path(example, run_name="__main__")
        sys.exit()
    with open(f"{folder}/status", "w") as file:
        print(os.waitstatus_to_exitcode(os.wait()[1]), file=file)
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A folder with one for each example, which holds its exit status and standard error."""
    root = tmp_path_factory.mktemp("examples")
    path = os.pathsep.join(sys.path)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", FORKS, *map(str, EXAMPLES)]
    subprocess.run(command, cwd=root, env=environment, check=True)
    return root


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_example_runs(example, ended):
    folder = ended / example.name
    assert int((folder / "status").read_text()) == 0, (folder / "stderr").read_text()
