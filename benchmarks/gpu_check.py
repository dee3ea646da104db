"""`make gpu-check OUT=DIR`: tests and measures a GPU machine within ten minutes.

It builds the extension, runs the tests that need a GPU, times steps and small batches beside
Hugging Face's, and profiles a step. It uses the Python that runs it and the packages installed
there, and needs no network. Each part is a separate process with a time limit, so that a failure
ends no other part. DIR gets results.jsonl, which grows as parts finish, log.txt, and one trace.
Without a GPU the same parts run at small sizes.

Other parts run only if `--only` names them. In a second run of ten minutes there is time for `make
gpu-check OUT=DIR ONLY="extension once memcheck racecheck kernels ablation"`: NVIDIA's
compute-sanitizer over every operator, and each operator beside its alternatives. A third run,
`ONLY="extension convergence"`, trains BERT-base in bf16, in FP8 and with Hugging Face. A fourth,
`ONLY="extension compiled_host"`, times small batches beside torch.compile's too.
"""

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer

from benchmarks.results import Options, Results
from fastbert.check import InputError

ROOT = Path(__file__).parents[1]
LOG, RESULTS, TRACE = "log.txt", "results.jsonl", "results.trace.json.gz"


class Part(NamedTuple):
    """One process of the check.

    arguments: of Python; seconds: its time limit; measures: whether it is a benchmark, whose rows
    join the results; under: a command that runs the Python process, such as a sanitizer
    """

    name: str
    arguments: tuple[str, ...]
    seconds: int
    measures: bool = False
    under: tuple[str, ...] = ()


def benchmark(name: str, seconds: int, *options: str, called: str = "") -> Part:
    arguments = ("-m", "benchmarks", *options, "--only", name)
    return Part(called or name, arguments, seconds, measures=True)


def tests(seconds: int) -> Part:
    """Runs tests in parallel if pytest-xdist is installed: most of their time is compilation."""
    many = ("-n", "12", "--dist", "worksteal") if importlib.util.find_spec("xdist") else ()
    # each test on a line, so that the log of a run that is cut off names the failed tests
    options = ("-m", "gpu", "-vv", "-p", "no:cacheprovider", *many)
    return Part("tests", ("-m", "pytest", *options), seconds)


def sanitizer(tool: str, seconds: int) -> Part:
    # without PyTorch's caching allocator, which hands out parts of large blocks: an access past the
    # end of a tensor would still be inside valid memory
    under = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--tool", tool)
    return Part(
        tool, ("-m", "benchmarks", "once"), seconds, under=(*under, "--error-exitcode", "9")
    )


# An H200 needed 32, 184, 158, 70 (without Trainer's steps) and 25 seconds.
PARTS = (
    Part("extension", ("setup.py", "-q", "build_ext", "--inplace"), 60),
    tests(230),
    benchmark("steps", 200, "--quick"),
    benchmark("host", 110, "--quick"),
    benchmark("step_profile", 50, "--quick"),
)
SECOND = (
    Part("once", ("-m", "benchmarks", "once"), 60),  # compiles for the sanitizers
    sanitizer("memcheck", 120),
    sanitizer("racecheck", 120),
    benchmark("kernels", 160, "--quick"),
    benchmark("ablation", 50, "--quick"),
)
THIRD = (benchmark("convergence", 550),)
FOURTH = (benchmark("host", 550, called="compiled_host"),)  # torch.compile takes a minute per batch
NAMED = SECOND + THIRD + FOURTH


def main(
    out: Annotated[Path, typer.Argument(help="Directory for the results.")],
    only: Annotated[list[str] | None, typer.Option(help="Parts, by name.")] = None,
) -> None:
    """Run every part, even if others fail, and end with a line for each."""
    known = {part.name: part for part in PARTS + NAMED}
    for name in only or ():
        if name not in known:
            raise InputError(f"--only: one of {', '.join(known)}, got {name!r}")
    parts = [known[name] for name in only] if only else PARTS
    out.mkdir(parents=True, exist_ok=True)
    (out / LOG).write_text("", encoding="utf-8")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = Options(device, "bf16" if device.type == "cuda" else "fp32", quick=True)
    results = Results(options, out / RESULTS)
    outcomes = [run(part, out, results) for part in parts]
    print("\n".join(["", *(line for line, _ in outcomes)]))
    raise typer.Exit(0 if all(succeeded for _, succeeded in outcomes) else 1)


def run(part: Part, out: Path, results: Results) -> tuple[str, bool]:
    """Runs a part and logs its output; returns a line on its outcome, and whether it succeeded."""
    started = time.monotonic()
    rows = out / f".{part.name}.jsonl"
    arguments = [*part.arguments, *(("--out", str(rows.resolve())) if part.measures else ())]
    with (out / LOG).open("a", encoding="utf-8") as log:
        command = [*part.under, sys.executable, *arguments]
        log.write(f"== {part.name}: {' '.join(command)}\n")
        log.flush()
        status = _run_process(command, log, part.seconds)
    found = list(_rows(rows))
    for row in found:
        results.add(**row)
    rows.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        rows.with_suffix(".trace.json.gz").replace(out / TRACE)
    seconds = time.monotonic() - started
    what = f"{len(found)} rows" if part.measures else _last_line(out / LOG)
    wrong = _failed_tests(out / LOG) if part.name == "tests" else []
    what = f"{len(wrong)} failed; {what}" if wrong else what
    outcome = {"status": status, "seconds": seconds, "said": what, "failed": wrong}
    results.add("check", {"of": part.name}, **outcome)
    return f"{part.name:<14}{status:<12}{seconds:4.0f} s  {what}", status == "ok"


def _run_process(command: list[str], log, seconds: int) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FASTBERT_BUILD_EXT": "1"}
    environment["MAX_JOBS"] = str(os.cpu_count())
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=log, stderr=log, env=environment, start_new_session=True
    )
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()
        return "out of time"
    return "ok" if code == 0 else f"failed ({code})"


def _rows(path: Path) -> Iterator[dict]:
    """The rows that a part measured, without its environment, which is this process's too."""
    for line in path.read_text(encoding="utf-8").splitlines()[1:] if path.exists() else ():
        with contextlib.suppress(ValueError):  # half a line of a part that was stopped
            yield json.loads(line)


def _failed_tests(path: Path) -> list[str]:
    """The names of the failed tests in the log, each once."""
    log = path.read_text(encoding="utf-8", errors="replace")
    return sorted(set(re.findall(r"^(?:\[gw.*\] )?(?:FAILED|ERROR) (tests/\S+)", log, re.M)))


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return "" if lines[-1].startswith("== ") else lines[-1][:80]
