"""Hugging Face's own tests: what passes over its classes passes over the patched ones."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest

from tests.hf.modeltester import sdist
from tests.hf.modeltester.different import DIFFERENT

SUITE = Path(__file__).parent / "modeltester" / "suite.py"
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
    before, after = (run_suite(family, tests, patched, tmp_path) for patched in (False, True))
    for name, run in {"unpatched": before, "patched": after}.items():
        print(f"{family} {name}: {dict(Counter(run.outcomes.values()))}, {run.packed} packed")
    assert len(before.passed()) >= ENOUGH
    assert before.packed == 0
    assert after.packed > 0
    # both ways: what differs no longer has no place in the table
    assert before.passed() - after.passed() == DIFFERENT.keys() & before.passed()


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
    return read(report)


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
