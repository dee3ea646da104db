"""The options of commands: their help texts, groups, bounds and checks.

A run's options are the fields of a frozen dataclass, each made by `option`. The command line is
built from these fields, and `check_options` checks their values.
"""

import dataclasses
import functools
import math
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from fastbert.check import InputError

DATA, MODEL, OPTIMISATION, OUTPUT = "Data", "Model", "Optimisation", "Run and output"
SERVER, LIMITS = "Server", "Limits of a request"
GROUPS = (DATA, MODEL, SERVER, LIMITS, OPTIMISATION, OUTPUT)  # as the help shows them
POOLINGS = ("mean", "cls")  # how a text's hidden states become one vector

REQUIRED = dataclasses.MISSING  # in the place of an option's default

_LARGEST = 2**31 - 1  # the largest integer for an option without an upper bound


class Bounds(NamedTuple):
    """An interval of finite numbers; `said` describes it in messages; an open end is excluded."""

    said: str
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def hold(self, value: float) -> bool:
        """Whether the value is finite and inside the interval."""
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below and math.isfinite(value)


ANY = Bounds("a number")
SHARE = Bounds("between 0 and 1", 0, 1)
INSIDE = Bounds("above 0 and below 1", 0, 1, low_open=True, high_open=True)
BELOW_ONE = Bounds("at least 0 and below 1", 0, 1, high_open=True)
PART = Bounds("above 0 and at most 1", 0, 1, low_open=True)
POSITIVE = Bounds("above 0", 0, low_open=True)
SEED = Bounds("between 0 and 2^63 - 1", 0, 2**63 - 1)


def at_least(low: float) -> Bounds:
    return Bounds(f"at least {low}", low)


class Only(NamedTuple):
    """A condition: an option has an effect only if `other` has one of these values."""

    other: str
    values: tuple[Any, ...]


def option(
    default: Any,
    text: str,
    *,
    group: str = DATA,
    bounds: Bounds | None = None,
    choices: Iterable[str] = (),
    only: Only | None = None,
    hidden: bool = False,
) -> Any:
    """A dataclass field of a run's options.

    text: help of the command line; group: heading in the help, one of GROUPS; bounds: allowed
    numbers; choices: allowed texts; only: the condition for an effect; hidden: omits the option
    from the help
    """
    shown = {"help": text, "hidden": hidden, "rich_help_panel": group}
    checked = {"bounds": bounds, "choices": tuple(choices), "only": only}
    return dataclasses.field(default=default, metadata={"shown": shown, **checked})


of_model = functools.partial(option, group=MODEL)
of_training = functools.partial(option, group=OPTIMISATION)
of_output = functools.partial(option, group=OUTPUT)
of_server = functools.partial(option, group=SERVER)
of_limits = functools.partial(option, group=LIMITS)


def check_options(config: Any) -> None:
    """Raises InputError for a value that is not allowed, and warns of an option without effect.

    `text_of` decodes texts again that the system's encoding could not decode, as under LC_ALL=C.
    """
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"--{dashed(field.name)}"
        # model and teacher may be paths, for which the system needs the undecoded bytes
        if isinstance(value, str) and field.name not in ("model", "teacher"):
            value = text_of(value, name)
            object.__setattr__(config, field.name, value)
        bounds, only = field.metadata["bounds"], field.metadata["only"]
        if bounds is not None and value is not None:
            _check_number(name, value, bounds)
        choices = field.metadata["choices"]
        if choices and value is not None and value not in choices:
            raise InputError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        if only is not None and value != field.default:
            beside = getattr(config, only.other)
            if beside not in only.values and not field.metadata["shown"]["hidden"]:
                known = ", ".join(str(known) for known in only.values if known is not None)
                other = dashed(only.other)
                # only a path's last part, so that its absolute path does not repeat the message
                warnings.warn(
                    f"{name} {value} has no effect with --{other} {Path(str(beside)).name}"
                    f"{known and f', only with --{other} {known}'}",
                    stacklevel=4,
                )


def _check_number(name: str, value: Any, bounds: Bounds) -> None:
    if not bounds.hold(value):
        finite = " and finite" if value == math.inf else ""
        raise InputError(f"{name}: expected {bounds.said}{finite}, got {value}")
    if isinstance(value, int) and bounds.high == math.inf and value > _LARGEST:
        raise InputError(f"{name}: expected at most {_LARGEST}, got {value}")


def text_of(value: str, name: str) -> str:
    """An argument as UTF-8 text, even if the system's encoding could not decode its bytes.

    name: the argument, for the message. Raises InputError for bytes that are not UTF-8.
    """
    if not any("\udc80" <= character <= "\udcff" for character in value):
        return value
    try:
        return os.fsencode(value).decode("utf-8")
    except UnicodeError:
        raise InputError(f"{name}: not UTF-8: {value!r}") from None


def read_delimiter(given: str) -> str:
    """The character that --delimiter means; a tab may be \\t or "tab". InputError for others."""
    meant = {"\\t": "\t", "tab": "\t"}.get(given, given)
    if len(meant) != 1 or meant in '"\r\n':
        raise InputError(f"--delimiter: expected a character such as ';' or \\t, got {given!r}")
    return meant


def dashed(name: str) -> str:
    return name.replace("_", "-")
