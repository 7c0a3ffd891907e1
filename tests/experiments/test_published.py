import dataclasses
import math
import re
from pathlib import Path

import pytest

from experiments import reproduce
from experiments.app import command as command_line
from experiments.flags.digits import OF_TEACHER, Setting
from experiments.language_claims import Claim, registered
from experiments.published import Number, published
from subliminal_theory.errors import InputError
from subliminal_theory.estimate import Estimate

ENTRY = """
[sources]
somebody = "somebody, 2026"

[number.one]
source = "somebody"
value = 0.5
tolerance = 0.05
"""


def registry(folder: Path, text: str) -> Path:
    path = folder / "numbers.toml"
    path.write_text(text)
    return path


def test_at_least_forty_numbers_with_source_and_tolerance() -> None:
    numbers = published()
    assert len(numbers) >= 40
    for number in numbers.values():
        assert number.source
        assert 0 <= number.value <= 1
        assert 0 < number.tolerance <= 0.1


def test_the_curve_over_m_is_the_published_one() -> None:
    """As the field's table has it, for the released script."""
    curve = {1: 0.103, 2: 0.348, 3: 0.537, 5: 0.704, 10: 0.835, 20: 0.894, 50: 0.917}
    for m, value in curve.items():
        number = published()[f"released-m{m}"]
        assert (number.value, number.setting.shown or number.setting.aux) == (value, m)
        assert dataclasses.replace(number.setting, aux=3, shown=None) == Setting()


def test_one_entry(tmp_path: Path) -> None:
    number = published(registry(tmp_path, ENTRY + 'setting = { aux = 7, inputs = "digits" }\nn = 12\n'))["one"]
    assert number.setting == Setting(aux=7, inputs="digits")
    assert (number.source, number.value, number.tolerance, number.n) == ("somebody, 2026", 0.5, 0.05, 12)
    assert math.isnan(number.interval)


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        ('source = "somebody"\n', "", "one: source: is missing"),
        ("tolerance = 0.05\n", "", "one: tolerance: is missing"),
        ("value = 0.5\n", "", "one: value: is missing"),
        ("tolerance = 0.05", "tolerance = 0", "one: tolerance: "),
        ('"somebody"\nv', '"nobody"\nv', "one: source 'nobody' is not listed under [sources]"),
        ("value", "color = 1\nvalue", "one: color: is not a known field"),
        ("value", 'who = "me"\nvalue', "one: who: "),
        ("value", "setting = { breadth = 3 }\nvalue", "one: setting.breadth: is not a known field"),
        ("value", "setting = { depth = -3 }\nvalue", "one: setting: --depth must be at least 0, got -3"),
        ("[sources]", "[sources", "not TOML"),
    ],
)
def test_bad_entries(tmp_path: Path, old: str, new: str, cause: str) -> None:
    assert old in ENTRY
    path = registry(tmp_path, ENTRY.replace(old, new, 1))
    with pytest.raises(InputError, match=re.escape(f"{path}: {cause}")):
        published(path)


CLAIM = """
margin = 0.05
[sources]
paper = "P"
[claim.one]
claim = "it is so"
source = "paper"
expected = "lower"
variant = { rank = 2, start = "other" }
"""


def test_one_claim(tmp_path: Path) -> None:
    claim = registered(registry(tmp_path, CLAIM))["one"]
    assert claim == Claim("one", "it is so", "P", "lower", {"rank": 2, "start": "other"}, {}, 0.05)


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        *((f"{line}\n", "", f"{line.split()[0]}: is missing") for line in CLAIM.split("\n")[5:8]),
        ('"paper"', '"blog"', "source 'blog' is not listed under [sources]"),
        ('"lower"', '"maybe"', "expected: "),
        ("variant", 'color = "red"\nvariant', "color: is not a known field"),
        ("rank = 2", "order = 'upside down'", "variant: --order 'upside down' is unknown; there are as written, "),
        ("variant", "against = { start = 'mars' }\nvariant", "against: start must be one of own, other, "),
        ("rank", "speed", "variant: setting 'speed' does not exist; there are teacher, "),
        ("margin", "margins", "margins: is not a known field"),
    ],
)
def test_bad_claims(tmp_path: Path, old: str, new: str, cause: str) -> None:
    assert old in CLAIM
    path = registry(tmp_path, CLAIM.replace(old, new, 1))
    with pytest.raises(InputError, match=re.escape(f"{path}: one: {cause}")):
        registered(path)


def test_missing_registry(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        published(tmp_path / "none.toml")


def test_chosen() -> None:
    names = [number.name for number in reproduce.chosen(reproduce.Config(ids="jiang-mse, released-aux"))]
    assert names == ["jiang-mse", "released-aux"]
    assert len(reproduce.chosen(reproduce.Config())) == len(published())


def test_unknown_number_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["reproduce", "released-m4", "--out", str(tmp_path / "run")]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("error: unknown published number 'released-m4'; there are released-reference, ")
    assert errors.count("\n") == 1
    assert not (tmp_path / "run" / "results.csv").exists()


def test_without_ids_all_are_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["reproduce", "--seeds", "0", "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == "error: --seeds must be at least 1, got 0\n"
    assert len(reproduce.plan(reproduce.configure(None, {"seeds": 1}))) == len(
        {tuple(getattr(number.setting, name) for name in OF_TEACHER) for number in published().values()}
    )


def number(interval: float = math.nan) -> Number:
    return Number("n", "s", value=0.5, tolerance=0.05, interval=interval)


@pytest.mark.parametrize(
    ("mean", "half", "interval", "expected"),
    [
        (0.52, 0.02, math.nan, "reproduced"),
        (0.52, 0.03, 0.039, "reproduced"),  # hypot: 0.0492
        (0.52, 0.03, 0.041, "cannot be told"),  # hypot: 0.0508
        (0.52, 0.06, math.nan, "cannot be told"),
        (0.56, 0.02, math.nan, "cannot be told"),
        (0.58, 0.02, math.nan, "differs"),
        (0.42, 0.02, math.nan, "differs"),
        (0.58, 0.02, 0.03, "cannot be told"),
        (0.5, math.nan, math.nan, "cannot be told"),
    ],
)
def test_verdict(mean: float, half: float, interval: float, expected: str) -> None:
    assert reproduce.verdict(number(interval), Estimate(mean, half, 5)) == expected
