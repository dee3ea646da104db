"""Where a pre-training step's time goes: its costliest operators or kernels, and a trace."""

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.results import FASTBERT, Options, Results
from benchmarks.steps import make_model, training_step
from benchmarks.workloads import pretraining_batch, sequence_lengths

STEPS = 3
WARM_UP = 3
COSTLIEST = 12


def run(options: Options, results: Results) -> None:
    """The part "profile": seconds a step of each of the costliest; the trace lies beside the file.

    On a GPU kernels are counted, on a CPU PyTorch's operators, each without those that it calls.
    """
    on_gpu = options.device.type == "cuda"
    preset, sequences = ("large", 96) if on_gpu else ("mini" if options.quick else "base", 4)
    torch.manual_seed(0)
    batch = pretraining_batch(sequence_lengths("wikipedia", sequences)).to(options.device)
    model = make_model(FASTBERT, preset).to(options.device)
    step = training_step(FASTBERT, model, batch, options)
    for _ in range(WARM_UP):
        step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    seconds = {}
    for event in profiler.key_averages():
        micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if micros and on_gpu == (event.device_type == torch.autograd.DeviceType.CUDA):
            seconds[event.key] = micros / 1e6 / STEPS
    total = sum(seconds.values())
    case = {"preset": preset, "lengths": "wikipedia", "sequences": sequences}
    costliest = sorted(seconds, key=seconds.__getitem__, reverse=True)[:COSTLIEST]
    results.add(
        "profile",
        case,
        seconds={name: seconds[name] for name in costliest},
        share={name: seconds[name] / total for name in costliest},
        total_s=total,
    )
    if results.path is not None:
        profiler.export_chrome_trace(str(results.path.with_suffix(".trace.json.gz")))
