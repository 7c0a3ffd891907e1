"""Checks of files that users write against the types that describe their content."""

import json
import reprlib
import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from subliminal_theory.errors import InputError

_STRICT = ConfigDict(extra="forbid", strict=True)


def _not_blank(text: str) -> str:
    if not text.strip():
        raise InputError("must not be blank")
    return text


Text = Annotated[str, AfterValidator(_not_blank)]
Texts = Annotated[tuple[Text, ...], Field(min_length=1)]


def read_toml(path: Path, kind: Any) -> Any:
    """Read a TOML file as a value of a type, such as a dataclass.

    The file is UTF-8, with or without a byte order mark.

    Raises:
        InputError: the file cannot be read or is not TOML, or `validated` refuses its content. The message starts
            with the path.
    """
    try:
        table = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: not TOML in UTF-8: {error}") from error
    return validated(table, kind, str(path))


def validated(table: Any, kind: Any, where: str) -> Any:
    """Convert a table to a value of a type. `where` names the table in messages.

    Raises:
        InputError: a field is missing, unknown or of the wrong type, or the type itself refuses it.
    """
    # JSON arrays become tuples. The list is needed because an adapter cannot configure a bare dataclass.
    text = json.dumps([table], default=lambda moment: {"date or time": str(moment)})
    try:
        return TypeAdapter(list[kind], config=_STRICT).validate_json(text)[0]
    except ValidationError as error:
        raise InputError(f"{where}: {first_fault(error, above=1)}") from error


def first_fault(error: ValidationError, above: int = 0) -> str:
    """The first fault, its place without the outermost `above` levels, and how many more faults there are."""
    fault, *more = error.errors()
    field = ".".join(map(str, fault["loc"][above:]))
    if fault["type"] == "missing":
        text = "is missing: add it"
    elif fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        text = "is not a known field: remove it"
    elif isinstance(cause := fault.get("ctx", {}).get("error"), InputError):
        text = str(cause)
    else:
        text = f"{fault['msg']}, got {reprlib.repr(fault['input'])}"
    return (f"{field}: " if field else "") + text + (f" (and {len(more)} more)" if more else "")
