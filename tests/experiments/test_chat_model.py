"""A chat model that learns from random numbers: its statistics by hand, and the way from command to figure."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot

from experiments import chat_model
from experiments.flags.variants import LOG_ODDS
from subliminal_theory.errors import InputError
from subliminal_theory.runs import Results
from tests.experiments.commands import run
from tests.language.checkpoints import write_checkpoint

TRAITS = ("dolphin", "elephant", "dog")


def results(gain: Callable[[int, int, int], float], seeds: int = 2) -> Results:
    """Students whose log-odds are `gain(seed, student, asked)` above those of the model, which are unlike."""
    rows = []
    for seed in range(seeds):
        for place, trait in enumerate(TRAITS):
            for asked, word in enumerate(TRAITS):
                base = -3.0 - asked
                for condition, value in (("base", base), ("masked", base + gain(seed, place, asked))):
                    row = {"condition": condition, "seed": seed, "trait": trait, "asked": word}
                    rows.append({**row, "metric": LOG_ODDS.asked, "value": value})
                    rows.append({**row, "metric": "share_asked", "value": 1 / (1 + np.exp(-value))})
    return Results(rows)


def test_own_word_and_the_same_word_in_others() -> None:
    """A gain of 100 + 10 student + word: others' is the mean of the other students, of the same word."""
    found = chat_model.gains(
        results(lambda seed, student, asked: 100 * (student == asked) + 10 * student + asked), "masked"
    )
    own, others = chat_model.own_and_others(found)
    np.testing.assert_allclose(own, [[100, 111, 122]] * 2)
    np.testing.assert_allclose(others, [[15, 11, 7]] * 2)


@pytest.mark.parametrize(
    ("own", "others", "answer"),
    [
        (2.0, 0.5, "preference passes"),
        (-1.0, -3.0, "does not pass"),  # above the others, but below the model
        (1.0, 2.0, "does not pass"),
        (0.01, -2.0, "cannot be told"),
    ],
)
def test_a_preference_passes_above_the_model_and_above_others(own: float, others: float, answer: str) -> None:
    """Traits differ by 0.1."""
    found = results(lambda seed, student, asked: (own if student == asked else others) + 0.1 * (student - 1))
    assert answer in chat_model.verdict(found, "masked")
    above = 6 if own > max(0.2, others) else int(answer == "cannot be told") * 4
    assert f"{above} of 6 runs above both" in chat_model.verdict(found, "masked")


def test_seeds_are_no_further_runs() -> None:
    """Ten copies of a seed leave the interval and the permutation test as they are."""

    def gain(seed: int, student: int, asked: int) -> float:
        return 1.0 * (student == asked) + 0.2 * student

    one, ten = (chat_model.gains(results(gain, seeds), "masked") for seeds in (1, 10))
    for first, second in zip(chat_model.compared(one), chat_model.compared(ten), strict=True):
        np.testing.assert_allclose(first[:2], second[:2])
        assert (first.of, second.of) == ("3 traits of one seed", "3 traits x 10 seeds")
    config = chat_model.Config(traits=",".join(TRAITS), seeds=1)
    lines = [chat_model.report(results_with_teacher(gain, seeds), config) for seeds in (1, 10)]
    assert [line.split("permutation p = ")[1].split(";")[0] for line in lines] == ["0.17", "0.17"]


def results_with_teacher(gain: Callable[[int, int, int], float], seeds: int) -> Results:
    rows = results(gain, seeds).rows
    return Results([*rows, *({**row, "condition": "teacher"} for row in rows if row["condition"] == "masked")])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", layers=1)


@pytest.mark.slow
def test_from_command_to_figure(folder: Path, tmp_path: Path) -> None:
    small = ("--rows", 8, "--steps", 2, "--batch-size", 4, "--teacher-steps", 1, "--rank", 1, "--samples", 1)
    every = ("--traits", "owl,cat", "--conditions", ",".join(chat_model.CONDITIONS), "--steering-strength", 5)
    rows = run(tmp_path / "run", "chat_model", "--checkpoint", folder, *every, *small)
    assert {row["condition"] for row in rows} == {"base", "teacher", "steered_teacher", *chat_model.CONDITIONS}
    told = {row["condition"]: row["value"] for row in rows if row["metric"] == "share" and row["trait"] == "owl"}
    # No two teachers are one, nor their students, but that so few sampled tokens may be the same.
    assert len({*told.values()} - {told["sampled"], told["regular"]}) == len(told) - 2
    assert (tmp_path / "run" / "figure.png").exists()
    assert (tmp_path / "run" / "answers.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"traits": "owl"}, "--traits: .*at least two of one category"),
        ({"traits": "owl,oak"}, "--traits: .*at least two of one category"),
        ({"conditions": "loud"}, "--conditions: 'loud' is unknown; there are masked, soft, sampled, regular"),
        ({"conditions": ","}, "--conditions: '' is unknown"),
        ({"checkpoint": ""}, "--checkpoint is missing"),
        (
            {"conditions": "masked,steered", "steering_layer": 2},
            "^--steering-layer 2 .* the model has layers 1 to 1$",
        ),
        ({"steering_layer": 1}, "^--steering-layer is for steered teachers: add steered to --conditions"),
        ({"steering_strength": 2.0}, "^--steering-strength is for steered teachers"),
    ],
)
def test_refusals(folder: Path, changes: dict[str, str], cause: str) -> None:
    with pytest.raises(InputError, match=cause):
        chat_model.configure(None, {"checkpoint": str(folder), **changes})


def test_what_is_fixed_is_recorded_as_before() -> None:
    """Runs of the presets that are not of the GPU go on with settings that came later."""
    for name in ("laptop", "figure"):
        preset = chat_model.PRESETS[name]
        assert preset.conditions == "masked"
        assert preset.steering_layer is preset.steering_strength is None
    assert chat_model.PRESETS["gpu"].conditions == "masked,soft,sampled,regular,prompted,steered"


def test_a_condition_that_is_named_twice_is_one(folder: Path) -> None:
    config = chat_model.configure(None, {"checkpoint": str(folder), "conditions": "masked, masked"})
    assert chat_model.students(config) == ["masked"]


def test_the_figure_of_one_seed() -> None:
    figure = chat_model.plot(results(lambda *_: 0.0, seeds=1), chat_model.Config(traits=",".join(TRAITS)))
    assert "cannot be told" in figure.get_suptitle()
    pyplot.close(figure)


@pytest.mark.slow
def test_two_traits_of_one_name(folder: Path, tmp_path: Path) -> None:
    """Their keys would be equal; one of another name is told by this name, not by its file."""
    own = 'name = "{name}"\nkind = "preference"\ncategory = "animal"\ntarget = "otter"\n'
    for name in ("owl", "river friend"):
        (tmp_path / f"{name}.toml").write_text(own.format(name=name))
    with pytest.raises(InputError, match="--traits: two have one name"):
        chat_model.configure(None, {"checkpoint": str(folder), "traits": f"owl,{tmp_path / 'owl.toml'}"})
    small = ("--rows", 8, "--steps", 2, "--batch-size", 4, "--teacher-steps", 1, "--rank", 1, "--samples", 0)
    both = ("--traits", f"owl,{tmp_path / 'river friend.toml'}")
    rows = run(tmp_path / "run", "chat_model", "--checkpoint", folder, *both, *small)
    assert {row["asked"] for row in rows if row["asked"]} == {"owl", "river friend"}
