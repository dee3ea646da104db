"""A fine-tuning step by Hugging Face's Trainer, end to end.

The time includes its loop with data loader, autocast, clipping and optimizer. The models take turns
run by run, and keep the graphs that they have recorded. Rows belong to the part "host".
"""

import tempfile
import time
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.host.calls import CLASSIFIER, Case, models
from benchmarks.results import PATCHED, PATCHED_GRAPHS, SDPA, Options, Results
from benchmarks.timing import summarize

TRAINER = "Trainer's step"
STEPS, WARM_UP = 30, 5  # steps of a run, and how many of them are not timed


class Clock(transformers.TrainerCallback):
    """Records the times at which the warm-up and the last step end, after the device's work."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step in (WARM_UP, STEPS):
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())


def compare(
    case: Case, preset: str, shape: dict, options: Options, results: Results, rounds: int
) -> None:
    """Times a step of all candidates, and adds a row; the first run of each is not timed.

    If the case is full, all sequences have its length; otherwise lengths are uniform up to it.
    """
    torch.manual_seed(0)
    words = shape.get("vocab_size", transformers.BertConfig().vocab_size)
    count = case.sequences * STEPS
    lengths = torch.full((count,), case.length)
    if not case.is_full:
        lengths = torch.randint(1, case.length + 1, (count,))
    rows = [{"input_ids": torch.randint(5, words, (n,)), "label": n % 2} for n in lengths.tolist()]
    names = [PATCHED, SDPA]
    if options.device.type == "cuda":
        names.append(PATCHED_GRAPHS)
    made = models(case, shape, names, options.device)
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name, model in made.items():
            seconds = seconds_a_step(model, case, rows, options)
            if number:
                found[name].append(seconds)
    timings = {name: summarize(times) for name, times in found.items()}
    fill = float(lengths.float().mean()) / case.length
    about = {"device": options.device.type, "preset": preset, **case._asdict()}
    results.add("host", about, timings, fill=fill, refused={})


def seconds_a_step(model: nn.Module, case: Case, rows: list[dict], options: Options) -> float:
    on_gpu, clock = options.device.type == "cuda", Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=case.sequences,
            max_steps=STEPS,
            learning_rate=1e-5,
            bf16=options.precision == "bf16",
            optim="adamw_torch_fused",
            use_cpu=not on_gpu,
            dataloader_pin_memory=on_gpu,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=padded,
            callbacks=[clock],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    began, ended = clock.times
    return (ended - began) / (STEPS - WARM_UP)


def padded(rows: list[dict]) -> dict[str, Tensor]:
    """Pads as transformers' DataCollatorWithPadding does, which would need a tokenizer."""
    ids = [row["input_ids"] for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(one) for one in ids], batch_first=True),
        "labels": torch.tensor([row["label"] for row in rows]),
    }


CASES = (
    Case(TRAINER, CLASSIFIER, 32, 128, is_full=True),
    Case(TRAINER, CLASSIFIER, 32, 512, is_full=False),
)
SMALL_CASE = Case(TRAINER, CLASSIFIER, 4, 16, is_full=False)
