import pytest

from fastbert.modules import sequences
from tests.modules.graphs.case import Repeats, use


@pytest.fixture
def recorder(monkeypatch):
    return use(Repeats(), monkeypatch)


@pytest.fixture(autouse=True)
def layers_compute_all_tokens(monkeypatch):
    """As in small batches, whose graphs begin with the ids and the mask."""
    monkeypatch.setattr(sequences, "FIRST_ALONE", {"cpu": float("inf")})
    monkeypatch.setattr(sequences, "FIRST_ALONE_ON_A_GPU", float("inf"))
