"""The README's five figures, one line each, taken from the committed results.

`python -m benchmarks report` writes them into the README's block "headlines", whose file is `.`,
the folder of all results.
"""

from pathlib import Path
from typing import NamedTuple

from benchmarks.reporting.cells import Table, time_of
from benchmarks.results import FASTBERT, PATCHED_GRAPHS, SDPA, Row, read


class Headline(NamedTuple):
    """A figure, from the first row of `part` in `file` whose case has the items of `case`."""

    what: str
    machine: str
    file: str
    part: str
    case: Row
    other: str = SDPA  # the candidate that fastbert is compared with
    ours: str = FASTBERT


HEADLINES = (
    Headline(
        "pre-training step of BERT-base, without a GPU",
        "2 CPU cores",
        "cpu/steps.jsonl",
        "steps",
        {"preset": "base", "lengths": "wikipedia"},
    ),
    Headline(
        "sentence embeddings, all-MiniLM-L6-v2 patched",
        "2 CPU cores",
        "cpu/sentence_encode.jsonl",
        "sentence_encode",
        {"route": "sentence-transformers' `encode`"},
        "unpatched",
    ),
    Headline(
        "pre-training step of BERT-large, one CUDA graph",
        "H200",
        "h200/4-fp8.jsonl",
        "steps",
        {"preset": "large", "lengths": "wikipedia"},
    ),
    Headline(
        "fine-tuning step of BERT-base patched, 32 x 128, half full",
        "H200",
        "h200/host.jsonl",
        "host",
        {"of": "training step", "sequences": 32, "length": 128, "is_full": False},
        ours=PATCHED_GRAPHS,
    ),
    Headline(
        "inference of BERT-base patched, 1 x 128",
        "H200",
        "h200/host.jsonl",
        "host",
        {
            "of": "inference",
            "sequences": 1,
            "length": 128,
            "model": "BertForSequenceClassification",
        },
        ours=PATCHED_GRAPHS,
    ),
)


def table(results: Path) -> Table:
    """A line for each figure; raises LookupError if a results file no longer has its row."""
    lines = []
    for headline in HEADLINES:
        timings = _row(results, headline)["timings"]
        ours, theirs = timings[headline.ours], timings[headline.other]
        ratio = theirs["median_s"] / ours["median_s"]
        measured = (time_of(ours), time_of(theirs), f"{ratio:.2f}x")
        lines.append((headline.what, headline.machine, *measured))
    return Table(("what", "machine", "fastbert", "Hugging Face", "ratio"), lines)


def _row(results: Path, headline: Headline) -> Row:
    for row in read(results / headline.file):
        is_case = row["part"] == headline.part and headline.case.items() <= row["case"].items()
        if is_case:
            return row
    raise LookupError(f"{headline.file} has no row of {headline.part} for {headline.what}")
