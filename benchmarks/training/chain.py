"""From raw text to a measured classifier: times the three commands of docs/finetuning.md.

For comparison it also fine-tunes a model that has not been pre-trained, with the random weights
that pre-training began with.
"""

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.results import Options, Results

ROOT = Path(__file__).parents[2]
CLI = (sys.executable, "-m", "fastbert.cli")
SEEDS = (0, 1, 2)
FINETUNING = ("--epochs", "3", "--learning-rate", "5e-4", "--max-seq-len", "128", "--truncate")


def run(options: Options, results: Results) -> None:
    """Measures the part "chain": accuracies on the test data, and the seconds of each command."""
    precision = ("--precision", options.precision)
    pretraining, finetuning = precision, (*FINETUNING, *precision)
    if options.quick:
        pretraining += ("--preset", "tiny", "--steps", "6", "--eval-batches", "2")
        finetuning += ("--epochs", "1")
    with tempfile.TemporaryDirectory() as directory:
        here = Path(directory)
        corpus = ("--corpus", "corpus.txt", *pretraining)
        data = ("--train", "train.csv", "--dev", "dev.csv", "--test", "test.csv")
        task = ("--task", "classification", *data, *finetuning)

        def finetune(model: str, seed: int) -> tuple[float, dict]:
            out = f"modules of {model} {seed}"
            seconds = timed(here, *CLI, "finetune", *task, "--model", model, "--out", out,
                            "--seed", str(seed))  # fmt: skip
            return seconds, json.loads((here / out / "summary.json").read_text())["test"]

        making = timed(here, sys.executable, str(ROOT / "examples" / "docstring_modules.py"))
        training = timed(here, *CLI, "pretrain", *corpus, "--out", "python")
        nothing = ("--tokenizer", "python/latest", "--steps", "1", "--learning-rate", "0")
        majority = share_of_the_majority(here / "test.csv")
        for seed in SEEDS[: 1 if options.quick else None]:
            for model in ("python", "untrained"):
                if model == "untrained" and seed == SEEDS[0]:
                    timed(here, *CLI, "pretrain", *corpus, *nothing, "--out", model)
                seconds, test = finetune(model, seed)
                results.add(
                    "chain",
                    {"pre-trained": model == "python", "seed": seed},
                    accuracy=test["accuracy"],
                    macro_f1=test["macro_f1"],
                    majority=majority,
                    seconds={"data": making, "pre-training": training, "fine-tuning": seconds},
                )


def timed(directory: Path, *command: str) -> float:
    """Runs a command in a directory, shows its output, and returns its seconds."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    started = time.perf_counter()
    subprocess.run(command, cwd=directory, env=os.environ | {"PYTHONPATH": path}, check=True)
    return time.perf_counter() - started


def share_of_the_majority(path: Path) -> float:
    with path.open(newline="", encoding="utf-8") as file:
        labels = Counter(row["label"] for row in csv.DictReader(file))
    return max(labels.values()) / labels.total()
