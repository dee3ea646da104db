"""Runs that learn a few examples, and the commands over small files."""

from pathlib import Path

from fastbert.config.finetune import FinetuneConfig
from fastbert.finetune.train import finetune

LEARN = {"epochs": 20, "batch_size": 8, "learning_rate": 2e-3, "precision": "fp32"}


def learn(model, tmp_path, **options) -> dict:
    return finetune(FinetuneConfig(model=str(model), **LEARN | options), tmp_path / "run")


OPINIONS = [
    ("the film was good", "pos"),
    ("a very good book", "pos"),
    ("fine film", "pos"),
    ("a fine book and a good film", "pos"),
    ("the film was awful", "neg"),
    ("a very bad book", "neg"),
    ("awful film", "neg"),
    ("a bad book and an awful film", "neg"),
]

ROWS = "text,label,id\nthe film was good,pos,7\nawful,neg,8\n"
SENTENCES = "the film was good\nit is a book\nthe cat lives here\n\n" * 12


def command(root: Path, name: str) -> list:
    small = ["--steps", 1, "--batch-tokens", 256, "--max-seq-len", 16, "--eval-batches", 1]
    return [name] + {
        "predict": ["--model", root / "run", "--input", root / "train.csv"],
        "embed": ["--model", root / "model", "--input", root / "texts.txt"],
        "finetune": ["--task", "classification", "--train", root / "train.csv", "--dev",
                     root / "train.csv", "--model", root / "model", "--epochs", 1],
        "pretrain": ["--corpus", root / "corpus.txt", "--preset", "tiny", "--vocab-size", 100,
                     *small],
        "distill": ["--teacher", root / "teacher", "--corpus", root / "corpus.txt", *small],
    }[name]  # fmt: skip
