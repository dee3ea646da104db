import pytest

from tests.modules.graphs.case import Repeats, use


@pytest.fixture
def recorder(monkeypatch):
    return use(Repeats(), monkeypatch)
