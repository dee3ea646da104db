"""Tables, plots and the documents say what the results say; `compare` finds what got slower."""

import re
import runpy
import sys

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import suite
from benchmarks.reporting import headlines, report
from benchmarks.results import FASTBERT, Options, Results, describe, read
from benchmarks.timing import summarize
from fastbert.check import InputError
from tests.benchmarks.results_case import ENVIRONMENT, step, timing, written

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


@pytest.fixture
def results(tmp_path):
    return written(tmp_path / "results" / "cpu" / "steps.jsonl", ROWS)


def test_writes_tables_and_plots_beside_the_results(results):
    readme = results.parent / "README.md"
    readme.write_text("Nothing to fill in.\n")
    report.main([results], [readme])
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
    with pytest.raises(InputError, match=r"expected one of .*steps.*targets, headlines$"):
        report.filled(
            "<!-- benchmarks: cpu/steps.jsonl stepps -->\n<!-- end -->", results.parents[1]
        )


@pytest.mark.parametrize("document", report.DOCUMENTS, ids=lambda path: path.name)
def test_a_document_says_what_the_committed_results_say(document):
    text = document.read_text(encoding="utf-8")
    assert report.filled(text) == text, "run python -m benchmarks report"
    named = {path for _, path, _, _ in report.BLOCK.findall(text)}
    assert named
    assert all((report.RESULTS / path).exists() for path in named)


@pytest.mark.parametrize(
    "document", [report.README, report.DOCS / "results.md"], ids=lambda path: path.name
)
def test_a_page_of_results_has_no_other_measured_figures(document):
    """Ratios and times stand in generated blocks alone."""
    text = report.BLOCK.sub("", document.read_text(encoding="utf-8"))
    assert not re.findall(r"\d[\d,.]*\s?(?:x|s|ms|us|nats|%|tokens/s)(?!\w)", text)


def test_each_headline_is_a_line_of_the_committed_results():
    found = headlines.table(report.RESULTS)
    assert len(found.lines) == len(headlines.HEADLINES) == 5
    results = (report.DOCS / "results.md").read_text(encoding="utf-8")
    for *_, ratio in found.lines:  # the same figure as in the whole table
        assert ratio in results


def test_a_headline_whose_row_is_gone_is_an_error(tmp_path):
    for headline in headlines.HEADLINES:
        written(tmp_path / headline.file, [ENVIRONMENT, step(lengths="uniform")])
    with pytest.raises(LookupError, match=r"cpu/steps\.jsonl has no row of steps"):
        headlines.table(tmp_path)


def test_the_plots_of_the_documents_are_those_of_the_results():
    """The site is built from docs/ alone, so docs/images has copies of the plots that it shows."""
    images = list((report.DOCS / "images").glob("*/*.png"))
    assert images
    for image in images:
        source = report.RESULTS / image.relative_to(report.DOCS / "images")
        assert image.read_bytes() == source.read_bytes(), f"cp {source} {image}"


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


def test_compare_takes_timings_without_a_spread(tmp_path):
    before, after = step(2.0), step(2.6)
    for row in (before, after):
        del row["timings"][FASTBERT]["spread"]
    code, said = compare(tmp_path, [before], [after])
    assert code == 1
    assert "1 slower beyond the noise" in said


@pytest.mark.parametrize("of_one", [summarize([2.6]), {**summarize([2.6]), "spread": 0.0}])
def test_one_round_is_shown_without_noise_and_fails_no_comparison(tmp_path, of_one):
    """Older results have 0 as the spread of one round."""
    before, after = step(2.0), step(7.0)
    after["timings"][FASTBERT] |= of_one
    code, said = compare(tmp_path, [before], [after])
    assert code == 0
    assert re.search(r"1\.30x *│ *- *│ *one round", said)
    assert "| fastbert | 2.6 s | " in report.markdown([ENVIRONMENT, after])


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
    ("number", "row", "said"),
    [
        (0, {key: ENVIRONMENT[key] for key in ENVIRONMENT if key != "device"}, "no device"),
        (1, {"part": "steps", "timings": {}}, "line 2: no case"),
        (1, {"part": "steps", "case": {}}, "line 2: no timings"),
        (1, {**step(), "timings": {FASTBERT: {}}}, "line 2: no median_s of fastbert"),
        (1, "part", "line 2: no row"),
    ],
)
def test_a_row_without_what_every_row_has_is_refused(tmp_path, number, row, said):
    rows = [ENVIRONMENT, step()]
    rows[number] = row
    with pytest.raises(InputError, match=rf"a\.jsonl: not results .*\({said}"):
        read(written(tmp_path / "a.jsonl", rows))


def test_a_row_without_a_field_of_its_part_is_refused_before_anything_is_written(tmp_path):
    row = step()
    del row["fill"]
    path = written(tmp_path / "cpu" / "a.jsonl", [ENVIRONMENT, step(), row])
    said = r"a\.jsonl: not results of python -m benchmarks \(a row lacks 'fill'\)"
    with pytest.raises(InputError, match=said):
        report.main([path], [])
    assert [one.name for one in path.parent.iterdir()] == ["a.jsonl"]
    with pytest.raises(InputError, match=said):
        report.filled("<!-- benchmarks: cpu/a.jsonl steps -->\n<!-- end -->", tmp_path)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["gpu-check", "file"], "file: File exists"),
        (["gpu-check", "file/a"], "file/a: Not a directory"),
        (["report", "."], ".: Is a directory"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_line(command, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks", *command])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("benchmarks", run_name="__main__")
    assert end.value.code == 2
    assert capsys.readouterr().err == f"benchmarks: error: {said}\n"


def test_a_document_that_cannot_be_read_is_refused_before_anything_is_written(results):
    with pytest.raises(InputError, match=r"missing\.md: No such file"):
        report.main([results], [results.parent / "missing.md"])
    assert [path.name for path in results.parent.iterdir()] == ["steps.jsonl"]


def test_results_cannot_be_written_to_a_directory(tmp_path):
    options = Options(torch.device("cpu"))
    with pytest.raises(InputError, match="Is a directory"):
        Results(options, tmp_path)


def test_changes_to_the_commit_are_named(results):
    changed = {**ENVIRONMENT, "commit": "abc-dirty", "changes": "larger blocks"}
    written(results, [changed, step()])
    text = "<!-- benchmarks: cpu/steps.jsonl steps -->\n<!-- end -->\n"
    assert ", commit abc with larger blocks, " in report.filled(text, results.parents[1])


def test_of_a_target_in_several_files_the_last_counts(results):
    folder = results.parent
    results.unlink()
    full = step(ours=2.0, theirs=2.6, lengths="full")
    written(folder / "1-first.jsonl", [ENVIRONMENT, step(theirs=9.0), full])
    written(folder / "2-later.jsonl", [ENVIRONMENT, step(theirs=5.0)])
    found = report.filled("<!-- benchmarks: cpu targets -->\n<!-- end -->\n", folder.parent)
    assert (
        "| pre-training step, speedup over Hugging Face (SDPA) | at least 3.00x | 2.50x |" in found
    )
    assert "Hugging Face (SDPA) | at least 1.25x | 1.30x | met |" in found


def test_a_block_of_targets_reads_a_folder(results):
    text = "<!-- benchmarks: cpu targets -->\nold\n<!-- end -->\n"
    found = report.filled(text, results.parents[1])
    assert "speedup over Hugging Face (SDPA) | at least 3.00x | 3.50x | met |" in found
    assert "From `benchmarks/results/cpu`" in found
    report.main([results], [written(results.parent / "README.md", [])])
    assert "## Targets" in results.with_suffix(".md").read_text()


def test_a_command_is_told_with_the_variables_that_change_what_it_measures(monkeypatch):
    monkeypatch.setenv("FASTBERT_PDL", "1")
    monkeypatch.setattr("sys.argv", ["benchmarks", "--quick"])
    options = Options(torch.device("cpu"), "fp32", quick=True)
    command = describe(options)["command"]
    assert "FASTBERT_PDL=1 python -m " in command
    assert command.endswith("--quick")
