"""Makes command-line options from dataclasses, and formats their help."""

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import typer
from typer.core import TyperCommand

from fastbert.check import stopping
from fastbert.config.options import GROUPS, OUTPUT, dashed

Function = TypeVar("Function", bound=Callable[..., Any])

_WIDTH = 100  # the most characters in a line of the help
_NAMES = 30  # the most characters in the column of option names
_REPEATED = re.compile(r"<list\[(\w+)\]>")  # how typer shows an option that may be repeated


class Command(TyperCommand):
    """A command whose help shows options in groups; Ctrl-C raises `Stopped`."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                group = getattr(parameter, "rich_help_panel", None) or OUTPUT
                names = _REPEATED.sub(lambda kind: f"<{kind[1].lower()}>...", record[0])
                groups.setdefault(group, []).append((names.replace(" / ", "/"), record[1]))
        for name in sorted(groups, key=GROUPS.index):
            with formatter.section(name if len(groups) > 1 else "Options"):
                formatter.write_dl(groups[name], col_max=_NAMES)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        formatter.write(f"\n  {self.epilog}\n")  # on one line, so that it can be copied

    def invoke(self, ctx: Any) -> Any:
        with stopping(lambda: "nothing was written"):
            return super().invoke(ctx)


SETTINGS = {"max_content_width": _WIDTH}  # settings of click's context


def options_of(config: type) -> Callable[[Function], Function]:
    """A decorator that gives a command an option for each field of the dataclass `config`.

    Each field, made with `config.options.option`, has the name, type, default and help. The options
    replace the command's `**options`.
    """

    def decorate(command: Function) -> Function:
        hints = get_type_hints(config)
        parameters = []
        # the help shows what only this kind of run has before what its base class has too
        inherited = {name for base in config.__mro__[1:] for name in inspect.get_annotations(base)}
        for field in sorted(dataclasses.fields(config), key=lambda field: field.name in inherited):
            hint, default = hints[field.name], field.default
            if default is dataclasses.MISSING:  # a required option
                default = inspect.Parameter.empty
            if isinstance(default, tuple):  # typer represents repeated options as lists
                hint, default = list[get_args(hint)[0]], list(default)  # type: ignore[misc]
            # without a name, typer would add --no-NAME, which an option that is off does not need
            names = [f"--{dashed(field.name)}"] if default is False else []
            option = typer.Option(*names, **field.metadata["shown"])
            parameters.append(
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=default,
                    annotation=Annotated[hint, option],
                )
            )
        before = [
            parameter
            for parameter in inspect.signature(command).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        command.__signature__ = inspect.Signature(before + parameters)  # type: ignore[attr-defined]
        return command

    return decorate
