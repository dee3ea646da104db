"""One command for a GPU machine: here with parts that are quick, fail, hang, and measure."""

import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import gpu_check, suite
from benchmarks.gpu_check import Part
from fastbert import backend
from fastbert.check import InputError

MEASURING = """
import json, sys, time
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
rows = [{"part": "environment"}, {"part": "kernels", "case": {"n": 1}, "timings": {}}]
out.write_text("".join(json.dumps(row) + "\\n" for row in rows) + '{"part": "ker')
out.with_suffix(".trace.json.gz").write_bytes(b"trace")
time.sleep(float(sys.argv[1]))
"""


COLLECTING = """
import sys, pytest
sys.modules["fastapi"] = sys.modules["uvicorn"] = None
sys.exit(pytest.main(["-p", "no:cacheprovider", "-m", "gpu", "tests/benchmarks/test_serve.py"]))
"""


def check(out, *options):
    app = typer.Typer()
    app.command()(gpu_check.main)
    return CliRunner().invoke(app, [str(out), *options])


def results(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_a_failing_part_stops_no_other(tmp_path, monkeypatch):
    parts = (
        Part("first", ("-c", "import sys; print('broken'); sys.exit(3)"), 60),
        Part("second", ("-c", MEASURING, "0"), 60, measures=True),
        Part("third", ("-c", MEASURING, "60"), 3, measures=True),
        Part("fourth", ("-c", "print('all is well')"), 60),
    )
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    outcome = check(tmp_path)
    assert outcome.exit_code == 1
    first, second, third, fourth = outcome.stdout.strip().splitlines()
    assert "failed (3)" in first
    assert "broken" in first
    assert "ok" in second
    assert "1 rows" in second
    assert "out of time" in third
    assert "1 rows" in third  # what it measured until then is kept
    assert "all is well" in fourth
    rows = results(tmp_path)
    assert [row["part"] for row in rows] == [
        *("environment", "check", "kernels", "check", "kernels", "check", "check")
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("log.txt", "results.jsonl", "results.trace.json.gz")
    ]


def test_all_is_well(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "PARTS", (Part("one", ("-c", "print(1)"), 60),))
    assert check(tmp_path).exit_code == 0


def test_fits_into_ten_minutes():
    assert sum(part.seconds for part in gpu_check.PARTS) <= 650  # ends of parts that take no time
    assert len(gpu_check.PARTS) <= 10  # lines of the table


def test_a_part_that_is_named_runs_under_its_tool(tmp_path, monkeypatch):
    tool = ("env", "WHO=the tool", sys.executable, "-c", "import os, sys; print(os.environ['WHO'])")
    monkeypatch.setattr(gpu_check, "PARTS", (Part("usual", ("-c", "print('not asked for')"), 60),))
    monkeypatch.setattr(gpu_check, "NAMED", (Part("named", ("-c", "1"), 60, under=tool),))
    outcome = check(tmp_path, "--only", "named")
    assert outcome.exit_code == 0
    assert "the tool" in outcome.stdout
    assert "not asked for" not in outcome.stdout
    assert [row["case"]["of"] for row in results(tmp_path)[1:]] == ["named"]


def test_without_the_tool_a_part_fails_and_says_so(tmp_path, monkeypatch):
    part = Part("named", ("-c", "1"), 60, under=("env", "no-such-sanitizer"))
    monkeypatch.setattr(gpu_check, "NAMED", (part,))
    outcome = check(tmp_path, "--only", "named")
    assert outcome.exit_code == 1
    assert "failed (127)" in outcome.stdout
    assert "no-such-sanitizer" in outcome.stdout


def test_the_named_parts_fit_into_ten_minutes_too():
    for parts in (gpu_check.SECOND, gpu_check.THIRD, gpu_check.FOURTH):
        assert sum(part.seconds for part in parts) <= 600


def test_tells_which_tests_failed_even_if_they_are_cut_off(tmp_path, monkeypatch):
    lines = (
        "[gw0] [  1%] PASSED tests/ops/test_one.py::test_a[x]",
        "[gw1] [  2%] FAILED tests/ops/test_one.py::test_b[cuda-1]",
        "[gw1] [  2%] ERROR tests/ops/test_two.py::test_c",
        "FAILED tests/ops/test_one.py::test_b[cuda-1] - assert 1 == 2",
    )
    script = f"import time; print(*{lines}, sep=chr(10), flush=True); time.sleep(60)"
    monkeypatch.setattr(gpu_check, "PARTS", (Part("tests", ("-c", script), 5),))
    outcome = check(tmp_path)
    assert "out of time" in outcome.stdout
    assert "2 failed" in outcome.stdout
    assert results(tmp_path)[-1]["failed"] == [
        "tests/ops/test_one.py::test_b[cuda-1]",
        "tests/ops/test_two.py::test_c",
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
def test_what_a_sanitizer_looks_at_is_every_operator():
    outcome = CliRunner().invoke(suite.app, ["once"], catch_exceptions=False)
    assert outcome.exit_code == 0
    by_triton = {name for name, operator in backend.OPS.items() if "triton" in operator.backends}
    for name in by_triton | {"compact", "gather_rows"}:
        assert name in outcome.stdout


def test_names_the_parts_it_knows(tmp_path):
    error = check(tmp_path, "--only", "nothing").exception
    assert isinstance(error, InputError)
    assert str(error).startswith("--only: one of extension, tests")


def test_make_has_no_default_place_for_it(monkeypatch):
    """With that of `make pretrain` it would write into the demo's run."""
    for name in ("OUT", "ONLY", "MAKEFLAGS", "MAKELEVEL"):  # which `make test` may pass on
        monkeypatch.delenv(name, raising=False)
    command = ["make", "-n", "gpu-check"]
    made = subprocess.run(command, cwd=gpu_check.ROOT, capture_output=True, text=True, check=True)
    assert made.stdout.split()[1:] == ["-m", "benchmarks", "gpu-check"]


@pytest.mark.slow
def test_measures_on_a_machine_without_a_gpu(tmp_path):
    outcome = check(tmp_path, "--only", "step_profile")
    assert outcome.exit_code == 0, (tmp_path / "log.txt").read_text()
    assert [row["part"] for row in results(tmp_path)] == ["environment", "profile", "check"]
    assert (tmp_path / "results.trace.json.gz").stat().st_size > 1000


def test_tests_are_collected_where_the_libraries_of_a_server_are_missing():
    done = subprocess.run(
        [sys.executable, "-c", COLLECTING], cwd=gpu_check.ROOT, capture_output=True, text=True
    )
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout
