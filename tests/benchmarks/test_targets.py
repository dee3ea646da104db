"""Targets are judged by the worst that was measured."""

from benchmarks.reporting.targets import table
from benchmarks.results import FASTBERT
from tests.benchmarks.results_case import ENVIRONMENT, step, timing

OVER = "speedup over Hugging Face (SDPA)"
GPU = {**ENVIRONMENT, "device": "cuda (made up)"}


def verdicts(rows):
    return {line[0]: line[1:] for line in table(rows).lines}


def test_targets_are_met_or_not():
    found = verdicts([ENVIRONMENT, step(), step(ours=2.0, theirs=2.4, lengths="full")])
    assert found[f"pre-training step, {OVER}"] == ("at least 3.00x", "3.50x", "met")
    name = f"pre-training step without padding, {OVER}"
    assert found[name] == ("at least 1.25x", "1.20x", "not met")
    name = "sentence embeddings by sentence-transformers, speedup over unpatched"
    assert found[name][1:] == ("-", "not measured")


def test_a_target_is_judged_by_the_worst_case():
    """And fastbert by the better of its ways, as a user may choose it."""
    graph, eager = timing(2.0), timing(4.0)
    rows = [GPU, step(preset="large", theirs=12.0), step(theirs=9.0)]
    rows[1]["timings"] |= {FASTBERT: graph, f"{FASTBERT} (without CUDA graph)": eager}
    for row, peaks in zip(rows[1:], ((3, 10), (5, 10)), strict=True):
        for by, peak in zip((FASTBERT, "Hugging Face (SDPA)"), peaks, strict=True):
            row["timings"][by]["memory_held_bytes"] = peak
    kernel = {"part": "kernels", "timings": {FASTBERT: {"median_s": 2.0, "share": 0.9}}}
    case = {"operator": "attention", "direction": "forward"}
    for theirs in (1.9, 2.5):
        others = {"SDPA flash": {"median_s": theirs}, "SDPA math": {"median_s": 9.0}}
        rows.append({**kernel, "case": case, "timings": kernel["timings"] | others})
    for share, operator in ((0.86, "bias_gelu"), (0.84, "gather_rows"), (0.1, "compact")):
        times = {FASTBERT: {"median_s": 1.0, "share": share}}
        case = {"operator": operator, "direction": "backward"}
        rows.append({**kernel, "case": case, "timings": times})
    found = verdicts(rows)
    assert found["BERT-large, bf16, real tokens per second"][1:] == ("500 tokens/s", "not met")
    assert found[f"pre-training step, {OVER}"][1:] == ("4.50x", "not met")
    name = "memory held for a step, relative to Hugging Face (SDPA)"
    assert found[name][1:] == ("0.50x", "not met")
    assert found["attention forward, speedup over PyTorch's fastest"][1:] == ("0.95x", "not met")
    assert found["attention backward, speedup over PyTorch's fastest"][1:] == ("-", "not measured")
    of = "of operators that only move bytes, share of a copy's rate"
    assert found[f"forward {of}"][1:] == ("-", "not measured")
    assert found[f"backward {of}"][1:] == ("84%", "met")


def test_targets_of_inference():
    rows = [GPU, step(preset="large", ours=0.05, lengths="384", sequences=128),
            step(ours=0.5e-3, theirs=2e-3, lengths="128", sequences=1)]  # fmt: skip
    for row in rows[1:]:
        row["part"] = "inference"
    found = verdicts(rows)
    assert found["BERT-large forward, sequences of 384 per second"][1:] == (
        "2,560 sequences/s",
        "met",
    )
    assert found["BERT-base forward, 1 sequence of 128"] == ("at most 600 us", "500 us", "met")
