"""From raw text to a classifier by three commands: pre-train, fine-tune, predict."""

import ast
import json
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import pytest


def fastbert_cli(*arguments) -> str:
    command = [sys.executable, "-m", "fastbert.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def docstrings(module: str) -> list[str]:
    """The first paragraphs of what a module of the standard library says of itself, each once."""
    tree = ast.parse((Path(sysconfig.get_path("stdlib")) / f"{module}.py").read_bytes())
    kinds = (ast.FunctionDef, ast.ClassDef)
    found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    return list(dict.fromkeys(" ".join(text.split("\n\n")[0].split()) for text in found if text))


@pytest.mark.slow
def test_which_module_a_docstring_belongs_to(tmp_path):
    """Better than always naming the most frequent module, on docstrings not trained on."""
    pretrained = tmp_path / "pretrained"
    sizes = ["--preset", "tiny", "--vocab-size", "2000", "--steps", "100", "--eval-batches", "2"]
    fastbert_cli("pretrain", "--out", pretrained, *sizes)
    files: dict[str, list[str]] = {"train": [], "dev": []}
    for module in ("turtle", "decimal", "tarfile", "argparse"):
        source = "_pydecimal" if module == "decimal" else module
        for number, text in enumerate(docstrings(source)):
            row = json.dumps({"text": text, "module": module})
            files["dev" if number % 4 == 0 else "train"].append(row)
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    options = ["--task", "classification", "--label-column", "module", "--truncate"]
    options += ["--train", tmp_path / "train.jsonl", "--dev", tmp_path / "dev.jsonl"]
    options += ["--epochs", 6, "--batch-size", 16, "--learning-rate", "1e-3", "--max-seq-len", 64]
    run = tmp_path / "run"
    said = fastbert_cli("finetune", "--model", pretrained, "--out", run, *options)
    assert "confusion" in said
    accuracy = json.loads((run / "summary.json").read_text())["accuracy"]
    modules = Counter(json.loads(row)["module"] for row in files["dev"])
    baseline = modules.most_common(1)[0][1] / modules.total()
    print(f"accuracy {accuracy:.3f}, majority {baseline:.3f}, of {modules.total()}")
    assert accuracy > baseline + 0.1

    out = tmp_path / "dev.predicted.jsonl"
    fastbert_cli("predict", "--model", run, "--input", tmp_path / "dev.jsonl", "--out", out)
    truth = [json.loads(row)["module"] for row in files["dev"]]
    labels = [json.loads(line)["label"] for line in out.read_text("utf-8").splitlines()]
    right = sum(a == b for a, b in zip(truth, labels, strict=True))
    assert right / len(truth) == pytest.approx(accuracy)
