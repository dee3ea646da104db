"""Each example runs, offline, to its end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
LONG = "docstring_modules"  # tests/finetune/test_chain.py runs it for fewer modules

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
        sys.stdout.flush()
        os._exit(0)  # taking down a fork's copy of all that was imported takes seconds
    with open(f"{folder}/status", "w") as file:
        print(os.waitstatus_to_exitcode(os.wait()[1]), file=file)
"""


def run(examples, root):
    """Leaves a folder for each example, which holds its exit status and standard error."""
    path = os.pathsep.join(sys.path)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", FORKS, *map(str, examples)]
    subprocess.run(command, cwd=root, env=environment, check=True)
    return root


def assert_ended_well(folder):
    assert int((folder / "status").read_text()) == 0, (folder / "stderr").read_text()


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    return run([e for e in EXAMPLES if e.stem != LONG], tmp_path_factory.mktemp("examples"))


@pytest.mark.parametrize("name", [example.stem for example in EXAMPLES if example.stem != LONG])
def test_the_example_runs(name, ended):
    assert_ended_well(ended / f"{name}.py")


@pytest.mark.exhaustive
def test_the_long_example_runs(tmp_path):
    (example,) = [one for one in EXAMPLES if one.stem == LONG]
    assert_ended_well(run([example], tmp_path) / example.name)
