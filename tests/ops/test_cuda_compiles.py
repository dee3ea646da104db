"""Compiles the CUDA sources wherever there is an nvcc; no GPU and no CUDA build of torch needed."""

import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch.utils import cpp_extension

pytestmark = pytest.mark.slow

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"


def cuda_tool(name):
    """The path of one of CUDA's programs: CUDA_HOME's, PATH's, or the one that triton brings."""
    places = [Path(cpp_extension.CUDA_HOME or "") / "bin"]
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    found = shutil.which(name) or next(
        (str(p / name) for p in places if (p / name).is_file()), None
    )
    if found is None:
        pytest.skip(f"{name} is not on PATH, in CUDA_HOME or in triton")
    return found


@pytest.fixture(scope="module", params=["compact", "gather_rows"])
def compiled(request, tmp_path_factory):
    """A CUDA source compiled for every architecture, and what ptxas said of its kernels."""
    nvcc = cuda_tool("nvcc")
    directory = tmp_path_factory.mktemp("cuda")
    # CUDA builds of torch generate this header; nothing of it is needed here
    header = directory / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    header.parent.mkdir(parents=True)
    header.touch()
    object_file = directory / f"{request.param}.o"
    command = [nvcc, "-c", str(SOURCES / f"{request.param}.cu"), "-o", str(object_file)]
    command += ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-t", "0"]
    for architecture in ARCHITECTURES:
        command += ["-gencode", f"arch={architecture.replace('sm', 'compute')},code={architecture}"]
    for include in (str(directory), *cpp_extension.include_paths()):
        command += ["-isystem", include]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"TMPDIR": str(directory)}
    )
    assert done.returncode == 0, done.stderr
    return request.param, object_file, done.stderr


def test_every_kernel_lives_in_registers(compiled):
    name, _, ptxas = compiled
    kernels_an_architecture = {"compact": 2 * 4, "gather_rows": 5}[name]  # times entry sizes
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", ptxas)
    assert len(frames) == kernels_an_architecture * len(ARCHITECTURES)
    assert set(frames) == {("0", "0", "0")}, ptxas


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_wide_rows_move_in_128_bit_vectors(compiled, architecture):
    """And a lane asks for at least three before its first store has to wait for one."""
    name, object_file, _ = compiled
    if name != "gather_rows":
        pytest.skip("compaction moves single entries")
    sass = subprocess.run(
        [cuda_tool("cuobjdump"), "-sass", "-arch", architecture, str(object_file)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (kernel,) = (text for text in sass.split("Function :")[1:] if "uint4" in text.splitlines()[0])
    moves = "".join(re.findall(r"\b([LS])(?:D|T)G\.E\.128\b", kernel))
    assert "LLLS" in moves, moves
