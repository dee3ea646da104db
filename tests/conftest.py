import os

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


def pytest_runtest_setup(item):
    if DEVICE == "cpu" and item.get_closest_marker("gpu"):
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param
