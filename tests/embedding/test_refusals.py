"""What `fastbert embed` into a directory refuses, and what it leaves."""

import pytest
import torch

import fastbert
from fastbert.check import InputError, Stopped
from fastbert.data import load_tokenizer, save_tokenizer
from fastbert.embedding import shards
from fastbert.embedding.shards import embed_corpus
from tests.embedding.shards_case import OPTIONS, contents


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
    with pytest.raises(InputError, match=f"with another {named}; name another directory"):
        embed_corpus(model, corpus, out, **OPTIONS | {"shard_size": 20} | change)
    assert contents(out) == before


def test_another_input_or_model_may_not_either(model, corpus, tmp_path):
    source, out = tmp_path / "c.txt", tmp_path / "out"
    source.write_text("bal\nbam\n")
    embed_corpus(model, source, out, **OPTIONS)
    for other in ("bal\nban\n", "bal\n"):  # of the same size and of another one
        source.write_text(other)
        with pytest.raises(InputError, match="with another input; name"):
            embed_corpus(model, source, out, **OPTIONS)
    source.write_text("bal\nbam\n")
    other = fastbert.BertModel.from_pretrained(model)
    with torch.no_grad():
        other.encoder.layer[1].output.dense.bias[3] += 1e-6
    other.save_pretrained(tmp_path / "other")
    save_tokenizer(load_tokenizer(model), tmp_path / "other")
    with pytest.raises(InputError, match="with another model; name"):
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
    with pytest.raises(InputError, match="with another --truncate"):
        embed_corpus(model, source, out, **options)


def test_what_cannot_be_read_is_found_before_there_is_work(model, tmp_path):
    source = tmp_path / "c.jsonl"
    source.write_text('{"text": "bal"}\n' * 50 + "{}\n")
    with pytest.raises(InputError, match="line 51: no column 'text'"):
        embed_corpus(model, source, tmp_path / "out", shard_size=2, **OPTIONS)
    assert not (tmp_path / "out").exists()
    for kind, text, message in (
        ("jsonl", "\n", "is empty"),
        ("csv", "", "is empty"),
        ("csv", "text\n", "has no rows"),
    ):
        source = tmp_path / f"c.{kind}"
        source.write_text(text)
        with pytest.raises(InputError, match=message):
            embed_corpus(model, source, tmp_path / "out", **OPTIONS)
        assert not (tmp_path / "out").exists()


def test_other_files_are_left_alone(model, corpus, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds other files, such as mine\.txt"):
        embed_corpus(model, corpus, tmp_path, **OPTIONS)
    assert contents(tmp_path) == {"mine.txt": b"mine"}


def test_a_plan_of_another_version_is_refused(model, corpus, tmp_path):
    embed_corpus(model, corpus, tmp_path, **OPTIONS)
    plan = tmp_path / "plan.json"
    plan.write_text(plan.read_text().replace('"version": 1', '"version": 0'))
    with pytest.raises(InputError, match=r"plan\.json: written by another version of fastbert"):
        embed_corpus(model, corpus, tmp_path, **OPTIONS)


@pytest.mark.parametrize("other", ["bal\nbam\nban\n", "bal\nban\n"])
def test_an_input_that_changes_meanwhile_gives_no_manifest(model, tmp_path, monkeypatch, other):
    source, out = tmp_path / "c.txt", tmp_path / "out"
    source.write_text("bal\nbam\n")
    write = shards._write

    def change(*args):
        write(*args)
        source.write_text(other)

    monkeypatch.setattr(shards, "_write", change)
    with pytest.raises(InputError, match="was changed while it was read"):
        embed_corpus(model, source, out, **OPTIONS)
    assert not (out / "manifest.json").exists()


def test_ctrl_c_says_what_is_kept(model, corpus, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "_describe", stop)
    with pytest.raises(Stopped, match="are kept; the same command makes the missing ones"):
        embed_corpus(model, corpus, tmp_path / "out", shard_size=50, **OPTIONS)
    assert len(list((tmp_path / "out").glob("shard-*"))) == 3
