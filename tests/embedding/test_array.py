"""Embeddings against Hugging Face's hidden states, and both commands as a user runs them."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from fastbert import cli
from fastbert.check import InputError
from fastbert.embedding.array import embed, write_npy
from tests.small_model import write_model

TEXTS = ["the film was good", "北京是中国的首都", "a", "john lives in paris , the cat does not"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def cli_run(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["fastbert", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 0


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_embeddings_are_those_of_hugging_face(model, write, pooling, kind):
    rows = [{"sentence": text} for text in TEXTS]
    file = write(f"texts.{kind}", rows if kind == "jsonl" else "\n".join(TEXTS) + "\n")
    ours = embed(
        model, file, text_column="sentence", pooling=pooling, batch_tokens=20, precision="fp32"
    )

    tokenizer = transformers.BertTokenizer.from_pretrained(model)
    tokens = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = transformers.BertModel.from_pretrained(model).eval()(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    theirs = hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5, rtol=1e-4)


def test_the_commands(model, write, tmp_path, monkeypatch):
    rows = "".join(f"{text}\t{label}\n" for text, label in zip(TEXTS, "abab", strict=True))
    file, run = write("train.tsv", "text\tlabel\n" + rows), tmp_path / "run"
    options = ["--train", file, "--dev", file, "--model", model, "--out", run, "--epochs", 1]
    cli_run(monkeypatch, "finetune", "--task", "classification", *options, "--class-weight", "a=2")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["history"][0]["epoch"] == 1
    new = write("new.tsv", "text\n" + "\n".join(TEXTS) + "\n")
    out = tmp_path / "deep" / "new.jsonl"
    cli_run(monkeypatch, "predict", "--model", run, "--input", new, "--out", out)
    said = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert len(said) == 4
    assert all(sum(one["probabilities"].values()) == pytest.approx(1) for one in said)

    cli_run(
        *(monkeypatch, "embed"),
        *("--model", run, "--input", new, "--out", tmp_path / "new.npy", "--pooling", "cls"),
    )
    np.testing.assert_array_equal(np.load(tmp_path / "new.npy"), embed(run, new, pooling="cls"))


def test_standard_input_is_a_text_a_line_and_the_help_says_so(model, write, monkeypatch, capsys):
    """JSON Lines on it would be embedded as they stand."""
    lines = write("texts.txt", '{"text": "a"}\n')
    with lines.open("rb") as stream:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stream))
        given = embed(model, Path("-"), precision="fp32")
    assert np.array_equal(given, embed(model, lines, precision="fp32"))
    cli_run(monkeypatch, "embed", "--help")
    assert "- reads lines (with --delimiter, a table)" in " ".join(capsys.readouterr().out.split())


def test_an_array_in_another_order_of_memory_is_written_as_it_reads(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    for name, one in (("a", array), ("b", np.asfortranarray(array)), ("c", array[:, ::2])):
        write_npy(tmp_path / f"{name}.npy", one)
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), one)


def test_another_ending_is_refused_with_all_that_are_read(model, write):
    with pytest.raises(InputError, match=r"a\.png: expected one of \.txt, \.jsonl, .*\.parquet"):
        embed(model, write("a.png", "x"))


@pytest.mark.parametrize("name", ["table.txt", "table"])
def test_a_delimiter_makes_a_table_of_a_file_as_of_standard_input(model, write, name):
    lines = write("lines.txt", "cat\n\ndog\n")
    table = write(name, "n;text\n1;cat\n2;\n3;dog\n")
    given = embed(model, table, delimiter=";", precision="fp32")
    assert np.array_equal(given, embed(model, lines, precision="fp32"))
