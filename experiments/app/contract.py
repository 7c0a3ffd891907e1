"""The parts of an experiment: a frozen `Config`, its `PRESETS`, a `plan`, a `report`, a `headline` and a `plot`.

The command line finds every module with these parts in the folder above this package. The first line of the
module's docstring describes it in the list, and the rest says what was done, what the figure shows and what to
expect. `headline` answers the experiment's question from the results. `LABELS` may put conditions into words, and
`expected` may list published values, for the summary page. One preset is called `smoke` and takes at most about a
minute on two cores. An optional `FIGURES` maps folders of figures/ to settings; the default is one folder with the
experiment's name and default settings.
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

# `experiments` in a clone, `subliminal_theory.experiments` in an installed wheel.
PACKAGE = __name__.removesuffix(".app.contract")
PROGRAM = ("python", "-m", "experiments") if PACKAGE == "experiments" else ("subliminal-theory",)


class Parser(argparse.ArgumentParser):
    """The parser of one command. It raises InputError for a wrong command line, as for all bad input."""

    def __init__(self, name: str, **settings: Any) -> None:
        super().__init__(prog=" ".join((*PROGRAM, name)), **settings)

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            InputError: always.
        """
        raise InputError(f"{message}; see {self.prog} --help")


@dataclass(frozen=True)
class Part:
    """A piece of a run that is computed and stored as a whole. `size` is its number of runs, for the progress bar.

    `compute` uses JAX's default device. If the part needs several `devices`, it uses the devices that follow as
    well.
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
    """A field of a Config, with its help text and its accepted values.

    Args:
        default: the default value.
        help: the help text.
        choices: the accepted values.
        minimum: the least accepted number.
        positive: whether the number must be above 0.
        positional: whether the setting takes all words of the command line that belong to no flag. They are joined
            by commas.
        alias: a second name of the flag.
        recorded: whether the setting belongs to the run's configuration. A run may be resumed with other values of
            settings that are not recorded, because they do not change results.
        only: for settings of checkpoints, the reason why the setting is refused without a --checkpoint.
    """
    limits = {"choices": choices, "minimum": minimum, "positive": positive, "positional": positional, "only": only}
    return field(default=default, metadata={"help": help, **limits, "alias": alias, "recorded": recorded})


def derived(default: Any) -> Any:
    """A field of a Config that is computed from the other fields or from files that they name.

    It is recorded, so that a run cannot be resumed after these files have changed.
    """
    return field(default=default, metadata={"derived": True})


def add_options(parser: argparse.ArgumentParser, default: Any) -> None:
    """Add a flag for every setting of a Config, with its help text and its value in `default`."""
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
        InputError: the preset is unknown, or a value is out of range.
    """
    if hasattr(experiment, "configure"):
        config = experiment.configure(preset, changes)
    else:
        config = dataclasses.replace(from_preset(experiment.PRESETS, preset), **changes)
    validate(config)
    return config


def from_preset(presets: Mapping[str, Any], name: str | None) -> Any:
    """The preset of a name, or the first preset if no name is given.

    Raises:
        InputError: the name is unknown.
    """
    if name is None:
        return next(iter(presets.values()))
    if name not in presets:
        raise InputError(f"unknown preset {name!r}; there are {', '.join(presets)}")
    return presets[name]


def validate(config: Any) -> None:
    """Check every setting against the range of its field.

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
        InputError: there is no entry, or an entry is not such a number or is repeated.
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
