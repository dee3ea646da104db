import pytest

from fastbert.modules import sequences
from fastbert.ops.embedding import embedding_layer_norm
from tests.modules.graphs.case import Repeats, use


@pytest.fixture
def recorder(monkeypatch):
    return use(Repeats(), monkeypatch)


@pytest.fixture(autouse=True)
def layers_compute_all_tokens(monkeypatch):
    """As in small batches, whose graphs begin with the ids and the mask."""
    monkeypatch.setattr(sequences, "FIRST_ALONE", {"cpu": float("inf")})
    monkeypatch.setattr(sequences, "FIRST_ALONE_ON_A_GPU", float("inf"))


@pytest.fixture
def embedded(monkeypatch):
    """Counts the calls of the operator, which a replay leaves out."""
    calls, run = [], embedding_layer_norm.run
    monkeypatch.setattr(embedding_layer_norm, "run", lambda call: (calls.append(1), run(call))[1])
    return calls
