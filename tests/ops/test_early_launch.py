"""Programmatic dependent launch: no kernel touches memory before those ahead of it have ended."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastbert import kernels
from fastbert.kernels import runtime

FOLDER = Path(kernels.__path__[0])


def decorated():
    for file in sorted(FOLDER.glob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                named = [getattr(d, "func", d) for d in node.decorator_list]
                if any(getattr(one, "id", "") == "kernel" for one in named):
                    yield pytest.param(node, id=node.name)


@pytest.mark.parametrize("function", list(decorated()))
def test_each_kernel_begins_by_waiting(function):
    """By the wait of the last one in a stream all those before it have ended, so all must wait."""
    first, *rest = function.body
    is_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    assert ast.unparse(rest[0] if is_docstring else first) == "begin()"


PROGRAM = """
from benchmarks.compiling.cases import all_cases
from benchmarks.compiling.report import compile_for_its_gpu

(case,) = [case for case in all_cases("partial_sums") if case.quick]
for gpu in (80, 90):
    for launch in case.launches(gpu):
        print("GPU", gpu, compile_for_its_gpu(launch).asm["ptx"])
"""


def run(program, **environment):
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""} | environment
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment,
        cwd=FOLDER.parent,
    )  # fmt: skip
    return found.returncode, found.stdout, found.stderr


@pytest.mark.parametrize("value", ["1", "0", ""])
def test_the_wait_comes_before_all_memory_and_from_hopper_on(value):
    code, out, error = run(PROGRAM, FASTBERT_PDL=value)
    assert code == 0, error
    ampere, hopper = out.split("GPU 90")
    waits = [match.start() for match in re.finditer(r"griddepcontrol\.wait", hopper)]
    assert "griddepcontrol" not in ampere
    assert len(waits) == (value == "1")
    memory = re.search(r"\b(ld|st)\.global|cp\.async", hopper)
    if waits:
        next_may_start = hopper.index("griddepcontrol.launch_dependents")
        assert waits[0] < next_may_start < memory.start()


def test_another_value_is_refused():
    code, _, error = run("import fastbert.kernels.runtime", FASTBERT_PDL="yes")
    assert code == 1
    assert 'FASTBERT_PDL: expected "0" or "1", got \'yes\'' in error


def test_the_interpreter_waits_for_nothing():
    program = "from fastbert.kernels.runtime import STARTS_EARLY; print(STARTS_EARLY.value)"
    assert run(program, FASTBERT_PDL="1", TRITON_INTERPRET="1")[1] == "False\n"
    assert run(program, FASTBERT_PDL="1")[1] == "True\n"


@pytest.mark.parametrize(("capability", "is_early"), [((8, 0), False), ((9, 0), True)])
def test_only_gpus_that_have_it_are_asked(capability, is_early, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(runtime.STARTS_EARLY, "value", True)
    runtime._options.cache_clear()
    assert runtime._options(0).get("launch_pdl", False) == is_early
    monkeypatch.undo()
    runtime._options.cache_clear()
    assert runtime._options(0) == runtime.OPTIONS
    runtime._options.cache_clear()
