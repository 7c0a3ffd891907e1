"""The registry of published numbers: each number, its source, and the setting that should give it."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from .app.registry import read_registry
from .flags.digits import Setting

REGISTRY = Path(__file__).with_name("published.toml")


@dataclass(frozen=True)
class Number:
    """One published accuracy. `interval` is the half-width of its 95% interval, or nan if none was published.

    `n` is the published number of runs. `seeds` limits the number of our runs, for settings that take long.
    """

    name: str
    source: str
    value: float
    tolerance: Annotated[float, Field(gt=0)]
    setting: Setting = field(default_factory=Setting)
    who: Literal["student", "teacher", "reference"] = "student"
    interval: float = math.nan
    n: int | None = None
    seeds: int | None = None
    note: str = ""


@functools.cache
def published(path: Path = REGISTRY) -> Mapping[str, Number]:
    """All numbers of a registry, by name.

    Raises:
        InputError: the file cannot be read, or an entry has no source or tolerance or has an unknown setting;
            names the entry.
    """
    return read_registry(path, "number", Number)
