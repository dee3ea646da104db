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
STUBS = Path(__file__).parent / "torch_stubs"


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


def compiled(directory, source, *options, includes=()):
    """The file that nvcc makes of a CUDA source, and what it said."""
    # CUDA builds of torch generate this header; nothing of it is needed here
    header = directory / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    header.parent.mkdir(parents=True)
    header.touch()
    out = directory / "out"
    command = [cuda_tool("nvcc"), str(source), "-o", str(out), *options]
    command += ["-std=c++20", "--expt-relaxed-constexpr"]
    for include in (*includes, str(directory), *cpp_extension.include_paths()):
        command += ["-isystem", str(include)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"TMPDIR": str(directory)}
    )
    assert done.returncode == 0, done.stderr
    return out, done.stderr


@pytest.fixture(scope="module", params=["compact", "gather_rows"])
def kernels(request, tmp_path_factory):
    """The kernels of a source for every architecture, and what ptxas said of them.

    In place of torch's headers, which cost ten times what the kernels do and change nothing in
    them, are those of torch_stubs. Each has its own names only: an include that is missing shows.
    """
    options = ["-fatbin", "-O3", "-Xptxas", "-v"]
    for architecture in ARCHITECTURES:
        options += ["-gencode", f"arch={architecture.replace('sm', 'compute')},code={architecture}"]
    directory = tmp_path_factory.mktemp("cuda")
    source = SOURCES / f"{request.param}.cu"
    return request.param, *compiled(directory, source, *options, includes=[STUBS])


def test_the_code_around_the_kernels_is_torchs(tmp_path):
    """All sources compile with torch's own headers, read once: each in a namespace of its own."""
    lines = [f'#include "{SOURCES.parent / "ops.h"}"']
    for source in sorted(SOURCES.glob("*.cu")):
        name = f"of_{source.stem}"
        lines += [f"namespace {name} {{ using namespace fastbert; }}", f"#define fastbert {name}"]
        lines += [f'#include "{source}"', "#undef fastbert"]
    everything = tmp_path / "everything.cu"
    everything.write_text("\n".join(lines) + "\n")
    compiled(tmp_path, everything, "-c", "-O0", f"-arch={ARCHITECTURES[0]}")


def test_every_kernel_lives_in_registers(kernels):
    name, _, ptxas = kernels
    kernels_an_architecture = {"compact": 2 * 4, "gather_rows": 5}[name]  # times entry sizes
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", ptxas)
    assert len(frames) == kernels_an_architecture * len(ARCHITECTURES)
    assert set(frames) == {("0", "0", "0")}, ptxas


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_wide_rows_move_in_128_bit_vectors(kernels, architecture):
    """And a lane asks for at least three before its first store has to wait for one."""
    name, file, _ = kernels
    if name != "gather_rows":
        pytest.skip("compaction moves single entries")
    sass = subprocess.run(
        [cuda_tool("cuobjdump"), "-sass", "-arch", architecture, str(file)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (kernel,) = (text for text in sass.split("Function :")[1:] if "uint4" in text.splitlines()[0])
    moves = "".join(re.findall(r"\b([LS])(?:D|T)G\.E\.128\b", kernel))
    assert "LLLS" in moves, moves
