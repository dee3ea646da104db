"""Tokenising by several processes: the same bytes, whatever is killed and in whatever order."""

import multiprocessing
import pickle
import subprocess
import sys
import time

import pytest

from fastbert.check import InputError
from fastbert.data import Interrupted, tokenize_corpus
from fastbert.data.tokenized import parts

# Segmenters that do as the words say, in a module that other processes can import.
SEGMENTERS = """
import os, signal, time
from pathlib import Path

here = Path(__file__).parent

def obedient(sentence):
    words = sentence.split()
    if not (here / "harmless").exists():
        if "sleep" in words:
            (here / f"pid{os.getpid()}").touch()
            time.sleep(1000)  # longer than pytest-timeout lets a test take
        if "die" in words:
            os.kill(os.getpid(), signal.SIGKILL)
        if "lie" in words:
            return ["truth"]
    return words
"""


@pytest.fixture
def obedient(tmp_path, monkeypatch):
    # a name of its own: the processes that fork the others keep what they have imported
    name = f"segmenters_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(SEGMENTERS)
    monkeypatch.syspath_prepend(tmp_path)
    return __import__(name).obedient


def files_in(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def stamps(directory):
    """When each complete part was written."""
    files = (directory / "partial").glob("0*.npz")
    return {int(path.stem): path.stat().st_mtime_ns for path in files}


def test_any_number_of_processes_gives_the_same_bytes(documents, tokenizer, tmp_path):
    calls = {}
    for processes in (0, 1, 2, 4):
        calls[processes] = []
        tokenize_corpus(
            [["", "\x00"], *documents, [], ["ba", "", " "]],
            tokenizer,
            tmp_path / str(processes),
            fingerprint="f",
            processes=processes,
            progress=lambda *done, n=processes: calls[n].append(done),
        )
        assert files_in(tmp_path / str(processes)) == files_in(tmp_path / "0"), processes
        assert len(calls[processes]) == len(calls[0])
        assert calls[processes] == sorted(calls[processes])
        assert calls[processes][-1] == calls[0][-1]
    assert not multiprocessing.active_children()


def test_reads_only_so_far_ahead(documents, tokenizer, tmp_path):
    cut = list(parts.batches(documents))
    first = {id(batch[0]): number for number, batch in enumerate(cut)}
    ahead = []

    def watched():
        for document in documents:
            if (number := first.get(id(document))) is not None:
                ahead.append(number - len(stamps(tmp_path)))
            yield document

    tokenize_corpus(watched(), tokenizer, tmp_path, fingerprint="f", processes=2)
    assert len(ahead) == len(cut) > 10
    assert 1 <= max(ahead) <= 3  # and with the one that is being read, two a process


def test_a_killed_process_is_one_line_and_loses_nothing(documents, tokenizer, tmp_path, obedient):
    texts = [*documents[:40], ["ba die ke"], *documents[40:]]
    options = {"fingerprint": "f", "segmenter": obedient, "processes": 2}
    out = tmp_path / "out"
    with pytest.raises(Interrupted, match=rf"^cache {out}: a process .* was killed.* run again"):
        tokenize_corpus(texts, tokenizer, out, **options)
    kept = stamps(out)
    assert kept
    (tmp_path / "harmless").touch()

    def untouched(*_):
        assert kept.items() <= stamps(out).items()

    tokenize_corpus(texts, tokenizer, out, progress=untouched, **options)
    options["processes"] = 1
    tokenize_corpus(texts, tokenizer, tmp_path / "whole", **options)
    assert files_in(out) == files_in(tmp_path / "whole")


PROGRAM = """
import pickle, sys
from pathlib import Path
from tokenizers import Tokenizer
job = Path(sys.argv[1])
documents, tokenizer, module = pickle.loads(job.read_bytes())
with (job.parent / "runs").open("a") as file:
    file.write("run")
sys.path.insert(0, str(job.parent))
from fastbert.data import tokenize_corpus
from fastbert.data.tokenized import parts
parts.PART_CHARACTERS = 5_000
tokenize_corpus(
    documents, Tokenizer.from_str(tokenizer), job.parent / "out", fingerprint="f",
    segmenter=__import__(module).obedient, processes=2,
)
"""  # and no `if __name__ == "__main__"`


def test_goes_on_after_a_kill_with_the_parts_that_are_missing(
    documents, tokenizer, tmp_path, obedient
):
    texts = [["ba sleep ke"], *documents]  # the first part is not done, others are
    job, out, program = tmp_path / "job", tmp_path / "out", tmp_path / "program.py"
    job.write_bytes(pickle.dumps((texts, tokenizer.to_str(), obedient.__module__)))
    program.write_text(PROGRAM)
    with subprocess.Popen([sys.executable, program, job]) as process:
        try:
            wait_for(lambda: len(stamps(out)) >= 3 or process.poll() is not None)
            assert process.returncode is None, "it ended before it was killed"
        finally:
            process.kill()
    assert (tmp_path / "runs").read_text() == "run"  # the processes have not run the script
    pids = [int(path.name[3:]) for path in tmp_path.glob("pid*")]
    assert len(pids) == 1
    wait_for(lambda: not is_running(pids[0]))
    kept = stamps(out)
    assert 0 not in kept

    (tmp_path / "harmless").touch()
    options = {"fingerprint": "f", "segmenter": obedient}

    def untouched(*_):
        assert kept.items() <= stamps(out).items()

    corpus = tokenize_corpus(texts, tokenizer, out, processes=2, progress=untouched, **options)
    tokenize_corpus(texts, tokenizer, tmp_path / "whole", **options)
    assert files_in(out) == files_in(tmp_path / "whole")
    assert corpus.num_documents == 81


def wait_for(condition):
    """As long as pytest-timeout lets it: on a busy machine Python takes a minute to start."""
    while not condition():
        time.sleep(0.02)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # before it is opened, or before it is read
        return False


@pytest.mark.parametrize("where", ["reading", "showing"])
def test_ctrl_c_ends_the_processes(documents, tokenizer, tmp_path, obedient, where):
    pressed = []

    def ctrl_c(at):
        if at == where:
            wait_for(lambda: list(tmp_path.glob("pid*")))
            pressed.append(time.monotonic())
            raise KeyboardInterrupt

    def texts():
        yield ["ba sleep ke " * 500]
        yield from documents[:3]
        ctrl_c("reading")
        yield from documents[3:]

    def show(seen, *_):
        if seen:
            ctrl_c("showing")

    options = {"fingerprint": "f", "segmenter": obedient, "processes": 2, "progress": show}
    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus(texts(), tokenizer, tmp_path / "out", **options)
    assert not multiprocessing.active_children()
    assert time.monotonic() - pressed[0] < 50  # and not until a process has slept enough


def test_an_error_in_a_process_arrives_as_itself(documents, tokenizer, tmp_path, obedient):
    texts = [*documents[:20], ["ba lie ke"], *documents[20:]]
    with pytest.raises(InputError, match=r"^--segmenter: returned the word 'truth', which is not"):
        tokenize_corpus(
            texts, tokenizer, tmp_path, fingerprint="f", segmenter=obedient, processes=2
        )


def of_the_script(sentence):
    return sentence.split()


def test_a_segmenter_that_cannot_travel_is_one_line(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(of_the_script, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "of_the_script", of_the_script, raising=False)
    assert pickle.dumps(of_the_script)  # but another process has another script
    for segmenter in (lambda sentence: [], of_the_script):
        with pytest.raises(InputError, match=r"segmenter .*function from a module.* processes=1"):
            tokenize_corpus(
                [["ba"]], tokenizer, tmp_path, fingerprint="f", segmenter=segmenter, processes=2
            )
    with pytest.raises(InputError, match="processes: expected at least 0, got -1"):
        tokenize_corpus([["ba"]], tokenizer, tmp_path, fingerprint="f", processes=-1)
