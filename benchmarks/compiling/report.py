"""`python -m benchmarks compile`: what Triton makes of each kernel, for GPUs not here.

Compiles every launch of `benchmarks.compiling.cases` ahead of time for sm_80, sm_90 and sm_100 and
reads registers, memory, tensor-core instructions and load widths from the binaries with the tools
that Triton ships. Exits with 1 where a kernel exceeds its committed limits.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Annotated, NamedTuple

import triton
import triton.backends.nvidia
import typer
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.compiling.cases import UNITS, Case, all_cases

TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
TENSOR_CORES = r"\b(?:HMMA|HGMMA|UTCHMMA|UTCQMMA)\b"


class Report(NamedTuple):
    registers: int
    stack: int
    local: int
    spills: int
    shared: int
    wide_loads: int
    matrix_products: int
    instructions: int


def compile_for(case: Case, capability: int) -> Report:
    """Compiles and disassembles; pointers and strides are multiples of 16, as in the launcher."""
    signature, attributes = {}, {}
    for place, name in enumerate(case.kernel.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
            continue
        default = "*bf16" if name.endswith("_ptr") else "i32"
        signature[name] = case.types.get(name, default)
        if name.endswith(("_ptr", "_stride")) or name in case.divisible:
            attributes[(place,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(case.kernel, signature, case.constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": case.num_warps,
            "num_stages": case.num_stages,
            "enable_fp_fusion": True,
        },
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found is not None, usage
    return Report(
        *map(int, found.groups()),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared=compiled.metadata.shared,
        wide_loads=len(re.findall(r"\b(?:LDG\.E|LDGSTS\.E)(?:\.\w+)*\.128\b", code)),
        matrix_products=len(re.findall(TENSOR_CORES, code)),
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", code, re.MULTILINE)),
    )


def faults(case: Case, capability: int, report: Report) -> list[str]:
    """What in the code is beyond the case's limits."""
    allowed = case.spills.get(capability, 0)
    found = []
    if report.spills > allowed:
        found.append(f"{report.spills} spills, {allowed} allowed")
    if (report.stack or report.local) and not allowed:
        found.append(f"{report.stack + report.local} bytes of local memory")
    if report.wide_loads < case.wide_loads:
        found.append(f"{report.wide_loads} loads of 16 bytes, {case.wide_loads} wanted")
    if case.dots and not report.matrix_products:
        found.append("no tensor-core instruction")
    return found


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run(
        [TOOLS / tool, *arguments], capture_output=True, text=True, check=True
    ).stdout


def main(
    quick: Annotated[bool, typer.Option(help="Only the representative part.")] = False,
    only: Annotated[str, typer.Option(help=f"One unit: {', '.join(UNITS)}.")] = "",
) -> None:
    """Compiles every kernel for every GPU and prints what became of it."""
    table = Table("kernel", "case", "GPU", *Report._fields, "verdict")
    total = failed = 0
    for case in all_cases(only):
        if quick and not case.quick:
            continue
        for capability in case.capabilities:
            report = compile_for(case, capability)
            found = faults(case, capability, report)
            verdict = "; ".join(found) if found else "ok" + (case.reason and f" ({case.reason})")
            name = case.kernel.__name__.strip("_")
            table.add_row(name, case.label, f"sm_{capability}", *map(str, report), verdict)
            total += 1
            failed += bool(found)
    console = Console(width=200)
    console.print(table)
    console.print(f"Triton {triton.__version__}: {total} compiled, {failed} beyond their limits")
    raise typer.Exit(1 if failed else 0)
