"""The plan of a directory, with the rows of each shard, and its manifest."""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any, Self

from fastbert._version import __version__
from fastbert.check import InputError
from fastbert.data.formats.texts import BEGINNING, Mark, Texts
from fastbert.system.files import read_json, write_json

PLAN, MANIFEST = "plan.json", "manifest.json"
_VERSION = 1  # of both files, and of how rows are grouped into batches


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the shards of a directory are made from, and where each shard begins.

    made_from: the input's identity, the model and the options, which determine every number in the
    shards; rows: the input's number of rows; marks: place in the input of each shard's first row
    """

    made_from: dict[str, Any]
    rows: int
    marks: tuple[Mark, ...]

    @property
    def shard_size(self) -> int:
        """Rows of a shard; the last one may have fewer."""
        size: int = self.made_from["shard_size"]
        return size

    def rows_of(self, number: int) -> range:
        """The input's rows that the shard holds."""
        begin = number * self.shard_size
        return range(begin, min(begin + self.shard_size, self.rows))

    def file_of(self, number: int) -> str:
        """The shard's file name."""
        return f"shard-{number:05d}.{self.made_from['format']}"

    @classmethod
    def of(cls, texts: Texts, made_from: dict[str, Any]) -> Self:
        """Reads all of the input, so that a bad row raises InputError before hours of work."""
        marks, rows, mark = [], 0, BEGINNING
        for text in texts.rows():
            if rows % made_from["shard_size"] == 0:
                marks.append(mark)
            rows, mark = rows + 1, text.after
        if not rows:
            raise InputError(f"{texts.path}: has no rows")
        return cls(made_from, rows, tuple(marks))

    def write(self, directory: Path) -> None:
        """Writes the plan into the directory; raises Unwritable."""
        write_json(directory / PLAN, {"version": _VERSION, **dataclasses.asdict(self)})

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """The plan of a directory or None; raises InputError for another version's plan."""
        values = _read(directory / PLAN)
        if values is None:
            return None
        marks = tuple(Mark(*mark) for mark in values["marks"])
        return cls(values["made_from"], values["rows"], marks)

    def finish(
        self, directory: Path, model: str, source: Path, shards: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Writes the manifest, the last file of a run, and returns its contents.

        shards: file, first_row, rows, bytes and sha256 of each shard, in order
        """
        manifest = {
            "version": _VERSION,
            "fastbert": __version__,
            "model": model,
            "input": str(source),
            "rows": self.rows,
            "made_from": self.made_from,
            "shards": shards,
        }
        write_json(directory / MANIFEST, manifest)
        return manifest


def require_same(directory: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises InputError unless this run may add shards to an earlier run's.

    there, wanted: `made_from` of the earlier run and of this one. Only --truncate may be added,
    because no text in the existing shards was too long.
    """
    if not there["truncate"]:
        there = there | {"truncate": wanted["truncate"]}
    others = [name for name in wanted if there.get(name) != wanted[name]]
    if others:
        said = [_SAID.get(name, f"--{name.replace('_', '-')}") for name in others]
        names = ", ".join(dict.fromkeys(said))
        raise InputError(
            f"--out {directory}: holds embeddings of a run with another {names}; name another "
            "directory, or use the earlier options"
        )


_SAID = {"model_sha256": "model", "input_bytes": "input", "input_sha256": "input"}


def _read(path: Path) -> dict[str, Any] | None:
    values: dict[str, Any] | None = read_json(path)
    if values is not None and values.get("version") != _VERSION:
        raise InputError(
            f"{path}: written by another version of fastbert embed; name another directory"
        )
    return values


def identity(path: Path) -> dict[str, Any]:
    """Identifies an input by its size in bytes and its SHA-256."""
    return {"input_bytes": os.path.getsize(path), "input_sha256": sha256(path)}


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
