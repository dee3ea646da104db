"""`python -m benchmarks report`: tables, plots and the documents' figures, from committed results.

A results file NAME.jsonl gets NAME.md and NAME-PART.png beside it. In the README and three pages
of docs/, a pair of comments names a file and a part; this command writes the part's table between
them, and a test checks that the table still agrees with the file. The part "targets" also takes a
folder: if several files measured a target, the last by name counts. The part "headlines" is the
README's table; its file is `.`, the folder of all results:

    <!-- benchmarks: cpu/steps.jsonl steps -->
    <!-- end -->
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from benchmarks.reporting import headlines, plots, targets
from benchmarks.reporting.tables import PARTS
from benchmarks.results import Row, read
from fastbert.check import InputError
from fastbert.system.files import write_text

HERE = Path(__file__).parents[1]
RESULTS = HERE / "results"
README = HERE.parent / "README.md"
DOCS = HERE.parent / "docs"
DOCUMENTS = (README, *(DOCS / name for name in ("finetuning.md", "results.md", "tuning.md")))

T = TypeVar("T")

TARGETS, HEADLINES = "targets", "headlines"
BLOCK = re.compile(r"(<!-- benchmarks: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Results files; by default all that are committed.")
    ] = None,
    document: Annotated[
        list[Path] | None,
        typer.Option(help="Where to fill in tables; by default the README and docs/."),
    ] = None,
) -> None:
    """Write tables (Markdown) and plots (PNG) beside results, and the tables of documents."""
    # everything is read before anything is written
    runs = {path: read(path) for path in files or sorted(RESULTS.glob("*/*.jsonl"))}
    pages = {path: _of(path, markdown, rows) for path, rows in runs.items()}
    texts = {path: filled(_text(path)) for path in document or DOCUMENTS}
    for path, rows in runs.items():
        write_text(path.with_suffix(".md"), pages[path])
        for plot in plots.write(rows, path):
            print(plot)
    for path, text in texts.items():
        write_text(path, text)


def markdown(rows: list[Row]) -> str:
    """All rows of a file as a Markdown page: environment, targets, a section for each part."""
    environment = {key: value for key, value in rows[0].items() if key != "part"}
    lines = [f"- {name}: {value}" for name, value in environment.items() if value is not None]
    sections = ["# Results", "\n".join(lines)]
    if any(target.value(rows) is not None for target in targets.targets_of(rows)):
        sections += ["## Targets", targets.table(rows).markdown()]
    for part, table in PARTS.items():
        if found := [row for row in rows if row["part"] == part]:
            sections += [f"## {part}", table(found).markdown()]
            refused = {
                f"- {name}: {reason}"
                for row in found
                for name, reason in row.get("refused", {}).items()
            }
            if refused:
                sections.append("\n".join(["Could not run:", "", *sorted(refused)]))
    for row in rows:
        if row["part"] == "failure":
            sections.append(f"{row['case']['of']} failed: {row['error']}")
    return "\n\n".join(sections) + "\n"


def filled(text: str, results: Path = RESULTS) -> str:
    """The text with the table of every block written from the results."""
    return BLOCK.sub(lambda found: found[1] + block(results, found[2], found[3]) + found[4], text)


def block(results: Path, name: str, part: str) -> str:
    """A part's table, and where and how it was measured; InputError for an unknown part."""
    path, file = results / name, f"`benchmarks/results/{name}`"
    parts = (*PARTS, TARGETS, HEADLINES)
    if part not in parts:
        raise InputError(f"a block names the part {part!r}, expected one of {', '.join(parts)}")
    if not path.exists():
        return "\nNot measured yet.\n\n"
    if part == HEADLINES:
        return f"\n{headlines.table(path).markdown()}\n\n"
    if part == TARGETS:
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        table = targets.table(*(read(each) for each in files))
        return f"\n{table.markdown()}\n\nFrom {file}\n\n"
    if path.suffix == ".json":  # the summary.json of a run of `fastbert pretrain`
        row = json.loads(path.read_text(encoding="utf-8"))
        return f"\n{_of(path, PARTS[part], [row]).markdown()}\n\n{_source(row)}: {file}\n\n"
    rows = read(path)
    found = [row for row in rows if row["part"] == part]
    if not found:
        return "\nNot measured yet.\n\n"
    return f"\n{_of(path, PARTS[part], found).markdown()}\n\n{_source(rows[0])}: {file}\n\n"


def _of(path: Path, make: Callable[[list[Row]], T], rows: list[Row]) -> T:
    """What `make` returns; raises InputError if it lacks a field of a part in the file's rows."""
    try:
        return make(rows)
    except KeyError as error:
        said = f"not results of python -m benchmarks (a row lacks {error})"
        raise InputError(f"{path}: {said}") from error


def _text(path: Path) -> str:
    """The text of a document; raises InputError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text in UTF-8") from None


def _source(about: Row) -> str:
    commit = f"commit {about['commit']}"
    if "changes" in about:
        commit = f"commit {about['commit'].removesuffix('-dirty')} with {about['changes']}"
    where = [about["device"], f"torch {about['torch']}", commit]
    if about["device"].startswith("cpu"):
        where.insert(1, f"{about['threads']} threads")
    if "command" in about:
        where.append(f"`{about['command']}`")
    return f"On {', '.join(where)}"
