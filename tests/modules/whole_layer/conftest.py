import pytest

from fastbert import backend
from fastbert.modules import whole_layer


@pytest.fixture(autouse=True)
def _kernels():
    with backend.use("triton"):
        yield


@pytest.fixture
def runs(monkeypatch):
    """What each `run` of a whole layer returned, True where it ran."""
    found, run = [], whole_layer.WholeLayer.run

    def recording(self, *arguments):
        outputs = run(self, *arguments)
        found.append(outputs is not None)
        return outputs

    monkeypatch.setattr(whole_layer.WholeLayer, "run", recording)
    return found
