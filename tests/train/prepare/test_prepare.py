"""The tokenised text of a run: kept, shared, and refused."""

import dataclasses
import threading
import warnings

import pytest

from fastbert.check import InputError
from fastbert.data import Interrupted, OtherCache, available_cores
from fastbert.data.tokenized import parts, workers
from fastbert.train import prepare
from fastbert.train.pretrain import pretrain
from tests.train.prepare.case import TEXT


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
    with pytest.raises(InputError, match=r"own: the corpus .* has changed since"):
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


def test_a_corpus_says_what_was_read(config, tmp_path, capsys):
    directory = tmp_path / "texts"
    directory.mkdir()
    (directory / "wiki_00").write_text(TEXT)
    (directory / "b.pdf").write_bytes(b"\xff")
    pretrain(dataclasses.replace(config, corpus=(directory,)), tmp_path / "run")
    said = capsys.readouterr().out
    assert "corpus: 1 file(s), 40 documents" in said
    assert "skipped, the ending .pdf: " in said


def vocabulary(path, *words):
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    return path


def test_a_vocabulary_that_does_not_fit_is_said_to(config, tmp_path):
    few = vocabulary(tmp_path / "few.txt", "list", "a", ".")
    with pytest.warns(UserWarning, match=r"--corpus: \d+% of its tokens are \[UNK\]"):
        prepare.prepare_text(dataclasses.replace(config, tokenizer=few), tmp_path / "run")
    none = dataclasses.replace(config, tokenizer=vocabulary(tmp_path / "none.txt"),
                               cache=tmp_path / "other")  # fmt: skip
    with pytest.raises(InputError, match="--corpus: none of its words are in the vocabulary"):
        pretrain(none, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["One sentence alone.\n\n" * 40, "many words " * 40 + "\n\n"])
def test_pairs_that_are_all_random_are_said_to_be(text, config, corpus, tmp_path):
    corpus.write_text(text if text.startswith("One") else text * 40)
    with pytest.warns(UserWarning, match="100% of the pairs have a random second sentence"):
        prepare.prepare_text(config, tmp_path / "run")
    mlm = dataclasses.replace(config, objective="mlm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare.prepare_text(mlm, tmp_path / "run")


@pytest.mark.parametrize("objective", ["mlm+nsp", "mlm"])
def test_long_lines_of_which_most_is_not_read_are_said_to_be(objective, config, corpus, tmp_path):
    """As in a corpus with a paragraph or a document on a line."""
    corpus.write_text(("The list holds a number. " * 3000 + "\n\nIt is an object.\n\n") * 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prepare.prepare_text(dataclasses.replace(config, objective=objective), tmp_path / "run")
    said = [str(one.message) for one in caught if "tokens are not read" in str(one.message)]
    assert len(said) == (objective == "mlm+nsp")  # without pairs, long lines are read in parts
    assert all("--corpus: at least 99% of its tokens" in one for one in said)


def test_one_document_lacks_no_next_sentences_where_none_are_wanted(config, corpus, tmp_path):
    corpus.write_text("It is an object of a class.\n" * 40)
    with pytest.raises(InputError, match=r"corpus: 1 document.* need one each; separate"):
        pretrain(dataclasses.replace(config, objective="mlm"), tmp_path / "run")
    corpus.write_text(("It is an object of a class.\n" * 40 + "\n") * 2)
    other = dataclasses.replace(config, cache=tmp_path / "other")
    pretrain(dataclasses.replace(other, objective="mlm"), tmp_path / "two")
    with pytest.raises(InputError, match="a random next sentence is from another"):
        pretrain(other, tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"masking": "words"}, "masking: expected one of bert, whole-word, span"),
        ({"masking": "span", "segmenter": "words"}, "--segmenter: expected one of characters"),
        ({"mlm_probability": 1.0}, "--mlm-probability: expected above 0 and below 1, got 1.0"),
        ({"heldout_fraction": 0.0}, "--heldout-fraction: expected above 0 and below 1, got 0.0"),
        ({"batch_tokens": 31}, "--batch-tokens: expected at least --max-seq-len = 32, got 31"),
    ],
)
def test_bad_options_are_refused_before_the_corpus_is_read(
    options, said, config, tmp_path, monkeypatch
):
    """Reading a large one takes hours, and a refused run keeps nothing of it."""

    def read(_):
        raise AssertionError("the corpus was read")

    monkeypatch.setattr(prepare, "_Source", read)
    with pytest.raises(InputError, match=said):
        prepare.prepare_text(dataclasses.replace(config, **options), tmp_path)


def test_accents_stay_where_that_is_asked_for(config, corpus, tmp_path):
    corpus.write_text(TEXT.replace("class", "naïve"))
    words = {}
    for name, strip in (("default", None), ("kept", False)):
        own = dataclasses.replace(config, cache=tmp_path / name, strip_accents=strip)
        words[name] = prepare.prepare_text(own, tmp_path / "run").tokenizer
    assert words["default"].encode("naïve").tokens == words["default"].encode("naive").tokens
    assert "ï" in "".join(words["kept"].encode("naïve").tokens)
    with pytest.raises(OtherCache, match="another strip_accents"):
        prepare.prepare_text(dataclasses.replace(config, strip_accents=False,
                                                 cache=tmp_path / "default"), tmp_path)  # fmt: skip
