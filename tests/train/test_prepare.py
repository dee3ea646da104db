"""The tokenised text of a run: kept, shared, refused, and shown while it is made."""

import dataclasses
import io
import threading

import pytest
from rich.console import Console

from fastbert.check import InputError
from fastbert.data import Interrupted, OtherCache, available_cores, parts, workers
from fastbert.pretrain_config import PretrainConfig
from fastbert.train import prepare, report
from fastbert.train.pretrain import pretrain
from fastbert.train.report import TokenizingReporter

TEXT = "The list holds a number.\nIt is an object of a class.\nA class has a name.\n\n" * 40


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def config(corpus, tmp_path):
    return PretrainConfig(
        corpus=(corpus,),
        cache=tmp_path / "cache",
        preset="tiny",
        vocab_size=100,
        steps=1,
        batch_tokens=256,
        eval_batches=1,
    )


def test_two_runs_share_a_cache(config, tmp_path, capsys):
    one = pretrain(dataclasses.replace(config, tokenize_workers=2), tmp_path / "one")
    made = stamps(tmp_path / "cache")
    assert {"tokens.npy", "tokenizer.json"} <= made.keys()
    said = capsys.readouterr().out
    assert "trained a vocabulary of" in said
    two = pretrain(config, tmp_path / "two")
    assert stamps(tmp_path / "cache") == made
    assert two["heldout_mlm_loss"] == one["heldout_mlm_loss"]
    assert "vocabulary" not in capsys.readouterr().out
    assert not (tmp_path / "two" / "text").exists()
    pretrain(dataclasses.replace(config, cache=None), tmp_path / "two", resume=True)
    assert (tmp_path / "two" / "text" / "tokens.npy").exists()


def stamps(directory):
    files = (path for path in directory.iterdir() if path.name != "lock")
    return {path.name: path.stat().st_mtime_ns for path in files}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 110}, "another vocab_size; remove the directory or name another"),
        ({"lowercase": False}, "another lowercase"),
        ({"tokenizer": "cased"}, "another tokenizer"),
        ({"segmenter": "spaces"}, "another segmenter"),
    ],
    ids=["size", "case", "tokenizer", "segmenter"],
)
def test_a_cache_of_another_vocabulary_is_an_error(change, said, config, tmp_path):
    prepare.prepare_text(config, tmp_path / "run")
    made = stamps(tmp_path / "cache")
    if "tokenizer" in change:
        other = dataclasses.replace(config, cache=tmp_path / "cased", lowercase=False)
        prepare.prepare_text(other, tmp_path / "run")
        change = {"tokenizer": tmp_path / "cased" / "tokenizer.json"}
    with pytest.raises(OtherCache, match=f"cache {tmp_path}/cache: was made with {said}"):
        pretrain(dataclasses.replace(config, **change), tmp_path / "run")
    assert stamps(tmp_path / "cache") == made
    assert not (tmp_path / "run").exists()


def test_a_corpus_that_changes_is_an_error(config, corpus, tmp_path):
    own = dataclasses.replace(config, cache=None)
    pretrain(config, tmp_path / "shared")
    pretrain(own, tmp_path / "own")
    corpus.write_text(TEXT + "One more.\n")
    with pytest.raises(OtherCache, match="cache: was made with another corpus; remove"):
        pretrain(config, tmp_path / "shared", resume=True)
    with pytest.raises(InputError, match="own: the corpus or the tokenizer has changed since"):
        pretrain(own, tmp_path / "own", resume=True)


def test_runs_that_want_the_same_cache_at_once_make_it_once(config, tmp_path, monkeypatch):
    trained, found = [], []
    train = prepare.data.train_tokenizer
    monkeypatch.setattr(prepare.data, "train_tokenizer", lambda *a: trained.append(a) or train(*a))

    def run(name):
        found.append(prepare.prepare_text(config, tmp_path / name).fingerprint)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(trained) == 1
    assert len(set(found)) == 1
    assert len(found) == 2


def test_what_a_killed_process_leaves_is_kept(config, tmp_path, monkeypatch):
    own, out = dataclasses.replace(config, cache=None), tmp_path / "run"
    monkeypatch.setattr(parts, "PART_CHARACTERS", 1_000)
    write = workers._write_part

    def killed(encoder, batch):
        if batch.number == 2:
            raise Interrupted("killed; run again")
        return write(encoder, batch)

    with monkeypatch.context() as patch:
        patch.setattr(workers, "_write_part", killed)
        with pytest.raises(Interrupted, match="text: killed; run again"):
            pretrain(own, out)
    assert len(list((out / "text" / "partial").glob("0*.npz"))) == 2
    assert pretrain(own, out)["steps"] == 1


def test_a_small_corpus_starts_no_processes(config, tmp_path, monkeypatch):
    asked = []
    tokenize = prepare.data.tokenize_corpus

    def ask(*arguments, processes, **options):
        asked.append(processes)
        return tokenize(*arguments, processes=0, **options)

    monkeypatch.setattr(prepare.data, "tokenize_corpus", ask)
    prepare.prepare_text(config, tmp_path)
    prepare.prepare_text(dataclasses.replace(config, tokenize_workers=3), tmp_path)
    monkeypatch.setattr(prepare, "LARGE", 1000)
    prepare.prepare_text(config, tmp_path)
    assert asked == [0, 3, available_cores()]


@pytest.fixture
def shown(monkeypatch):
    def console(**options):
        out = io.StringIO()
        monkeypatch.setattr(report, "console", Console(file=out, width=120, **options))
        return out

    return console


def test_plain_lines_come_now_and_then(shown, monkeypatch):
    out = shown(force_terminal=False)
    now = iter([0.0, 0.0, 5.0, 12.0, 13.0, 20.0])
    monkeypatch.setattr(report.time, "perf_counter", lambda: next(now, 20.0))
    with TokenizingReporter(6_000_000) as reporter:
        for part in range(1, 7):  # the first is of an earlier run
            reporter(10 * part, 1000 * part, 1_000_000 * part)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("tokenised 40 documents, 4,000 tokens, 67% of 6.0 MB, 250 tokens/s")
    assert lines[1].startswith("tokenised 60 documents, 6,000 tokens, 100% of 6.0 MB, 250 tokens/s")
    assert len(lines) == 2


def test_a_terminal_shows_a_bar(shown):
    out = shown(force_terminal=True)
    with TokenizingReporter(4_000_000) as reporter:
        reporter(10, 1000, 0)  # of an earlier run
        reporter(20, 2000, 2_000_000)
        reporter.progress.refresh()
    said = out.getvalue()
    assert "tokenising" in said
    assert "20 documents, 2,000 tokens, 50% of 4.0 MB" in said
    assert "━" in said


def test_a_finished_cache_and_an_unknown_size_are_shown_too(shown):
    out = shown(force_terminal=False)
    with TokenizingReporter(0):
        pass
    assert out.getvalue() == ""
    with TokenizingReporter(0) as reporter:
        reporter(0, 0, 0)
        reporter(3, 500, 0)
    assert "%" not in out.getvalue()
    assert out.getvalue().startswith("tokenised 3 documents, 500 tokens")
