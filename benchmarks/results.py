"""Results as JSON Lines, written row by row as soon as they are measured.

The first row is the environment; it has `changes` if the code differed from the commit. Every other
row has its `part`; `case`, which says what was measured; and `timings`, with the `median_s` and the
`spread` of each candidate (`timing.summarize`). fastbert is the candidate FASTBERT. A part's other
figures are further fields of the row.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fastbert.check import InputError
from fastbert.train.report import environment

# Candidates for whole steps and calls; operators have candidates of their own.
FASTBERT, FP8 = "fastbert", "FP8 (fastbert)"
EAGER, SDPA, COMPILED = (f"Hugging Face ({how})" for how in ("eager", "SDPA", "torch.compile"))
# Only for forward passes; runs without autocast.
LOW = "Hugging Face (SDPA, bf16 weights)"
# A compiled model that replays CUDA graphs, for calls with small batches.
REDUCED = "Hugging Face (torch.compile, reduce-overhead)"
PATCHED, PATCHED_GRAPHS = "patched", "patched (CUDA graphs)"

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """How to run the parts of the suite.

    precision: fp32, or bf16 with autocast; quick: small sizes, which take minutes on 2 CPU cores
    """

    device: torch.device
    precision: str = "fp32"
    quick: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of matrix products' inputs."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


class Results:
    """Collects rows and, if `path` is given, appends each to that file, which is emptied first.

    Raises InputError if the file cannot be written.
    """

    def __init__(self, options: Options, path: Path | None = None) -> None:
        self.path = path
        self.rows: list[Row] = []
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("", encoding="utf-8")
            except OSError as error:
                raise InputError(f"{path}: {error.strerror}") from None
        self._append({"part": "environment", **describe(options)})

    def add(self, part: str, case: Row, timings: Row | None = None, **others: Any) -> Row:
        """Appends a row of this part and case, and returns it."""
        row = {"part": part, "case": case, "timings": timings or {}, **others}
        self._append(row)
        return row

    def of(self, part: str) -> list[Row]:
        """The rows of a part."""
        return [row for row in self.rows if row["part"] == part]

    def _append(self, row: Row) -> None:
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[Row]:
    """The rows of a results file; raises InputError if it cannot be read or is no results file."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if rows[0]["part"] != "environment":
            raise ValueError("no environment in its first line")
        for name in ("device", "torch", "threads", "commit"):
            if name not in rows[0]:
                raise ValueError(f"no {name} in its environment")
        for number, row in enumerate(rows[1:], 2):
            if wrong := _wrong(row):
                raise ValueError(f"line {number}: {wrong}")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"{path}: not results of python -m benchmarks ({error})") from None
    return rows


def _wrong(row: Any) -> str:
    """What a row after the environment lacks; empty if nothing."""
    if not isinstance(row, dict):
        return "no row"
    for name, kind in (("part", str), ("case", dict), ("timings", dict)):
        if not isinstance(row.get(name), kind):
            return f"no {name}"
    for name, timing in row["timings"].items():
        if not isinstance(timing, dict) or not isinstance(timing.get("median_s"), (int, float)):
            return f"no median_s of {name}"
    return ""


def describe(options: Options) -> Row:
    """The environment row: machine, versions, commit, command and options."""
    return {
        **environment(options.device),
        "driver": _driver() if options.device.type == "cuda" else None,
        **{name: _version(name) for name in ("triton", "transformers")},
        "command": " ".join([*_variables(), "python -m", _program(), *sys.argv[1:]]),
        "precision": options.precision,
        "quick": options.quick,
    }


def _variables() -> list[str]:
    """The set variables that change what is measured, as a shell sets them before a command."""
    names = [f"FASTBERT_{name}" for name in ("BACKEND", "GRAPHS", "PDL")]
    found = {name: os.environ.get(name) for name in [*names, "CUBLAS_WORKSPACE_CONFIG"]}
    return [f"{name}={value}" for name, value in found.items() if value]


def _program() -> str:
    """The module that `python -m` runs: the suite or a single part."""
    spec = sys.modules["__main__"].__spec__
    return "benchmarks" if spec is None else spec.name.removesuffix(".__main__")


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        return result.stdout.splitlines()[0].strip()
    return None
