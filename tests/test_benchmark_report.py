"""Tables, plots and the README say what the results say; `compare` finds what got slower."""

import json
import re

import pytest
from typer.testing import CliRunner

import benchmarks.__main__ as suite
from benchmarks import report
from benchmarks.results import FASTBERT, read
from benchmarks.tables import PARTS, seconds, targets
from fastbert.check import InputError

ENVIRONMENT = {
    "part": "environment",
    "device": "cpu (made up)",
    "threads": 2,
    "torch": "2.13.0",
    "commit": "abc",
    "command": "python -m benchmarks",
}


def timing(median, spread=0.02):
    return {
        "median_s": median,
        "spread": spread,
        "real_tokens_per_second": 1000 / median,
        "utilisation": 0.4 / median,
    }


def step(ours=2.0, theirs=7.0, **case):
    case = {"preset": "base", "lengths": "wikipedia", "sequences": 4, **case}
    timings = {FASTBERT: timing(ours), "Hugging Face (SDPA)": timing(theirs)}
    return {"part": "steps", "case": case, "timings": timings, "fill": 0.49, "refused": {}}


ROWS = [
    ENVIRONMENT,
    step(),
    {**step(), "part": "inference", "refused": {"Hugging Face (eager)": "out of memory"}},
    *(
        {
            "part": "ablation",
            "case": {"without": without},
            "timings": {name: timing(time)},
        }
        for without, name, time in (
            ("nothing", FASTBERT, 2.0),
            ("fused QKV", FASTBERT, 2.5),
            ("fastbert", "Hugging Face (SDPA)", 7.0),
        )
    ),
    {
        "part": "convergence",
        "case": {"preset": "tiny", "steps": 2, "dropout": 0.0, "seed": 0},
        "timings": {},
        "curves": {FASTBERT: [9.0, 8.0], "Hugging Face": [9.0, 8.0], "reference": [9.0, 8.01]},
        "largest_gap": {"Hugging Face": 0.0, "reference": 0.01},
    },
]


def written(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def results(tmp_path):
    return written(tmp_path / "results" / "cpu" / "steps.jsonl", ROWS)


def test_writes_tables_and_plots_beside_the_results(results):
    readme = results.parent / "README.md"
    readme.write_text("Nothing to fill in.\n")
    report.main([results], readme)
    text = results.with_suffix(".md").read_text()
    for said in (
        "cpu (made up)",
        "3.50x",
        "1.25x",
        "Hugging Face (eager): out of memory",
        "1.0e-02",
    ):
        assert said in text
    plots = sorted(path.name for path in results.parent.glob("*.png"))
    assert plots == [
        f"steps-{part}.png" for part in ("ablation", "convergence", "inference", "steps")
    ]
    for path in results.parent.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    assert readme.read_text() == "Nothing to fill in.\n"


def test_fills_in_a_readme(results):
    before = "a\n<!-- benchmarks: cpu/steps.jsonl steps -->\nold\n<!-- end -->\nb\n"
    after = report.filled(before, results.parents[1])
    assert after.startswith("a\n<!-- benchmarks: cpu/steps.jsonl steps -->\n\n| model |")
    assert after.endswith("<!-- end -->\nb\n")
    assert (
        "| base, 4 sequences | wikipedia | 49% | fastbert | 2 s ±2% | 500 | 20% | 1.00x |" in after
    )
    assert "| Hugging Face (SDPA) | 7 s ±2% | 143 | 6% | 3.50x |" in after
    assert "old" not in after
    assert report.filled(after, results.parents[1]) == after
    # another figure in the results shows
    written(results, [ENVIRONMENT, step(theirs=8.0)])
    assert "| 4.00x |" in report.filled(after, results.parents[1])
    results.unlink()
    assert "Not measured yet." in report.filled(after, results.parents[1])


def test_a_block_names_a_part_that_there_is(results):
    with pytest.raises(InputError, match="expected one of"):
        report.filled(
            "<!-- benchmarks: cpu/steps.jsonl stepps -->\n<!-- end -->", results.parents[1]
        )


def test_the_readme_says_what_the_committed_results_say():
    text = report.README.read_text(encoding="utf-8")
    assert report.filled(text) == text, "run python -m benchmarks report"
    named = {path for _, path, _, _ in report.BLOCK.findall(text)}
    assert named
    assert all((report.RESULTS / path).exists() for path in named)


def test_the_readme_has_no_other_measured_figures():
    """Ratios and times stand in generated blocks alone."""
    text = report.BLOCK.sub("", report.README.read_text(encoding="utf-8"))
    section = text[text.index("## What is measured") : text.index("## Where things are")]
    figures = re.findall(r"\d[\d,.]*\s?(?:x|s|ms|us|nats|%|tokens/s)(?!\w)", section)
    assert not figures


def test_committed_tables_say_what_the_committed_results_say():
    for path in report.RESULTS.glob("*/*.jsonl"):
        assert path.with_suffix(".md").read_text(encoding="utf-8") == report.markdown(read(path))


def compare(tmp_path, before, after):
    paths = [
        written(tmp_path / name, [ENVIRONMENT, *rows])
        for name, rows in (("a.jsonl", before), ("b.jsonl", after))
    ]
    done = CliRunner().invoke(suite.app, ["compare", *map(str, paths)], env={"COLUMNS": "200"})
    return done.exit_code, done.stdout


def test_compare_finds_what_got_slower(tmp_path):
    code, said = compare(tmp_path, [step(2.0, 7.0)], [step(2.6, 7.1)])
    assert code == 1
    lines = [line for line in said.splitlines() if "x" in line and "±" in line]
    assert "1.30x" in lines[0]
    assert "slower" in lines[0]
    assert "same within noise" in lines[1]
    assert "1 slower beyond the noise" in said


def test_compare_is_content_with_noise_and_gains(tmp_path):
    code, said = compare(tmp_path, [step(2.0, 7.0)], [step(1.0, 7.2)])
    assert code == 0
    assert "faster" in said


def test_compare_names_what_has_no_counterpart(tmp_path):
    code, said = compare(tmp_path, [step(), step(lengths="full")], [step()])
    assert code == 0
    assert "only in a.jsonl: steps" in said
    assert "full" in said


def test_compare_says_that_the_machines_differ(tmp_path):
    a = written(tmp_path / "a.jsonl", ROWS)
    b = written(tmp_path / "b.jsonl", [{**ENVIRONMENT, "device": "cuda (other)"}, *ROWS[1:]])
    said = CliRunner().invoke(suite.app, ["compare", str(a), str(b)]).stdout
    assert "device differs: cpu (made up) in a.jsonl, cuda (other) in b.jsonl" in said


@pytest.mark.parametrize("text", ["", "{}\n", "not json\n", '{"part": "steps"}\n', "[1]\n"])
def test_refuses_a_file_that_holds_no_results(tmp_path, text):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"a\.jsonl: not results"):
        read(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match=r"b\.jsonl: No such file"):
        read(tmp_path / "b.jsonl")


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


GPU = {**ENVIRONMENT, "device": "cuda (made up)"}


def verdicts(rows):
    return {line[0]: line[1:] for line in targets(rows).lines}


def test_targets_are_met_or_not():
    found = verdicts([ENVIRONMENT, step(), step(ours=2.0, theirs=2.4, lengths="full")])
    name = "step over Hugging Face's (SDPA)"
    assert found[name] == ("at least 3.00x", "3.50x", "met")
    name = "step without padding over Hugging Face's (SDPA)"
    assert found[name] == ("at least 1.25x", "1.20x", "not met")
    assert found["sentence embeddings over sentence-transformers"][1:] == ("-", "not measured")


def test_a_target_is_judged_by_the_worst_case():
    """And fastbert by the better of its ways, as a user may choose it."""
    graph, eager = timing(2.0), timing(4.0)
    rows = [GPU, step(preset="large", theirs=12.0), step(theirs=9.0)]
    rows[1]["timings"] |= {FASTBERT: graph, f"{FASTBERT} (without CUDA graph)": eager}
    for row, peaks in zip(rows[1:], ((3, 10), (5, 10)), strict=True):
        for by, peak in zip((FASTBERT, "Hugging Face (SDPA)"), peaks, strict=True):
            row["timings"][by]["peak_memory_bytes"] = peak
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
    assert found["BERT-large, bf16, real tokens a second"][1:] == ("500 tokens/s", "not met")
    assert found["step over Hugging Face's (SDPA)"][1:] == ("4.50x", "not met")
    assert found["peak memory of a step, of Hugging Face's (SDPA)"][1:] == ("0.50x", "not met")
    assert found["attention forward over PyTorch's fastest"][1:] == ("0.95x", "not met")
    assert found["attention backward over PyTorch's fastest"][1:] == ("-", "not measured")
    assert found["forward of what moves bytes, of a copy's rate"][1:] == ("-", "not measured")
    assert found["backward of what moves bytes, of a copy's rate"][1:] == ("84%", "met")


def test_targets_of_inference():
    rows = [GPU, step(preset="large", ours=0.05, lengths="384", sequences=128),
            step(ours=0.5e-3, theirs=2e-3, lengths="128", sequences=1)]  # fmt: skip
    for row in rows[1:]:
        row["part"] = "inference"
    found = verdicts(rows)
    assert found["BERT-large forward, sequences of 384 a second"][1:] == (
        "2,560 sequences/s",
        "met",
    )
    assert found["BERT-base forward, 1 sequence of 128"] == ("at most 600 us", "500 us", "met")


def test_a_block_of_targets_reads_a_folder(results):
    text = "<!-- benchmarks: cpu targets -->\nold\n<!-- end -->\n"
    found = report.filled(text, results.parents[1])
    assert "| step over Hugging Face's (SDPA) | at least 3.00x | 3.50x | met |" in found
    assert "From `benchmarks/results/cpu`" in found
    report.main([results], written(results.parent / "README.md", []))
    assert "## Targets" in results.with_suffix(".md").read_text()


def test_every_part_of_the_suite_has_a_table():
    assert {"steps", "inference", "ablation", "convergence", "sentence_encode"} <= PARTS.keys()
