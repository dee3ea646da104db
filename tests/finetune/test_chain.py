"""The three commands of docs/finetuning.md, shortened: from raw text to a measured classifier."""

import csv
import json
import re
import runpy
import sys
from collections import Counter
from pathlib import Path

import pytest

from fastbert.data.text import python_docs
from tests.command_line import call

SCRIPT = Path(__file__).parents[2] / "examples" / "docstring_modules.py"
MODULES = ("turtle", "tarfile", "argparse", "unittest")


def column(path: Path, name: str) -> list[str]:
    with path.open(newline="", encoding="utf-8") as file:
        return [row[name] for row in csv.DictReader(file)]


def letters(text: str) -> str:
    return re.sub(r"[\W_]", "", text.lower())


@pytest.mark.slow
def test_which_module_a_docstring_is_from(tmp_path, monkeypatch):
    """Better than always naming the most frequent module, on docstrings that no step has read."""

    def run(*command) -> str:
        status, said, error = call(*command)
        assert status == 0, error
        return said

    # the corpus is of these modules and of every eighth: reading all takes seconds
    files = python_docs._modules()
    named = [file for file in files if {file.stem, file.parent.name} & {*MODULES}]
    assert len(named) > len(MODULES)
    some = sorted({*named, *files[::8]}, key=files.index)
    monkeypatch.setattr(python_docs, "_modules", lambda: some)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *MODULES])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    sizes = ("--preset", "tiny", "--vocab-size", 2000, "--steps", 40, "--eval-batches", 2)
    run("pretrain", "--corpus", "corpus.txt", "--out", "python", *sizes)
    data = ("--train", "train.csv", "--dev", "dev.csv", "--test", "test.csv", "--truncate")
    options = ("--epochs", 6, "--batch-size", 16, "--learning-rate", "1e-3", "--max-seq-len", 64)
    said = run("finetune", "--task", "classification", *data, "--model", "python",
               "--out", "modules", *options)  # fmt: skip
    assert "confusion" in said

    texts, truth = (column(tmp_path / "test.csv", name) for name in ("text", "label"))
    test = json.loads((tmp_path / "modules" / "summary.json").read_text())["test"]
    baseline = Counter(truth).most_common(1)[0][1] / len(truth)
    print(f"accuracy {test['accuracy']:.3f}, majority {baseline:.3f}, of {len(truth)}")
    assert test["accuracy"] > baseline + 0.1

    run("predict", "--model", "modules", "--input", "test.csv", "--out", "said.jsonl")
    lines = (tmp_path / "said.jsonl").read_text("utf-8").splitlines()
    right = [json.loads(line)["label"] == label for line, label in zip(lines, truth, strict=True)]
    assert sum(right) / len(right) == pytest.approx(test["accuracy"])

    kept_back = "\n".join(map(letters, [*column(tmp_path / "dev.csv", "text"), *texts]))
    for line in (tmp_path / "corpus.txt").read_text("utf-8").splitlines():
        assert not line or letters(line) not in kept_back
