"""How a task is trained: by which epoch, in how many parts, and when a run must end."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastbert.check import InputError
from fastbert.config.finetune import FinetuneConfig
from fastbert.finetune import train
from fastbert.finetune.predict import predict
from fastbert.finetune.sequences import Classification
from fastbert.finetune.train import finetune
from fastbert.train.optimizer import clipped_step, finetuning_optimizer
from tests.finetune.case import LEARN, OPINIONS, learn


def test_gradients_that_are_not_finite_end_the_run(model, write, tmp_path, monkeypatch):
    """By a sentence at the end of their epoch, although the loss is finite."""

    def overflowing(built, *options):
        built.classifier.weight.register_hook(lambda gradient: gradient * math.inf)
        return finetuning_optimizer(built, *options)

    monkeypatch.setattr(train, "finetuning_optimizer", overflowing)
    file = write("opinions.csv", "text,label\n" + "".join(f"{a},{b}\n" for a, b in OPINIONS))
    with pytest.raises(InputError, match=r"gradients are not finite in epoch 1; .*--learning-rate"):
        learn(model, tmp_path, task="classification", train=file, dev=file)


def test_a_step_has_its_dropout_its_total_weight_and_clipping(model, write, tmp_path, monkeypatch):
    states, totals, norms = [], [], []

    def loss(task, built, batch, features, total):
        states.append(batch.dropout_state.tolist())
        totals.append((total, sum(4.0 if f.target else 1.0 for f in features)))
        return own_loss(task, built, batch, features, total)

    def step(optimizer, parameters, max_norm):
        norms.append(max_norm)
        return clipped_step(optimizer, parameters, max_norm)

    own_loss = Classification.loss
    monkeypatch.setattr(Classification, "loss", loss)
    monkeypatch.setattr(train, "clipped_step", step)
    file = write("opinions.csv", "text,label\n" + "".join(f"{a},{b}\n" for a, b in OPINIONS))
    options = {"epochs": 2, "batch_size": 3, "seed": 5, "class_weight": ("pos=4",)}
    options |= {"task": "classification", "train": file, "dev": file, "max_grad_norm": 0.5}
    learn(model, tmp_path, **options)
    assert states == [[5, number] for number in range(6)]
    assert all(total == weight for total, weight in totals)
    assert len({total for total, _ in totals}) > 1
    assert norms == [0.5] * 6


def test_the_same_config_gives_the_same_run_in_any_number_of_parts(model, write, tmp_path):
    """Dropout is on: its masks follow the examples, not the parts of a batch."""
    directory = tmp_path / "model"
    directory.mkdir()
    for file in model.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((directory / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    (directory / "config.json").write_text(json.dumps(config))
    rows = [{"text": text, "label": label} for text, label in OPINIONS]
    file = write("opinions.jsonl", rows)
    weights = []
    for name, limit in (("one", 4096), ("same", 4096), ("parts", 10)):
        options = {**LEARN, "epochs": 2, "batch_tokens": limit, "class_weight": ("pos=3",)}
        config = FinetuneConfig(
            model=str(directory), task="classification", train=file, dev=file, **options
        )
        finetune(config, tmp_path / name)
        weights.append(load_file(tmp_path / name / "latest" / "model.safetensors"))
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
        torch.testing.assert_close(tensor, weights[2][name], atol=2e-4, rtol=1e-3)


def test_early_stopping_keeps_the_best_epoch(model, write, tmp_path):
    """At a rate of next to nothing no epoch is better than the first."""
    rows = [{"text": text, "label": label} for text, label in OPINIONS]
    file = write("opinions.jsonl", rows)
    summary = learn(
        *(model, tmp_path),
        task="classification", train=file, dev=file, learning_rate=1e-12, patience=2,
    )  # fmt: skip
    assert [row["epoch"] for row in summary["history"]] == [1, 2, 3]
    assert summary["best_epoch"] == 1
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    assert (tmp_path / "run" / "latest").resolve().name == "checkpoint-1"
    with pytest.raises(InputError, match="holds a run already"):
        learn(model, tmp_path, task="classification", train=file, dev=file)


def test_the_test_data_measure_the_best_epoch_not_the_last(model, write, tmp_path):
    """The dev data say the opposite of what is learnt, so that an early epoch is the best."""
    numbers = {"one": 1.0, "two": 2.0, "three": 3.0}
    rows = [{"text": f"the {word} cat", "label": n} for word, n in numbers.items()]
    file = write("train.jsonl", rows)
    dev = write("dev.jsonl", [row | {"label": 4 - row["label"]} for row in rows])
    summary = learn(
        *(model, tmp_path),
        task="regression", train=file, dev=dev, test=file, epochs=25, metric="mse",
    )  # fmt: skip
    said = np.array([one["score"] for one in predict(tmp_path / "run", file)])
    error = ((said - [1, 2, 3]) ** 2).mean()
    assert summary["test"]["mse"] == pytest.approx(error, rel=1e-4)
    assert summary["best_epoch"] < 25
    assert error > 0.1


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_predictions_are_computed_as_the_model_was_measured(model, write, tmp_path, precision):
    """On whatever machine: `auto` may stand there for the other precision."""
    rows = [{"text": text, "label": float(n)} for n, (text, _) in enumerate(OPINIONS)]
    file = write("rows.jsonl", rows)
    summary = learn(
        model, tmp_path, task="regression", train=file, dev=file, epochs=1, precision=precision
    )
    truth = np.arange(len(rows))
    errors = {
        name: ((np.array([one["score"] for one in said]) - truth) ** 2).mean()
        for name, said in (
            ("default", predict(tmp_path / "run", file)),
            ("bf16", predict(tmp_path / "run", file, precision="bf16")),
            ("fp32", predict(tmp_path / "run", file, precision="fp32")),
        )
    }
    assert errors["default"] == errors[precision]
    assert errors["bf16"] != errors["fp32"]
    assert summary["mse"] == pytest.approx(errors[precision], rel=1e-6)


@pytest.mark.parametrize("task", ["classification", "multilabel"])
def test_a_rare_label_may_fall_into_the_share_to_measure_by(model, write, tmp_path, task):
    """Whichever part of the file it falls into, the run ends with a loss that is a number."""
    rows = [{"text": "a cat", "label": label} for label in ("x", "y", "x", "y", "z")]
    if task == "multilabel":
        rows = [row | {"label": [row["label"]]} for row in rows]
    file = write("rare.jsonl", rows)
    where = set()
    for seed in range(6):
        summary = finetune(
            FinetuneConfig(
                model=str(model), task=task, train=file, dev_share=0.2, epochs=1, seed=seed,
                class_weight=("balanced",), precision="fp32",
            ),
            tmp_path / str(seed),
        )  # fmt: skip
        support = {name: count for name, *_, count in summary["tables"][0]["rows"]}
        where.add(support["z"])
        assert math.isfinite(summary["history"][0]["loss"])
    assert where == {0, 1}
