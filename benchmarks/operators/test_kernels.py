"""The operators under pytest-benchmark, on the CPU; pytest runs this file only if it is named."""

import pytest
import torch

from benchmarks.operators.workloads import workloads

TOKENS = 512

CASES = [
    pytest.param(body, workload, id=f"{workload.operator.name}-{workload.label}-{name}")
    for workload in workloads("base", TOKENS, "cpu", torch.float32)
    for name, body in (("fastbert", workload.fused), ("eager", workload.plain))
]


@pytest.mark.parametrize(("body", "workload"), CASES)
def test_forward(benchmark, body, workload):
    benchmark.group = f"{workload.operator.name} {workload.label} forward"
    tensors = workload.make()
    with torch.no_grad():
        benchmark(body, *tensors)


@pytest.mark.parametrize(("body", "workload"), CASES)
def test_backward(benchmark, body, workload):
    if not workload.backward:
        pytest.skip(f"{workload.operator.name} has no gradient")
    benchmark.group = f"{workload.operator.name} {workload.label} backward"
    tensors = workload.make()
    leaves = [tensor.requires_grad_() for tensor in tensors if tensor.is_floating_point()]

    def forward():
        y = body(*tensors)
        return (y, leaves, torch.ones_like(y)), {}

    benchmark.pedantic(torch.autograd.grad, setup=forward, rounds=10, warmup_rounds=1)
