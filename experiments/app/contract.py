"""What an experiment is: a frozen `Config`, its `PRESETS`, a `plan` in parts, and a `plot`.

A module beside this package that defines these four is found by the command line. The first line of its docstring
describes it in the list. One of its presets is called `smoke` and takes about a minute on two cores at most. Where
figures/ has more of it than one folder of its name with default settings, `FIGURES` maps folders to settings.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NoReturn, get_args

from subliminal_theory.errors import InputError
from subliminal_theory.runs import Row

# `experiments` in a clone; where the wheel is installed, a part of the library.
PACKAGE = __name__.removesuffix(".app.contract")
PROGRAM = ("python", "-m", "experiments") if PACKAGE == "experiments" else ("subliminal-theory",)


class Parser(argparse.ArgumentParser):
    """Command lines of one name in the list, refused as all bad input is.

    Raises:
        InputError: the command line is wrong.
    """

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__(prog=" ".join((*PROGRAM, name)), **settings)

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise InputError(f"{message}; see {self.prog} --help")


@dataclass(frozen=True)
class Part:
    """A piece of a run that is computed and stored as a whole, and its size in runs for the progress bar.

    It is computed under the default device that it is given, and those that follow if it takes several `devices`.
    """

    name: str
    size: int
    compute: Callable[[], Sequence[Row]]
    devices: int = 1


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str | int] | None = None,
    minimum: float | None = None,
    positive: bool = False,
    positional: bool = False,
    alias: str | None = None,
    recorded: bool = True,
    only: str = "",
) -> Any:
    """A field of a Config, with what the command line says of it and accepts for it.

    A positional one is a text that takes all words of the command line that belong to no flag, joined by commas.
    An alias is another name of the flag. What is not recorded decides no result: runs are resumed with any.
    `only` says why the setting is refused without a --checkpoint.
    """
    limits = {"choices": choices, "minimum": minimum, "positive": positive, "positional": positional, "only": only}
    return field(default=default, metadata={"help": help, **limits, "alias": alias, "recorded": recorded})


def derived(default: Any) -> Any:
    """A field of a Config that nobody sets: it follows from the others or from files that they name.

    It is recorded with them, so that a run is not resumed with other ones.
    """
    return field(default=default, metadata={"derived": True})


def add_options(parser: argparse.ArgumentParser, default: Any) -> None:
    """A flag for every setting of a Config, with what its field says of it and its value in `default`."""
    for setting in dataclasses.fields(default):
        if setting.metadata.get("derived"):
            continue
        value, choices = getattr(default, setting.name), setting.metadata.get("choices")
        names = f"{{{' | '.join(map(str, choices))}}} " if choices else ""
        if setting.metadata.get("positional"):
            parser.add_argument(
                setting.name, nargs="*", metavar=setting.name.upper(), help=setting.metadata["help"]
            )
            continue
        kinds = [kind for kind in (get_args(setting.type) or (setting.type,)) if kind is not type(None)]
        shown = json.dumps(value) if value is not None else "automatic"
        flag, alias = "--" + setting.name.replace("_", "-"), setting.metadata.get("alias")
        if kinds == [bool]:
            told = f"{setting.metadata['help']} (default {shown})"
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=told)
            continue
        parser.add_argument(
            *((flag, alias) if alias else (flag,)),
            type=kinds[0],
            metavar=getattr(kinds[0], "__name__", "value"),
            help=f"{names}{setting.metadata['help']} (default {shown})".replace("%", "%%"),
        )


def configure(experiment: ModuleType, preset: str | None, changes: dict[str, Any]) -> Any:
    """The configuration of a preset with some settings changed.

    Raises:
        InputError: unknown preset, or a value outside its range.
    """
    if hasattr(experiment, "configure"):
        config = experiment.configure(preset, changes)
    else:
        config = dataclasses.replace(from_preset(experiment.PRESETS, preset), **changes)
    validate(config)
    return config


def from_preset(presets: Mapping[str, Any], name: str | None) -> Any:
    """One of the presets, the first if no name is given.

    Raises:
        InputError: unknown name.
    """
    if name is None:
        return next(iter(presets.values()))
    if name not in presets:
        raise InputError(f"unknown preset {name!r}; there are {', '.join(presets)}")
    return presets[name]


def validate(config: Any) -> None:
    """Check every setting against the range that its field states.

    Raises:
        InputError: names the flag, its value and its range.
    """
    for setting in dataclasses.fields(config):
        value, limits = getattr(config, setting.name), setting.metadata
        flag = "--" + setting.name.replace("_", "-")
        if limits.get("choices") and value is not None and value not in limits["choices"]:
            raise InputError(f"{flag} {value!r} is unknown; there are {', '.join(map(str, limits['choices']))}")
        if not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            raise InputError(f"{flag} must be finite, got {value}")
        if limits.get("minimum") is not None and value < limits["minimum"]:
            raise InputError(f"{flag} must be at least {limits['minimum']}, got {value}")
        if limits.get("positive") and value <= 0:
            raise InputError(f"{flag} must be above 0, got {value}")


def listed(text: str, flag: str, kind: type = int) -> list[Any]:
    """The entries of a setting that is a list, such as "1,2,5".

    Raises:
        InputError: an entry is no such number, is repeated, or there is none.
    """
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    if not entries:
        raise InputError(f"{flag} is empty: give it values such as 1,2,5")
    try:
        values = [kind(entry) for entry in entries]
    except ValueError as error:
        raise InputError(f"{flag} takes numbers separated by commas, got {text!r}") from error
    if len(set(values)) < len(values):
        raise InputError(f"{flag} repeats a value: {text!r}")
    return values
