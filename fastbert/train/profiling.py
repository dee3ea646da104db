"""Profiles a few training steps."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from fastbert.system.console import console
from fastbert.system.files import new_file
from fastbert.train.report import Nothing

SKIPPED, WARM_UP, RECORDED = 5, 2, 3  # steps; the skipped ones include a CUDA graph's capture
LINES = 10


@contextlib.contextmanager
def profiling(out: Path, steps: int, device: torch.device) -> Iterator[profile | Nothing]:
    """A profiler of training that writes out/profile/trace.json.gz.

    The caller calls the profiler's `step` after each training step. Perfetto or chrome://tracing
    open the trace. The most expensive operators are also printed. No trace is written if `steps`,
    the number of remaining steps, is below 10.
    """
    needed = SKIPPED + WARM_UP + RECORDED
    if steps < needed:
        console.print(f"--profile: needs {needed} steps, but {steps} are left; no trace is written")
        yield Nothing()
        return
    path = out / "profile" / "trace.json.gz"
    on_gpu = device.type == "cuda"

    def report(profiler: profile) -> None:
        with new_file(path) as beside:
            packed = beside.with_suffix(".gz")  # the profiler compresses because of this suffix
            profiler.export_chrome_trace(str(packed))
            packed.replace(beside)
        key = f"self_{device.type}_time_total"
        events = profiler.key_averages()
        console.print(events.table(sort_by=key, row_limit=LINES, max_name_column_width=60))
        console.print(f"trace of {RECORDED} steps: {path}")

    with profile(
        activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu,
        schedule=schedule(wait=SKIPPED, warmup=WARM_UP, active=RECORDED, repeat=1),
        on_trace_ready=report,
    ) as profiler:
        yield profiler
