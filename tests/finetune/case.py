"""Runs that learn a few examples."""

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
