"""Encodes batches of documents into part files, in this process or in worker processes."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import types
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from fastbert.check import InputError
from fastbert.data.text.encoding import DocumentEncoder
from fastbert.data.tokenized.parts import Part, write_part
from fastbert.system.files import Unwritable

_UNDER_WAY = 2  # batches for each process, so that no process waits for the next batch


class Interrupted(InputError):
    """Tokenising has stopped; complete parts are kept, and the next run continues from there."""


class Foreign(Exception):
    """Carries an error from the caller's code past the handlers for errors of the cache."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)  # the `args` from which pickle rebuilds it in a process
        self.error = error


@contextlib.contextmanager
def foreign() -> Iterator[None]:
    """Runs the caller's code: its documents, its progress, its segmenter."""
    try:
        yield
    except (OSError, Unwritable) as error:
        raise Foreign(error) from error


class Batch(NamedTuple):
    """Documents to encode, and the number and the file of their part."""

    number: int
    documents: list[list[str]]
    path: Path


def available_cores() -> int:
    """The number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux; respects taskset and batch systems
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def write_parts(
    batches: Iterable[Batch], encoder: DocumentEncoder, processes: int
) -> Generator[tuple[int, Part], None, None]:
    """Yields (number, part) as each batch is done, in any order with 2 or more `processes`.

    At most _UNDER_WAY batches for each process are read ahead. Raises InputError for a segmenter
    that cannot be pickled for other processes, Interrupted if one of them is killed.
    """
    if processes < 2:
        for batch in batches:
            yield batch.number, _write_part(encoder, batch)
        return
    _require_portable(encoder)
    under_way: dict[Future[Part], int] = {}
    with _pool(encoder, processes) as pool:
        try:
            for batch in batches:
                with _without_main():
                    under_way[pool.submit(_work, batch)] = batch.number
                if len(under_way) == _UNDER_WAY * processes:
                    yield from _done(under_way)
            while under_way:
                yield from _done(under_way)
        except BrokenProcessPool:
            raise Interrupted(
                "a process that tokenised was killed, perhaps because memory ran out; run again to "
                "continue, with fewer processes if it happens again"
            ) from None


def _done(under_way: dict[Future[Part], int]) -> Iterator[tuple[int, Part]]:
    """Waits until at least one batch is done, and yields all finished batches."""
    for future in wait(under_way, return_when=FIRST_COMPLETED).done:
        yield under_way.pop(future), future.result()


def _write_part(encoder: DocumentEncoder, batch: Batch) -> Part:
    with foreign():
        encoded = encoder.encode(batch.documents)
    return write_part(batch.path, len(batch.documents), encoded)


def _require_portable(encoder: DocumentEncoder) -> None:
    segmenter = encoder.segmenter
    try:
        pickle.dumps(segmenter)
        portable = getattr(segmenter, "__module__", None) != "__main__"
    except Exception:  # pickle raises three classes, and an object's __reduce__ any class
        portable = False
    if not portable:
        raise InputError(
            f"segmenter {segmenter!r}: several processes need a function from a module that they "
            "can import; move it to a module, or tokenise with processes=1"
        )


@contextlib.contextmanager
def _pool(encoder: DocumentEncoder, processes: int) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes end with the block, and at once if it fails or this one is killed."""
    # A fork server imports fastbert once, which saves each process seconds and torch's memory.
    # Forking this process instead would copy locks that its threads hold.
    has_server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if has_server else "spawn")
    context.set_forkserver_preload([__name__])
    threads = max(available_cores() // processes, 1)
    alive, end = context.Pipe(duplex=False)
    with (
        alive,
        ProcessPoolExecutor(processes, context, _begin, (encoder, threads, alive)) as pool,
        end,  # closed before the pool waits, because closing it ends the processes
    ):
        yield pool
        pool.shutdown()


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Keeps processes that start in the block from importing the running script.

    They do not need it, and a script without `if __name__ == "__main__"` would run again.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


_encoder: DocumentEncoder  # set in each process of the pool


def _begin(encoder: DocumentEncoder, threads: int, alive: Connection) -> None:
    """Initialises a process in the pool."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles Ctrl-C
    # the tokenizers library reads these when it first encodes
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
    _encoder = encoder


def _end_with(alive: Connection) -> None:
    """Ends this process when the main process closes its end of the pipe or is gone."""
    with contextlib.suppress(EOFError, OSError):
        alive.recv()
    os._exit(1)


def _work(batch: Batch) -> Part:
    return _write_part(_encoder, batch)
