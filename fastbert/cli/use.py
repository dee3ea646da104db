"""Commands that use a model (`predict`, `embed`, `fill-mask`, `export`, `serve`), and `info`."""

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from fastbert.check import InputError
from fastbert.cli.app import app
from fastbert.cli.options import Command, options_of
from fastbert.config.options import text_of
from fastbert.config.serve import ServeConfig
from fastbert.system import files
from fastbert.system.console import console, leave_standard_output

_MODEL = typer.Option(help="Directory of a model or a run, or a hub name.")
_INPUT = typer.Option(
    "--input", help="File to read; - reads JSON Lines (with --delimiter, a table) from stdin."
)
_TEXTS = typer.Option(
    "--input", help="File to read; - reads lines (with --delimiter, a table) from stdin."
)
_DELIMITER = typer.Option(help="Character between columns of a table, instead of , or a tab.")
_PRECISION = "auto, bf16, fp16 or fp32; auto is bf16 autocast if the hardware has it, else fp32"
_BATCH_TOKENS = typer.Option(help="The most tokens in a batch.", min=1)


@app.command(
    cls=Command,
    epilog="Example: fastbert predict --model runs/reviews --input new.csv --out new.jsonl",
)
def predict(
    model: Annotated[str, typer.Option(help="Directory of a fine-tuning run.")],
    source: Annotated[Path, _INPUT],
    out: Annotated[Path, typer.Option(help="JSON Lines to write, one per example; - prints.")],
    copy: Annotated[
        list[str] | None,
        typer.Option(help="Column of the table to copy into the output; repeatable; '*': all."),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="Read longer texts in windows that share this many tokens.", min=0),
    ] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut longer texts off instead of refusing them.")
    ] = False,
    delimiter: Annotated[str | None, _DELIMITER] = None,
    batch_tokens: Annotated[int, _BATCH_TOKENS] = 4096,
    precision: Annotated[
        str | None, typer.Option(help=f"{_PRECISION}; by default the training's.")
    ] = None,
) -> None:
    """Run a fine-tuned model on a file. The file has the format of the training data."""
    from fastbert.finetune import predict as inference

    _open_output(out, source, model)
    predictions = inference.predict(
        model,
        source,
        batch_tokens=batch_tokens,
        precision=precision,
        stride=stride,
        truncate=truncate,
        delimiter=delimiter,
        copy=[text_of(name, "--copy") for name in copy or ()],
    )
    inference.write_json_lines(out, predictions)
    refused = [row["error"] for row in predictions if "error" in row]
    if refused:
        warnings.warn(f"{len(refused)} row(s) have an error; the first: {refused[0]}", stacklevel=2)
    _say_where(out, f"{len(predictions)} predictions")


@app.command(
    cls=Command,
    epilog="Example: fastbert embed --model runs/demo --input texts.txt --out texts.npy",
)
def embed(
    model: Annotated[str, _MODEL],
    source: Annotated[Path, _TEXTS],
    out: Annotated[
        Path,
        typer.Option(
            help="The .npy to write, (texts, width) float32; - prints. A directory gets shards, "
            "for inputs of any size, resumable, with all processes of torchrun."
        ),
    ],
    pooling: Annotated[
        str | None,
        typer.Option(help="mean of all tokens, or cls; by default as in the model's files."),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option("--normalize/--no-normalize", help="Scale vectors to length 1."),
    ] = None,
    text_column: Annotated[
        str, typer.Option(help="Column of a .csv, .tsv, .jsonl or .parquet.")
    ] = "text",
    max_seq_len: Annotated[
        int | None, typer.Option(help="Longest sequence, in tokens; by default the model's.")
    ] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut longer texts off instead of refusing them.")
    ] = False,
    batch_tokens: Annotated[int, _BATCH_TOKENS] = 4096,
    precision: Annotated[str, typer.Option(help=f"{_PRECISION}.")] = "auto",
    delimiter: Annotated[str | None, _DELIMITER] = None,
    shard_size: Annotated[
        int | None, typer.Option(help="Rows per shard, by default 65536.", min=1)
    ] = None,
    format: Annotated[str | None, typer.Option(help="Shards: npy (default), parquet.")] = None,
) -> None:
    """Write an embedding for each text of a file. A text is a line, or a row of a table."""
    options: dict[str, Any] = {
        "text_column": text_of(text_column, "--text-column"),
        "pooling": pooling,
        "normalize": normalize,
        "max_seq_len": max_seq_len,
        "truncate": truncate,
        "batch_tokens": batch_tokens,
        "precision": precision,
        "delimiter": delimiter,
    }
    if not files.is_stream(out) and (out.is_dir() or not out.suffix):
        from fastbert.embedding import shards

        given = {"shard_size": shard_size, "format": format}
        options |= {name: value for name, value in given.items() if value is not None}
        manifest = shards.embed_corpus(model, source, out, **options)
        console.print(f"{manifest['rows']:,} embeddings are in {out}")
        return
    from fastbert.embedding import array

    if shard_size is not None or format is not None:
        raise InputError(
            f"--out {out}: a file has no shards; name a directory, or omit --shard-size and "
            "--format"
        )
    array.require_npy(out)
    _open_output(out, source, model)
    embeddings = array.embed(model, source, **options)
    array.write_npy(out, embeddings)
    _say_where(out, f"embeddings {embeddings.shape}")


def _open_output(out: Path, source: Path, model: str) -> None:
    """Raises InputError before the work begins, if the output cannot be written or is an input."""
    files.require_output(out, source, model)
    if files.is_stream(out):  # only rows may go to the stream
        leave_standard_output()


def _say_where(out: Path, what: str) -> None:
    """Prints that rows are in a file, unless the output is a stream."""
    if not files.is_stream(out):
        console.print(f"{what} are in {out}")


@app.command(
    "fill-mask",
    cls=Command,
    epilog='Example: fastbert fill-mask --model runs/demo "a [MASK] of text"',
)
def fill_mask(
    text: Annotated[str, typer.Argument(help="Text with [MASK]; - reads it from stdin.")],
    model: Annotated[str, _MODEL],
    top: Annotated[int, typer.Option(help="Number of words to show.", min=1)] = 5,
) -> None:
    """Show the likeliest words for each [MASK] of a text. Also shows their probabilities."""
    from rich.console import Console
    from rich.table import Table

    from fastbert.data.formats.tables import read_text
    from fastbert.fill_mask import fill_mask as predictions

    console = Console(highlight=False, markup=False)
    if text == files.STANDARD:
        text = read_text(Path(text)).strip()
    for number, words in enumerate(predictions(model, text, top), start=1):
        table = Table("probability", "word", "text", title=f"[MASK] {number}", title_justify="left")
        for word in words:
            table.add_row(f"{word.probability:.3f}", word.word, word.text)
        console.print(table)


@app.command(
    cls=Command,
    epilog="Example: fastbert export --model runs/reviews --to onnx --out reviews/model.onnx",
)
def export(
    model: Annotated[str, _MODEL],
    out: Annotated[Path, typer.Option(help="The .onnx or .pt2 to write, or its directory.")],
    to: Annotated[str, typer.Option(help="onnx, or torch for a torch.export program.")] = "onnx",
    precision: Annotated[str, typer.Option(help="Precision of the file: fp32, fp16.")] = "fp32",
    head: Annotated[
        str | None,
        typer.Option(help="The model's class, such as BertForMaskedLM; by default config.json's."),
    ] = None,
    pooling: Annotated[
        str | None, typer.Option(help="Export sentence embeddings, mean or cls, of the bare model.")
    ] = None,
) -> None:
    """Write a model as a file for other runtimes. Keeps the file if it agrees with the model."""
    from fastbert.export import command

    path, difference = command.export(
        model, out, to=to, precision=precision, head=head, pooling=pooling
    )
    console.print(
        f"{path} agrees with the model: the largest difference is {difference.found:.1e}, "
        f"{difference.allowed:.1e} is allowed"
    )


@app.command(cls=Command, epilog="Example: fastbert serve --model runs/demo --port 8080")
@options_of(ServeConfig)
def serve(**options: Any) -> None:
    """Serve a model over HTTP. For embeddings, ranking, predictions, and words for [MASK]."""
    config = ServeConfig(**options)
    from fastbert import serve as serving  # slow to import: torch, FastAPI

    serving.run(config)


@app.command(cls=Command, epilog="Example: fastbert info")
def info() -> None:
    """Show versions, devices and backends. Also which backend each operator takes, and why."""
    from rich.console import Console
    from rich.table import Table

    from fastbert.cli.about import backends, devices, versions

    console = Console(highlight=False, markup=False)
    for title, header, rows in (
        ("Versions", ("package", "version"), versions()),
        ("Devices", ("device", "what it is"), devices()),
        ("Operators", ("operator", "device", "backend", "why"), backends()),
    ):
        table = Table(*header, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
