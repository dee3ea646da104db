"""Host times of Hugging Face's models, and of patched or own ones, without CUDA graphs and with.

    python -m tests.cuda_stand_in.host_times [--rounds 20] [--only "train lora"]

It is for the stand-ins of CUDA's libraries beside it: launches take no time and compute nothing, so
what is left is Python, PyTorch's dispatch, its allocator and autograd. The table has the median and
the least time of an inference in bf16, or of a training step under autocast with a fused AdamW, in
turns, and the launches beside cuBLAS's, of which a driver takes microseconds each that no time here
contains.
"""

import copy
import ctypes
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple
from unittest import mock

import peft
import rich
import torch
import transformers
import typer
from rich.table import Table
from torch import Tensor, nn

import fastbert
from fastbert.modules.graphs import buckets

LENGTHS = 64, 40
VOCABULARY = 1000
CUDA = torch.device("cuda")
HEADS = {
    "cls": "ForSequenceClassification",
    "mlm": "ForMaskedLM",
    "qa": "ForQuestionAnswering",
    "tok": "ForTokenClassification",
}
FAMILIES = ("Bert", "Roberta", "DistilBert", "Electra")


class Case(NamedTuple):
    """family, head: of the model; trains: a step, or an inference; change: makes a model of it.

    mask: "padded", "ones" or "none"; is_own: compares fastbert's own model in place of a patched
    """

    name: str
    family: str
    head: str
    trains: bool
    mask: str = "padded"
    change: Callable[[nn.Module], nn.Module] = lambda model: model
    is_own: bool = False


def checkpointed(model: Any) -> nn.Module:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def adapted(model: Any) -> nn.Module:
    return peft.get_peft_model(
        model, peft.LoraConfig(r=8, target_modules=["query", "value"], lora_dropout=0.1)
    )


def hooked(model: Any) -> nn.Module:
    model.base_model.encoder.layer[3].register_forward_hook(lambda *_: None)
    return model


def frozen(model: Any) -> nn.Module:
    model.base_model.requires_grad_(False)
    return model


def cases() -> Iterator[Case]:
    for trains, use in ((False, "infer"), (True, "train")):
        for family in FAMILIES:
            for head in HEADS:
                yield Case(f"{family} {head} {use}", family, head, trains)
        for head in HEADS:
            yield Case(f"Bert {head} {use} own", "Bert", head, trains, is_own=True)
        for mask in ("ones", "none"):
            yield Case(f"Bert cls {use} mask {mask}", "Bert", "cls", trains, mask)
            yield Case(f"Bert cls {use} mask {mask} own", "Bert", "cls", trains, mask, is_own=True)
        for change in (adapted, hooked):
            yield Case(f"Bert cls {use} {change.__name__}", "Bert", "cls", trains, change=change)
    for change in (checkpointed, frozen):
        yield Case(f"Bert cls train {change.__name__}", "Bert", "cls", True, change=change)


def batch_of(case: Case) -> dict[str, Tensor]:
    shape = len(LENGTHS), max(LENGTHS)
    batch = {"input_ids": torch.randint(5, VOCABULARY, shape, device=CUDA)}
    if case.mask != "none":
        batch["attention_mask"] = torch.ones(shape, dtype=torch.int64, device=CUDA)
    if not case.trains:
        return batch
    ones = torch.ones(shape[0], dtype=torch.int64, device=CUDA)
    if case.head == "qa":
        return {**batch, "start_positions": ones, "end_positions": ones}
    labels = ones if case.head == "cls" else ones[:, None].expand(shape).contiguous()
    return {**batch, "labels": labels}


def models_of(case: Case) -> dict[str, nn.Module]:
    layers = {"n_layers": 6} if case.family == "DistilBert" else {}
    config = getattr(transformers, f"{case.family}Config")(
        vocab_size=VOCABULARY, attn_implementation="sdpa", **layers
    )
    with CUDA:
        theirs = getattr(transformers, case.family + HEADS[case.head])(config)
    theirs = case.change(theirs).train(case.trains)
    if not case.trains:
        theirs.bfloat16()
    made = {"Hugging Face": theirs}
    kinds: dict[str, buckets.Graphs] = {"without graphs": False, "with graphs": "auto"}
    for name, graphs in kinds.items():
        if case.is_own:
            made[name] = getattr(fastbert, type(theirs).__name__)(config).to(CUDA, theirs.dtype)
            made[name].train(case.trains).load_state_dict(theirs.state_dict())
            buckets.allow(made[name], graphs)
        else:
            made[name] = fastbert.patch(copy.deepcopy(theirs), graphs=graphs)
    return made


def work_of(case: Case, model: nn.Module) -> Callable[[], None]:
    batch = batch_of(case)
    if not case.trains:

        def infer() -> None:
            with torch.inference_mode():
                model(**batch)

        return infer
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def launches_of(work: Callable[[], None]) -> int:
    counts, library = (ctypes.c_long * 5)(), ctypes.CDLL("libcudart.so.13")
    library.stand_in_counts(counts)
    before = counts[0]
    work()
    library.stand_in_counts(counts)
    return counts[0] - before


def _reads(read: Any, value: Any) -> Any:
    """What the host reads of a GPU: how long sequences are, how many labels there are."""
    return mock.patch.object(Tensor, read.__name__, lambda x: value if x.is_cuda else read(x))


def measured(case: Case, rounds: int) -> list[str]:
    """A row of the table."""
    lengths = list(LENGTHS) if case.mask == "padded" else [max(LENGTHS)] * len(LENGTHS)
    with _reads(Tensor.tolist, lengths), _reads(Tensor.__int__, 20):
        works = {name: work_of(case, model) for name, model in models_of(case).items()}
        for work in works.values():
            for _ in range(5):
                work()
        launches = [launches_of(work) for work in works.values()]
        times: dict[str, list[float]] = {name: [] for name in works}
        gc.collect()
        gc.disable()
        for _ in range(rounds):
            for name, work in works.items():
                begin = time.perf_counter()
                work()
                times[name].append(time.perf_counter() - begin)
        gc.enable()
    usual = [statistics.median(one) for one in times.values()]
    least = [min(one) for one in times.values()]
    row = [f"{usual[0] * 1e3:.2f} ({least[0] * 1e3:.2f}) ms"]
    row += [
        f"{a / usual[0]:.2f} ({b / least[0]:.2f})"
        for a, b in zip(usual[1:], least[1:], strict=True)
    ]
    return [case.name, *row, " ".join(map(str, launches))]


def main(
    rounds: Annotated[int, typer.Option(help="of each model, in turns")] = 20,
    only: Annotated[str, typer.Option(help="cases with all of these words")] = "",
) -> None:
    """Prints the table."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    torch.backends.cuda.enable_cudnn_sdp(False)  # the stand-in has no cuDNN
    table = Table("case", "Hugging Face", "without graphs", "with graphs", "launches of each")
    for case in cases():
        if set(only.split()) <= set(case.name.split()):
            table.add_row(*measured(case, rounds))
    rich.print(table)


if __name__ == "__main__":
    typer.run(main)
