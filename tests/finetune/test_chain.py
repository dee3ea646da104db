"""From raw text to a fine-tuned, evaluated model in the three commands of the README, shortened."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "docstring_modules.py"
CLI = [sys.executable, "-m", "fastbert.cli"]
COMMANDS = (
    [*CLI, "pretrain", "--out", "runs/demo", "--preset", "tiny", "--steps", "40", "--vocab-size",
     "2000", "--eval-batches", "2"],
    [sys.executable, EXAMPLE],
    [*CLI, "finetune", "--model", "runs/demo", "--train", "train.csv", "--dev", "dev.csv", "--out",
     "runs/modules", "--max-seq-len", "64", "--truncate", "--epochs", "3", "--learning-rate",
     "1e-3"],
)  # fmt: skip


@pytest.mark.slow
def test_from_raw_text_to_a_fine_tuned_model(tmp_path):
    for command in COMMANDS:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs" / "modules" / "summary.json").read_text())
    assert summary["accuracy"] > summary["majority"] + 0.1
