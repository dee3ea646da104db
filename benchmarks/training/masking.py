"""How many tokens per second one core masks, by scheme."""

import time

import numpy as np

from benchmarks.results import FASTBERT, Options, Results
from benchmarks.timing import summarize
from benchmarks.workloads import VOCAB_SIZE
from fastbert.data import SCHEMES, NgramCounts, SpecialTokens, Tokens, make_masking

SPECIALS = SpecialTokens(pad=0, unk=100, cls=101, sep=102, mask=103)


def run(options: Options, results: Results) -> None:
    """Measures the part "masking": batches of sequences of 128 and of 512 tokens.

    Three of four tokens begin a word. NumPy uses only one core.
    """
    counts = NgramCounts(*np.random.default_rng(0).integers(1, 1000, (3, VOCAB_SIZE)))
    for length in (128, 512):
        tokens = batch(16 if options.quick else 128, length)
        for scheme in SCHEMES:
            masking = make_masking(scheme, SPECIALS, VOCAB_SIZE, counts=lambda: counts)
            seconds = []
            for epoch in range(4 if options.quick else 20):
                start = time.perf_counter()
                masking(tokens, seed=0, epoch=epoch)
                seconds.append(time.perf_counter() - start)
            timing = summarize(seconds[1:])
            timing["tokens_per_second"] = len(tokens.ids) / timing["median_s"]
            case = {"scheme": scheme, "length": length, "tokens": len(tokens.ids)}
            results.add("masking", case, {FASTBERT: timing})


def batch(sequences: int, length: int) -> Tokens:
    generator = np.random.default_rng(0)
    size = sequences * length
    ids = generator.integers(1000, VOCAB_SIZE, (sequences, length))
    ids[:, 0], ids[:, length // 2], ids[:, -1] = SPECIALS.cls, SPECIALS.sep, SPECIALS.sep
    flat = ids.reshape(-1)
    example, position = np.divmod(np.arange(size), length)
    starts = generator.random(size) < 0.75
    return Tokens(flat, example, position, ~np.isin(flat, SPECIALS), starts)
