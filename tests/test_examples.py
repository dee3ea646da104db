"""Each example runs, offline, to its end."""

import os
import runpy
import sys
from pathlib import Path

import pytest

from tests import processes

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
LONG = "docstring_modules"  # tests/finetune/test_chain.py runs it for fewer modules


def run(example, folder):
    """In a process of its own."""
    os.chdir(folder)
    sys.argv = [str(example)]
    runpy.run_path(str(example), run_name="__main__")


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(example, marks=[pytest.mark.exhaustive] * (example.stem == LONG))
        for example in EXAMPLES
    ],
    ids=lambda example: example.stem,
)
def test_the_example_runs(example, tmp_path):
    status, said = processes.run(run, example, tmp_path, OMP_NUM_THREADS="1")
    assert status == 0, said
