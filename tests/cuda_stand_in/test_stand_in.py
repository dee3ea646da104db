"""The stand-in for CUDA keeps the rules of captures, Triton launches, and replays compute.

It runs where PyTorch is built for CUDA and CUDA's headers are there, as in nox's session `oldest`.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cuda_stand_in import build

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch is built without CUDA"),
    pytest.mark.skipif(not Path(build.HEADERS).exists(), reason="CUDA's headers are not here"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]

RULES = """
import ctypes, torch

def broken(work):
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            work()
    except RuntimeError:
        return True
    return False

x, side = torch.ones(8, device="cuda"), torch.cuda.Stream()
pinned, pageable = torch.ones(8).pin_memory(), torch.ones(8)

def beside():
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x + 1

def beside_and_back():
    beside()
    torch.cuda.current_stream().wait_stream(side)

works = {
    "kernels": lambda: (x + 1).sum(),
    "pinned": lambda: x.copy_(pinned, non_blocking=True),
    "joined": beside_and_back,
    "a host that waits": lambda: x.sum().item(),
    "pageable": lambda: x.copy_(pageable, non_blocking=True),
    "device": torch.cuda.synchronize,
    "unjoined": beside,
}
print([name for name, work in works.items() if broken(work)])
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = x * 2 + 1
counts = (ctypes.c_long * 5)()
library = ctypes.CDLL("libcudart.so.13")
library.stand_in_counts(counts)
before = list(counts)
graph.replay()
library.stand_in_counts(counts)
print([after - then for then, after in zip(before, counts)][:4])

from fastbert.ops.bias_gelu import bias_gelu
print(bias_gelu.chosen("cuda").backend)
x = torch.ones(4, 64, device="cuda")
library.stand_in_counts(counts)
before = list(counts)
bias_gelu(x, x[0])
library.stand_in_counts(counts)
print(counts[0] - before[0])
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand-in")
    command = [sys.executable, build.__file__, str(folder)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    pairs = (line.removeprefix("export ").split("=", 1) for line in said.splitlines())
    # Triton's part that is linked with the driver is compiled anew
    own = {"TRITON_CACHE_DIR": str(folder / "triton"), "TRITON_INTERPRET": "0"}
    return os.environ | own | {name: value.strip('"') for name, value in pairs}


def run(environment, *command, **variables):
    command = [sys.executable, "-W", "ignore", *command]
    found = subprocess.run(
        command, cwd=ROOT, env=environment | variables, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def test_a_capture_ends_by_what_cuda_refuses_in_it(environment):
    broken, counted, backend, launches = run(environment, "-c", RULES).splitlines()
    assert broken == str(["a host that waits", "pageable", "device", "unjoined"])
    assert counted == str([1, 0, 1, 0])  # a launch, none beside a capture, a replay, no wait
    assert (backend, launches) == ("triton", "1")


def test_a_replay_computes_what_was_captured(environment):
    plugin = ("-p", "tests.cuda_stand_in.host_kernels", "-p", "no:cacheprovider")
    options = ("-m", "gpu", "-k", "float32-own or recording_that_fails")
    test = "tests/modules/graphs/test_on_a_gpu.py"
    said = run(environment, "-m", "pytest", *plugin, test, *options, TRITON_INTERPRET="1")
    assert "2 passed" in said
    assert "skipped" not in said
