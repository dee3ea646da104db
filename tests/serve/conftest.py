import pytest

from tests.serve.running import running
from tests.small_model import write_model

pytest.importorskip("fastapi")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def minilm_server(minilm):
    with running(minilm) as server:
        yield server


@pytest.fixture(scope="session")
def server(model):
    with running(model) as server:
        yield server
