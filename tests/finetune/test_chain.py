"""The three commands of docs/finetuning.md, shortened: from raw text to a measured classifier."""

import csv
import json
import re
import runpy
from collections import Counter
from pathlib import Path

import pytest

from tests.command_line import call

SCRIPT = Path(__file__).parents[2] / "examples" / "docstring_modules.py"


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

    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(SCRIPT))["main"](("turtle", "tarfile", "argparse", "unittest"))
    sizes = ("--preset", "tiny", "--vocab-size", 2000, "--steps", 100, "--eval-batches", 2)
    run("pretrain", "--corpus", "corpus.txt", "--out", "python", *sizes)
    data = ("--train", "train.csv", "--dev", "dev.csv", "--test", "test.csv", "--truncate")
    options = ("--epochs", 8, "--batch-size", 16, "--learning-rate", "1e-3", "--max-seq-len", 64)
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
