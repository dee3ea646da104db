"""How the command ends while it is still being imported."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastbert.system import startup

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "fastbert.cli", "info"]


def run(command, path=(), **environment):
    places = os.pathsep.join(map(str, (*path, ROOT)))
    environment = os.environ | {"PYTHONPATH": places} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("argv", "whole", "expected"),
    [
        (["/usr/bin/fastbert", "info"], ["python", "/usr/bin/fastbert", "info"], True),
        (["-m", "info"], ["python", "-m", "fastbert.cli", "info"], True),
        (["train.py"], ["python", "train.py", "fastbert.cli"], False),
        (["-m"], ["python", "-m", "pytest"], False),
        ([""], ["python"], False),
    ],
)
def test_scripts_and_notebooks_are_no_command(argv, whole, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", whole)
    assert startup.is_command() == expected
    monkeypatch.setattr("multiprocessing.parent_process", lambda: object())
    assert not startup.is_command()  # a worker has its parent's arguments


def test_ctrl_c_while_torch_is_imported_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    end = run(COMMAND, [tmp_path])
    assert (end.returncode, end.stdout) == (130, "")
    assert end.stderr == "fastbert: stopped: before anything was done\n"
    script = run([sys.executable, "-c", "import fastbert"], [tmp_path])
    assert script.stderr.startswith("Traceback")
    assert script.stderr.endswith("KeyboardInterrupt\n")


def test_ctrl_c_is_an_exception_again_once_the_command_runs():
    before = signal.signal(signal.SIGINT, startup.stop)
    try:
        startup.end()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        startup.end()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_environment_variable_that_is_refused_is_one_line():
    end = run(COMMAND, FASTBERT_BACKEND="nope")
    expected = "FASTBERT_BACKEND: expected one of ext, triton, reference, got 'nope'"
    assert (end.returncode, end.stderr) == (2, f"fastbert: error: {expected}\n")


def test_another_error_keeps_its_traceback(capsys):
    try:
        raise ValueError("a bug")
    except ValueError as error:
        startup.refuse(ValueError, error, error.__traceback__)
    assert capsys.readouterr().err.startswith("Traceback")
