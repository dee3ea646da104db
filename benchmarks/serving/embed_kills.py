"""`python -m benchmarks embed-kills`: embeds a corpus of 1 GB, and embeds it again under kills.

The model is tiny and random, so that this takes minutes. `fastbert embed` is killed (SIGKILL) at
random moments, spread over all of its work, and started again; the last run may finish. Its files
must equal those of the undisturbed run, bit for bit. Prints seconds, peak memory (in MiB) and the
result as JSON; exits with 1 if files differ.
"""

import hashlib
import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer

import fastbert
from fastbert.data import load_tokenizer, save_tokenizer

WORDS = 2000
WIDTH = 32
SHARD_SIZE = 2048
WATCHED = 0.01  # seconds between two looks at a run


class Moment(NamedTuple):
    """When a run is killed: `seconds` after it has `shards` files of shards."""

    shards: int
    seconds: float


def make_model(directory: Path, words: list[str]) -> None:
    directory.mkdir(parents=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(words)]
    (directory / "vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary))
    tokenizer = load_tokenizer(directory)
    torch.manual_seed(0)
    config = fastbert.BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=64,
    )
    fastbert.BertModel(config).save_pretrained(directory)
    save_tokenizer(tokenizer, directory)


def make_words(generator: random.Random) -> list[str]:
    letters = "etaoinshrdlucmfwyp"
    return ["".join(generator.choices(letters, k=generator.randint(6, 16))) for _ in range(WORDS)]


def make_corpus(path: Path, words: list[str], size: int, generator: random.Random) -> int:
    """Writes about `size` bytes in lines of 1 to 3000 words; returns the number of lines."""
    rows = written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            count = min(int(generator.expovariate(1 / 250)) + 1, 3000)
            written += file.write(" ".join(generator.choices(words, k=count)) + "\n")
            rows += 1
    return rows


def command(model: Path, corpus: Path, out: Path, shard_size: int) -> list[str]:
    options = {"model": model, "input": corpus, "out": out, "max-seq-len": 48}
    options |= {"shard-size": shard_size, "batch-tokens": 16384, "precision": "fp32"}
    given = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "fastbert.cli", "embed", "--truncate", *given]


def run(arguments: list[str], out: Path, kill: Moment | None = None) -> tuple[int, float, float]:
    """(exit status, -9 if killed; seconds; peak memory in MiB) of a run that writes to `out`."""
    start, end, peak = time.perf_counter(), float("inf"), 0.0
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    while True:
        peak = max(peak, peak_mib(process.pid))
        status, now = process.poll(), time.perf_counter()
        if status is not None:
            return status, now - start, peak
        if kill is not None and len(shards(out)) >= kill.shards:
            end = min(end, now + kill.seconds)
        if now >= end:
            process.kill()
        time.sleep(WATCHED)


def peak_mib(process: int) -> float:
    """Peak memory of a process so far; 0 once it has ended.

    It comes from /proc, because `wait4` also counts the process that started this one.
    """
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def shards(out: Path) -> list[Path]:
    return sorted(out.glob("shard-*"))


def seconds_of_a_shard(out: Path) -> float:
    """The mean time between two shards of an undisturbed run; 0 for a single shard."""
    ends = [path.stat().st_mtime for path in shards(out)]
    return (ends[-1] - ends[0]) / max(len(ends) - 1, 1)


def moments(generator: random.Random, kills: int, count: int, seconds: float) -> list[Moment]:
    """One for each kill, in order: uniform over `count` shards that take `seconds` each."""
    begins = sorted(generator.choices(range(count), k=kills))
    return [Moment(begin, generator.uniform(0, seconds)) for begin in begins]


def digests(out: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())
    }


def measure(
    place: Path, size: int, kills: int, seed: int, shard_size: int = SHARD_SIZE
) -> dict[str, Any]:
    generator = random.Random(seed)
    words = make_words(generator)
    make_model(place / "model", words)
    rows = make_corpus(place / "corpus.txt", words, size, generator)
    whole, broken = place / "a", place / "b"
    again = command(place / "model", place / "corpus.txt", broken, shard_size)
    status, seconds, peak = run(
        command(place / "model", place / "corpus.txt", whole, shard_size), whole
    )
    assert status == 0, "the undisturbed run failed"
    count = len(shards(whole))
    found = {"bytes": size, "rows": rows, "shards": count, "seconds": round(seconds)}
    found |= {"peak_mib": round(peak)}
    print(json.dumps(found), flush=True)
    peaks, killed_at, spent = [], [], time.perf_counter()
    for kill in moments(generator, kills, count, seconds_of_a_shard(whole)):
        status, _, peak = run(again, broken, kill)
        assert status in (-signal.SIGKILL, 0), f"a run ended with {status} before its kill"
        if status:  # a kill in the last shard may come too late
            killed_at.append(len(shards(broken)))
        peaks.append(peak)
    status, _, peak = run(again, broken)
    assert status == 0, "the run after the kills failed"
    same = digests(whole) == digests(broken)
    return found | {
        "kills": len(killed_at),
        "shards_at_kills": killed_at,
        "seconds_with_kills": round(time.perf_counter() - spent),
        "peak_mib_with_kills": round(max(*peaks, peak)),
        "files": len(digests(whole)),
        "same": same,
    }


def main(
    place: Annotated[Path, typer.Option(help="An empty directory, for 3 GB.")],
    megabytes: Annotated[int, typer.Option(help="Size of the text.", min=1)] = 1000,
    kills: Annotated[int, typer.Option(min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the text and of the kills.")] = 0,
) -> None:
    """Embed a large corpus, and again under kills; exit code 1 if the files differ."""
    place.mkdir(parents=True, exist_ok=True)
    found = measure(place, megabytes * 10**6, kills, seed)
    print(json.dumps(found))
    raise typer.Exit(0 if found["same"] else 1)
