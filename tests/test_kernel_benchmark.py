import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.operators import workloads


@pytest.mark.parametrize(
    "workload",
    [w for w in workloads("tiny", 600, "cpu", torch.float32) if "dropout 0.1" not in w.label],
    ids=lambda workload: f"{workload.operator.name} {workload.label}",
)
def test_compares_the_same_mathematics(workload):
    tensors = workload.make()
    leaves = [tensor.requires_grad_() for tensor in tensors if tensor.is_floating_point()]
    fused, plain = workload.fused(*tensors), workload.plain(*tensors)
    torch.testing.assert_close(fused, plain)
    grads = [torch.autograd.grad(y.sum(), leaves) for y in (fused, plain)]
    for a, e in zip(*grads, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def test_says_that_it_needs_a_gpu():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels"],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 2
    assert "needs an NVIDIA GPU" in done.stdout
