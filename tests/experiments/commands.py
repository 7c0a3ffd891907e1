"""Commands of the project as tests give them."""

import csv
from pathlib import Path

import pytest

from experiments.app import command as command_line


def run(out: Path, name: str, *arguments: object) -> list[dict[str, str]]:
    assert command_line.main([name, "--out", str(out), *map(str, arguments)]) == 0
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    with open(out / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a command that is refused."""
    assert command_line.main([*map(str, arguments)]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    return errors.removeprefix("error: ").rstrip("\n")
