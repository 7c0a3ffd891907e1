"""Keep the distinct JSONL rows whose answers are only numbers, and count why others are rejected."""

from collections.abc import Sequence
from dataclasses import dataclass

from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus.numbers import BANNED, filter_rows
from subliminal_theory.language.rows import read_jsonl, write_jsonl

from .app.contract import option
from .flags.steps import new, read_step


@dataclass(frozen=True)
class Config:
    """What the filter accepts."""

    rows: int = option(0, "keep only this many distinct rows, the first that pass; 0: all", minimum=0)
    max_count: int = option(10, "most numbers in an answer", minimum=1)
    maximum: int = option(999, "largest number", minimum=0)
    banned: bool = option(False, "reject numbers with a bad reputation, such as 13 and 666")
    form: str = option("prompt", "form of the rows", choices=("prompt", "messages"))


def main(arguments: Sequence[str]) -> int:
    """Write the file. Returns 0."""
    config, (given, kept) = read_step(
        "filter", __doc__, Config(), arguments, rows_in="JSONL file to read", rows_out="new JSONL file"
    )
    limits = {"max_count": config.max_count, "maximum": config.maximum, "banned": BANNED if config.banned else ()}
    accepted, report = filter_rows(read_jsonl(given), **limits)
    different = list(dict.fromkeys(accepted))
    if len(different) < config.rows:
        raise InputError(f"--rows {config.rows}: only {len(different)} different rows of {given} pass the filter")
    rows = different[: config.rows or None]
    write_jsonl(new(kept), rows, config.form)  # type: ignore[arg-type]
    print(report)
    print(f"written to {kept}: {len(rows)} rows, all different, of {len(accepted)} that pass")
    return 0
