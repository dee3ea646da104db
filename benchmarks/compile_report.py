"""`python -m benchmarks.compile_report`: what Triton makes of each kernel, for GPUs not here.

Compiles ahead of time for sm_80, sm_90 and sm_100 and reads registers, local memory and load
widths from the binaries with the tools that Triton ships. Exits with 1 where a kernel spills or
loads a row in pieces narrower than 16 bytes.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.backends.nvidia
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastbert.kernels import layer_norm

CAPABILITIES = (80, 90, 100)
TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"


class Spec(NamedTuple):
    """One way a kernel is launched: the types of its arguments, its constants, its warps."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, int]
    num_warps: int
    wide_loads: int  # 16-byte loads that the code must have at least


class Report(NamedTuple):
    registers: int
    stack: int
    local: int
    spills: int
    wide_loads: int


def specs() -> Iterator[Spec]:
    """The launches of BERT-base and BERT-large, in bf16."""
    for columns in (768, 1024):
        block, num_warps = layer_norm.block_and_warps(columns)
        constants = {"N_COLS": columns, "BLOCK_N": block}
        statistics = dict.fromkeys(("mean_ptr", "rstd_ptr", "dweight_ptr", "dbias_ptr"), "*fp32")
        types = {"eps": "fp32", **statistics}
        yield Spec(layer_norm._layer_norm_fwd_kernel, types, constants, num_warps, wide_loads=3)
        yield Spec(layer_norm._layer_norm_bwd_kernel, types, constants, num_warps, wide_loads=3)


def compile_for(spec: Spec, capability: int) -> Report:
    """Compiles and disassembles; pointers and strides are multiples of 16, as in the launcher."""
    signature, attributes = {}, {}
    for place, name in enumerate(spec.kernel.arg_names):
        if name in spec.constants:
            signature[name] = "constexpr"
            continue
        default = "*bf16" if name.endswith("_ptr") else "i32"
        signature[name] = spec.types.get(name, default)
        if name.endswith(("_ptr", "_stride")):
            attributes[(place,)] = [["tt.divisibility", 16]]
    binary = triton.compile(
        ASTSource(spec.kernel, signature, spec.constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": spec.num_warps},
    ).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found is not None, usage
    return Report(
        *map(int, found.groups()),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        wide_loads=len(re.findall(r"\bLDG\.E(?:\.\w+)*\.128\b", code)),
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run(
        [TOOLS / tool, *arguments], capture_output=True, text=True, check=True
    ).stdout


def main() -> int:
    table = Table("kernel", "columns", "GPU", *Report._fields, "verdict")
    failed = False
    for spec in specs():
        for capability in CAPABILITIES:
            report = compile_for(spec, capability)
            good = not (report.stack or report.local or report.spills)
            good = good and report.wide_loads >= spec.wide_loads
            failed |= not good
            table.add_row(
                spec.kernel.__name__,
                str(spec.constants["N_COLS"]),
                f"sm_{capability}",
                *map(str, report),
                "ok" if good else "FAILED",
            )
    Console(width=140).print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
