"""The two formats: writing a file, and running it in its own runtime."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from fastbert.check import InputError, require_libraries
from fastbert.export.plain import INPUTS, Plain

Inputs = dict[str, Tensor]  # int64 tensors, by the names in INPUTS
Runner = Callable[[Inputs], dict[str, Tensor]]  # computes a file's outputs, by name

_LARGEST = 2**31 - 2**20  # bytes of weights in an ONNX file, which is one protobuf message


def trace(model: Plain, longest: int) -> ExportedProgram:
    """Traces the model; batch, choices and length (up to `longest`) are dynamic."""
    lead = (2, 3) if model.has_choices else (2,)
    # separate tensors, because the exporter would merge inputs that are one tensor
    inputs = {name: torch.ones(*lead, min(8, longest), dtype=torch.int64) for name in INPUTS}
    length = Dim("length", max=longest) if longest > 1 else Dim.STATIC
    axes = {0: Dim("batch"), len(lead): length} | ({1: Dim("choices")} if model.has_choices else {})
    with torch.no_grad(), _quietly():
        return torch.export.export(
            model, (), inputs, dynamic_shapes=dict.fromkeys(INPUTS, axes), strict=False
        )


def write_onnx(program: ExportedProgram, model: Plain, path: Path) -> None:
    """Writes one ONNX file with named inputs and outputs; InputError if its weights exceed 2 GB."""
    size = sum(x.numel() * x.element_size() for x in model.state_dict().values())
    if size > _LARGEST:
        raise InputError(
            f"--to onnx: an ONNX file holds 2 GB, but the weights have {size / 1e9:.1f} GB; use "
            "--precision fp16, or --to torch"
        )
    with _quietly():
        onnx = torch.onnx.export(
            program,
            input_names=list(INPUTS),
            output_names=list(model.outputs),
            dynamo=True,
            verbose=False,
        )
        assert onnx is not None
        onnx.save(str(path), external_data=False)


def run_onnx(path: Path) -> Runner:
    """Loads an ONNX file into onnxruntime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Inputs) -> dict[str, Tensor]:
        found = session.run(names, {name: x.numpy() for name, x in inputs.items()})
        return dict(zip(names, map(torch.from_numpy, found), strict=True))

    return run


def write_torch(program: ExportedProgram, model: Plain, path: Path) -> None:
    """Writes a .pt2 file, which `torch.export.load` reads."""
    archive = io.BytesIO()  # if a disk is full, torch would end the process
    with _quietly():
        torch.export.save(program, archive)
    path.write_bytes(archive.getbuffer())


def run_torch(path: Path) -> Runner:
    """Loads a .pt2 file with `torch.export.load`."""
    with _quietly(), path.open("rb") as file:
        module = torch.export.load(file).module()

    def run(inputs: Inputs) -> dict[str, Tensor]:
        with torch.no_grad():
            outputs: dict[str, Tensor] = module(**inputs)
        return outputs

    return run


class Format(NamedTuple):
    """suffix: end of a file's name; write, run: functions above; needs: packages for them."""

    suffix: str
    write: Callable[[ExportedProgram, Plain, Path], None]
    run: Callable[[Path], Runner]
    needs: tuple[str, ...] = ()


FORMATS = {
    "onnx": Format(".onnx", write_onnx, run_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "torch": Format(".pt2", write_torch, run_torch),
}


def format_of(name: str) -> Format:
    """The format `name`; InputError if it is unknown or its packages are not installed."""
    if name not in FORMATS:
        raise InputError(f"--to: expected one of {', '.join(FORMATS)}, got {name!r}")
    require_libraries(f"--to {name}", FORMATS[name].needs, "export")
    return FORMATS[name]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silences the exporters' warnings and logs, which are about their own internals."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
