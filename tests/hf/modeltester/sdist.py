"""transformers' own tests, from the source distribution of the installed release.

Nothing of them is in this repository: pip fetches them from whatever index it is configured for, at
test time and once a release, into `$XDG_CACHE_HOME/fastbert` (by default `~/.cache/fastbert`).
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers


class Unavailable(Exception):
    """The source distribution, or its tests, cannot be had here; the message says why."""


def fetch() -> Path:
    """The `tests` folder of the installed transformers' source distribution."""
    name = f"transformers-{transformers.__version__}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastbert"
    tests = cache / name / "tests"
    if not tests.exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                _unpack(_download(Path(scratch)), Path(scratch))
                shutil.rmtree(cache / name, ignore_errors=True)
                (Path(scratch) / name).rename(cache / name)
        except (OSError, tarfile.TarError) as error:
            raise Unavailable(f"{name}: {error}") from error
    if not (tests / "test_modeling_common.py").exists():
        raise Unavailable(f"{name}.tar.gz has no tests/test_modeling_common.py")
    return tests


def _download(folder: Path) -> Path:
    release = f"transformers=={transformers.__version__}"
    # no isolation: pip reads the metadata with the setuptools that is here
    command = ["download", "--no-deps", "--no-build-isolation", "--no-binary", "transformers"]
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "-q", *command, "--dest", str(folder), release],
        capture_output=True,
        text=True,
    )
    archives = list(folder.glob("transformers-*.tar.gz"))
    if pip.returncode or not archives:
        said = (pip.stderr or pip.stdout).strip().splitlines() or ["nothing"]
        raise Unavailable(f"pip got no source distribution of {release}; it said: {said[-1]}")
    return archives[0]


def _unpack(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as opened:
        members = [member for member in opened.getmembers() if "/tests/" in member.name]
        opened.extractall(folder, members, filter="data")
