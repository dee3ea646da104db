"""`fastbert embed` into a directory: the rows of a whole run, whatever happens on the way."""

import json
import sys

import numpy as np
import pytest

from fastbert import cli
from fastbert.embedding import shards
from fastbert.embedding.array import embed
from fastbert.embedding.shards import embed_corpus
from tests import processes
from tests.command_line import main as fastbert
from tests.embedding import killed_runs
from tests.embedding.shards_case import OPTIONS, contents, rows_of


@pytest.mark.parametrize("format", ["npy", "parquet"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_rows_are_those_of_one_file(model, corpus, tmp_path, monkeypatch, format, pooling):
    if format == "parquet":
        pytest.importorskip("pyarrow.parquet", reason="the extra [embed] is needed")
    monkeypatch.setattr(shards, "_WINDOW_ROWS", 8)
    options = OPTIONS | {"pooling": pooling}
    embed_corpus(model, corpus, tmp_path / "out", shard_size=25, format=format, **options)
    whole = embed(model, corpus, pooling=pooling, precision="fp32")
    rows = rows_of(tmp_path / "out")
    assert rows.shape == (103, 16)
    np.testing.assert_allclose(rows, whole, atol=1e-5)


def test_every_kind_of_input_gives_the_same_rows(model, corpus, tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="the extra [embed] is needed")
    pytest.importorskip("pyarrow.parquet")
    texts = corpus.read_text().split("\n")[:-1]
    jsonl = "".join(json.dumps({"body": text}) + "\n" for text in texts)
    (tmp_path / "c.jsonl").write_text(jsonl)
    (tmp_path / "c.csv").write_text("n,body\n" + "".join(f'0,"{text}"\n' for text in texts))
    arrow.parquet.write_table(arrow.table({"body": texts}), tmp_path / "c.parquet")
    embed_corpus(model, corpus, tmp_path / "txt", shard_size=40, **OPTIONS)
    wanted = rows_of(tmp_path / "txt")
    for kind in ("jsonl", "csv", "parquet"):
        options = OPTIONS | {"text_column": "body"}
        embed_corpus(model, tmp_path / f"c.{kind}", tmp_path / kind, shard_size=40, **options)
        np.testing.assert_array_equal(rows_of(tmp_path / kind), wanted)


@pytest.fixture(scope="module")
def killed(model, corpus, tmp_path_factory):
    """What `killed_runs.py` leaves, and how many runs it has killed in each way."""
    root = tmp_path_factory.mktemp("killed")
    modes = {"moments": {"shard_size": 4, "batch_tokens": 1}, "points": {"shard_size": 60}}
    modes = {mode: OPTIONS | options for mode, options in modes.items()}
    case = {"model": model, "source": str(corpus), "out": str(root), "modes": modes}
    status, said = processes.run(killed_runs.main, case, OMP_NUM_THREADS="1")
    assert status == 0, said
    return root, json.loads(said)


def test_killed_at_random_moments_the_files_are_those_of_an_undisturbed_run(killed):
    root, numbers = killed
    assert numbers["moments"] == 6
    assert rows_of(root / "moments" / "killed").shape == (103, 16)
    assert contents(root / "moments" / "killed") == contents(root / "moments" / "whole")


def test_killed_at_each_change_of_a_file(killed):
    root, numbers = killed
    number = numbers["points"]
    assert number == 3 * 4  # of the plan, two shards and the manifest
    places = [root / "points" / str(place) for place in range(number + 1)]
    last = contents(places[-1])  # of the run that was not killed
    assert rows_of(places[-1]).shape == (103, 16)
    for place in places[:-1]:
        assert contents(place) == last, place


def test_two_processes_give_the_same_files(model, corpus, tmp_path):
    pytest.importorskip("torch.distributed.run", reason="this torch has no torchrun")
    options = ["--model", model, "--input", corpus, "--shard-size", 20, "--batch-tokens", 100]
    options += ["--precision", "fp32"]
    embed_corpus(model, corpus, tmp_path / "one", shard_size=20, **OPTIONS)
    command = (fastbert, "embed", *options, "--out", tmp_path / "two")
    status, said = processes.run(processes.torchrun, 0, *command, OMP_NUM_THREADS="1")
    assert status == 0, said
    assert said.count("103 embeddings are in") == 1  # only the first process speaks
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_run_goes_on_with_what_is_missing(model, corpus, tmp_path, monkeypatch):
    out = tmp_path / "out"
    embed_corpus(model, corpus, out, shard_size=20, **OPTIONS)
    before = contents(out)
    (out / "shard-00002.npy").unlink()
    (out / "shard-00004.npy").write_bytes(before["shard-00004.npy"][:-1])
    (out / ".shard-00002.npy.123").write_bytes(b"half")
    made = []
    write = shards._write
    monkeypatch.setattr(shards, "_write", lambda *args: made.append(args[1]) or write(*args))
    embed_corpus(model, corpus, out, shard_size=20, **OPTIONS)
    assert made == [2, 4]
    assert contents(out) == before
    embed_corpus(model, corpus, out, shard_size=20, **OPTIONS)
    assert made == [2, 4]


@pytest.fixture
def call(monkeypatch, capsys):
    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastbert", "embed", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        said = capsys.readouterr()
        return exit.value.code, said.out, said.err

    return call


def test_the_command(model, corpus, tmp_path, call):
    given = ["--model", model, "--input", corpus]
    status, said, error = call(*given, "--out", tmp_path / "out", "--shard-size", 60)
    assert (status, error) == (0, "")
    assert "103 embeddings are in" in said
    np.testing.assert_allclose(rows_of(tmp_path / "out"), embed(model, corpus), atol=1e-5)
    for options, message in (
        (["--out", tmp_path / "a.npy", "--shard-size", 9], "a file has no shards"),
        (["--out", tmp_path / "a", "--format", "hdf5"], "--format: expected one of npy, parquet"),
        (["--out", tmp_path / "a", "--pooling", "max"], "--pooling: expected one of mean, cls"),
        (["--out", tmp_path / "a", "--max-seq-len", 99], "--max-seq-len: expected 3 to"),
    ):
        status, _, error = call(*given, *options)
        assert status == 2
        assert message in error
        assert not (tmp_path / "a").exists()
