"""Every command with its output on an input, a link, a FIFO, a full disk, a read-only directory."""

import contextlib
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

import fastbert
from fastbert.data import load_tokenizer, save_tokenizer
from tests import processes
from tests.command_line import call, forked
from tests.command_line import main as fastbert_alone

ROWS = "text,label,id\nthe film was good,pos,7\nawful,neg,8\n"
SENTENCES = "the film was good\nit is a book\nthe cat lives here\n\n" * 12


@pytest.fixture(scope="module")
def place(model, tmp_path_factory):
    """Inputs that each command reads, and a fine-tuned model; readable by all."""
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    shutil.copytree(model, root / "model")
    (root / "train.csv").write_text(ROWS)
    (root / "texts.txt").write_text("a film\n")
    (root / "corpus.txt").write_text(SENTENCES)
    tokenizer = load_tokenizer(root / "model")
    torch.manual_seed(0)
    config = fastbert.BertConfig.from_pretrained(root / "model")
    fastbert.BertForMaskedLM(config).save_pretrained(root / "teacher")
    save_tokenizer(tokenizer, root / "teacher")
    status, _, error = call(*command(root, "finetune"), "--out", root / "run")
    assert status == 0, error
    yield root
    shutil.rmtree(root)


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


FILES = {"predict": "train.csv", "embed": "texts.txt"}
DIRECTORIES = {"finetune": "model", "pretrain": "corpus.txt", "distill": "teacher"}
KINDS = ("input", "link", "fifo", "full", "read-only")
ENDING = {"predict": ".jsonl", "embed": ".npy"}


def snapshot(root: Path) -> dict:
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in sorted(root.rglob("*"))
    }


@contextlib.contextmanager
def as_nobody():
    """The superuser may write everywhere."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@contextlib.contextmanager
def small_files(limit: int):
    """A limit on the size of files fails a write as a full disk does, without needing one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@hypothesis.given(st.sampled_from(list(itertools.product([*FILES, *DIRECTORIES], KINDS))))
@hypothesis.settings(max_examples=25)
def test_no_output_costs_an_input(place, case):
    name, kind = case
    outs = Path(tempfile.mkdtemp(dir=place.parent))
    outs.chmod(0o755)
    before = snapshot(place)
    is_file = name in FILES
    out = outs / ("out" + ENDING.get(name, ""))
    around, read = contextlib.nullcontext(), []
    if kind == "input":
        out = place / (FILES | DIRECTORIES)[name]
        if name == "embed":  # by a name that it would take
            out = outs / "link.npy"
            out.symlink_to(place / "texts.txt")
    elif kind == "link":
        out.symlink_to(outs / "target")
    elif kind == "fifo" and is_file:
        os.mkfifo(out)
        reader = threading.Thread(target=lambda: read.append(out.read_bytes()))
        reader.start()
    elif kind == "fifo":
        os.mkfifo(out)
    elif kind == "full" and is_file and name == "predict":
        out = Path("/dev/full")
    elif kind == "full":
        around = small_files(100)
    else:
        outs.chmod(0o555)
        around = as_nobody()
    with around:
        status, _, error = call(*command(place, name), "--out", out)
    good = kind == "link" or (kind == "fifo" and is_file)
    assert status == (0 if good else 2), (case, error)
    assert snapshot(place) == before
    if good and kind == "fifo":
        reader.join()
        assert (read[0].count(b"\n") == 2) if name == "predict" else read[0].startswith(b"\x93NUM")
    elif good:
        assert out.is_symlink()
        assert (outs / "target").exists()
    else:
        last = error.splitlines()[-1]
        assert last.startswith("fastbert: error: ")
        assert "Traceback" not in error
        left = [path for path in outs.rglob("*") if path.is_file() and not path.is_symlink()]
        assert not [p for p in left if kind != "full" or p.name == out.name], left
    shutil.rmtree(outs)


def test_every_case_of_the_property(place):
    """The draws above are a part; these are the two that lost data."""
    status, _, error = call(*command(place, "predict"), "--out", place / "train.csv")
    assert status == 2
    assert "is the input" in error
    assert (place / "train.csv").read_text() == ROWS


def test_standard_input_and_output(place, monkeypatch):
    program = [sys.executable, "-m", "fastbert.cli", "predict", "--model", str(place / "run")]
    rows = '{"text": "good"}\n{"text": ""}\n{"id": 3}\n'
    done = subprocess.run([*program, "--input", "-", "--out", "-"], input=rows, text=True,
                          capture_output=True, check=True)  # fmt: skip
    one, two, three = map(json.loads, done.stdout.splitlines())
    assert one["label"] in ("pos", "neg")
    assert "expected a text in column 'text'" in two["error"]
    assert three == {"error": "-, line 3: expected a text in column 'text', got None"}
    assert "3 predictions are in -" in done.stderr


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
    assert "1 training sequences, 1 to choose the epoch by" in said
    base[base.index("--dev-share") + 1] = 0.1
    status, _, error = call(*base, "--out", tmp_path / "other")
    assert (status, "--dev-share 0.1: of the 2 example(s)" in error) == (2, True)
    assert not (tmp_path / "other").exists()


def test_two_runs_into_one_directory_at_once_are_one(place, tmp_path):
    run = (fastbert_alone, *command(place, "finetune"), "--out", tmp_path / "run")
    with processes.started(*run) as (one, by_one), processes.started(*run) as (other, by_other):
        said = by_one.read() + by_other.read()
        one.join()
        other.join()
    assert sorted((one.exitcode, other.exitcode)) == [0, 2], said
    assert "another process is writing there" in said or "holds a run" in said
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 1


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


def test_an_interrupted_run_does_not_look_finished(place, tmp_path, monkeypatch):
    from fastbert.finetune.train import _Trainer

    step, out = _Trainer._step, tmp_path / "run"

    def stop(self, numbers):
        if self.step == 2:
            raise KeyboardInterrupt
        return step(self, numbers)

    arguments = command(place, "finetune")
    arguments[-1] = 5
    with monkeypatch.context() as patch:
        patch.setattr(_Trainer, "_step", stop)
        status, _, error = call(*arguments, "--out", out)
    assert status == 130
    assert "the best epoch so far, is kept" in error
    assert "--overwrite begins anew" in error
    assert not (out / "latest").exists()
    status, _, error = call("predict", "--model", out, "--input", place / "train.csv", "--out",
                            tmp_path / "x.jsonl")  # fmt: skip
    assert (status, "the run is not finished" in error) == (2, True)
    status, _, error = call(*arguments, "--out", out)
    assert (status, "holds a run that was not finished" in error) == (2, True)
    assert call(*arguments, "--out", out, "--overwrite")[0] == 0
    assert (out / "latest").exists()


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
