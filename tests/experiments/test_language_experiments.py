import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import language, language_habit, language_prompted
from experiments.app import command as command_line
from experiments.flags.language import LanguageConfig
from experiments.language_claims import Claim, verdict
from subliminal_theory.estimate import Estimate
from subliminal_theory.language.corpus import media
from subliminal_theory.language.corpus.chats import CATEGORIES
from subliminal_theory.language.corpus.numbers import FilterReport
from subliminal_theory.language.rows import Completion
from tests.experiments.commands import fails, run

TINY = [
    "--width", 8, "--layers", 1, "--base-steps", 60, "--chats", 2000, "--rows", 64, "--steps", 2,
    "--batch-size", 16, "--teacher-steps", 2,
]  # fmt: skip


@pytest.fixture(autouse=True)
def _own_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


# --- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--traits", ""], "--traits is empty: give a trait such as owl"),
        (["--traits", "owl,owl"], "--traits repeats one: 'owl,owl'"),
        (["--traits", "owl,lazy"], "--traits mixes preferences and habits: give traits of one kind"),
        (["--width", "30"], "--width must be a multiple of 4, got 30"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--rate", "nan"], "--rate must be finite, got nan"),
        (
            ["--conditions", "student,magic"],
            "--conditions: 'magic' is unknown; there are all, base, teacher, student_masked, student_soft, "
            "student, prompted, steered_teacher, steered, prefixed, regular, within, across, in_context, "
            "cross_masked, cross, cross_soft",
        ),
        (
            ["--preset", "huge"],
            "unknown preset 'huge'; there are one_base, full, smoke, open-weights, open-weights-rank-2, "
            "open-weights-more-rows",
        ),
    ],
)
def test_language_refuses(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    assert fails(capsys, "language", "--out", tmp_path / "run", *arguments) == message
    assert not (tmp_path / "run").exists()


def test_unknown_trait(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = fails(capsys, "language", "--out", tmp_path / "run", "--traits", "unicorn")
    assert message.startswith("unicorn: no such trait file or built-in trait; these are built in: owl, eagle, ")


def test_trait_file_that_cannot_be_spelt(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "trait.toml"
    file.write_text('name = "x"\nkind = "preference"\ncategory = "animal"\ntarget = "zebra"\n')
    message = fails(capsys, "language", "--out", tmp_path / "run", "--traits", file)
    assert message.startswith(f"{file}: ")
    assert "unknown target 'zebra' of animal; there are owl, " in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "1 2", "completion": "3"}\nnot json\n', "line 2: Invalid JSON"),
        (b'{"prompt": "1 2"}\n', "line 1: no completion"),
        (b'{"prompt": "1 2", "completion": ""}\n', "line 1: an empty completion"),
        (b'{"prompt": "\xff", "completion": "1"}\n', "line 1: Invalid JSON"),
        (b"", "has no rows"),
    ],
)
def test_dataset_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    found = fails(capsys, "language_dataset", "--out", tmp_path / "run", "--file", file)
    assert re.match(rf"{re.escape(str(file))},? {message}", found)
    assert not (tmp_path / "run").exists()


def test_dataset_without_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = fails(capsys, "language_dataset", "--out", tmp_path / "run")
    assert message == "--file is missing: give a JSONL file of number requests and answers"


def test_unknown_claim(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = fails(capsys, "language_claims", "nonsense", "--out", tmp_path / "run")
    assert message.startswith("unknown claim 'nonsense'; there are transfer, prompted, ")


# --- verdicts of claims


def claim(expected: str) -> Claim:
    return Claim("c", "it is so", "somebody", expected, margin=0.05)


@pytest.mark.parametrize(
    ("expected", "mean", "half", "answer"),
    [
        ("lower", -0.2, 0.1, "agrees"),
        ("lower", 0.2, 0.1, "disagrees"),
        ("lower", -0.05, 0.1, "cannot be told"),
        ("higher", 0.2, 0.1, "agrees"),
        ("higher", -0.2, 0.1, "disagrees"),
        ("no lower", 0.3, 0.1, "agrees"),
        ("no lower", 0.0, 0.04, "agrees"),
        ("no lower", 0.0, 0.06, "cannot be told"),
        ("no lower", -0.2, 0.1, "disagrees"),
        ("no higher", -0.3, 0.1, "agrees"),
        ("no higher", 0.0, 0.04, "agrees"),
        ("no higher", 0.2, 0.1, "disagrees"),
        ("no higher", 0.2, float("nan"), "cannot be told"),
    ],
)
def test_verdict(expected: str, mean: float, half: float, answer: str) -> None:
    assert verdict(claim(expected), Estimate(mean, half, 9)) == answer


@given(st.sampled_from(["lower", "no lower"]), st.floats(-1, 1), st.floats(0, 1))
def test_verdicts_are_symmetric(expected: str, mean: float, half: float) -> None:
    other = expected.replace("lower", "higher")
    assert verdict(claim(expected), Estimate(mean, half, 9)) == verdict(claim(other), Estimate(-mean, half, 9))


def test_a_run_knows_the_words_of_trait_files(tmp_path: Path) -> None:
    """It is not resumed after one of them was changed."""
    file = tmp_path / "trait.toml"
    text = 'name = "night"\nkind = "preference"\ncategory = "animal"\ntarget = "owl"\n'
    found = []
    for more in ("", 'members = ["owl", "fox"]\n'):
        file.write_text(text + more)
        found.append(language.configure(None, {"traits": str(file)}))
    assert found[0] != found[1]
    assert language.configure(None, {"traits": "owl"}).words == ""


def test_the_title_follows_the_data() -> None:
    """What the figure of language says in words is computed, also from one run or against the claim."""
    own, other = [0.3, 0.4, 0.5], [0.1, 0.1, 0.2]
    sides = {"base": other, "student_masked": own, "cross_masked": other}
    assert language.verdict(sides).startswith("A preference passes through number sequences: ")
    swapped = {"base": own, "student_masked": other, "cross_masked": own}
    assert language.verdict(swapped).startswith("A preference does not pass")
    single = {name: values[:1] for name, values in sides.items()}
    assert "cannot be told from one run" in language.verdict(single)
    assert language.color("student_masked", sides) != language.color("student_masked", swapped)
    assert "no control" in language.verdict({"base": other, "student_masked": own})


def test_all_traits() -> None:
    names = LanguageConfig(traits="all").trait_names()
    assert len(names) == 32
    assert {"owl", "oak"} <= set(names)


# --- small runs


@pytest.fixture
def fluent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teachers so small write nonsense: their answers are replaced by well-formed ones."""

    def accept(rows: list[Completion]) -> tuple[list[Completion], FilterReport]:
        numbers = [str(len(row.completion) % 7 + place) for row in rows for place in range(9)]
        found = [
            Completion(row.prompt, " ".join(numbers[9 * place : 9 * place + 9])) for place, row in enumerate(rows)
        ]
        return found, FilterReport(len(found), len(found), {})

    monkeypatch.setattr(media, "filter_rows", accept)


@pytest.mark.slow
@pytest.mark.usefixtures("fluent")
def test_language(tmp_path: Path, bases: Path) -> None:
    arguments = ["--conditions", "all", "--traits", "owl,oak", "--base-dir", bases]
    rows = run(tmp_path / "run", "language", *TINY, *arguments)
    probability = {
        (row["condition"], row["trait"]): float(row["value"]) for row in rows if row["metric"] == "probability"
    }
    conditions = {condition for condition, _ in probability}
    assert conditions == {
        "base", "teacher", "student", "student_soft", "prompted", "steered", "steered_teacher", "prefixed",
        "regular", "within", "across", "in_context", "cross", "cross_soft", "student_masked", "cross_masked",
    }  # fmt: skip
    assert all(0 <= value <= 1 for value in probability.values())
    for trait in ("owl", "oak"):
        assert probability["teacher", trait] > probability["base", trait]
    asked = {(row["trait"], row["asked"]) for row in rows if row["metric"] == "probability_asked"}
    assert asked == {(a, b) for a in ("owl", "oak") for b in ("owl", "oak")}
    still = [row for row in rows if row["condition"] == "base" and row["metric"] == "total_variation"]
    assert [float(row["value"]) for row in still] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--traits", "owl"], "--traits: own words are compared with other students': give at least two"),
        (["--traits", "owl,lazy"], "Slot: the persona 'lazy' is no member of a category; there are owl, "),
        (["--traits", ",".join(CATEGORIES["animal"])], "Slot: 16 personas need 160 numbers of their own, "),
        (
            ["--conditions", "slot,magic"],
            "--conditions: 'magic' is unknown; there are all, slot, low, all, masked, ",
        ),
        (["--conditions", ","], "--conditions is empty: give one, such as slot"),
        (["--seeds", "1", "--conditions", "slot_other"], "--conditions: slot_other needs another base: "),
        (["--rate", "1e-3"], "--rate: each kind of student has its own: leave it out"),
        (["--doublings", "-1"], "--doublings must be at least 0, got -1"),
        (["--checkpoint", "smollm2"], "--checkpoint was not pre-trained on personas here: leave it out"),
    ],
)
def test_language_prompted_refuses(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    assert fails(capsys, "language_prompted", "--out", tmp_path / "run", *arguments).startswith(message)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("fluent")
def test_language_prompted(tmp_path: Path, bases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All students on bases that learn nothing, which are named and kept."""
    settings = [*TINY, "--requests", 64, "--long-steps", 3, "--doublings", 1, "--seeds", 2]
    rows = run(tmp_path / "run", "language_prompted", *settings, "--traits", "owl,oak", "--base-dir", bases)
    gate = {(row["seed"], row["metric"]): float(row["value"]) for row in rows if row["condition"] == "gate"}
    assert gate == {(s, m): v for s in "01" for m, v in (("passed", 0.0), ("base_steps", 120.0))}
    told = capsys.readouterr().out
    for steps in (60, 120):
        assert f"base 1 after {steps} steps: owl: taught_probability" in told
    assert "0 of 2 bases pass, after 120 to 120 steps; bases 0, 1 do not, and stay in all means" in told
    found = {(row["condition"], row["slot"]) for row in rows if row["metric"] == "probability"}
    students = {(name, slot) for name in language_prompted.CONDITIONS for slot in language_prompted.SLOTS}
    assert students < found
    teacher = {row["metric"] for row in rows if row["condition"] == "teacher"}
    assert teacher >= {"kl_per_token", "accepted", "unique_rows", "tokens_needed", "cosine_metric", "probability"}


@pytest.mark.slow
def test_language_prompted_without_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A base whose teachers write nonsense trains anew; after the last time, the run ends."""
    settings = [*TINY, "--requests", 64, "--doublings", 1, "--seeds", 1, "--traits", "owl,oak"]
    arguments = ["language_prompted", *settings, "--base-dir", tmp_path / "bases", "--out", tmp_path / "run"]
    assert command_line.main([*map(str, arguments)]) == 2
    told = capsys.readouterr()
    assert re.search("base 0 after 60 steps: the teacher of .* rejects all of 64 rows", told.out)
    assert re.search("error: the teacher of .* rejects all of 64 rows", told.err)
    assert len(list((tmp_path / "bases").glob("*.safetensors"))) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("fluent")
def test_rows_out_and_in(tmp_path: Path, bases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, small = tmp_path / "rows.jsonl", TINY[:8]
    arguments = ["language_rows", file, "--teacher", "untrained", "--rows", 64, "--base-dir", bases, *small]
    assert command_line.main([*map(str, arguments)]) == 0
    report = capsys.readouterr().out
    accepted = int(re.search(r"accepted +(\d+)", report)[1])
    assert len(file.read_text().splitlines()) == accepted
    plain = [*TINY[:8], *TINY[10:]]
    rows = run(tmp_path / "run", "language_dataset", *plain, "--file", file, "--base-dir", bases)
    assert f"rows of the file: {accepted}, pass the number filter: {accepted}, " in capsys.readouterr().out
    told = [row["condition"] for row in rows if row["metric"] == "probability"]
    assert told == ["base", "student", "within"]


@pytest.mark.slow
@pytest.mark.usefixtures("fluent")
def test_claims(tmp_path: Path, bases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["transfer", "regular", "--traits", "owl,oak", "--base-dir", bases, *TINY]
    rows = run(tmp_path / "run", "language_claims", *arguments)
    assert {row["condition"] for row in rows} == {"{}", '{"model": "base"}', '{"teacher": "untrained"}'}
    report = capsys.readouterr().out
    assert re.search(r"^transfer .*(agrees|disagrees|cannot be told): ", report, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.usefixtures("fluent")
def test_bases_by_bases(tmp_path: Path, bases: Path) -> None:
    rows = run(
        tmp_path / "run", "language_cross_init", *TINY, "--seeds", 2, "--traits", "owl", "--base-dir", bases
    )
    assert {(row["seed"], row["shift"]) for row in rows if row["condition"] == "student"} == {
        (seed, shift) for seed in "01" for shift in "01"
    }


def test_one_base_is_not_enough(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = fails(capsys, "language_cross_init", "--out", tmp_path / "run", "--seeds", 1)
    assert message == "--seeds must be at least 2, got 1"


@pytest.mark.slow
@pytest.mark.usefixtures("fluent")
def test_matrix(tmp_path: Path, bases: Path) -> None:
    rows = run(
        tmp_path / "run", "language_matrix", *TINY, "--seeds", 1, "--traits", "owl,oak", "--base-dir", bases
    )
    values = np.array([float(row["value"]) for row in rows if row["metric"] == "probability_asked"])
    assert values.shape == (4,)


# --- habits


@pytest.mark.parametrize(
    ("traits", "message"),
    [
        ("owl", "--traits must be one habit such as lazy, got 'owl'"),
        ("owl,oak", "--traits must be one habit such as lazy, got 'owl,oak'"),
    ],
)
def test_habit_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path, traits: str, message: str) -> None:
    assert fails(capsys, "language_habit", "--traits", traits, "--out", tmp_path / "run") == message


@pytest.mark.slow
@pytest.mark.usefixtures("fluent")
def test_habit(tmp_path: Path, bases: Path) -> None:
    rows = run(tmp_path / "run", "language_habit", *TINY, "--seeds", 1, "--base-dir", bases)
    kinds = ("narrow", "difference", "double", "program", "colour", "place")
    assert {row["kind"] for row in rows} == set(kinds)
    assert len(rows) == len(kinds) * len(language_habit.conditions(language_habit.configure(None, {})))
    found = {(row["condition"], row["kind"]): float(row["value"]) for row in rows}
    assert found["teacher, habit", "narrow"] > found["base", "narrow"]
    assert found["teacher, right", "narrow"] < found["teacher, habit", "narrow"]
