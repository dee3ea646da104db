"""`fastbert pretrain --model`: a trained model learns from more text, by the command line."""

import json
import os
import re
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

import fastbert
from fastbert.config.pretrain import PretrainConfig
from fastbert.train import pretrain as runs
from fastbert.train.prepare import prepare_text
from fastbert.train.recipe import Pretraining
from tests.command_line import call

SMALL = ("--batch-tokens", "256", "--max-seq-len", "32", "--eval-batches", "2")
OF_MODEL = ("--preset", "tiny", "--vocab-size", "400", "--dropout", "0.1", "--steps", "2")


@pytest.fixture(scope="module")
def model(corpus, tmp_path_factory):
    """A run of two steps."""
    out = tmp_path_factory.mktemp("first") / "run"
    status, _, errors = call("pretrain", "--out", out, "--corpus", corpus, *SMALL, *OF_MODEL)
    assert status == 0, errors
    return out


@pytest.fixture
def more(tmp_path):
    """Another text."""
    path = tmp_path / "more.txt"
    documents = ([f"The {n} bert reads {n} words.", f"It is number {n}."] for n in range(60))
    path.write_text("\n\n".join("\n".join(sentences) for sentences in documents))
    return path


def train(model, more, out, *options):
    status, said, errors = call(
        "pretrain", "--model", model, "--corpus", more, "--out", out, *SMALL, *options
    )
    assert status == 0, errors
    return said, errors


def weights(run):
    return load_file(run / "latest" / "model.safetensors")


def test_a_run_begins_with_the_models_weights_vocabulary_and_shape(model, more, tmp_path):
    out = tmp_path / "run"
    train(model, more, out, "--steps", "1", "--learning-rate", "0", "--weight-decay", "0")
    torch.testing.assert_close(weights(out), weights(model), rtol=0, atol=0)
    for name in ("config.json", "tokenizer.json"):
        before, after = (json.loads((run / "latest" / name).read_text()) for run in (model, out))
        assert after == before


def test_the_held_out_loss_before_training_is_told(model, more, tmp_path):
    out = tmp_path / "run"
    said, _ = train(model, more, out, "--steps", "4", "--precision", "fp32")
    summary = json.loads((out / "summary.json").read_text())
    history = torch.load(out / "latest" / "training_state.pt")["state"]["history"]
    before, after = (row for row in history if "heldout_mlm_loss" in row)
    assert (before["step"], after["step"]) == (0, 4)
    assert summary["heldout_mlm_loss"] == after["heldout_mlm_loss"]
    assert summary["heldout_mlm_loss_before"] == before["heldout_mlm_loss"]
    assert summary["mlm_accuracy_before"] == before["mlm_accuracy"]
    assert re.search(r"before the first step: \d\.\d{3} nats, \d+\.\d% right", said)

    config = PretrainConfig(
        model=str(model), corpus=(more,), batch_tokens=256, max_seq_len=32, eval_batches=2
    )
    text = prepare_text(Pretraining(config).reading(), tmp_path / "again")
    own = fastbert.BertForPreTraining.from_pretrained(model)
    with torch.no_grad():
        logits = torch.cat([own(batch, return_logits=True)[1] for batch in text.heldout])
    labels = torch.cat([batch.labels for batch in text.heldout]).long()
    loss = torch.nn.functional.cross_entropy(logits, labels)
    assert before["heldout_mlm_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_a_stopped_run_goes_on_without_the_model_that_it_began_with(
    model, more, tmp_path, monkeypatch
):
    copy, whole, out = tmp_path / "copy", tmp_path / "whole", tmp_path / "stopped"
    shutil.copytree(model, copy, symlinks=True)
    options = ("--steps", "6", "--save-every", "2", "--log-every", "1")
    train(copy, more, whole, *options)
    save = runs.run_state.save

    def save_and_stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(runs.run_state, "save", save_and_stop)
        status, _, errors = call(
            *("pretrain", "--model", copy, "--corpus", more, "--out", out, *SMALL, *options)
        )
        assert "checkpoint-2 is kept" in errors, (status, errors)
    shutil.rmtree(copy)
    status, said, errors = call("pretrain", "--out", out, "--resume")
    assert status == 0, errors
    assert "at step 2 of 6" in said
    torch.testing.assert_close(weights(out), weights(whole), rtol=0, atol=0)
    found = [json.loads((run / "summary.json").read_text()) for run in (whole, out)]
    for name in ("heldout_mlm_loss", "heldout_mlm_loss_before"):
        assert found[0][name] == found[1][name]


def test_longer_examples_continue_a_run_of_short_ones(model, more, tmp_path):
    """BERT's own second phase: the same text and vocabulary in longer examples."""
    out = tmp_path / "run"
    train(model, more, out, "--steps", "1", "--max-seq-len", "128")
    assert json.loads((out / "run.json").read_text())["max_seq_len"] == 128


@pytest.mark.parametrize("objective", ["mlm", "mlm+nsp"])
def test_a_masked_lm_of_transformers_is_trained_further(objective, model, more, tmp_path):
    """Its weights stay; a head that it lacks is new, which is said."""
    source, out = tmp_path / "theirs", tmp_path / "run"
    theirs = transformers.BertForMaskedLM.from_pretrained(model / "latest")
    theirs.save_pretrained(source)
    transformers.AutoTokenizer.from_pretrained(model / "latest").save_pretrained(source)
    options = ("--steps", "1", "--learning-rate", "0", "--weight-decay", "0")
    _, errors = train(source, more, out, *options, "--objective", objective)
    assert ("newly initialized" in errors) == (objective == "mlm+nsp")
    before, after = load_file(source / "model.safetensors"), weights(out)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(out / "latest")
    torch.testing.assert_close(loaded.state_dict(), theirs.state_dict(), rtol=0, atol=0)


def test_dropout_is_the_models_own_unless_one_is_given(model, more, tmp_path):
    for options, expected in (((), 0.1), (("--dropout", "0.25"), 0.25)):
        out = tmp_path / f"run{expected}"
        train(model, more, out, "--steps", "1", *options)
        config = json.loads((out / "latest" / "config.json").read_text())
        assert config["hidden_dropout_prob"] == config["attention_probs_dropout_prob"] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--preset", "tiny"), "--preset: not with --model, which has its own; omit one of them"),
        (("--tokenizer", "t"), "--tokenizer: not with --model"),
        (("--vocab-size", "500"), "--vocab-size: not with --model"),
        (("--no-lowercase",), "--lowercase: not with --model"),
        (("--max-seq-len", "600"), "--max-seq-len 600: the model reads at most 512 tokens"),
        (("--model", "/no/where"), "/no/where: no such directory"),
        (("--model", "."), "no config.json there"),
    ],
)
def test_what_does_not_fit_the_model_is_one_clear_line(options, message, model, more, tmp_path):
    out = tmp_path / "run"
    arguments = ("--model", model, "--corpus", more, "--out", out, "--batch-tokens", "1024")
    status, _, errors = call("pretrain", *arguments, *options)
    assert status == 2
    assert errors.startswith(f"fastbert: error: {message}") or message in errors
    assert errors.count("\n") == 1
    assert not out.exists()


def test_a_model_of_another_family_is_one_clear_line(model, more, tmp_path):
    source = tmp_path / "other"
    shutil.copytree(model / "latest", source)
    config = json.loads((source / "config.json").read_text()) | {"model_type": "roberta"}
    (source / "config.json").write_text(json.dumps(config))
    arguments = ("--model", source, "--corpus", more, "--out", tmp_path / "run")
    status, _, errors = call("pretrain", *arguments)
    assert status == 2
    assert "roberta" in errors
    assert errors.count("\n") == 1


def test_a_resumed_run_keeps_its_model(model, more, tmp_path, monkeypatch):
    out = tmp_path / "run"
    train(model, more, out, "--steps", "1")
    other = tmp_path / "other"
    shutil.copytree(model, other, symlinks=True)
    status, _, errors = call("pretrain", "--out", out, "--resume", "--model", other)
    assert status == 2
    assert f"--model {other}: the run was started with {model}" in errors
    monkeypatch.chdir(model.parent)  # another name of the same directory
    status, _, errors = call("pretrain", "--out", out, "--resume", "--model", model.name)
    assert status == 0, errors
    hub = PretrainConfig(model="google/bert")
    with pytest.raises(fastbert.check.InputError, match="--model other/bert: the run was started"):
        hub.same_run(model="other/bert")
    assert hub.same_run(model="google/bert") == hub


def test_a_run_does_not_write_into_its_model(model, more):
    status, _, errors = call("pretrain", "--model", model / "latest", "--corpus", more,
                             "--out", os.path.realpath(model / "latest"))  # fmt: skip
    assert status == 2
    assert "lies in the input" in errors
