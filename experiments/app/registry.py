"""Registries: TOML files of entries that each name one of the file's sources."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from subliminal_theory.errors import InputError

T = TypeVar("T")


class Entry(NamedTuple):
    """An entry as it stands in the file, where that is, and its source written out."""

    where: str
    fields: Mapping[str, Any]
    source: str


def read_registry(
    path: Path, table: str, what: str, required: Sequence[str], known: Sequence[str]
) -> tuple[dict[str, Entry], Mapping[str, Any]]:
    """The entries [table.NAME] of a registry, by name, and the whole file; `what` an entry is called in messages.

    Raises:
        InputError: the file cannot be read, or an entry lacks a field, has an unknown one or an unlisted source;
            names the entry.
    """
    try:
        registry = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"cannot read the registry {path}: {error}") from error
    sources, found = registry.get("sources", {}), {}
    for name, fields in registry.get(table, {}).items():
        where = f"{path.name}: {name}"
        for field in required:
            if field not in fields:
                raise InputError(f"{where} has no {field}: every {what} needs one")
        for field in fields:
            if field not in known:
                raise InputError(f"{where}: unknown field {field!r}; there are {', '.join(known)}")
        if fields["source"] not in sources:
            raise InputError(f"{where}: source {fields['source']!r} is not listed under [sources]")
        found[name] = Entry(where, fields, sources[fields["source"]])
    return found, registry


def pick(entries: Mapping[str, T], names: Sequence[str], what: str) -> list[T]:
    """The entries of these names, or all if there are none.

    Raises:
        InputError: a name is unknown; lists those that are known.
    """
    for name in names:
        if name not in entries:
            raise InputError(f"unknown {what} {name!r}; there are {', '.join(entries)}")
    return [entries[name] for name in names or entries]
