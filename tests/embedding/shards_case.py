"""What the tests of shards share."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]
OPTIONS = {
    "pooling": "mean",
    "max_seq_len": None,
    "truncate": False,
    "batch_tokens": 100,
    "precision": "fp32",
}


def rows_of(out: Path) -> np.ndarray:
    """All rows, by the manifest, whose every claim is checked."""
    manifest = json.loads((out / "manifest.json").read_text())
    parts, first = [], 0
    for shard in manifest["shards"]:
        path = out / shard["file"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
        assert path.stat().st_size == shard["bytes"]
        if path.suffix == ".npy":
            rows = np.load(path)
        else:
            table = pytest.importorskip("pyarrow.parquet").read_table(path)
            numbers = table["row"].to_numpy()
            assert numbers.tolist() == list(range(first, first + len(numbers)))
            rows = np.stack(table["embedding"].to_numpy())
        assert rows.dtype == np.float32
        assert (shard["first_row"], shard["rows"]) == (first, len(rows))
        first += len(rows)
        parts.append(rows)
    assert first == manifest["rows"]
    names = {shard["file"] for shard in manifest["shards"]} | {"manifest.json", "plan.json"}
    assert {path.name for path in out.iterdir()} == names
    return np.concatenate(parts)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}
