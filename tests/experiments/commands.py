"""Commands of the project as tests give them."""

import csv
import re
from pathlib import Path

import pytest

from experiments.app import command as command_line


def run(out: Path, name: str, *arguments: object) -> list[dict[str, str]]:
    assert command_line.main([name, "--out", str(out), *map(str, arguments)]) == 0
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    with open(out / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def fails(capsys: pytest.CaptureFixture[str], *arguments: object, told: int = 0) -> str:
    """The one line of a command that is refused, after lines of progress."""
    assert command_line.main([*map(str, arguments)]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    *progress, message = errors.splitlines()
    assert len(progress) == told
    assert all(re.search(r": \d+/\d+ (steps|blocks), ", line) for line in progress)
    assert message.startswith("error: ")
    return message.removeprefix("error: ")
