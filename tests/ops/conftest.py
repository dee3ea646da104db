import contextlib

import pytest
import torch
from torch.utils import deterministic

from fastbert import backend
from fastbert.backend import INTERPRETED

POISON = -(2**30)  # in integers; floating-point memory holds NaN

# torch keeps a list of the functions that a device context changes, made when it first needs it:
# made now, it has the real ones, also for the tests of other folders that run in this process
with torch.device("meta"):
    torch.empty(0)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fresh memory holds nonsense, so an element that nobody writes fails its test."""

    def poisoned(allocate):
        def allocate_poison(*args, **kwargs):
            out = allocate(*args, **kwargs)
            if out.is_floating_point():
                return out.fill_(float("nan"))
            return out.fill_(POISON) if out.dtype in (torch.int32, torch.int64) else out

        return allocate_poison

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def wide_blocks(monkeypatch):
    """The interpreter takes as long for a narrow block as for a wide one."""
    if INTERPRETED:
        from fastbert.kernels import gather_rows, partial_sums

        monkeypatch.setattr(partial_sums, "ADD_BLOCK", (512, 256, 8))
        monkeypatch.setattr(gather_rows, "BLOCK", (16384, 512, 4))


@pytest.fixture(
    params=[torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)],
    ids=str,
)
def dtype(request, device):
    """What kernels compute in; Triton's interpreter has no bfloat16 arithmetic."""
    if request.param == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter has no bfloat16 arithmetic")
    return request.param


@pytest.fixture(params=["triton", "reference"])
def body(request, device):
    """Runs the test over the Triton kernels and over the reference, each forced."""
    with _forced(request.param, device):
        yield request.param


@pytest.fixture
def triton(device):
    with _forced("triton", device):
        yield


@contextlib.contextmanager
def _forced(name, device):
    try:
        backend.load(name, "layer_norm", device)  # where one unit runs, all of them do
    except backend.BackendUnavailable as reason:
        pytest.skip(str(reason))
    with backend.use(name):
        yield


@pytest.fixture(params=["ext", "triton", "reference"])
def implementation(request, device, monkeypatch):
    """Runs the test over the extension, over Triton's kernels and over their twin, each forced."""
    try:
        backend.load(request.param, "compact", device)
    except backend.BackendUnavailable as reason:
        pytest.skip(str(reason))
    if request.param == "ext":
        # C++ allocates without Python's torch.empty; in this mode torch itself fills what it gives
        monkeypatch.setattr(deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True, warn_only=True)
    with backend.use(request.param):
        yield request.param
    torch.use_deterministic_algorithms(False)
