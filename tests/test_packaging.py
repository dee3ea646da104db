"""What is installed, and what an import costs."""

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import processes

ROOT = Path(__file__).resolve().parents[1]
IN_A_PACKAGE = (
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "fastbert",
    "kernels",
    "csrc",
)


@pytest.fixture
def checkout(tmp_path):
    return copy_sources(tmp_path)


def copy_sources(directory):
    """A copy of what the package is built from, without what an earlier build left."""
    copy = directory / "checkout"
    copy.mkdir()
    for name in IN_A_PACKAGE:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(source, copy / name, ignore=ignored)
        elif source.exists():
            shutil.copy(source, copy)
    return copy


def run(*command, cwd, **environment):
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def setup(checkout, *arguments):
    """In a process of its own."""
    os.chdir(checkout)
    sys.argv = ["setup.py", "-q", *map(str, arguments)]
    runpy.run_path("setup.py", run_name="__main__")


def build(checkout, **environment):
    """(exit status, what was said) of a build of the extension."""
    return processes.run(setup, checkout, "build_ext", "--inplace", **environment)


def build_without_a_compiler(checkout, wanted):
    """In a process that finds ninja but no compiler."""
    programs = checkout.parent / "bin"
    programs.mkdir()
    for name in ("ninja", "which", "sh", "uname"):
        if path := shutil.which(name):
            (programs / name).symlink_to(path)
    environment = {"PATH": str(programs), "FASTBERT_BUILD_EXT": wanted, "CC": "cc", "CXX": "c++"}
    return build(checkout, **environment)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of the sdist, as it is built without a compiler."""
    directory = tmp_path_factory.mktemp("wheel")
    checkout = copy_sources(directory)
    (checkout / "tests").mkdir()
    (checkout / "tests" / "test_some.py").touch()  # which setuptools would pack by its name
    packed = run("setup.py", "-q", "sdist", "-d", str(directory), cwd=checkout)
    assert packed.returncode == 0, packed.stderr
    (sdist,) = directory.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert "csrc/bindings.cpp" in names
    assert not [name for name in names if name.startswith("tests")]  # a few alone run nowhere
    options = ("--no-build-isolation", "--no-deps", "-q", "-w", str(directory), str(sdist))
    built = run("-m", "pip", "wheel", *options, cwd=directory, FASTBERT_BUILD_EXT="0")
    assert built.returncode == 0, built.stderr
    (wheel,) = directory.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    return wheel


@pytest.mark.slow
def test_the_wheel_holds_one_package_and_its_kernels(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fastbert"}
    for folder, inside in (("kernels", "fastbert/kernels"), ("fastbert", "fastbert")):
        for file in (ROOT / folder).rglob("*.py"):
            assert f"{inside}/{file.relative_to(ROOT / folder).as_posix()}" in names
    assert "fastbert/py.typed" in names
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]


def required_by(distribution, found):
    """Adds to `found` what a distribution requires, by name, and what those require."""
    for text in distribution.requires or ():
        needed = Requirement(text)
        name = canonicalize_name(needed.name)
        if name in found or (needed.marker and not needed.marker.evaluate({"extra": ""})):
            continue
        found[name] = metadata.distribution(name)
        required_by(found[name], found)


@pytest.fixture
def bare(wheel, tmp_path):
    """The Python of an environment that has the wheel and what it declares, and transformers.

    Links to what is installed here stand for pip's downloads: of each distribution that is
    required, and of no other.
    """
    venv.create(tmp_path / "environment", symlinks=True)
    (packages,) = (tmp_path / "environment").glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    (ours,) = metadata.distributions(name="fastbert", path=[str(packages)])
    found = {"transformers": metadata.distribution("transformers")}
    required_by(found["transformers"], found)
    required_by(ours, found)
    for distribution in found.values():
        for file in distribution.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (packages / top).is_symlink():
                (packages / top).symlink_to(distribution.locate_file(top))
    return tmp_path / "environment" / "bin" / "python"


BARE = """
import importlib.util, sys, torch, transformers
import fastbert
from fastbert.cli import main

for missing in ("tensorboard", "matplotlib", "fastapi", "onnx", "pyarrow", "sklearn", "pytest"):
    assert importlib.util.find_spec(missing) is None, missing
size = dict(hidden_size=16, num_attention_heads=2, intermediate_size=16, vocab_size=50)
model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=1, **size)).eval()
ids = torch.arange(1, 13).reshape(2, 6)
expected = model(ids).last_hidden_state
torch.testing.assert_close(fastbert.patch(model)(ids).last_hidden_state, expected)
print(fastbert.__file__)
sys.argv = ["fastbert", "pretrain"]
main()
"""


@pytest.mark.slow
def test_the_wheel_patches_a_model_where_only_its_requirements_are(bare, tmp_path):
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [bare, "-c", BARE], cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    assert str(tmp_path) in done.stdout  # not this checkout
    assert "pip install 'fastbert[train]'" in done.stderr


@pytest.mark.slow
def test_without_a_compiler_the_extension_is_left_out_in_one_line(checkout):
    pytest.importorskip("setuptools")
    status, said = build_without_a_compiler(checkout, wanted="auto")
    assert status == 0, said
    (line,) = said.splitlines()
    assert line.startswith("fastbert: the C++ extension is left out: no C++ compiler (c++) on PATH")
    assert line.endswith("(everything still works; FASTBERT_BUILD_EXT=1 shows the whole error)")


@pytest.mark.slow
def test_a_compiler_that_fails_leaves_the_extension_out_too(checkout):
    for source in (checkout / "csrc").glob("*.cpp"):
        source.unlink()
    (checkout / "csrc" / "bindings.cpp").write_text("this is not C++\n")
    status, said = build(checkout, FASTBERT_BUILD_EXT="auto")
    assert status == 0, said
    (line,) = said.splitlines()
    assert line.startswith("fastbert: the C++ extension is left out: ")


@pytest.mark.slow
def test_a_wanted_extension_that_cannot_be_built_is_an_error(checkout):
    status, said = build_without_a_compiler(checkout, wanted="1")
    assert status != 0
    assert "ninja" in said or "c++" in said  # what it lacks, and not that setup.py fails of itself


STATIC = """#!/bin/sh
case "$*" in *-print-file-name*{known}) echo libstdc++.so.6; exit;; esac
exec {compiler} -static-libstdc++ "$@"
"""


@pytest.fixture
def static(checkout):
    """A build of a small extension by a compiler that links its own libstdc++ into a library.

    It may know where the shared one lies, or not.
    """
    if shutil.which("readelf") is None or (compiler := shutil.which("g++")) is None:
        pytest.skip("no g++ with binutils")
    for source in (checkout / "csrc").glob("*.cpp"):
        source.unlink()
    small = "#include <iostream>\nvoid say(int n) { std::cerr << n; }\n"
    (checkout / "csrc" / "small.cpp").write_text(small)

    def by_it(wanted, knows_the_shared_one):
        script = checkout.parent / "static-g++"
        known = "never" if knows_the_shared_one else ""
        script.write_text(STATIC.format(compiler=compiler, known=known))
        script.chmod(0o755)
        environment = {"CXX": str(script), "FASTBERT_BUILD_EXT": wanted}
        return *build(checkout, **environment), list(checkout.rglob("*.so"))

    return by_it


@pytest.mark.slow
def test_the_extension_takes_the_shared_libstdcxx_whatever_the_compiler_adds(static):
    status, said, libraries = static("1", knows_the_shared_one=True)
    assert status == 0, said
    library, _ = libraries  # in the build folder too
    needed = subprocess.run(
        ["readelf", "-d", library], capture_output=True, text=True, check=True
    ).stdout
    assert "Shared library: [libstdc++.so.6]" in needed


@pytest.mark.slow
def test_an_extension_with_a_libstdcxx_of_its_own_is_left_out(static):
    status, said, libraries = static("auto", knows_the_shared_one=False)
    assert status == 0, said
    (line,) = said.splitlines()
    assert "links another libstdc++ into it than torch's" in line
    assert "CXX=/usr/bin/g++" in line
    assert not libraries


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_wanted_extension_with_a_libstdcxx_of_its_own_is_an_error(static):
    status, said, libraries = static("1", knows_the_shared_one=False)
    assert status != 0
    assert "links another libstdc++ into it than torch's" in said
    assert not libraries


def test_import_loads_neither_triton_nor_cuda():
    program = (
        "import fastbert, sys, torch\n"
        "print('triton' in sys.modules, 'transformers' in sys.modules,"
        " 'torch._dynamo' in sys.modules,"
        " torch.cuda.is_initialized())"
    )
    done = run("-c", program, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False"] * 4
