"""The commands of a fine-tuned model from end to end: what they read, write and say."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.command_line import call, forked
from tests.finetune.case import command


def test_standard_input_and_output(place, monkeypatch):
    program = [sys.executable, "-m", "fastbert.cli", "predict", "--model", str(place / "run")]
    rows = '{"text": "good"}\n{"text": ""}\n{"id": 3}\n'
    done = subprocess.run([*program, "--input", "-", "--out", "-"], input=rows, text=True,
                          capture_output=True, check=True)  # fmt: skip
    one, two, three = map(json.loads, done.stdout.splitlines())
    assert one["label"] in ("pos", "neg")
    assert "expected a text in column 'text'" in two["error"]
    assert three == {"error": "-, line 3: expected a text in column 'text', got None"}
    assert "predictions are in" not in done.stderr


def test_columns_are_copied_into_the_rows(place, tmp_path):
    out = tmp_path / "out.jsonl"
    status, _, error = call(*command(place, "predict"), "--out", out, "--copy", "id")
    assert status == 0, error
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["7", "8"]
    assert call(*command(place, "predict"), "--out", out, "--copy", "*")[0] == 0
    first = json.loads(out.read_text().splitlines()[0])
    assert list(first)[:3] == ["text", "input_label", "id"]
    assert first["input_label"] == "pos"
    status, _, error = call(*command(place, "predict"), "--out", out, "--copy", "nowhere")
    assert (status, "no column 'nowhere'" in error) == (2, True)


def test_long_and_empty_texts(place, tmp_path):
    new = tmp_path / "new.csv"
    new.write_text("text\n" + "very " * 60 + '\n""\ngood\n')
    out = tmp_path / "out.jsonl"
    base = ["predict", "--model", place / "run", "--input", new, "--out", out]
    status, _, error = call(*base)
    assert status == 2
    assert "with --stride, or cut it off with --truncate" in error
    assert not out.exists()
    for option in (["--stride", 4], ["--truncate"]):
        status, _, error = call(*base, *option)
        assert status == 0, error
        assert "1 row(s) have an error" in error
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert ["error" in row for row in rows] == [False, True, False]
    npy = tmp_path / "out.npy"
    embed = ["embed", "--model", place / "model", "--input", new, "--out", npy]
    status, _, error = call(*embed)
    assert (status, "cut it off with --truncate" in error, "--stride" in error) == (2, True, False)
    assert call(*embed, "--truncate")[0] == 0
    assert np.load(npy).shape == (3, 64)


def test_a_share_of_the_training_file_measures(place, tmp_path):
    base = list(command(place, "finetune"))
    base[base.index("--dev") : base.index("--dev") + 2] = ["--dev-share", 0.5]
    status, said, error = call(*base, "--out", tmp_path / "run")
    assert status == 0, error
    assert "1 training sequences, 1 to choose the best epoch" in said
    base[base.index("--dev-share") + 1] = 0.1
    status, _, error = call(*base, "--out", tmp_path / "other")
    assert (status, "--dev-share 0.1: takes 0 of the 2 example(s)" in error) == (2, True)
    assert not (tmp_path / "other").exists()


@pytest.fixture(scope="module")
def in_ascii(place, tmp_path_factory):
    """Ends of commands where the locale has ASCII alone: their bytes are not what Python reads.

    A run with labels that ASCII lacks, its directory, and `fill-mask` with bytes that are no text
    and with those of another script.
    """
    root = tmp_path_factory.mktemp("in_ascii")
    (file := root / "t.csv").write_text("text,label\ngood,İyi\nawful,kötü\n", "utf-8")
    run = [*command(place, "finetune"), "--out", root / "run"]
    for option in ("--train", "--dev"):
        run[run.index(option) + 1] = file
    words = ["fill-mask", "--model", place / "teacher"]
    fills = [[*words, text] for text in (b"\xff [MASK]", "北京 [MASK]".encode())]
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    imports = "torch._dynamo sklearn.metrics fastbert.finetune.train fastbert.fill_mask"
    return root / "run", *forked(root / "said", run, *fills, imports=imports, **environment)


def test_what_cannot_be_printed_ends_no_run(in_ascii):
    out, (status, said, error), *_ = in_ascii
    assert status == 0, error
    assert b"\\u0130yi" in said
    assert (out / "summary.json").exists()


def test_a_mistyped_model_is_one_line(place, tmp_path):
    for given, said in ((place / "modle", f"did you mean {place / 'model'}?"),
                        (tmp_path / "far" / "away", "no such directory")):  # fmt: skip
        status, _, error = call("embed", "--model", given, "--input", place / "texts.txt", "--out",
                                tmp_path / "x.npy")  # fmt: skip
        assert (status, error.count("\n")) == (2, 1)
        assert said in error


def test_texts_of_another_language_are_said_to_be(place, tmp_path):
    (tmp_path / "new.csv").write_text("text\nxyzzy plugh qwerty\n")
    status, _, error = call("predict", "--model", place / "run", "--input", tmp_path / "new.csv",
                            "--out", tmp_path / "x.jsonl")  # fmt: skip
    assert status == 0
    assert "60% of its tokens are [UNK]" in error


def test_bytes_that_are_no_text_are_one_line(in_ascii):
    *_, bad, good = in_ascii
    assert bad[0] == 2
    assert bad[2].startswith(b"fastbert: error: TEXT: not UTF-8")
    assert bad[2].count(b"\n") == 1
    assert good[0] == 0, good[2]
