import pytest

from fastbert.data.tokenized import parts


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "PART_CHARACTERS", 5_000)
