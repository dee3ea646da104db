"""`fastbert embed` into a directory: the rows of a whole run, whatever happens on the way."""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastbert
from fastbert import cli
from fastbert.check import InputError, Stopped
from fastbert.data import load_tokenizer, save_tokenizer
from fastbert.data.texts import Mark, Text
from fastbert.embedding import model as embedder_module
from fastbert.embedding import shards
from fastbert.embedding.model import Embedder
from fastbert.embedding.shards import embed_corpus
from fastbert.finetune.predict import embed

ROOT = Path(__file__).resolve().parents[2]
WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]
OPTIONS = {
    "pooling": "mean",
    "max_seq_len": None,
    "truncate": False,
    "batch_tokens": 100,
    "precision": "fp32",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("model")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##s", "é", "北", "!"]
    (directory / "vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary), "utf-8")
    save_tokenizer(load_tokenizer(directory), directory)
    torch.manual_seed(0)
    config = fastbert.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        initializer_range=0.5,
    )
    fastbert.BertModel(config).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """103 texts of 0 to 30 words."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(0, 30))) for _ in range(103)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def rows_of(out: Path) -> np.ndarray:
    """All rows, by the manifest, whose every claim is checked."""
    manifest = json.loads((out / "manifest.json").read_text())
    parts, first = [], 0
    for shard in manifest["shards"]:
        path = out / shard["file"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
        assert path.stat().st_size == shard["bytes"]
        if path.suffix == ".npy":
            rows = np.load(path)
        else:
            table = pytest.importorskip("pyarrow.parquet").read_table(path)
            numbers = table["row"].to_numpy()
            assert numbers.tolist() == list(range(first, first + len(numbers)))
            rows = np.stack(table["embedding"].to_numpy())
        assert rows.dtype == np.float32
        assert (shard["first_row"], shard["rows"]) == (first, len(rows))
        first += len(rows)
        parts.append(rows)
    assert first == manifest["rows"]
    names = {shard["file"] for shard in manifest["shards"]} | {"manifest.json", "plan.json"}
    assert {path.name for path in out.iterdir()} == names
    return np.concatenate(parts)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


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


@pytest.fixture
def case(model, corpus, tmp_path):
    """Runs `killed_runs.py`, and gives how many runs it has killed."""

    def run(mode: str, **options) -> int:
        values = {"model": model, "source": str(corpus), "out": str(tmp_path), **OPTIONS}
        (tmp_path / "case.json").write_text(json.dumps(values | options))
        script = [sys.executable, str(Path(__file__).with_name("killed_runs.py"))]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*script, mode, str(tmp_path / "case.json")],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    return run


def test_killed_at_random_moments_the_files_are_those_of_an_undisturbed_run(case, tmp_path):
    assert case("moments", shard_size=4, batch_tokens=1) == 6
    assert rows_of(tmp_path / "killed").shape == (103, 16)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_killed_at_each_change_of_a_file(case, tmp_path):
    killed = case("points", shard_size=60)
    assert killed == 3 * 4  # of the plan, two shards and the manifest
    last = contents(tmp_path / str(killed))  # of the run that was not killed
    assert rows_of(tmp_path / str(killed)).shape == (103, 16)
    for number in range(killed):
        assert contents(tmp_path / str(number)) == last, number


def torchrun(*arguments: object) -> subprocess.CompletedProcess:
    pytest.importorskip("torch.distributed.run", reason="this torch has no torchrun")
    start = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    return subprocess.run(
        [*start, "-m", "fastbert.cli", "embed", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_two_processes_give_the_same_files(model, corpus, tmp_path):
    options = ["--model", model, "--input", corpus, "--shard-size", 20, "--batch-tokens", 100]
    options += ["--precision", "fp32"]
    embed_corpus(model, corpus, tmp_path / "one", shard_size=20, **OPTIONS)
    done = torchrun(*options, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("103 embeddings are in") == 1  # only the first process speaks
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


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"pooling": "cls"}, "--pooling"),
        ({"batch_tokens": 99}, "--batch-tokens"),
        ({"shard_size": 21}, "--shard-size"),
        ({"max_seq_len": 39}, "--max-seq-len"),
    ],
)
def test_another_run_may_not_write_there(model, corpus, tmp_path, change, named):
    out = tmp_path / "out"
    embed_corpus(model, corpus, out, **OPTIONS | {"shard_size": 20})
    before = contents(out)
    with pytest.raises(InputError, match=f"with other {named}; name another directory"):
        embed_corpus(model, corpus, out, **OPTIONS | {"shard_size": 20} | change)
    assert contents(out) == before


def test_another_input_or_model_may_not_either(model, corpus, tmp_path):
    source, out = tmp_path / "c.txt", tmp_path / "out"
    source.write_text("bal\nbam\n")
    embed_corpus(model, source, out, **OPTIONS)
    source.write_text("bal\nban\n")
    with pytest.raises(InputError, match="with other input; name"):
        embed_corpus(model, source, out, **OPTIONS)
    source.write_text("bal\nbam\n")
    other = fastbert.BertModel.from_pretrained(model)
    with torch.no_grad():
        other.encoder.layer[1].output.dense.bias[3] += 1e-6
    other.save_pretrained(tmp_path / "other")
    save_tokenizer(load_tokenizer(model), tmp_path / "other")
    with pytest.raises(InputError, match="with other model; name"):
        embed_corpus(str(tmp_path / "other"), source, out, **OPTIONS)


def test_a_long_text_ends_a_run_that_goes_on_with_truncate(model, tmp_path):
    source, out = tmp_path / "c.txt", tmp_path / "out"
    source.write_text("bal\nbam\n" * 10 + "bal " * 50 + "\nbam\n")
    options = OPTIONS | {"shard_size": 6}
    with pytest.raises(InputError, match=r"line 21: 52 tokens, more than the 40 .* --truncate"):
        embed_corpus(model, source, out, **options)
    kept = contents(out)
    assert sorted(kept) == ["plan.json", *(f"shard-0000{i}.npy" for i in range(3))]
    embed_corpus(model, source, out, **options | {"truncate": True})
    embed_corpus(model, source, tmp_path / "anew", **options | {"truncate": True})
    assert contents(out) == contents(tmp_path / "anew")
    with pytest.raises(InputError, match="with other --truncate"):
        embed_corpus(model, source, out, **options)


def test_what_cannot_be_read_is_found_before_there_is_work(model, tmp_path):
    source = tmp_path / "c.jsonl"
    source.write_text('{"text": "bal"}\n' * 50 + "{}\n")
    with pytest.raises(InputError, match="line 51: no column 'text'"):
        embed_corpus(model, source, tmp_path / "out", shard_size=2, **OPTIONS)
    assert not (tmp_path / "out").exists()
    source.write_text("\n")
    with pytest.raises(InputError, match="has no rows"):
        embed_corpus(model, source, tmp_path / "out", **OPTIONS)


def test_other_files_are_left_alone(model, corpus, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds other files, such as mine\.txt"):
        embed_corpus(model, corpus, tmp_path, **OPTIONS)
    assert contents(tmp_path) == {"mine.txt": b"mine"}


def test_an_input_that_changes_meanwhile_gives_no_manifest(model, tmp_path, monkeypatch):
    source, out = tmp_path / "c.txt", tmp_path / "out"
    source.write_text("bal\nbam\n")
    write = shards._write

    def change(*args):
        write(*args)
        source.write_text("bal\nbam\nban\n")

    monkeypatch.setattr(shards, "_write", change)
    with pytest.raises(InputError, match="was changed while it was read"):
        embed_corpus(model, source, out, **OPTIONS)
    assert not (out / "manifest.json").exists()


def test_ctrl_c_says_what_is_kept(model, corpus, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "_describe", stop)
    with pytest.raises(Stopped, match="are kept; the same command makes the rest"):
        embed_corpus(model, corpus, tmp_path / "out", shard_size=50, **OPTIONS)
    assert len(list((tmp_path / "out").glob("shard-*"))) == 3


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
        (["--out", tmp_path / "a", "--format", "hdf5"], "--format: one of npy, parquet"),
        (["--out", tmp_path / "a", "--pooling", "max"], "--pooling: one of mean, cls"),
        (["--out", tmp_path / "a", "--max-seq-len", 99], "--max-seq-len: between 3 and"),
    ):
        status, _, error = call(*given, *options)
        assert status == 2
        assert message in error
        assert not (tmp_path / "a").exists()


def embedder_of(model, **options) -> Embedder:
    return Embedder(model, torch.device("cpu"), **OPTIONS | options)


def test_of_a_long_text_only_the_beginning_is_tokenised(model, monkeypatch):
    """With the tokens that the whole text gives."""
    monkeypatch.setattr(embedder_module, "_CHARACTERS", 1)
    cut = embedder_of(model, truncate=True, max_seq_len=12)
    whole = embedder_of(model, truncate=True, max_seq_len=12)
    whole.divides_at_blanks = False
    draw = random.Random(1)
    pieces = [
        *WORDS[:20],
        "é",
        "e\u0301",
        "北",
        "!",
        "\t",
        "[MASK]",
        "xyz",
        "\u0301",
        "\u00a0",
        "İ",
    ]
    lengths = set()
    for _ in range(300):
        texts = [
            draw.choice([" ", "", "  "]).join(draw.choices(pieces, k=draw.randint(0, 40)))
            for _ in range(3)
        ]
        found = cut._ids(texts)
        assert found == whole._ids(texts)
        lengths.update(map(len, found))
    assert {0, 10} < lengths
    assert cut._end("bal " * 10) is not None


def test_a_window_is_bounded_by_rows_and_by_characters(monkeypatch):
    monkeypatch.setattr(shards, "_WINDOW_ROWS", 4)
    monkeypatch.setattr(shards, "_WINDOW_CHARACTERS", 10)
    texts = [Text("", "x" * n, Mark()) for n in (1, 1, 1, 1, 1, 9, 20, 3)]
    found = [[len(text.text) for text in window] for window in shards.windows(iter(texts))]
    assert found == [[1, 1, 1, 1], [1, 9], [20], [3]]


def test_batches_hold_at_most_the_budget_and_texts_of_a_length(model, monkeypatch):
    embedder = embedder_of(model)
    sizes = []
    collate = embedder_module.collate

    def spied(features):
        sizes.append([feature.num_tokens for feature in features])
        return collate(features)

    monkeypatch.setattr(embedder_module, "collate", spied)
    texts = [Text("", "bal " * n, Mark()) for n in (30, 1, 20, 2, 19, 3, 38, 0) * 3]
    embedder(texts)
    assert all(sum(size) <= 100 for size in sizes)
    flat = [n for size in sizes for n in size]
    assert flat == sorted(flat)
    assert len(flat) == len(texts)
