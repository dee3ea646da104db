"""`python -m benchmarks`: runs the benchmarks of this machine and writes their results as JSON."""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import pretrain_step
from fastbert.train.report import environment

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(highlight=False, width=110)


@app.command()
def main(
    preset: Annotated[str, typer.Option(help="Architecture: tiny, mini, base, large.")] = "base",
    precision: Annotated[str, typer.Option(help="fp32 or bf16 (autocast).")] = "fp32",
    sequences: Annotated[int, typer.Option(help="Sequences in a batch.", min=2)] = 4,
    steps: Annotated[int, typer.Option(help="Timed steps of each model.", min=2)] = 8,
    out: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
) -> None:
    """Times a pre-training step against Hugging Face's on the same batches, interleaved."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = []
    table = Table(
        "lengths", "filled", "model", "step", "spread", "real tokens/s", "times fastbert's"
    )
    for lengths in ("wikipedia", "full"):
        result = pretrain_step.run(preset, precision, lengths, sequences, steps, device)
        results.append(result)
        for name, timing in result["models"].items():
            table.add_row(
                lengths,
                f"{result['fill']:.0%}",
                name,
                f"{timing['median_s']:.3f} s",
                f"{timing['spread']:.0%}",
                f"{timing['real_tokens_per_second']:,.0f}",
                f"{timing['median_s'] / result['models']['fastbert']['median_s']:.2f}x",
            )
    console.print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        values = {"environment": environment(device), "pretrain_step": results}
        out.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
