"""Kills of `fastbert embed` come when the work has gone so far, and what is left is the same."""

import random
import signal
import sys

import pytest

from benchmarks.serving import embed_kills
from benchmarks.serving.embed_kills import Moment, moments, run, shards

SLOW = """
import pathlib, sys, time
out = pathlib.Path(sys.argv[1])
out.mkdir(exist_ok=True)
for number in range(8):
    if not (out / f"shard-{number}").exists():
        time.sleep(0.3)
        (out / f"shard-{number}").write_text(f"{number} {time.time() if 'odd' in sys.argv else ''}")
"""


def test_kills_are_spread_over_the_whole_run():
    found = moments(random.Random(0), 2000, 100, 3.0)
    begins = [kill.shards for kill in found]
    assert begins == sorted(begins)
    assert set(begins) == set(range(100))
    assert sum(begins) / 2000 == pytest.approx(49.5, abs=2)
    seconds = [kill.seconds for kill in found]
    assert (min(seconds), max(seconds)) == pytest.approx((0, 3), abs=0.02)


def test_a_run_is_killed_once_its_shards_are_there(tmp_path):
    program = [sys.executable, "-c", SLOW, str(tmp_path / "out")]
    for wanted in (0, 3, 6):
        status, _, peak = run(program, tmp_path / "out", Moment(wanted, 0.05))
        assert status == -signal.SIGKILL
        assert wanted <= len(shards(tmp_path / "out")) <= wanted + 1
        assert 1 < peak < 100
        for path in shards(tmp_path / "out"):
            path.unlink()
    status, seconds, _ = run(program, tmp_path / "out")
    assert (status, len(shards(tmp_path / "out"))) == (0, 8)
    assert seconds > 2.4
    assert 0.25 < embed_kills.seconds_of_a_shard(tmp_path / "out") < 1.5


@pytest.mark.parametrize("kind", ["even", "odd"])
def test_the_files_after_the_kills_are_compared(tmp_path, monkeypatch, kind):
    """A stand-in for `fastbert embed`, which tests/embedding kills: `odd` never writes the same."""
    monkeypatch.setattr(
        embed_kills, "command", lambda *given: [sys.executable, "-c", SLOW, str(given[2]), kind]
    )
    found = embed_kills.measure(tmp_path, 10_000, 4, seed=0)
    assert found["same"] == (kind == "even")
    assert (found["shards"], found["files"]) == (8, 8)
    assert len(found["shards_at_kills"]) == found["kills"] >= 3  # the last may come too late
    assert found["shards_at_kills"] == sorted(found["shards_at_kills"])
    assert 1 < found["peak_mib"] < 100
    assert 1 < found["peak_mib_with_kills"] < 100
