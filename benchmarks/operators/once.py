"""`python -m benchmarks once`: runs every operator forward and backward at small, odd sizes.

`make gpu-check ONLY="once memcheck racecheck"` runs it under compute-sanitizer. It needs an NVIDIA
GPU; with TRITON_INTERPRET=1 it runs anywhere, at the first size of each operator.
"""

import torch

from benchmarks.operators.workloads import workloads
from fastbert import backend

TOKENS = {"cuda": 389, "cpu": 41}


def main() -> None:
    """Run every operator that has kernels once, and print their names."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes = (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float32,)
    names = []
    for dtype in dtypes:
        torch.manual_seed(0)
        for workload in workloads("tiny", TOKENS[device], device, dtype):
            if device == "cpu" and workload.operator.name in names:
                continue  # one size each: the interpreter takes milliseconds per row
            tensors = [t.requires_grad_(t.is_floating_point()) for t in workload.make()]
            with backend.use("triton"):
                y = workload.fused(*tensors)
                if workload.backward:
                    y.backward(torch.randn_like(y))
            names.append(workload.operator.name)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"once: {len(names)} runs of {', '.join(dict.fromkeys(names))}")
