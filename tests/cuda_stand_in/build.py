"""Builds the stand-ins for CUDA's libraries into a folder, for the PyTorch that is installed.

    python tests/cuda_stand_in/build.py FOLDER [HEADERS]

It needs g++, CUDA's headers (by default /usr/local/cuda-13.0/include) and a build of PyTorch for
CUDA 13; README.md has the rest. What PyTorch asks for and no source here has only succeeds.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
HEADERS = "/usr/local/cuda-13.0/include"
SOURCES = {
    "libcudart.so.13": sorted(HERE.glob("cudart/*.cpp")),
    "libcublas.so.13": [HERE / "cublas.cpp"],
    "libcublasLt.so.13": [HERE / "cublas.cpp"],
    "libcuda.so.1": [HERE / "cuda.cpp"],
}
ASKING = ("c10_cuda", "caffe2_nvrtc", "torch_cuda")  # PyTorch's that use the driver


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def packages() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent.parent


def needed() -> dict[str, set[str]]:
    """The functions of each library that PyTorch, CUDA's other libraries and Triton ask for."""
    names: dict[str, set[str]] = {library: set() for library in SOURCES}
    for path in (*packages().glob("torch/lib/*.so"), *packages().glob("nvidia/*/lib/*.so*")):
        symbols = output("nm", "-D", "--undefined-only", path)
        for name, library in re.findall(r" [Uw] (\w+)@+([\w.]+)", symbols):
            if library in names and not path.name.startswith("libcudart"):
                names[library].add(name)
    # the driver's functions are asked for by name as the program runs
    folder = packages() / "torch/lib"
    texts = [output("strings", folder / f"lib{name}.so") for name in ASKING]
    texts.append((packages() / "triton/backends/nvidia/driver.c").read_text())
    for text in texts:
        names["libcuda.so.1"] |= set(re.findall(r"\bcu[A-Z]\w+\b", text))
    return names


def build(library: str, names: set[str], folder: Path, headers: str) -> None:
    options = ("-O1", "-fPIC", "-std=c++17", f"-I{headers}")
    own = []
    for source in SOURCES[library]:
        own.append(folder / f"{library}.{source.stem}.o")
        subprocess.run(["g++", *options, "-c", source, "-o", own[-1]], check=True)
    defined = {
        line.split()[-1] for line in output("nm", "--defined-only", *own).splitlines() if line
    }
    rest = folder / f"{library}.c"
    lines = (f"int {name}() {{ return 0; }}\n" for name in sorted(names - defined))
    rest.write_text("".join(lines))
    versions = folder / f"{library}.map"
    versions.write_text(f"{library} {{ global: *; }};\n")
    named = f"-Wl,-soname,{library},--version-script={versions}"
    shared = ("-shared", "-fPIC", "-w", named, "-o", folder / library)
    subprocess.run(["g++", *own, "-x", "c", rest, *shared], check=True)


def main(folder: str, headers: str = HEADERS) -> None:
    if not (packages() / "torch/lib/libtorch_cuda.so").exists():
        sys.exit("build.py: expected a PyTorch that is built for CUDA 13, as PyPI's for Linux is")
    if not Path(headers, "cuda_runtime_api.h").exists():
        sys.exit(f"build.py: {headers}: expected CUDA's headers here")
    target = Path(folder).absolute()
    target.mkdir(parents=True, exist_ok=True)
    for library, names in needed().items():
        build(library, names, target, headers)
    (target / "libcuda.so").unlink(missing_ok=True)
    (target / "libcuda.so").symlink_to("libcuda.so.1")  # which Triton links
    first = ("libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcuda.so.1")
    print(f'export LD_PRELOAD="{" ".join(str(target / name) for name in first)}"')
    print(f"export TRITON_LIBCUDA_PATH={target}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: build.py FOLDER [HEADERS]")
    main(*sys.argv[1:])
