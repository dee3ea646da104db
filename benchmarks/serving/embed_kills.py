"""`python -m benchmarks embed-kills`: embeds a corpus of 1 GB, and embeds it again under kills.

The model is tiny and random, so that it takes minutes. `fastbert embed` is killed (SIGKILL) at
random moments and started again; the last run may end. Its files must be those of the undisturbed
run, bit for bit. Prints seconds, peak memory and the result as JSON; exits with 1 if files differ.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import fastbert
from fastbert.data import load_tokenizer, save_tokenizer

WORDS = 2000
WIDTH = 32


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


def command(model: Path, corpus: Path, out: Path) -> list[str]:
    options = {"model": model, "input": corpus, "out": out, "max-seq-len": 48}
    options |= {"shard-size": 2048, "batch-tokens": 16384, "precision": "fp32"}
    given = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "fastbert.cli", "embed", "--truncate", *given]


def run(arguments: list[str], until: float | None = None) -> tuple[int, float, float]:
    """Exit status (-9 if killed after `until` seconds), seconds, and peak memory in MiB."""
    start = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    timer = threading.Timer(until or 1e6, process.kill)
    timer.start()
    _, status, usage = os.wait4(process.pid, 0)
    timer.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, time.perf_counter() - start, usage.ru_maxrss / 1024


def digests(out: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())
    }


def measure(place: Path, size: int, kills: int, seed: int) -> dict[str, Any]:
    generator = random.Random(seed)
    words = make_words(generator)
    make_model(place / "model", words)
    rows = make_corpus(place / "corpus.txt", words, size, generator)
    whole, broken = (command(place / "model", place / "corpus.txt", place / n) for n in "ab")
    status, seconds, peak = run(whole)
    assert status == 0, "the undisturbed run failed"
    found = {"bytes": size, "rows": rows, "seconds": round(seconds), "peak_mb": round(peak)}
    print(json.dumps(found), flush=True)
    peaks, moments, spent = [], [], time.perf_counter()
    for number in range(kills):
        # in sum about as long as the undisturbed run, so that each still finds work to do
        moments.append(round(generator.uniform(0.5, 2 * seconds / (kills + 1)), 2))
        status, _, peak = run(broken, moments[-1])
        assert status == -signal.SIGKILL, f"ended with {status} before kill number {number + 1}"
        peaks.append(peak)
    kept = len(list((place / "b").glob("shard-*")))
    status, _, peak = run(broken)
    assert status == 0, "the run after the kills failed"
    same = digests(place / "a") == digests(place / "b")
    return found | {
        "kills_after_seconds": moments,
        "seconds_with_kills": round(time.perf_counter() - spent),
        "peak_mb_with_kills": round(max(*peaks, peak)),
        "shards_kept_by_kills": kept,
        "files": len(digests(place / "a")),
        "same": same,
    }


def main(
    place: Annotated[Path, typer.Option(help="An empty directory, for 3 GB.")],
    megabytes: Annotated[int, typer.Option(help="Of text.", min=1)] = 1000,
    kills: Annotated[int, typer.Option(min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Of the text and of the moments.")] = 0,
) -> None:
    """Embed a large corpus, and again under kills; exit code 1 where the two differ."""
    place.mkdir(parents=True, exist_ok=True)
    found = measure(place, megabytes * 10**6, kills, seed)
    print(json.dumps(found))
    raise typer.Exit(0 if found["same"] else 1)
