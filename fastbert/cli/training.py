"""Commands that train a model: `pretrain`, `distill`, `finetune`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fastbert.check import InputError
from fastbert.cli.app import app
from fastbert.cli.options import Command, options_of
from fastbert.config.distill import DistillConfig
from fastbert.config.finetune import FinetuneConfig
from fastbert.config.pretrain import PretrainConfig


def _add(name: str, kind: type[PretrainConfig], about: str, example: str) -> None:
    """Adds the command `name`, which trains on a corpus with the options of `kind`."""

    @app.command(name, cls=Command, help=about, epilog=f"Example: fastbert {name} {example}")
    @options_of(kind)
    def command(
        context: typer.Context,
        paths: Annotated[
            list[Path] | None, typer.Argument(help="More texts, as in --corpus a.txt b.txt.")
        ] = None,
        *,
        out: Annotated[Path, typer.Option(help="Directory of the run.")] = Path("runs", name),
        resume: Annotated[
            bool, typer.Option("--resume", help="Continue a run that is in --out.")
        ] = False,
        profile: Annotated[
            bool, typer.Option("--profile", help="Write a profiler trace of a few steps.")
        ] = False,
        eager: Annotated[
            bool, typer.Option("--eager", help="On a GPU, run steps without CUDA graphs.")
        ] = False,
        parallel: Annotated[
            str,
            typer.Option(help="Under torchrun: ddp (all weights on each GPU) or fsdp (shards)."),
        ] = "ddp",
        **options: Any,
    ) -> None:
        from fastbert.train.distill.run import distill  # slow to import: torch
        from fastbert.train.pretrain import pretrain

        config = _config_of_run(kind, context, paths, out, resume, options)
        train: Callable[..., Any] = distill if isinstance(config, DistillConfig) else pretrain
        train(config, out, resume=resume, eager=eager, profile=profile, parallel=parallel)


_add(
    "pretrain",
    PretrainConfig,
    "Pre-train BERT on text. With masked LM and next-sentence prediction, or masked LM only.",
    "--corpus wiki/ --out runs/wiki --preset base",
)
_add(
    "distill",
    DistillConfig,
    "Train a smaller BERT on a teacher's predictions. On text, with DistilBERT's losses.",
    "--teacher runs/wiki --corpus wiki/ --out runs/small",
)


def _config_of_run(
    kind: type[PretrainConfig],
    context: typer.Context,
    paths: list[Path] | None,
    out: Path,
    resume: bool,
    options: dict[str, Any],
) -> PretrainConfig:
    """The options of a new run, or of the resumed run in `out` with the given changes.

    Raises InputError for a path without --corpus, or if a resumed run must not change an option.
    """
    from fastbert.train.run_directory import read_run

    options["corpus"] = (*options["corpus"], *(paths or ()))
    if paths and len(options["corpus"]) == len(paths):
        raise InputError(f"{paths[0]}: unexpected argument; name texts with --corpus")
    earlier = read_run(out, kind) if resume else None
    if earlier is None:
        return kind(**options)
    sources = {name: context.get_parameter_source(name) for name in options}
    given = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    return earlier.same_run(**{name: options[name] for name in given})


@app.command(
    cls=Command,
    epilog="Example: fastbert finetune --task classification --train train.csv --dev dev.csv "
    "--model runs/demo",
)
@options_of(FinetuneConfig)
def finetune(
    *,
    out: Annotated[Path, typer.Option(help="Directory of the run.")] = Path("runs/finetune"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run that is in --out.")
    ] = False,
    **options: Any,
) -> None:
    """Fine-tune BERT for a task on labelled examples. Keeps the best epoch."""
    config = FinetuneConfig(**options)
    from fastbert.finetune import train  # slow to import: torch

    train.finetune(config, out, overwrite=overwrite)
