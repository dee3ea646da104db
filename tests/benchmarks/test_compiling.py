"""What the compile report compiles is what operators launch, and all kernels are held to limits."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.compiling.cases import CAPABILITIES, SM80, SM90, UNITS, Case, all_cases, floats
from benchmarks.compiling.limits import TILES, Limits, limits_of
from benchmarks.compiling.report import Report, faults
from fastbert.kernels.runtime import Kernel
from fastbert.ops.bias_gelu import bias_gelu

ROOT = Path(__file__).parents[2]


def test_every_kernel_is_launched_by_a_case_on_every_gpu():
    units = (
        importlib.import_module(f"fastbert.kernels.{f.stem}") for f in ROOT.glob("kernels/*.py")
    )
    functions = (x for unit in units for x in vars(unit).values() if isinstance(x, Kernel))
    kernels = {x.__name__ for x in functions}
    assert kernels == set(TILES)
    launched = {gpu: set() for gpu in CAPABILITIES}
    for case in all_cases():
        for gpu, seen in launched.items():
            for launch in case.launches(gpu):
                assert launch.capability == gpu
                is_narrow = launch.values.get("COLS") == 1 or not TILES[launch.kernel.__name__][1]
                assert limits_of(launch).wide_loads > 0 or is_narrow
                seen.add(launch.kernel.__name__)
    # Ampere has no room for one of them, and no FP8
    assert launched[SM80] == kernels - {"_cast_transpose_kernel", "attention_single_kernel"}
    assert all(seen == kernels for gpu, seen in launched.items() if gpu != SM80)


def test_some_of_every_unit_is_compiled_by_make_test():
    assert all(any(case.quick for case in all_cases(unit)) for unit in UNITS)


def test_a_launch_is_recorded_with_its_arguments_for_its_gpu():
    x, bias = floats(3, 512, dtype="bf16"), floats(512)
    case = Case("", bias_gelu, (x, bias))
    for gpu, block in ((SM80, (4, 256, 4)), (SM90, (4, 512, 2))):
        forward, backward, sums = case.launches(gpu)
        assert forward.values["x_ptr"].data_ptr() == x.data_ptr()
        assert forward.values["y_ptr"].dtype == torch.bfloat16
        assert (forward.values["n_rows"], forward.values["x_row_stride"]) == (3, 512)
        assert [backward.values[name] for name in ("ROWS", "COLS", "num_warps")] == list(block)
        assert sums.values["K0"] == 1
    (alone,) = case._replace(trains=False).launches(SM90)
    assert alone.kernel is forward.kernel


def test_a_tiles_limit_on_registers_reaches_its_launch():
    """Without it Triton 3.6 compiles dq to 133 registers, and only three programs are resident."""
    limits = {
        launch.values["maxnreg"]
        for case in all_cases()
        for launch in case.launches(SM90)
        if launch.kernel.__name__ == "attention_dq_kernel"
    }
    assert limits == {None, 128}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spills": 3}, "3 spills, 2 allowed"),
        ({"wide_loads": 3}, "3 loads of 16 bytes, 4 required"),
        ({"matrix_products": 0}, "no tensor-core instruction"),
        ({"shared": 101}, "101 bytes of shared memory, 100 allowed"),
    ],
)
def test_what_is_beyond_a_limit_is_a_fault(change, fault):
    limits = Limits(wide_loads=4, shared=100, dots=True, spills=2, reason="a test")
    report = Report(64, 8, 0, spills=2, shared=0, wide_loads=4, matrix_products=1, instructions=9)
    assert faults(limits, report) == []
    assert faults(limits, report._replace(**change)) == [fault]


def test_local_memory_is_a_fault_where_no_spill_is_allowed():
    report = Report(64, 8, 4, 0, 0, 0, 0, 9)
    assert faults(Limits(0, 0, False, 0, ""), report) == ["12 bytes of local memory"]


@pytest.mark.slow
def test_every_kernel_keeps_to_its_limits_on_every_gpu():
    """In a process of its own: in this one, Triton interprets kernels instead of compiling them."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "compile", "--quick"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " ok " in done.stdout
