"""What `fastbert info` shows: versions, devices, and the backend of each operator."""

import importlib.metadata
import pkgutil
import platform
import shutil
import subprocess

import torch

import fastbert.ops
from fastbert import backend

_PACKAGES = ("torch", "triton", "tokenizers", "safetensors", "transformers", "numpy")


def versions() -> list[tuple[str, ...]]:
    """(name, version) of fastbert and of the software that affects its speed and numerics."""
    rows: list[tuple[str, ...]] = [
        ("fastbert", fastbert.__version__),
        ("python", platform.python_version()),
    ]
    for package in _PACKAGES:
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    return [*rows, ("CUDA of torch", torch.version.cuda or "none"), ("nvcc", _nvcc())]


def devices() -> list[tuple[str, ...]]:
    """(device, description) of the CPU and of each GPU that torch can use."""
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    counted = f"{threads} thread{'s' if threads > 1 else ''}"
    rows: list[tuple[str, ...]] = [("cpu", f"{counted}, {capability}")]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = gpu.total_memory / 2**30
        rows.append((f"cuda:{index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {memory:.0f} GiB"))
    return rows


def backends() -> list[tuple[str, ...]]:
    """(operator, device, backend, reason) for each operator and each kind of device here."""
    for module in pkgutil.iter_modules(fastbert.ops.__path__, "fastbert.ops."):
        importlib.import_module(module.name)  # registers the operators of the module
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows: list[tuple[str, ...]] = []
    for name, operator in sorted(backend.OPS.items()):
        for device in kinds:
            try:
                choice = operator.chosen(device)
                rows.append((name, device, choice.backend, choice.reason))
            except backend.BackendUnavailable as refusal:
                rows.append((name, device, "none", str(refusal)))
    return rows


def _nvcc() -> str:
    if shutil.which("nvcc") is None:
        return "not on PATH"
    printed = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    return printed.strip().splitlines()[-1] if printed.strip() else "does not run"
