"""Time and memory of making a cache from a corpus file, beside the tokenizer alone."""

import contextlib
import itertools
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from tokenizers import Tokenizer

from benchmarks.results import FASTBERT, Options, Results
from benchmarks.timing import interleaved, summarize
from fastbert import data

BATCH = 10_000  # sentences per call of encode_batch
CEILING = "tokenizers, encode_batch"


def run(options: Options, results: Results) -> None:
    """Measures the parts "tokenizing" and "tokenizing_memory".

    The corpus is sentences of Python's documentation, drawn at random.
    """
    size, rounds = (2_000_000, 2) if options.quick else (50_000_000, 3)
    drawn = list(data.python_documents())
    sentences = list(itertools.chain.from_iterable(drawn))
    tokenizer = data.train_tokenizer(sentences, 8192)
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        tokenizer.save(str(place / "tokenizer.json"))
        corpus = write_corpus(place / "corpus.txt", sentences, size)
        seconds = throughput(tokenizer, corpus, place, rounds)
        tokens = data.TokenizedCorpus.open(place / "cache").num_tokens
        timings: dict[str, Any] = {name: summarize(some) for name, some in seconds.items()}
        for timing in timings.values():
            timing["bytes_per_second"] = corpus.stat().st_size / timing["median_s"]
            timing["tokens_per_second"] = tokens / timing["median_s"]
            timing["share"] = timings[CEILING]["median_s"] / timing["median_s"]
        results.add("tokenizing", {"bytes": size, "cores": data.available_cores()}, timings)
        for some in (size // 2, size * 2):
            corpus = write_corpus(place / f"{some}.txt", sentences, some)
            for processes in sorted({1, data.available_cores()}):
                command = [sys.executable, "-m", "benchmarks.training.tokenizing"]
                command += map(str, (corpus, place, processes))
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                case = {"bytes": some, "processes": processes}
                results.add("tokenizing_memory", case, **json.loads(done.stdout))


def write_corpus(path: Path, sentences: list[str], size: int) -> Path:
    """A text file of about `size` bytes, in documents of 20 sentences."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            file.write("\n".join(draw.choices(sentences, k=20)) + "\n\n")
    return path


def throughput(
    tokenizer: Tokenizer, corpus: Path, place: Path, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each candidate; fastbert reads, encodes, writes and merges.

    The hash of the files is timed separately, because a run needs it even if there is a cache.
    """
    sentences = list(itertools.chain.from_iterable(data.read_documents([corpus])))
    cores = data.available_cores()

    def alone(encode: Any) -> None:
        for begin in range(0, len(sentences), BATCH):
            for encoding in encode(sentences[begin : begin + BATCH], add_special_tokens=False):
                encoding.ids  # noqa: B018 -- the attribute makes the list

    return interleaved(
        {
            CEILING: lambda: alone(tokenizer.encode_batch),
            "tokenizers, encode_batch_fast": lambda: alone(tokenizer.encode_batch_fast),
            FASTBERT: lambda: end_to_end(tokenizer, corpus, place / "cache", cores),
            "fastbert, one process": lambda: end_to_end(tokenizer, corpus, place / "cache", 1),
            "hash of the files": lambda: data.fingerprint_files([corpus]),
        },
        rounds,
    )


def end_to_end(tokenizer: Tokenizer, corpus: Path, directory: Path, processes: int) -> None:
    (directory / "manifest.json").unlink(missing_ok=True)
    documents = data.read_documents([corpus])
    data.tokenize_corpus(
        documents, tokenizer, directory, fingerprint=corpus.name, processes=processes
    )


def peak_memory(corpus: Path, place: Path, processes: int) -> None:
    """Prints the peak memory of this process and its descendants as JSON; shared pages count once.

    A fork server starts the descendants, so `resource.getrusage` does not count them as children.
    """
    own, peak, done = psutil.Process(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.1):
            peak = max(peak, sum(map(memory, (own, *own.children(recursive=True)))))

    watching = threading.Thread(target=watch)
    watching.start()
    started = time.perf_counter()
    tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
    with tempfile.TemporaryDirectory(dir=place) as directory:
        end_to_end(tokenizer, corpus, Path(directory), processes)
    seconds = time.perf_counter() - started
    done.set()
    watching.join()
    print(json.dumps({"peak_memory_bytes": peak, "seconds": seconds}))


def memory(process: psutil.Process) -> int:
    """A process's bytes of memory, as Linux's Pss: n processes count 1/n of a shared page each."""
    with contextlib.suppress(psutil.NoSuchProcess):  # it has ended
        return process.memory_full_info().pss
    return 0


if __name__ == "__main__":
    peak_memory(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
