"""Profiles a pre-training step: finds its costliest operators or kernels, and writes a trace."""

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.results import FASTBERT, Options, Results
from benchmarks.steps import footprint
from benchmarks.steps.steps import make_model, training_step
from benchmarks.workloads import pretraining_batch, sequence_lengths

STEPS = 3
WARM_UP = 3
COSTLIEST = 12

# Parts of fastbert's step on a GPU, each with substrings of its kernels' names.
PARTS = {
    "products": ("nvjet", "gemm", "cutlass", "splitKreduce"),
    "attention, forward": ("attention_fwd", "attention_drop_words"),
    "attention, backward": tuple(f"attention_{x}" for x in ("dq", "dkdv", "single")),
    "bias + GELU, forward": ("bias_gelu_fwd",),
    "bias + GELU, backward": ("bias_gelu_bwd",),
    "dropout + add + LayerNorm, forward": ("layer_norm_fwd",),
    "dropout + add + LayerNorm, backward": ("layer_norm_bwd",),
    "casts to FP8": ("cast_transpose",),
    "AdamW": ("FusedOptimizer",),
    "casts of weights and gradients, QKV packed": ("copy_kernel", "CatArray", "CopyFunctor"),
    "norm of the gradients, clipping": ("LpNorm", "lpnorm", "multi_tensor_apply"),
    "sums of gradients at the residual connections": ("CUDAFunctor_add<c10::BFloat16>",),
    "gradient of the QKV bias": ("sum_functor<c10::BFloat16",),
}
OTHERS = "all else"


def run(options: Options, results: Results) -> None:
    """Measures the parts "profile" and, on a GPU, "step_parts", in seconds per step.

    On a GPU the kernels' time counts; on a CPU the time of PyTorch's operators, without the
    operators that they call. A trace is written beside the results file.
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
        if micros and on_gpu == footprint.ran_on_gpu(event):
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
    if on_gpu:
        results.add("step_parts", case, seconds=parts(seconds), total_s=total)
    if results.path is not None:
        profiler.export_chrome_trace(str(results.path.with_suffix(".trace.json.gz")))


def parts(seconds: dict[str, float]) -> dict[str, float]:
    """The kernels' seconds summed by part of the step, in the order of PARTS, with OTHERS last."""
    found = dict.fromkeys((*PARTS, OTHERS), 0.0)
    for kernel, time in seconds.items():
        names = (part for part, marks in PARTS.items() if any(mark in kernel for mark in marks))
        found[next(names, OTHERS)] += time
    return found
