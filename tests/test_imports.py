"""Which room of the package may import which: imports point one way, and there is no cycle.

A room is a folder, or a file beside the folders. The rooms of `data` are told apart.
"""

import ast
import collections
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the bottom up: each room with the rooms that it imports, which stand above it in this list.
# `check` and `packing` are further down than most, so that they can be imported nearly anywhere.
ROOMS = {
    "kernels": "",
    "_version": "",
    "check": "",
    "events": "",
    "outputs": "",
    "rng": "",
    "optim": "check",
    "packing": "check",
    "tensorflow": "",
    "system": "check",
    "config": "check system",
    "backend": "check events",
    "checkpoint": "check system",
    "explain": "events rng",
    "reference": "config",
    "ops": "backend check packing rng",
    "modules": "backend check config events ops outputs rng",
    "models": "check checkpoint config modules ops outputs packing rng system",
    "hf": "backend check events models modules ops packing rng",
    "data.streams": "",
    "data.text": "check system",
    "data.tokenized": "check data.streams data.text system",
    "data.masking": "check data.text data.tokenized packing",
    "data.batches": "check data.masking data.streams data.text data.tokenized packing",
    "data.formats": "check config system",
    "data": "data.batches data.masking data.text data.tokenized",
    "fill_mask": "check checkpoint config data models packing",
    "export": "check checkpoint config models modules reference system",
    "train": "_version backend check checkpoint config data data.text data.tokenized models modules"
    " ops optim packing system",
    "finetune": "check checkpoint config data data.formats data.streams data.text models packing"
    " system train",
    "embedding": "_version check checkpoint config data data.formats data.text finetune models"
    " system train",
    "serve": "_version check checkpoint config data data.formats embedding fill_mask finetune"
    " models packing system train",
    "cli": "_version backend check config data.formats embedding export fill_mask finetune ops"
    " serve system train",
}
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for folder in ("fastbert", "kernels")
    for file in sorted((ROOT / folder).rglob("*.py"))
}


def room_of(module):
    """The room of a module's full name; "" for the package itself, which gathers its names."""
    first, *rest = module.removeprefix("fastbert.").split(".")
    if first == "data" and rest:
        return f"data.{rest[0]}"
    return "" if module == "fastbert" else first


def imports_of(file):
    """The absolute names that a file imports anywhere, also inside its functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_imported(file):
    """Those of fastbert among them: the longest part of each name that is a module."""
    for name in imports_of(file):
        if name.startswith("fastbert.kernels"):  # which is the folder `kernels`
            name = name.removeprefix("fastbert.")
        while name and name not in FILES:
            name = name.rpartition(".")[0]
        if name:
            yield name


@pytest.fixture(scope="module")
def imported():
    return {name: set(modules_imported(file)) - {name} for name, file in FILES.items()}


def test_each_room_imports_what_the_table_says(imported):
    found = {room_of(name): set() for name in FILES}
    for name, others in imported.items():
        found[room_of(name)] |= {room_of(other) for other in others} - {room_of(name)}
    del found[""]
    assert {room: " ".join(sorted(others)) for room, others in found.items()} == {
        room: " ".join(sorted(others.split())) for room, others in ROOMS.items()
    }


def test_the_table_points_one_way():
    places = {room: place for place, room in enumerate(ROOMS)}
    for room, others in ROOMS.items():
        assert all(places[other] < places[room] for other in others.split()), room


def test_no_file_is_in_a_cycle(imported):
    list(graphlib.TopologicalSorter(imported).static_order())


def test_only_hf_imports_transformers():
    for name, file in FILES.items():
        if room_of(name) != "hf":
            assert not any(other.split(".")[0] == "transformers" for other in imports_of(file)), (
                name
            )


def test_files_and_folders_are_short():
    for folder, most_lines, most_files in (("fastbert", 300, 15), ("kernels", 350, 17)):
        files = [file for file in FILES.values() if file.is_relative_to(ROOT / folder)]
        lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in files}
        assert not {file: n for file, n in lengths.items() if n > most_lines}
        counts = collections.Counter(file.parent for file in files)
        assert not {place: n for place, n in counts.items() if n > most_files}


def test_what_takes_long_is_imported_where_it_is_used():
    """Half of the time of `import fastbert` beyond torch's, which every command pays."""
    slow = "torch.distributed.tensor", "huggingface_hub.file_download", "transformers", "typer"
    code = f"import fastbert, sys; print([name for name in {slow} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
