"""Tables say of made-up results what there is to say."""

import pytest

from benchmarks.reporting.cells import seconds
from benchmarks.reporting.tables import PARTS
from benchmarks.results import FASTBERT
from tests.benchmarks.results_case import step, timing


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.5, "1,234 s"), (4.132, "4.13 s"), (0.0153, "15.3 ms"), (2.5e-6, "2.5 us")],
)
def test_times_are_readable(value, text):
    assert seconds(value) == text


def test_tokenising_is_shown_as_a_share_of_the_tokenizers_own_speed():
    rates = {"bytes_per_second": 2.5e6, "tokens_per_second": 5e5}
    rows = [
        {
            "part": "tokenizing",
            "case": {"bytes": 50_000_000, "cores": 2},
            "timings": {
                "tokenizers, encode_batch": {**timing(20.0), **rates, "share": 1.0},
                FASTBERT: {**timing(25.0), **rates, "share": 0.8},
            },
        }
    ]
    lines = PARTS["tokenizing"](rows).lines
    assert lines[0][:3] == ("50 MB", "2", "tokenizers, encode_batch")
    assert lines[1] == ("", "", "fastbert", "25 s ±2%", "2.50 MB/s", "0.50 M", "80%")
    memory = {"part": "tokenizing_memory", "case": {"bytes": 25_000_000, "processes": 2}}
    row = {**memory, "peak_memory_bytes": 300 << 20, "seconds": 11.0}
    assert PARTS["tokenizing_memory"]([row]).lines == [("25 MB", "2", "300 MiB", "11 s")]


def test_the_best_rate_of_each_optimizer_is_in_bold():
    rows = [
        {
            "part": "large_batch",
            "case": {"optimizer": optimizer, "learning_rate": rate, "steps": 7,
                     "batch_tokens": 4096, "preset": "tiny"},
            "final": loss,
            "baseline": 6.5,
        }
        for optimizer, rate, loss in (
            ("adamw", 0.1, 6.0), ("adamw", 0.2, None), ("lamb", 0.3, 5.5), ("lamb", 0.4, 5.25)
        )
    ]  # fmt: skip
    assert PARTS["large_batch"](rows).lines == [
        ("adamw, learning rate", "0.1", "0.2"),
        ("held-out loss (nats)", "**6.000**", "diverged"),
        ("lamb, learning rate", "0.3", "0.4"),
        ("held-out loss (nats)", "5.500", "**5.250**"),
    ]


def test_the_chain_is_shown_with_and_without_pre_training():
    took = {"data": 9.0, "pre-training": 500.0, "fine-tuning": 60.0}
    rows = [
        {
            "part": "chain",
            "case": {"pre-trained": is_trained, "seed": seed},
            "accuracy": accuracy,
            "macro_f1": accuracy - 0.1,
            "majority": 0.25,
            "seconds": took if seed == 0 and is_trained else dict.fromkeys(took, 1.0),
        }
        for seed, is_trained, accuracy in (
            (0, True, 0.75), (0, False, 0.5), (1, True, 0.8), (1, False, 0.7)
        )
    ]  # fmt: skip
    assert PARTS["chain"](rows).lines == [
        ("pre-trained", "2", "77.5%", "75.0% to 80.0%", "0.675"),
        ("not pre-trained", "2", "60.0%", "50.0% to 70.0%", "0.500"),
        ("the most frequent module", "", "25.0%", "", ""),
        *((f"time: {name}", "", seconds(took[name]), "", "") for name in took),
    ]


def test_a_teacher_is_measured_as_its_students_are():
    same = {"part": "distillation", "parameters": 2e6, "seconds": 9.0, "baseline": 6.0}
    case = {"seed": 0, "steps": 5}
    none = {"teacher_final": None, "teacher_accuracy": None}
    rows = [
        {**same, **none, "case": {"scheme": "teacher", **case}, "final": 5.0, "accuracy": 0.1},
        {**same, "case": {"scheme": "distilled", **case}, "final": 4.5, "accuracy": 0.3,
         "teacher_final": 4.0, "teacher_accuracy": 0.4},
        {**same, **none, "case": {"scheme": "alone", **case}, "final": 5.5, "accuracy": 0.2},
    ]  # fmt: skip
    lines = PARTS["distillation"](rows).lines
    assert [(line[0], line[4], line[6]) for line in lines] == [
        ("teacher", "4.000", "40.0%"), ("distilled", "4.500", "30.0%"), ("alone", "5.500", "20.0%")
    ]  # fmt: skip


def test_the_runs_of_several_seeds_end_with_what_they_differ_by():
    def run(seed, ours, theirs):
        case = {"preset": "base", "steps": 20, "dropout": 0.1, "seed": seed}
        curves = {FASTBERT: [9.0] * 18 + ours, "Hugging Face": [9.0] * 18 + theirs}
        gap = {"Hugging Face": 0.5}
        return {"part": "convergence", "case": case, "curves": curves, "largest_gap": gap}

    rows = [run(0, [6.0, 5.0], [6.2, 5.2]), run(1, [6.0, 5.2], [5.8, 5.2])]
    lines = PARTS["convergence"](rows).lines
    assert [line[3:8] for line in lines] == [
        ("0", "Hugging Face", "5.5000", "5.7000", "-0.2000"),
        ("1", "Hugging Face", "5.6000", "5.5000", "+0.1000"),
        ("all 2", "Hugging Face", "5.5500", "5.6000", "-0.0500 ±0.2121"),
    ]


def test_what_a_step_costs_is_shown_of_those_that_have_it():
    """And not the figures of earlier files, which left a graph's memory out."""
    row = step()
    ours, theirs = row["timings"][FASTBERT], row["timings"]["Hugging Face (SDPA)"]
    ours |= {"memory_held_bytes": 3 << 29, "kernel_launches": 1, "graph_nodes": 1426}
    theirs |= {"kernel_launches": 2326, "peak_memory_bytes": 5 << 30}
    header, lines = PARTS["steps"]([row])
    places = slice(header.index("MFU") + 1, -1)
    assert header[places] == ("memory held", "launches", "nodes of the graph")
    assert [line[places] for line in lines] == [("1.50 GiB", "1", "1,426"), ("-", "2,326", "-")]


def test_a_patched_model_is_shown_beside_the_original():
    def row(of, sequences, ours, theirs):
        case = {"of": of, "preset": "base", "sequences": sequences, "length": 128}
        times = {FASTBERT: {"median_s": ours}, "Hugging Face (SDPA)": {"median_s": theirs}}
        return {"part": "drop_in", "case": case, "timings": times, "fill": 0.5}

    rows = [row("a step", 32, 0.04, 0.02), row("a step", 64, 0.04, 0.06), row("serving", 1, 2, 1)]
    assert PARTS["drop_in"](rows).lines == [
        ("a step", "32 x 128", "50%", "20 ms", "40 ms", "0.50x"),
        ("", "64 x 128", "50%", "60 ms", "40 ms", "1.50x"),
        ("serving", "1 x 128", "50%", "1 s", "2 s", "0.50x"),
    ]


def test_every_part_of_the_suite_has_a_table():
    assert {"steps", "inference", "ablation", "convergence", "sentence_encode"} <= PARTS.keys()
