"""Host time, the cost of Python around the kernels, in calls that have hardly any arithmetic.

The part "host" times whole calls of fastbert's own, patched and Hugging Face's models in turns,
with the same weights and batch. On every machine it runs on the CPU in float32 with one thread: 12
layers of width 32 and one sequence of 16 tokens, in training steps also four. On a GPU it also runs
BERT-base: inference with weights in the measured precision, also with all hidden states, and
fine-tuning steps under autocast, of a classifier (also by Hugging Face's Trainer and with LoRA) and
with a contrastive loss. On a GPU, patched models also run with CUDA graphs, and Hugging Face's with
torch.compile.

Then `empty_launches` measures single layers and operators as they run on a GPU.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch

from benchmarks.host import empty_launches, trainer
from benchmarks.host.calls import (
    CLASSIFIER,
    CONTRASTIVE,
    ENCODER,
    INFERENCE,
    LORA,
    MAKERS,
    SMALL,
    STATES,
    STEP,
    Case,
    Work,
    batch_of,
    models,
)
from benchmarks.results import FASTBERT, PATCHED, PATCHED_GRAPHS, REDUCED, SDPA, Options, Results
from benchmarks.timing import first_line, interleaved, summarize
from fastbert.config.presets import PRESETS

WARM_UP = 4  # runs in which torch.compile compiles and records, and patched models may record

CPU_CASES = (
    *(Case(INFERENCE, model, has_mask=m) for model in (ENCODER, CLASSIFIER) for m in (True, False)),
    *(Case(STEP, has_mask=has_mask) for has_mask in (True, False)),
    *(Case(STEP, sequences=4, is_full=is_full) for is_full in (True, False)),
    Case(LORA),
)
BATCHES = ((1, 16, True), (1, 128, True), (32, 128, True), (32, 128, False), (32, 512, False))
COMPILED_CASES = tuple(Case(of, CLASSIFIER, *b) for of in (INFERENCE, STEP) for b in BATCHES)
# Batches that are not measured with torch.compile, which takes a minute per model.
OTHER_CASES = (
    Case(INFERENCE, CLASSIFIER, 8, 128, False),
    Case(INFERENCE, CLASSIFIER, 128, 256, False),
    Case(STEP, CLASSIFIER, 16, 512, False),
    Case(STATES, ENCODER, 1, 128),
    Case(STATES, ENCODER, 32, 128, False),
    Case(CONTRASTIVE, ENCODER, 32, 128, False),
    Case(LORA, CLASSIFIER, 1, 128),
    Case(LORA, CLASSIFIER, 32, 128),
)


def run(options: Options, results: Results) -> None:
    """Measures the parts "host", "host_layers" and "host_operators"; the last two on the CPU."""
    on_cpu = dataclasses.replace(options, device=torch.device("cpu"), precision="fp32")
    with one_thread():
        for case in CPU_CASES:
            compare(case, "12 x 32", SMALL, on_cpu, results, 5 if options.quick else 200)
        rounds = 1 if options.quick else 5
        trainer.compare(trainer.SMALL_CASE, "12 x 32", SMALL, on_cpu, results, rounds)
        empty_launches.run(on_cpu, results)
    if options.device.type == "cuda":
        shape, rounds = PRESETS["base"].shape, 20 if options.quick else 60
        for case in COMPILED_CASES + OTHER_CASES:
            compare(case, "base", shape, options, results, rounds)
        for case in trainer.CASES:
            trainer.compare(case, "base", shape, options, results, 2 if options.quick else 5)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def compare(
    case: Case, preset: str, shape: dict, options: Options, results: Results, rounds: int
) -> None:
    """Times all candidates on one batch, and adds a row."""
    torch.manual_seed(0)
    batch = batch_of(case, options.device, shape)
    names = [FASTBERT, PATCHED, SDPA]
    if options.device.type == "cuda":
        names += [PATCHED_GRAPHS]
        names += [REDUCED] if case in COMPILED_CASES and not options.quick else []
    works: dict[str, Work] = {}
    refused: dict[str, str] = {}
    for name, model in models(case, shape, names, options.device).items():
        work = MAKERS[case.of](name, model, batch, options)
        try:
            for _ in range(WARM_UP):
                work()
            works[name] = work
        except Exception as error:  # out of memory, no compiler: still time the others
            refused[name] = first_line(error)
    timings = {name: summarize(times) for name, times in interleaved(works, rounds).items()}
    about = {"device": options.device.type, "preset": preset, **case._asdict()}
    fill = float(batch["attention_mask"].float().mean()) if case.has_mask else 1.0
    results.add("host", about, timings, fill=fill, refused=refused)
