"""The command line: `fastbert pretrain`, `distill`, `finetune`, `predict`, `embed`, ..."""

import contextlib
import functools
import io
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from fastbert import files
from fastbert.check import InputError, Stopped
from fastbert.cli_options import SETTINGS, Command, by_option_names, options_of
from fastbert.console import close_standard_streams, console, leave_standard_output
from fastbert.distill_config import DistillConfig
from fastbert.finetune_config import FinetuneConfig
from fastbert.options import text_of
from fastbert.pretrain_config import PretrainConfig
from fastbert.serve_config import ServeConfig

Run = TypeVar("Run", bound=PretrainConfig)

app = typer.Typer(
    name="fastbert",
    help="Pre-train, fine-tune and run BERT, fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=SETTINGS,
)


_Paths = Annotated[
    list[Path] | None, typer.Argument(help="More of --corpus, as in --corpus a.txt b.txt.")
]
_Out = Annotated[Path, typer.Option(help="Directory of the run.")]
_Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run in --out, if there is one.")
]
_Profile = Annotated[
    bool, typer.Option("--profile", help="Write a profiler's trace of a few steps.")
]
_Eager = Annotated[bool, typer.Option("--eager", help="On a GPU, run steps without a CUDA graph.")]
_Parallel = Annotated[
    str, typer.Option(help="Under torchrun: ddp (whole weights on each GPU) or fsdp (shards).")
]


@app.command(
    cls=Command, epilog="Example: fastbert pretrain --corpus wiki/ --out runs/wiki --preset base"
)
@options_of(PretrainConfig)
def pretrain(
    context: typer.Context,
    paths: _Paths = None,
    *,
    out: _Out = Path("runs/pretrain"),
    resume: _Resume = False,
    profile: _Profile = False,
    eager: _Eager = False,
    parallel: _Parallel = "ddp",
    **options: Any,
) -> None:
    """Pre-train a BERT (masked LM and next-sentence prediction) on text."""
    from fastbert.train import pretrain as pretraining  # slow to import: torch

    config = _config_of_run(PretrainConfig, context, paths, out, resume, options)
    pretraining.pretrain(
        config, out, resume=resume, eager=eager, profile=profile, parallel=parallel
    )


@app.command(
    cls=Command,
    epilog="Example: fastbert distill --teacher runs/wiki --corpus wiki/ --out runs/small",
)
@options_of(DistillConfig)
def distill(
    context: typer.Context,
    paths: _Paths = None,
    *,
    out: _Out = Path("runs/distill"),
    resume: _Resume = False,
    profile: _Profile = False,
    eager: _Eager = False,
    parallel: _Parallel = "ddp",
    **options: Any,
) -> None:
    """Train a smaller BERT on text to predict what a teacher predicts (DistilBERT's losses)."""
    from fastbert.train import distill as distilling  # slow to import: torch

    config = _config_of_run(DistillConfig, context, paths, out, resume, options)
    distilling.distill(config, out, resume=resume, eager=eager, profile=profile, parallel=parallel)


def _config_of_run(
    kind: type[Run],
    context: typer.Context,
    paths: list[Path] | None,
    out: Path,
    resume: bool,
    options: dict[str, Any],
) -> Run:
    """Of a new run, or of the one that is resumed, which only some options may change."""
    from fastbert.train.pretrain import read_run

    options["corpus"] = (*options["corpus"], *(paths or ()))
    if paths and len(options["corpus"]) == len(paths):
        raise InputError(f"{paths[0]}: a stray argument; text to train on is named by --corpus")
    earlier = read_run(out, kind) if resume else None
    if earlier is None:
        return kind(**options)
    sources = {name: context.get_parameter_source(name) for name in options}
    given = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    return earlier.same_run(**{name: options[name] for name in given})


_MODEL = typer.Option(help="Directory of a model or of a run, or a hub name.")
_INPUT = typer.Option(
    "--input", help="File to read; - is standard input: JSON Lines, or with --delimiter a table."
)
_DELIMITER = typer.Option(help="Between the columns of a table, in place of , or a tab.")
_PRECISION = "auto, bf16, fp16 or fp32; auto is bf16 autocast where it is fast"
_BATCH_TOKENS = typer.Option(help="Tokens computed at once.", min=1)


@app.command(
    cls=Command,
    epilog="Example: fastbert finetune --task classification --train train.csv --dev dev.csv "
    "--model runs/demo --out runs/reviews",
)
@options_of(FinetuneConfig)
def finetune(
    *,
    out: Annotated[Path, typer.Option(help="Directory of the run.")] = Path("runs/finetune"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin the run in --out anew, if there is one.")
    ] = False,
    **options: Any,
) -> None:
    """Train a BERT for a task on labelled examples; keep the best epoch."""
    config = FinetuneConfig(**options)
    from fastbert.finetune import train  # slow to import: torch

    train.finetune(config, out, overwrite=overwrite)


@app.command(
    cls=Command,
    epilog="Example: fastbert predict --model runs/reviews --input new.csv --out new.jsonl",
)
def predict(
    model: Annotated[str, typer.Option(help="Directory of a fine-tuning run.")],
    source: Annotated[Path, _INPUT],
    out: Annotated[Path, typer.Option(help="JSON Lines to write, a row an example; - prints.")],
    copy: Annotated[
        list[str] | None,
        typer.Option(help="A column of the table to copy into the rows, once for each; '*': all."),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="Reads longer texts in windows that share this many tokens.", min=0),
    ] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut longer texts off instead of refusing them.")
    ] = False,
    delimiter: Annotated[str | None, _DELIMITER] = None,
    batch_tokens: Annotated[int, _BATCH_TOKENS] = 4096,
    precision: Annotated[
        str | None, typer.Option(help=f"{_PRECISION}; by default that of the training.")
    ] = None,
) -> None:
    """Run a fine-tuned model on a file in the format that it was trained with."""
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
        warnings.warn(f"{len(refused)} row(s) have an error, as: {refused[0]}", stacklevel=2)
    console.print(f"{len(predictions)} predictions are in {out}")


@app.command(
    cls=Command,
    epilog="Example: fastbert embed --model runs/demo --input texts.txt --out texts.npy",
)
def embed(
    model: Annotated[str, _MODEL],
    source: Annotated[Path, _INPUT],
    out: Annotated[
        Path,
        typer.Option(
            help="The .npy to write, (texts, width) float32; - prints. A directory is for shards: "
            "inputs of any size, resumed after a kill, on all of torchrun's processes."
        ),
    ],
    pooling: Annotated[str, typer.Option(help="mean of all tokens, or cls.")] = "mean",
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
        int | None, typer.Option(help="Rows of a shard, by default 65536.", min=1)
    ] = None,
    format: Annotated[str | None, typer.Option(help="Of shards: npy (default), parquet.")] = None,
) -> None:
    """Write an embedding for each text of a file: a line of a .txt, or a row of a table."""
    options: dict[str, Any] = {
        "text_column": text_of(text_column, "--text-column"),
        "pooling": pooling,
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
    from fastbert.finetune import predict as inference

    if shard_size is not None or format is not None:
        raise InputError(
            f"--out {out}: a file has no shards; name a directory, or leave out "
            "--shard-size and --format"
        )
    inference.require_npy(out)
    _open_output(out, source, model)
    embeddings = inference.embed(model, source, **options)
    inference.write_npy(out, embeddings)
    console.print(f"embeddings {embeddings.shape} are in {out}")


def _open_output(out: Path, source: Path, model: str) -> None:
    """Refuses an output that cannot be written or is an input, before there is work to lose."""
    files.require_output(out, source, model)
    if files.is_stream(out):  # which is for the rows alone
        leave_standard_output()


@app.command(
    "fill-mask",
    cls=Command,
    epilog='Example: fastbert fill-mask --model runs/demo "a [MASK] of text"',
)
def fill_mask(
    text: Annotated[str, typer.Argument(help="Text with one or more [MASK]; - reads it.")],
    model: Annotated[str, _MODEL],
    top: Annotated[int, typer.Option(help="How many words to show.", min=1)] = 5,
) -> None:
    """Show the likeliest words for each [MASK] of a text, with their probabilities."""
    from rich.console import Console
    from rich.table import Table

    from fastbert.data.tables import read_text
    from fastbert.predict import fill_mask as predictions

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
    precision: Annotated[str, typer.Option(help="Of weights and products: fp32, fp16.")] = "fp32",
    head: Annotated[
        str | None,
        typer.Option(help="Class of the model, as BertForMaskedLM; by default config.json's."),
    ] = None,
    pooling: Annotated[
        str | None, typer.Option(help="mean or cls: the bare model, with sentence embeddings.")
    ] = None,
) -> None:
    """Write a model as a file for other runtimes, once its answers are found to be the model's."""
    from fastbert.export import command

    path, difference = command.export(
        model, out, to=to, precision=precision, head=head, pooling=pooling
    )
    console.print(
        f"{path} answers as the model does: the largest difference is {difference.found:.1e}, "
        f"of {difference.allowed:.1e} allowed"
    )


@app.command(cls=Command, epilog="Example: fastbert serve --model runs/demo --port 8080")
@options_of(ServeConfig)
def serve(**options: Any) -> None:
    """Serve a model over HTTP: embeddings, ranking, predictions, words for [MASK]."""
    config = ServeConfig(**options)
    from fastbert import serve as serving  # slow to import: torch, FastAPI

    serving.run(config)


@app.command(cls=Command, epilog="Example: fastbert info")
def info() -> None:
    """Show versions, devices, and which backend each operator takes and why."""
    from rich.console import Console
    from rich.table import Table

    from fastbert.about import backends, devices, versions

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


def main() -> None:
    """Runs the command line and ends the process.

    What the user gave wrong is one line on stderr and exit code 2; Ctrl-C is one line that says
    what is kept, and 130.
    """
    warnings.filterwarnings("default", category=UserWarning, module="fastbert")
    warnings.showwarning = _warn
    _warn_once.cache_clear()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what an encoding lacks is shown by its number
            stream.reconfigure(errors="backslashreplace")
    status: str | int | None = 0
    try:
        app()
    except SystemExit as end:  # of the library that reads the command line
        status = end.code
    except InputError as error:
        status = _say("error", by_option_names(str(error)), 2)
    except Stopped as error:
        status = _say("stopped", error, 130)
    except OSError as error:
        # files that the user named, or a disk that is full: never a fault of the program's logic
        where = error.filename or "standard output, or a temporary file"
        status = _say("error", f"{where}: {error.strerror or error}", 2)
    close_standard_streams()
    sys.exit(status)


def _say(kind: str, message: object, status: int = 0) -> int:
    with contextlib.suppress(OSError, ValueError):
        print(f"fastbert: {kind}: {' '.join(str(message).split())}", file=sys.stderr)
    return status


@functools.cache  # so that options which are read twice are warned of once
def _warn_once(message: str) -> None:
    _say("warning", message)


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    _warn_once(by_option_names(str(message)))


if __name__ == "__main__":
    main()
