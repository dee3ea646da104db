"""The project's performance targets, and whether the results meet them.

The targets derive from NVIDIA's MLPerf submission for BERT-large on an H200 (packed, Wikipedia-like
lengths), from FasterTransformer's successors for inference, from memory bandwidth for operators
that only move bytes, and from Hugging Face's BERT on the same batches.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from benchmarks.reporting.cells import Table, seconds
from benchmarks.results import COMPILED, FASTBERT, FP8, PATCHED, PATCHED_GRAPHS, SDPA, Row

BOTH = BASE, LARGE = "base", "large"
BYTES = ("dropout_add_layer_norm", "bias_gelu", "embedding_layer_norm", "gather_rows")


class Target(NamedTuple):
    """One target.

    goal: the least value, or the largest if `is_limit`, in `unit`; measured: yields the values in a
    file's rows, none if the file did not measure them
    """

    what: str
    goal: float
    unit: str
    measured: Callable[[list[Row]], Iterable[float]]
    is_limit: bool = False

    def value(self, rows: list[Row]) -> float | None:
        """The worst value measured, None if there is none."""
        found = list(self.measured(rows))
        if not found:
            return None
        return max(found) if self.is_limit else min(found)

    def is_met(self, value: float) -> bool:
        return value <= self.goal if self.is_limit else value >= self.goal


def times(part: str, one: str, other: str, **case: Any) -> Callable:
    """The time of candidate `one` divided by that of `other`, on the same batches."""

    def measured(rows: list[Row]) -> Iterable[float]:
        for row in _of(rows, part, **case):
            if {one, other} <= row["timings"].keys():
                yield _median(row, one) / _median(row, other)

    return measured


def step(lengths: str, other: str) -> Callable:
    """The time of another candidate's pre-training step divided by fastbert's."""
    return times("steps", other, FASTBERT, lengths=lengths, preset=BOTH)


def memory(rows: list[Row]) -> Iterable[float]:
    for row in _of(rows, "steps", lengths="wikipedia", preset=BOTH):
        peaks = [row["timings"].get(by, {}).get("memory_held_bytes") for by in (FASTBERT, SDPA)]
        if all(peaks):
            yield peaks[0] / peaks[1]


def timing(part: str, lengths: str, preset: str, key: str, by: str = FASTBERT) -> Callable:
    """A figure of fastbert's timing, the better one of with and without a CUDA graph."""

    def measured(rows: list[Row]) -> Iterable[float]:
        for row in _of(rows, part, lengths=lengths, preset=preset):
            own = [t[key] for name, t in row["timings"].items() if name.startswith(by)]
            if own:
                yield min(own) if key == "median_s" else max(own)

    return measured


def share(direction: str) -> Callable:
    """The bandwidth of operators that only move bytes, as a share of a copy's in the same run."""

    def measured(rows: list[Row]) -> Iterable[float]:
        for row in _of(rows, "kernels", operator=BYTES, direction=direction):
            if FASTBERT in row["timings"]:
                yield row["timings"][FASTBERT]["share"]

    return measured


def attention(direction: str) -> Callable:
    """The time of the fastest alternative, packed or padded, divided by fastbert's attention's."""

    def measured(rows: list[Row]) -> Iterable[float]:
        for row in _of(rows, "kernels", operator="attention", direction=direction):
            others = [t["median_s"] for n, t in row["timings"].items() if n != FASTBERT]
            if FASTBERT in row["timings"] and others:
                yield min(others) / _median(row, FASTBERT)

    return measured


def encoding(route: str) -> Callable:
    return times("sentence_encode", "unpatched", FASTBERT, route=route)


def served(other: str) -> Callable:
    """fastbert's requests per second divided by another server's, on the same requests."""
    return times("serve", other, FASTBERT)


def sequences_a_second(rows: list[Row]) -> Iterable[float]:
    for row in _of(rows, "inference", lengths="384", preset=LARGE):
        fastest = min(t["median_s"] for n, t in row["timings"].items() if n.startswith(FASTBERT))
        yield row["case"]["sequences"] / fastest


def on_host(by: str, of: str) -> Callable:
    """The time of a call on the CPU with hardly any arithmetic, divided by Hugging Face's."""
    return times("host", by, SDPA, device="cpu", of=of)


def patched(by: str, **case: Any) -> Callable:
    """Hugging Face's time divided by a patched model's, for calls on a GPU."""
    return times("host", SDPA, by, device="cuda", **case)


def layer_on_host(rows: list[Row]) -> Iterable[float]:
    """Seconds of a layer in inference, without kernels and matrix products, own and patched."""
    for row in _of(rows, "host_layers", of="inference"):
        for timing in row["timings"].values():
            yield timing["median_s"] - row["products"]["median_s"]


def _of(rows: list[Row], part: str, **case: Any) -> Iterable[Row]:
    """The rows of a part whose case has these values; a tuple allows any of its values."""
    wanted = {name: one if isinstance(one, tuple) else (one,) for name, one in case.items()}
    for row in rows:
        if row["part"] == part and all(row["case"].get(n) in some for n, some in wanted.items()):
            yield row


def _median(row: Row, name: str) -> float:
    return row["timings"][name]["median_s"]


OVER_SDPA = "speedup over Hugging Face (SDPA)"
GPU = (
    Target("BERT-large, bf16, real tokens per second", 280e3, "tokens/s",
           timing("steps", "wikipedia", LARGE, "real_tokens_per_second")),
    Target("BERT-large, FP8, real tokens per second", 350e3, "tokens/s",
           timing("steps", "wikipedia", LARGE, "real_tokens_per_second", FP8)),
    Target(f"pre-training step, {OVER_SDPA}", 5, "x", step("wikipedia", SDPA)),
    Target("pre-training step, speedup over torch.compile", 3, "x", step("wikipedia", COMPILED)),
    Target(f"pre-training step without padding, {OVER_SDPA}", 1.6, "x", step("full", SDPA)),
    Target("pre-training step without padding, speedup over torch.compile", 1.25, "x",
           step("full", COMPILED)),
    Target("memory held for a step, relative to Hugging Face (SDPA)", 0.4, "x", memory,
           is_limit=True),
    Target("attention forward, speedup over PyTorch's fastest", 1, "x", attention("forward")),
    Target("attention backward, speedup over PyTorch's fastest", 1, "x", attention("backward")),
    Target("forward of operators that only move bytes, share of a copy's rate", 0.85, "",
           share("forward")),
    Target("backward of operators that only move bytes, share of a copy's rate", 0.80, "",
           share("backward")),
    Target("BERT-base forward, 16 sequences of 512, 60 % filled", 3.7e-3, "s",
           timing("inference", "serving", BASE, "median_s"), is_limit=True),
    Target("BERT-base forward, 1 sequence of 128", 0.6e-3, "s",
           timing("inference", "128", BASE, "median_s"), is_limit=True),
    Target("BERT-large forward, sequences of 384 per second", 2050, "sequences/s",
           sequences_a_second),
    Target(f"patched BERT-base without graphs, {OVER_SDPA}", 1, "x", patched(PATCHED)),
    Target(f"patched, inference of 1 x 128, {OVER_SDPA}", 5, "x",
           patched(PATCHED_GRAPHS, of="inference", sequences=1, length=128)),
    Target(f"patched, fine-tuning step of 32 x 128, {OVER_SDPA}", 1.5, "x",
           patched(PATCHED_GRAPHS, of="training step", sequences=32, length=128)),
    Target(f"patched, fine-tuning step of 32 x 512, half full, {OVER_SDPA}", 2.5, "x",
           patched(PATCHED_GRAPHS, of="training step", sequences=32, length=512)),
    Target(f"patched, Trainer's step of 32 x 128, {OVER_SDPA}", 1.5, "x",
           patched(PATCHED_GRAPHS, of="Trainer's step", sequences=32, length=128)),
    Target(f"patched, Trainer's step of 32 x 512, half full, {OVER_SDPA}", 2.5, "x",
           patched(PATCHED_GRAPHS, of="Trainer's step", sequences=32, length=512)),
)  # fmt: skip
CPU = (
    Target(f"pre-training step, {OVER_SDPA}", 3, "x", step("wikipedia", SDPA)),
    Target(f"pre-training step without padding, {OVER_SDPA}", 1.25, "x", step("full", SDPA)),
    Target("sentence embeddings in a loop of mixed lengths, speedup over unpatched", 3, "x",
           encoding("loop over batches of 32 as they come")),
    Target("sentence embeddings by sentence-transformers, speedup over unpatched", 1.8, "x",
           encoding("sentence-transformers' `encode`")),
    Target("requests per second, relative to infinity-emb", 1.5, "x", served("infinity-emb")),
    Target("requests per second, relative to a route around `encode`", 3, "x",
           served("a route around `encode`")),
    *(
        Target(f"{of} of a tiny model, {by}, time relative to Hugging Face", goal, "x",
               on_host(by, of), is_limit=True)
        for of, by, goal in (("inference", PATCHED, 1.0), ("training step", PATCHED, 1.1),
                             ("inference", FASTBERT, 0.8), ("training step", FASTBERT, 1.0))
    ),
    Target("a layer in inference, without kernels and matrix products", 80e-6, "s", layer_on_host,
           is_limit=True),
)  # fmt: skip


def targets_of(rows: list[Row]) -> tuple[Target, ...]:
    """The targets for the kind of machine that the results come from."""
    return CPU if rows[0]["device"].startswith("cpu") else GPU


def table(*runs: list[Row]) -> Table:
    """The targets, each beside its value in the last run that measured it.

    A run is all rows of a file, its environment first.
    """
    lines = []
    for target in targets_of(runs[0]):
        values = [value for run in runs if (value := target.value(run)) is not None]
        value = values[-1] if values else None
        bound = "at most" if target.is_limit else "at least"
        wanted = f"{bound} {_figure(target.goal, target.unit)}"
        measured, verdict = "-", "not measured"
        if value is not None:
            measured = _figure(value, target.unit)
            verdict = "met" if target.is_met(value) else "not met"
        lines.append((target.what, wanted, measured, verdict))
    return Table(("target", "goal", "measured", ""), lines)


def _figure(value: float, unit: str) -> str:
    if unit == "s":
        return seconds(value)
    if not unit:
        return f"{value:.0%}"
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.2f}{unit}"
