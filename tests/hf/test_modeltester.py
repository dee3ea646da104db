"""Hugging Face's own tests: what passes over its classes passes over the patched ones.

What passes over its own classes is recorded in modeltester/unpatched.json, for one set of versions:
`FASTBERT_RECORD_UNPATCHED=1 pytest tests/hf/test_modeltester.py` (in one process) runs them and
writes it anew. Under other versions, or with another suite, both are run. The tests come in two
parts, of which `make test` runs the first: see modeltester/parts.py.
"""

import functools
import hashlib
import json
import os
import platform
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import pytest
import torch
import transformers

from tests import processes
from tests.hf.modeltester import parts, sdist
from tests.hf.modeltester.different import DIFFERENT

EXHAUSTIVE = pytest.mark.exhaustive
SUITE = Path(__file__).parent / "modeltester" / "suite.py"
DECIDING = (SUITE.name, "different.py", "parts.py")
RECORD = SUITE.with_name("unpatched.json")
RECORDS = os.environ.get("FASTBERT_RECORD_UNPATCHED") == "1"
ROOT = Path(__file__).parents[2]
FAMILIES = ("Bert", "Roberta", "Electra", "DistilBert")
# each family passes more; with fewer, the suite itself is at fault
ENOUGH = {parts.QUICK: 40, parts.REST: 20}


class Run(NamedTuple):
    """outcomes: test name -> passed, skipped, failure or error; packed: calls of packed layers."""

    outcomes: dict[str, str]
    packed: int

    def passed(self) -> set[str]:
        return {name for name, outcome in self.outcomes.items() if outcome == "passed"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Gives the run of a part over a family; one process, started once, runs it over all four."""
    pytest.importorskip("parameterized", reason="Hugging Face's tests import parameterized")
    try:
        tests = sdist.fetch()
    except sdist.Unavailable as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("modeltester")

    @functools.cache
    def whole(part: str, patched: bool) -> dict[str, Run]:
        return run_suite(part, tests, patched, folder)

    return lambda family, part, patched: whole(part, patched)[family]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", [parts.QUICK, pytest.param(parts.REST, marks=EXHAUSTIVE)])
def test_what_passes_unpatched_passes_patched(part, family, run):
    before = None if RECORDS else recorded(family, part)
    if before is None:
        unpatched = run(family, part, False)
        assert unpatched.packed == 0
        before = unpatched.passed()
        if RECORDS:
            record(family, part, before)
    after = run(family, part, True)
    assert len(before) >= ENOUGH[part]
    assert after.packed > 0
    # both ways: what differs no longer has no place in the table
    assert before - after.passed() == DIFFERENT.keys() & before


def what_decides() -> dict[str, Any]:
    """All that the outcomes over Hugging Face's own classes depend on."""
    suite = b"".join((SUITE.parent / name).read_bytes() for name in DECIDING)
    return {
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
        "python": ".".join(platform.python_version_tuple()[:2]),
        "gpu": torch.cuda.is_available(),
        "suite": hashlib.sha256(suite).hexdigest(),
    }


def recorded(family: str, part: str) -> set[str] | None:
    """The tests that passed over the family's own classes, if that was recorded for all of this."""
    if not RECORD.exists():
        return None
    one = json.loads(RECORD.read_text())
    if one["decides"] != what_decides():
        return None
    passed = one["passed"].get(family, {}).get(part)
    return None if passed is None else set(passed)


def record(family: str, part: str, passed: set[str]) -> None:
    """Writes a family's tests beside those that were recorded for all of this."""
    one = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if one.get("decides") != what_decides():
        one = {"decides": what_decides(), "passed": {}}
    one["passed"].setdefault(family, {})[part] = sorted(passed)
    RECORD.write_text(json.dumps(one, indent=1) + "\n")


def run_pytest(arguments: list[str]) -> None:
    """In a process of its own, offline."""
    os.chdir(ROOT)
    sys.exit(int(pytest.main(arguments)))


def run_suite(part: str, tests: Path, patched: bool, folder: Path) -> dict[str, Run]:
    """Runs a part of the suite over all families."""
    kind = "patched" if patched else "unpatched"
    report = folder / f"{part}-{kind}.xml"
    environment = {
        "FASTBERT_TRANSFORMERS_TESTS": str(tests),
        "FASTBERT_MODELTESTER_PATCHED": str(int(patched)),
        "FASTBERT_MODELTESTER_PART": part,
        "OMP_NUM_THREADS": "1",
    }
    # neither this repository's configuration nor its conftest
    alone = ["-c", os.devnull, "--rootdir", str(SUITE.parent), "-p", "no:cacheprovider"]
    told = ["--disable-warnings", "-q", f"--junitxml={report}", "-o", "junit_family=xunit1"]
    classes = [f"{SUITE}::Test{family}" for family in FAMILIES]
    status, said = processes.run(run_pytest, [*alone, *told, *classes], **environment)
    print(said)
    assert status in (0, 1), said
    runs = {family: read(report, family) for family in FAMILIES}
    for family, run in runs.items():
        print(f"{family} {kind}: {dict(Counter(run.outcomes.values()))}, {run.packed} packed")
    return runs


def read(report: Path, family: str) -> Run:
    outcomes: dict[str, str] = {}
    packed = 0
    # a test has one entry, and one more for each subtest that did not pass
    for case in ElementTree.parse(report).iter("testcase"):
        if not case.get("classname", "").endswith(f".Test{family}"):
            continue
        name = case.get("name", "")
        tags = {child.tag for child in case}
        outcome = next((tag for tag in ("error", "failure", "skipped") if tag in tags), "passed")
        worst = {"error", "failure"} & {outcomes.get(name), outcome}
        outcomes[name] = worst.pop() if worst else outcome
        packed += sum(int(one.get("value", 0)) for one in case.iter("property"))
    return Run(outcomes, packed)
