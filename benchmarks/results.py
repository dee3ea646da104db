"""Results as JSON Lines: what was measured where, row by row, on disk as soon as it is known.

The first row is the environment, with `changes` where the commit had some. Every other one names
its `part`, and as `case` what was measured; its `timings` hold a median_s and a spread for each
candidate, fastbert's under FASTBERT; whatever else a part measures stands beside them.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fastbert.check import InputError
from fastbert.train.report import environment

# Whom a step is timed beside; operators have others.
FASTBERT = "fastbert"
EAGER, SDPA, COMPILED = (f"Hugging Face ({how})" for how in ("eager", "SDPA", "torch.compile"))
# Calls of small batches are timed beside a compiled model that replays graphs, too.
REDUCED = "Hugging Face (torch.compile, reduce-overhead)"
PATCHED, PATCHED_GRAPHS = "patched", "patched (CUDA graphs)"

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """How to run the parts of the suite.

    quick: a short look at everything, minutes on 2 CPU cores; precision: fp32, or bf16 by autocast.
    """

    device: torch.device
    precision: str = "fp32"
    quick: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of what matrix products multiply."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


class Results:
    """Collects rows, and appends them to a file if there is one."""

    def __init__(self, options: Options, path: Path | None = None) -> None:
        self.path = path
        self.rows: list[Row] = []
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("", encoding="utf-8")
        self._append({"part": "environment", **describe(options)})

    def add(self, part: str, case: Row, timings: Row | None = None, **others: Any) -> Row:
        row = {"part": part, "case": case, "timings": timings or {}, **others}
        self._append(row)
        return row

    def of(self, part: str) -> list[Row]:
        return [row for row in self.rows if row["part"] == part]

    def _append(self, row: Row) -> None:
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def read(path: Path) -> list[Row]:
    """The rows of a file; raises InputError where it is not one of ours."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if rows[0]["part"] != "environment" or not all("part" in row for row in rows):
            raise ValueError("no environment in its first line")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(f"{path}: not results of python -m benchmarks ({error})") from None
    return rows


def describe(options: Options) -> Row:
    """Machine, versions, commit and command, to judge the figures by."""
    return {
        **environment(options.device),
        "driver": _driver() if options.device.type == "cuda" else None,
        **{name: _version(name) for name in ("triton", "transformers")},
        "command": " ".join(["python -m", _program(), *sys.argv[1:]]),
        "precision": options.precision,
        "quick": options.quick,
    }


def _program() -> str:
    """The module that was run: the suite, or a part of it by itself."""
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
