"""Builds the optional extension `fastbert._C`; the rest of the package is in pyproject.toml.

The package works without the extension, so a build that fails is one line, not an error.
FASTBERT_BUILD_EXT=1 makes it an error and shows all the compiler says; =0 does not try.
"""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from setuptools import setup

WANTED = os.environ.get("FASTBERT_BUILD_EXT", "auto")
LIBSTDCXX = "libstdc++.so.6"


def leave_out(reason: BaseException | str) -> None:
    first_line = str(reason).strip().partition("\n")[0] or repr(reason)
    print(
        f"fastbert: the C++ extension is left out: {first_line} "
        "(everything still works; FASTBERT_BUILD_EXT=1 shows the whole error)"
    )


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Discards what this process and its children print: torch's build ignores setuptools' -q."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [(stream, os.dup(stream)) for stream in (1, 2)]
    with open(os.devnull, "w") as nowhere:
        for stream, _ in saved:
            os.dup2(nowhere.fileno(), stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, copy in saved:
            os.dup2(copy, stream)
            os.close(copy)


def shared_libstdcxx(compiler: str) -> list[str]:
    """What has the linker take torch's own libstdc++, also where the compiler adds a static one.

    Named before what the compiler adds, it is what the symbols are found in. With a second copy in
    the library, an error message that is begun in one and ended in the other ends the process.
    """
    command = [*shlex.split(compiler), f"-print-file-name={LIBSTDCXX}"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        return [found] if os.path.isabs(found) else []
    return []


def check_libstdcxx(library: Path, compiler: str) -> None:
    """Removes a library that does not name the shared libstdc++, and raises RuntimeError."""
    if LIBSTDCXX.encode() + b"\0" not in library.read_bytes():
        library.unlink()
        raise RuntimeError(
            f"{compiler} links another libstdc++ into it than torch's, and errors would end the "
            "process; CXX=/usr/bin/g++ may do better"
        )


def extension() -> dict[str, Any]:
    """The arguments of `setup` that build the extension, from C++ and, where torch has it, CUDA."""
    import torch
    from torch.utils import cpp_extension

    class OptionalBuild(cpp_extension.BuildExtension):
        def run(self) -> None:
            if WANTED == "1":
                super().run()
                return
            inplace = self.inplace
            try:
                compiler = cpp_extension.get_cxx_compiler()
                if shutil.which(shlex.split(compiler)[0]) is None:
                    raise RuntimeError(f"no C++ compiler ({compiler}) on PATH")
                with silence():
                    super().run()
            except Exception as error:
                leave_out(error)
                self.extensions = []  # or setuptools goes on to copy the missing file
                self.inplace = inplace  # which setuptools changes while it builds

        def build_extension(self, ext: Any) -> None:
            super().build_extension(ext)
            if sys.platform == "linux":
                library = Path(self.get_ext_fullpath(ext.name))
                check_libstdcxx(library, cpp_extension.get_cxx_compiler())

    cuda = cpp_extension.CUDA_HOME is not None and torch.version.cuda is not None
    sources = sorted(map(str, Path("csrc").glob("*.cpp")))
    if cuda:
        if not torch.cuda.is_available():  # for GPUs elsewhere: 8.0 is all of 8.x, PTX the newer
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        sources += sorted(str(path) for path in Path("csrc/cuda").iterdir())
    make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    openmp = ["-fopenmp"] if sys.platform == "linux" else []  # at::parallel_for is a header's
    flags = {"cxx": ["-O3", "-g0", *openmp], "nvcc": ["-O3", "-lineinfo"]}
    linked = [*openmp, *shared_libstdcxx(cpp_extension.get_cxx_compiler())]
    module = make(
        "fastbert._C",
        sources,
        extra_compile_args=flags,
        extra_link_args=linked,
        depends=["setup.py"],  # which says how to link
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": OptionalBuild}}


def optional_extension() -> dict[str, Any]:
    if WANTED == "0":
        return {}
    try:
        return extension()
    except Exception as error:
        if WANTED == "1":
            raise
        leave_out(error)
        return {}


setup(**optional_extension())
