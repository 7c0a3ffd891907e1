"""The registry of published numbers: what was claimed, by whom, and the setting that should give it."""

import dataclasses
import functools
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.setting import WHO, Setting
from subliminal_theory.errors import InputError

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
    try:
        registry = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"cannot read the registry {path}: {error}") from error
    entries, sources = registry.get("number", {}), registry.get("sources", {})
    return {name: _number(f"{path.name}: {name}", name, entry, sources) for name, entry in entries.items()}


def select(names: list[str], path: Path = REGISTRY) -> list[Number]:
    """The numbers of these names, or all if there are none.

    Raises:
        InputError: a name is unknown; lists those that are.
    """
    known = published(path)
    for name in names:
        if name not in known:
            raise InputError(f"unknown published number {name!r}; there are {', '.join(known)}")
    return [known[name] for name in names or known]


def _number(where: str, name: str, entry: Mapping[str, Any], sources: Mapping[str, str]) -> Number:
    for field in ("source", "value", "tolerance"):
        if field not in entry:
            raise InputError(f"{where} has no {field}: every published number needs one")
    for field in entry:
        if field not in KNOWN:
            raise InputError(f"{where}: unknown field {field!r}; there are {', '.join(KNOWN)}")
    if entry["source"] not in sources:
        raise InputError(f"{where}: source {entry['source']!r} is not listed under [sources]")
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
        source=sources[entry["source"]],
        setting=setting,
        value=float(entry["value"]),
        tolerance=float(entry["tolerance"]),
        who=who,
        interval=float(entry.get("interval", math.nan)),
        n=entry.get("n"),
        seeds=entry.get("seeds"),
        note=entry.get("note", ""),
    )
