import os
from pathlib import Path

import hypothesis
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is decorated

# Time limits are pytest-timeout's; an example may compile. The same examples come on every run.
hypothesis.settings.register_profile(
    "fastbert",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("fastbert")


# Started first, so that the processes of `make test` end together.
LONGEST = (
    "hf/test_modeltester.py",
    "train/test_distributed.py",
    "ops/test_cuda_compiles.py",
    "train/test_pretrain.py",
    "test_tune.py",
    "test_packaging.py",
    "models/test_compile.py",
    "models/test_triton.py",
)


def pytest_collection_modifyitems(items):
    first = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.path, len(first)))


def pytest_runtest_setup(item):
    if DEVICE == "cpu" and item.get_closest_marker("gpu"):
        pytest.skip("needs an NVIDIA GPU")


@pytest.hookimpl(trylast=True)  # after the test's result has been sent on
def pytest_runtest_logfinish():
    """A kernel that reads what it must not leaves the process without a GPU.

    All tests that follow would fail. Under pytest-xdist another process takes this one's place.
    """
    if DEVICE == "cuda" and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param
