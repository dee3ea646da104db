"""What writes and who may: nothing that is there is lost, whatever the output is."""

import errno
import fcntl
import io
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import filelock
import pytest
import torch
from rich.console import Console
from rich.table import Table

from fastbert.check import InputError
from fastbert.system import console, files, locks


def test_an_output_that_is_the_input_is_refused(tmp_path):
    source = tmp_path / "in.csv"
    source.write_text("kept")
    (tmp_path / "link").symlink_to(source)
    os.link(source, tmp_path / "hard")
    for name in ("in.csv", "link", "hard", "../" + tmp_path.name + "/in.csv"):
        with pytest.raises(InputError, match=r"--out .* is the input .*in\.csv"):
            files.require_output(tmp_path / name, source)
    files.require_output(tmp_path / "new.csv", source)


def test_an_output_that_is_a_file_of_an_input_directory_is_refused(tmp_path):
    model = tmp_path / "model"
    (model / "checkpoint-1").mkdir(parents=True)
    (model / "checkpoint-1" / "model.safetensors").write_text("weights")
    with pytest.raises(InputError, match=r"is the input .*model"):
        files.require_output(model / "checkpoint-1" / "model.safetensors", model)
    files.require_output(model / "new.jsonl", model)  # among them, but none of them


def test_a_run_is_not_written_among_what_it_reads(tmp_path):
    (tmp_path / "corpus" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "corpus")
    for out in ("corpus", "corpus/run", "link/deep/run"):
        with pytest.raises(InputError, match=r"--out .*: lies in the input .*corpus"):
            files.require_apart("--out", tmp_path / out, [tmp_path / "corpus"])
    files.require_apart("--out", tmp_path / "corpus2", [tmp_path / "corpus"])
    files.require_apart("--out", tmp_path / "corpus" / "run", (), [tmp_path / "corpus"])
    with pytest.raises(InputError, match="lies in the input"):  # a model's directory
        files.require_apart("--out", tmp_path / "link", (), [tmp_path / "corpus"])


def test_links_are_written_through(tmp_path):
    (tmp_path / "deep").mkdir()
    target = tmp_path / "deep" / "target"
    (tmp_path / "link").symlink_to(target)  # to nothing, at first
    for text in ("one", "two"):
        files.write_text(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink()
        assert target.read_text() == text
    (tmp_path / "model").symlink_to(tmp_path / "deep")
    with files.new_directory(tmp_path / "model") as writing:
        (writing / "a").write_text("new")
    assert (tmp_path / "model").is_symlink()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "link", "model"]


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path):
    path = tmp_path / "private"
    path.write_text("one")
    path.chmod(0o600)
    files.write_text(path, "two")
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_is_new_is_as_private_as_the_umask_asks(tmp_path):
    program = """
import pathlib, sys
from fastbert.system import files
files.write_text(sys.argv[1] + "/file", "x")
with files.new_directory(sys.argv[1] + "/model") as writing:
    (writing / "deep").mkdir()
    (writing / "deep" / "a").touch()"""
    for umask in (0o077, 0o002):
        out = tmp_path / str(umask)
        subprocess.run([sys.executable, "-c", program, out], umask=umask, check=True)
        for path in (out, *out.rglob("*")):
            widest = 0o777 if path.is_dir() else 0o666
            assert path.stat().st_mode & 0o777 == widest & ~umask, path


@pytest.mark.parametrize("through_a_link", [False, True])
def test_a_fifo_is_streamed_to(tmp_path, through_a_link):
    fifo = out = tmp_path / "fifo"
    os.mkfifo(fifo)
    if through_a_link:
        out = tmp_path / "link"
        out.symlink_to(fifo)
    read = []
    reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()))
    reader.start()
    files.require_output(out)
    files.write_text(out, "rows\n")
    reader.join()
    assert read == [b"rows\n"]
    assert files.is_stream(fifo)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fifo"] + ["link"] * through_a_link


def test_devices_are_streamed_to_and_a_full_one_is_named():
    files.write_text("/dev/null", "rows")
    assert files.is_stream("/dev/null")
    with pytest.raises(InputError, match=r"/dev/full: cannot be written \(No space left"):
        files.write_text("/dev/full", "rows")


def test_standard_output_is_added_to(tmp_path):
    """As the shell's >> asks; renaming would lose what is there, and what comes after."""
    names = ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"]
    program = f"""
from fastbert.system import files
for name in {names}:
    files.write_text(name, name + "\\n")
print("after")"""
    out = tmp_path / "out"
    out.write_text("before\n")
    with out.open("a") as stream:
        subprocess.run([sys.executable, "-c", program], stdout=stream, check=True)
    assert out.read_text().split() == ["before", *names, "after"]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")

    def fail(error):
        with files.output(path) as file:
            file.write(b"half")
            raise error

    for error, kind in ((OSError(28, "No space left"), files.Unwritable), (KeyError(), KeyError)):
        with pytest.raises(kind):
            fail(error)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/b: cannot be written \(\w"):
        files.write_text(tmp_path / "file" / "b", "x")


def test_a_file_is_not_replaced_by_a_directory(tmp_path):
    path = tmp_path / "model"

    def fill():
        with files.new_directory(path) as writing:
            begun.append(writing)
            (writing / "a").write_text("new")
            path.write_text("kept")

    path.write_text("kept")
    (tmp_path / "link").symlink_to(path)
    begun = []
    for name in ("model", "link"):
        with (
            pytest.raises(files.Unwritable, match=rf"{name}: cannot be written \(Not a directory"),
            files.new_directory(tmp_path / name),
        ):
            begun.append(name)
    assert not begun
    path.unlink()
    with pytest.raises(files.Unwritable, match="Not a directory"):  # it came meanwhile
        fill()
    assert begun
    assert path.read_text() == "kept"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["link", "model"]


def test_an_error_of_writing_travels_between_processes():
    error = pickle.loads(pickle.dumps(files.Unwritable("a", "full")))
    assert (str(error), error.reason) == ("a: cannot be written (full)", "full")


HOLDER = """
import os, sys, time
from pathlib import Path
from fastbert.system import locks
with locks.claimed(Path(sys.argv[1])):
    if os.fork() == 0:  # as a loader's process, which outlives a killed parent for a while
        print("held", flush=True)
        time.sleep(60)
        os._exit(0)
    time.sleep(60)
"""


def test_a_directory_is_held_until_its_holder_is_killed(tmp_path):
    out = tmp_path / "deep" / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, start_new_session=True
    ) as holder:
        try:
            holder.stdout.readline()
            with (
                pytest.raises(InputError, match=r"--out .*run: another process is writing there"),
                locks.claimed(out),
            ):
                pass
            assert out.exists()  # the holder's
            holder.kill()
            holder.wait()
            with locks.claimed(out):  # though its child lives, and the file is there
                assert (out / locks.LOCK).exists()
        finally:
            os.killpg(holder.pid, signal.SIGKILL)
    assert not list(out.iterdir())


def test_a_claim_that_leaves_nothing_takes_its_directories_away(tmp_path):
    with pytest.raises(KeyError), locks.claimed(tmp_path / "a" / "b"):
        raise KeyError
    assert not list(tmp_path.iterdir())
    with locks.claimed(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "kept").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["kept"]


def test_who_waits_for_a_lock_gets_it_when_it_is_free(tmp_path):
    order = []

    def wait():
        with locks.locked(tmp_path / "lock", "it", wait=True):
            order.append("second")

    with locks.locked(tmp_path / "lock", "it", wait=True):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


@pytest.mark.parametrize("name", ["ENOSYS", "ENOTSUP", "ENOLCK"])
def test_a_file_system_without_locks_is_told_and_no_hindrance(name, tmp_path, monkeypatch):
    def none(*_):
        raise OSError(getattr(errno, name), "No locks")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.warns(UserWarning, match="the file system has no locks"), locks.claimed(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_who_waits_survives_that_the_directory_is_removed(tmp_path, monkeypatch):
    """By a claim that ends, and leaves its directory empty."""
    out, made = tmp_path / "out", []
    acquire = filelock.FileLock.acquire

    def beaten(self, *arguments, **options):
        made.append(self)
        if len(made) == 1:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(out))
        return acquire(self, *arguments, **options)

    monkeypatch.setattr(filelock.FileLock, "acquire", beaten)
    with locks.claimed(out):
        assert (out / locks.LOCK).exists()
    assert len(made) == 2


class Full(io.StringIO):
    encoding = "utf-8"

    def write(self, text):
        raise OSError(28, "No space left on device")

    flush = close = lambda self: self.write("")


class Gone(Full):
    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("stream", [Full, Gone])
def test_what_is_not_taken_ends_no_run(stream, monkeypatch):
    monkeypatch.setattr(sys, "stdout", stream())
    console.console.print("lost")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_what_an_encoding_lacks_is_printed_by_its_number(encoding, monkeypatch):
    table = Table("label")
    table.add_row("İyi \ud800")
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    own = Console(file=console._Forgiving(), width=60)
    own.print(table)
    sys.stdout.flush()
    said = raw.getvalue().decode(encoding)
    assert ("İyi" if encoding == "utf-8" else "\\u0130yi") in said
    assert "\\ud800" in said


class NearlyFull(io.BytesIO):
    """Has room for an archive's first bytes."""

    def write(self, data):
        if len(data) > 1000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_a_full_disk_under_torchs_archive_is_told_as_a_failed_write(tmp_path):
    with pytest.raises(RuntimeError, match="unexpected pos"):
        torch.save({"weight": torch.zeros(1000)}, NearlyFull())
    with (
        pytest.raises(
            files.Unwritable, match=r"model: cannot be written \(No space left on device"
        ),
        files.new_directory(tmp_path / "model"),
    ):
        torch.save({"weight": torch.zeros(1000)}, NearlyFull())
    assert not list(tmp_path.iterdir())


def test_errors_of_other_things_are_not_told_as_a_failed_write(tmp_path):
    for error in (RuntimeError("CUDA error: an illegal memory access"), MemoryError()):
        with pytest.raises(type(error)) as raised, files.new_directory(tmp_path / "model"):
            raise error
        assert raised.value is error
    assert not list(tmp_path.iterdir())
