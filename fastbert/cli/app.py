"""The typer application to which the modules of commands add their commands."""

import typer

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
