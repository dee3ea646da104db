"""The quick part of the tests on every supported Python, each with three versions of transformers.

And all of it on the oldest PyTorch and Triton. `make test-matrix` runs both. A Python that is not
installed is skipped. `nox -s newest` runs all of it on what `pip install` gives today.
"""

import nox

PYTHONS = ("3.11", "3.12", "3.13")
# The oldest that the extra allows, one of 5.x from before numbers of hidden states and the name of
# the cache changed (5.23, 5.24), and that of constraints.txt.
TRANSFORMERS = ("4.57.6", "5.17.0", "5.24.0")
NEEDED = ("pytest", "pytest-timeout", "hypothesis", "setuptools", "accelerate", "peft")
TESTS = (
    *("tests/checkpoint", "tests/config", "tests/data", "tests/models", "tests/modules"),
    *("tests/test_explain.py", "tests/test_imports.py", "tests/test_outputs.py"),
    *(
        f"tests/hf/test_{name}.py"
        for name in (
            *("attention_interface", "contract", "differences", "encoder_swap", "first_tokens"),
            *("hooks", "padding", "patch", "peft", "precision", "promises"),
            *("users_calls", "users_changes", "users_hooks", "users_tables"),
        )
    ),
)
# The oldest that pyproject.toml allows; the interpreter of that Triton needs an older numpy.
OLDEST = ("torch==2.11.0", "triton==3.6.0", "numpy<2.4")

nox.options.default_venv_backend = "venv"
nox.options.sessions = ("tests", "oldest")


@nox.session(python=PYTHONS, reuse_venv=True)
def tests(session: nox.Session) -> None:
    """Kernels do not run, as this part takes minutes: `make test` runs them in the interpreter."""
    environment = {"FASTBERT_BUILD_EXT": "0", "OMP_NUM_THREADS": "1"}
    session.install("torch==2.13.0", "numpy", *NEEDED)
    for version in TRANSFORMERS:
        session.install("-e", ".[finetune,train]", f"transformers=={version}", env=environment)
        session.run("pip", "check")
        # by the module, so that processes that tests spawn find `tests` too
        command = ("python", "-m", "pytest", "-m", "not slow and not exhaustive")
        session.run(*command, *TESTS, *session.posargs, env=environment)


@nox.session(python="3.12", reuse_venv=True)
def oldest(session: nox.Session) -> None:
    """All of `make test` but the packaging, kernels in the interpreter and compiled graphs too."""
    _test_all(session, *OLDEST)


@nox.session(python="3.12")
def newest(session: nox.Session) -> None:
    """The same on the newest release of each package that pyproject.toml allows."""
    _test_all(session)


def _test_all(session: nox.Session, *packages: str) -> None:
    environment = {"FASTBERT_BUILD_EXT": "0", "OMP_NUM_THREADS": "1"}
    session.install(*(packages or ("torch",)), "setuptools", "setuptools_scm")
    session.install("--no-build-isolation", "-e", ".[dev]", *packages, env=environment)
    session.run("pip", "check")
    command = ("python", "-m", "pytest", "-n", "2", "--dist", "loadfile", "-m", "not exhaustive")
    session.run(*command, "--ignore=tests/test_packaging.py", *session.posargs, env=environment)
