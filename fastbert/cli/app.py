"""The typer application to which the commands' modules add their commands."""

from typing import Annotated

import typer

from fastbert._version import __version__
from fastbert.cli.options import SETTINGS

app = typer.Typer(
    name="fastbert",
    help="Pre-train, fine-tune and run BERT, fast.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=SETTINGS,
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"fastbert {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None: ...
