"""The registry of published numbers: what was claimed, by whom, and the setting that should give it."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from subliminal_theory.errors import InputError

from .app.registry import Entry, pick, read_registry
from .flags.digits import WHO, Setting

REGISTRY = Path(__file__).with_name("published.toml")
KNOWN = ("source", "who", "setting", "value", "interval", "n", "tolerance", "data", "seeds", "note")


@dataclass(frozen=True)
class Number:
    """One published accuracy. `interval` is the half-width of its 95% interval, nan if none was published.

    `n` is the published number of runs, `seeds` the most that ours is worth.
    """

    name: str
    source: str
    setting: Setting
    value: float
    tolerance: float
    who: str = "student"
    interval: float = math.nan
    n: int | None = None
    seeds: int | None = None
    note: str = ""


@functools.cache
def published(path: Path = REGISTRY) -> Mapping[str, Number]:
    """All numbers of a registry, by name.

    Raises:
        InputError: the file cannot be read, or an entry lacks its source or tolerance or has a setting that
            does not exist; names the entry.
    """
    entries, _ = read_registry(path, "number", "published number", ("source", "value", "tolerance"), KNOWN)
    return {name: _number(name, entry) for name, entry in entries.items()}


def select(names: list[str], path: Path = REGISTRY) -> list[Number]:
    """The numbers of these names, or all if there are none.

    Raises:
        InputError: a name is unknown; lists those that are.
    """
    return pick(published(path), names, "published number")


def _number(name: str, found: Entry) -> Number:
    where, entry, source = found
    if not entry["tolerance"] > 0:
        raise InputError(f"{where}: tolerance must be above 0, got {entry['tolerance']}")
    who = entry.get("who", "student")
    if who not in WHO:
        raise InputError(f"{where}: who {who!r} is unknown; there are {', '.join(WHO)}")
    changes = {"data": entry.get("data", "mnist"), **entry.get("setting", {})}
    axes = [field.name for field in dataclasses.fields(Setting)]
    for axis in changes:
        if axis not in axes:
            raise InputError(f"{where}: setting {axis!r} does not exist; there are {', '.join(axes)}")
    try:
        setting = Setting(**changes)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return Number(
        name=name,
        source=source,
        setting=setting,
        value=float(entry["value"]),
        tolerance=float(entry["tolerance"]),
        who=who,
        interval=float(entry.get("interval", math.nan)),
        n=entry.get("n"),
        seeds=entry.get("seeds"),
        note=entry.get("note", ""),
    )
