"""Registries: TOML files with entries that each name one of the file's sources."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from subliminal_theory.errors import InputError
from subliminal_theory.validation import read_toml, validated

T = TypeVar("T")


def read_registry(path: Path, table: str, kind: Any) -> dict[str, Any]:
    """The entries [table.NAME] of a registry by name, as instances of a dataclass with their sources filled in.

    All other top-level fields of the file, except [sources], are fields of every entry.

    Raises:
        InputError: the file cannot be read, or an entry is invalid or has an unlisted source; names the entry.
    """
    content = read_toml(path, dict[str, Any])
    sources, entries = content.pop("sources", {}), content.pop(table, {})
    found = {}
    for name, fields in entries.items():
        entry = validated({**content, **fields, "name": name}, kind, f"{path}: {name}")
        if entry.source not in sources:
            raise InputError(f"{path}: {name}: source {entry.source!r} is not listed under [sources]")
        found[name] = replace(entry, source=sources[entry.source])
    return found


def pick(entries: Mapping[str, T], ids: str, what: str) -> list[T]:
    """The entries whose names are in `ids`, separated by commas, or all entries if `ids` is empty.

    Raises:
        InputError: a name is unknown; lists the known names.
    """
    names = [name.strip() for name in ids.split(",") if name.strip()]
    for name in names:
        if name not in entries:
            raise InputError(f"unknown {what} {name!r}; there are {', '.join(entries)}")
    return [entries[name] for name in names or entries]
