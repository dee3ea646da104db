"""Hugging Face's own tests: what passes over its classes passes over the patched ones.

What passes over its own classes is recorded in modeltester/unpatched.json, for one set of versions:
`FASTBERT_RECORD_UNPATCHED=1 pytest tests/hf/test_modeltester.py` (in one process) runs them and
writes it anew. Under other versions, or with another suite, both are run.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest
import torch
import transformers

from tests.hf.modeltester import sdist
from tests.hf.modeltester.different import DIFFERENT

SUITE = Path(__file__).parent / "modeltester" / "suite.py"
RECORD = SUITE.with_name("unpatched.json")
RECORDS = os.environ.get("FASTBERT_RECORD_UNPATCHED") == "1"
ROOT = Path(__file__).parents[2]
ENOUGH = 40  # each family passes 50 or more; with fewer, the suite itself is at fault


class Run(NamedTuple):
    """outcomes: test name -> passed, skipped, failure or error; packed: calls of packed layers."""

    outcomes: dict[str, str]
    packed: int

    def passed(self) -> set[str]:
        return {name for name, outcome in self.outcomes.items() if outcome == "passed"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", ["Bert", "Roberta", "Electra", "DistilBert"])
def test_what_passes_unpatched_passes_patched(family, tmp_path):
    pytest.importorskip("parameterized", reason="Hugging Face's tests import parameterized")
    try:
        tests = sdist.fetch()
    except sdist.Unavailable as error:
        pytest.skip(str(error))
    before = None if RECORDS else recorded(family)
    if before is None:
        unpatched = run_suite(family, tests, False, tmp_path)
        assert unpatched.packed == 0
        before = unpatched.passed()
        if RECORDS:
            record(family, before)
    after = run_suite(family, tests, True, tmp_path)
    assert len(before) >= ENOUGH
    assert after.packed > 0
    # both ways: what differs no longer has no place in the table
    assert before - after.passed() == DIFFERENT.keys() & before


def what_decides() -> dict[str, Any]:
    """All that the outcomes over Hugging Face's own classes depend on."""
    suite = b"".join((SUITE.parent / name).read_bytes() for name in (SUITE.name, "different.py"))
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
        "python": ".".join(platform.python_version_tuple()[:2]),
        "gpu": torch.cuda.is_available(),
        "suite": hashlib.sha256(suite).hexdigest(),
    }


def recorded(family: str) -> set[str] | None:
    """The tests that passed over the family's own classes, if that was recorded for all of this."""
    if not RECORD.exists():
        return None
    one = json.loads(RECORD.read_text())
    passed = one["passed"].get(family) if one["decides"] == what_decides() else None
    return None if passed is None else set(passed)


def record(family: str, passed: set[str]) -> None:
    """Writes a family's tests beside those that were recorded for all of this."""
    one = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if one.get("decides") != what_decides():
        one = {"decides": what_decides(), "passed": {}}
    one["passed"][family] = sorted(passed)
    RECORD.write_text(json.dumps(one, indent=1) + "\n")


def run_suite(family: str, tests: Path, patched: bool, folder: Path) -> Run:
    report = folder / f"{family}-{patched}.xml"
    environment = {
        **os.environ,
        "FASTBERT_TRANSFORMERS_TESTS": str(tests),
        "FASTBERT_MODELTESTER_PATCHED": str(int(patched)),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    # neither this repository's configuration nor its conftest
    alone = ["-c", os.devnull, "--rootdir", str(SUITE.parent), "-p", "no:cacheprovider"]
    told = ["--disable-warnings", "-q", f"--junitxml={report}", "-o", "junit_family=xunit1"]
    process = subprocess.run(
        [sys.executable, "-m", "pytest", *alone, *told, f"{SUITE}::Test{family}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    print(process.stdout)
    assert process.returncode in (0, 1), process.stdout + process.stderr
    run = read(report)
    kind = "patched" if patched else "unpatched"
    print(f"{family} {kind}: {dict(Counter(run.outcomes.values()))}, {run.packed} packed")
    return run


def read(report: Path) -> Run:
    outcomes: dict[str, str] = {}
    packed = 0
    # a test has one entry, and one more for each subtest that did not pass
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("name", "")
        tags = {child.tag for child in case}
        outcome = next((tag for tag in ("error", "failure", "skipped") if tag in tags), "passed")
        worst = {"error", "failure"} & {outcomes.get(name), outcome}
        outcomes[name] = worst.pop() if worst else outcome
        packed += sum(int(one.get("value", 0)) for one in case.iter("property"))
    return Run(outcomes, packed)
