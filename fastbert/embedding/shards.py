"""`fastbert embed` into a directory, shard by shard, in one process or in all of torchrun's.

A shard appears whole or not at all, and depends only on its rows, the model and the options. So a
run that was killed continues with the missing shards, with any number of processes.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from fastbert.check import InputError, stopping
from fastbert.data.formats.texts import Text, Texts, pyarrow_of, texts_of
from fastbert.embedding.model import Embedder
from fastbert.embedding.plan import MANIFEST, PLAN, Plan, identity, require_same, sha256
from fastbert.embedding.progress import RowsReporter
from fastbert.embedding.writers import WRITERS, holds
from fastbert.system.console import console
from fastbert.system.files import new_file, require_apart
from fastbert.train.distributed import Ranks, joined

SHARD_SIZE = 65_536
_WINDOW_ROWS, _WINDOW_CHARACTERS = 8192, 2**22  # limits of texts in memory, sorted together

T = TypeVar("T")


def embed_corpus(
    model: str,
    source: Path,
    out: Path,
    *,
    text_column: str = "text",
    delimiter: str | None = None,
    shard_size: int = SHARD_SIZE,
    format: str = "npy",
    **options: Any,
) -> dict[str, Any]:
    """Embeds the texts of a file into shards of `shard_size` rows in `out`; returns the manifest.

    source: .txt, .csv, .tsv, .jsonl or .parquet, of any size; out: a directory that is new or holds
    the same run; format: npy, (rows, width) float32, or parquet, with columns `row`, int64, and
    `embedding`, float32; options: `Embedder`'s. A call after a kill makes only the missing shards;
    the manifest is written last. Under torchrun, rank r of W makes every W-th missing shard, from
    the r-th on. Raises InputError for input that cannot be read or changes meanwhile and for an
    `out` with other contents, Stopped after Ctrl-C.
    """
    if format not in WRITERS:
        raise InputError(f"--format: expected one of {', '.join(WRITERS)}, got {format!r}")
    if format == "parquet":
        pyarrow_of("--format parquet")
    texts = texts_of(source, text_column, delimiter)
    require_apart("--out", out, [source], [Path(model)])
    with joined() as ranks:
        embedder = Embedder(model, ranks.device, **options)
        made_from = embedder.made_from() | {
            "text_column": text_column,
            "delimiter": delimiter,
            "shard_size": shard_size,
            "format": format,
        }
        kept = f"the shards in {out} are kept; the same command makes the missing ones"
        with ranks.claimed(out), stopping(lambda: kept):
            before = os.stat(source)
            plan, missing = _from_first(ranks, lambda: _prepare(texts, out, made_from, embedder))
            own = missing[ranks.rank :: ranks.size]
            with RowsReporter(sum(len(plan.rows_of(n)) for n in own), ranks) as reporter:
                for number in own:
                    _write(plan, number, texts, embedder, out, reporter)
            embedder.warn_of_words(source)
            shards = _describe(plan, out, embedder.width, ranks)
            if _changed(before, os.stat(source)):
                raise InputError(f"{source}: was changed while it was read; use a new --out")
            return _from_first(ranks, lambda: plan.finish(out, model, source, shards))


def _prepare(
    texts: Texts, out: Path, made_from: dict[str, Any], embedder: Embedder
) -> tuple[Plan, list[int]]:
    """The new or existing plan, and the numbers of the missing shards."""
    made_from = made_from | identity(texts.path)
    plan = Plan.read(out)
    if plan is None:
        _require_empty(out)
        console.print(f"reading {texts.path}")
        plan = Plan.of(texts, made_from)
        plan.write(out)
    else:
        require_same(out, plan.made_from, made_from)
        if plan.made_from != made_from:  # --truncate was added; the plan must say so
            plan = Plan(made_from, plan.rows, plan.marks)
            plan.write(out)
    for name in ("shard-*", PLAN, MANIFEST):
        for rest in out.glob(f".{name}.*"):  # partly written by a run that was killed
            rest.unlink()
    missing = [
        number
        for number in range(len(plan.marks))
        if not holds(out / plan.file_of(number), len(plan.rows_of(number)), embedder.width)
    ]
    if missing:
        (out / MANIFEST).unlink(missing_ok=True)  # because a manifest says that all shards exist
    console.print(
        f"{plan.rows:,} rows in {len(plan.marks)} shard(s), of which {len(missing)} are missing"
    )
    return plan, missing


def _require_empty(out: Path) -> None:
    others = [path.name for path in out.iterdir() if not path.name.startswith(".")]
    if others:
        raise InputError(
            f"--out {out}: holds other files, such as {min(others)}; name a new or empty directory"
        )


def _write(
    plan: Plan, number: int, texts: Texts, embedder: Embedder, out: Path, reporter: RowsReporter
) -> None:
    rows = plan.rows_of(number)
    some = itertools.islice(texts.rows(plan.marks[number]), len(rows))
    with (
        new_file(out / plan.file_of(number)) as beside,
        WRITERS[plan.made_from["format"]](beside, rows, embedder.width) as write,
    ):
        for window in windows(some):
            write(embedder(window))
            reporter.advance(len(window))


def windows(texts: Iterator[Text]) -> Iterator[list[Text]]:
    """Groups of texts, in order: 8192 rows, or fewer once they have 4 million characters."""
    window: list[Text] = []
    characters = 0
    for text in texts:
        window.append(text)
        characters += len(text.text)
        if len(window) == _WINDOW_ROWS or characters >= _WINDOW_CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window


def _describe(plan: Plan, out: Path, width: int, ranks: Ranks) -> list[dict[str, Any]]:
    """The manifest's entries for all shards, on every rank.

    Waits until every rank has written its shards; then each rank hashes every W-th shard.
    """
    _gather(ranks, None)
    own = []
    for number in range(len(plan.marks))[ranks.rank :: ranks.size]:
        path, rows = out / plan.file_of(number), plan.rows_of(number)
        if not holds(path, len(rows), width):
            raise InputError(f"{path}: removed or changed by another process; run it again")
        own.append(
            {
                "file": path.name,
                "first_row": rows.start,
                "rows": len(rows),
                "bytes": path.stat().st_size,
                "sha256": sha256(path),
            }
        )
    found = itertools.chain.from_iterable(_gather(ranks, own))
    return sorted(found, key=lambda shard: shard["first_row"])


def _gather(ranks: Ranks, own: T) -> list[T]:
    """The values that all ranks pass, in order of rank. Waits for every rank."""
    if ranks.size == 1:
        return [own]
    everyones: list[Any] = [None] * ranks.size
    dist.all_gather_object(everyones, own, group=ranks.patient)
    return everyones


def _from_first(ranks: Ranks, make: Callable[[], T]) -> T:
    """The result of `make`, called on the first rank, on every rank; the others wait for it."""
    made: list[Any] = [make() if ranks.is_first else None]
    if ranks.size > 1:
        dist.broadcast_object_list(made, src=0, group=ranks.patient)
    result: T = made[0]
    return result


def _changed(before: os.stat_result, after: os.stat_result) -> bool:
    return (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns)
