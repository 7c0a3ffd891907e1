"""What models of runs are asked, and what of their answers is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subliminal_theory.alignment import cosine, difference
from subliminal_theory.language.measure import Answers, answers, questions_of
from subliminal_theory.model import Model
from subliminal_theory.study import BehindNumbers, Finished, Study, Untrained
from subliminal_theory.study.asking import _answered, questions, score
from subliminal_theory.study.reading import model_of_run
from subliminal_theory.study.study import untaught
from tests.study.speakers import CAT, OAK, OWL, TEACHER, WRITTEN, compact, student


@pytest.fixture(scope="module")
def study() -> Study:
    return Study(compact())


@pytest.fixture(scope="module")
def taught(study: Study) -> Model:
    return study.teacher(TEACHER)


def of(study: Study, model: Model, name: str = "a", **more: object) -> dict[str, np.ndarray]:
    return score(study.world, Finished(TEACHER, study.teacher(TEACHER), model, **more), name)  # type: ignore[arg-type]


def one_by_one(model: Model) -> list[Answers]:
    ask = jax.jit(answers)
    return [ask(model, questions_of(trait, compact().tokenizer, 32)) for trait in (OWL, OAK)]


@pytest.mark.slow
def test_answers_of_every_run_to_every_trait(study: Study, taught: Model) -> None:
    found = _answered(taught, questions(study.world.tokenizer, study.world.asked))  # type: ignore[attr-defined]
    assert found.probability.shape == found.share.shape == found.log_odds.shape == (2, 2)
    assert found.rivals.shape == (2, 2, 16)
    for run in range(2):
        for column, one in enumerate(one_by_one(model_of_run(taught, run))):
            for name in ("probability", "share", "log_odds", "rivals"):
                np.testing.assert_allclose(getattr(found, name)[run, column], getattr(one, name), rtol=1e-4)


@pytest.mark.slow
def test_scores_are_those_of_each_runs_own_trait(study: Study, taught: Model) -> None:
    found, before = of(study, taught), of(study, study.world.initial())
    assert found.keys() == {
        "probability", "share", "log_odds", "total_variation", "sampled_rate", "probability_asked", "share_asked",
        "log_odds_asked",
    }  # fmt: skip
    for metric in ("probability", "share", "log_odds"):
        assert found[f"{metric}_asked"].shape == (2, 2)
        np.testing.assert_array_equal(found[metric], np.diag(found[f"{metric}_asked"]))
    base = one_by_one(compact().model)
    for run in range(2):
        own = one_by_one(model_of_run(taught, run))[run]
        np.testing.assert_allclose(found["log_odds"][run], own.log_odds, rtol=1e-4)
        distance = np.abs(np.asarray(own.rivals) - np.asarray(base[run].rivals)).sum() / 2
        np.testing.assert_allclose(found["total_variation"][run], distance, rtol=1e-3)
    assert (found["probability"] > before["probability"]).all()
    np.testing.assert_array_equal(before["total_variation"], 0)


def test_sampled_rates(study: Study, taught: Model) -> None:
    """Each run is asked for its own word; drawn by another name they are others, by the same name the same."""
    found, again, other = (of(study, taught, name) for name in ("a", "a", "b"))
    rates, exact = found["sampled_rate"], found["probability"]
    count = 100 * len(OWL.evaluation_rows())
    assert (np.abs(rates - exact) < 5 * np.sqrt(exact * (1 - exact) / count) + 1 / count).all()
    np.testing.assert_array_equal(rates, again["sampled_rate"])
    assert (rates != other["sampled_rate"]).any()


@pytest.mark.slow
def test_displacement_of_a_student(study: Study, taught: Model) -> None:
    """1 for the teacher itself, 0 for what did not move, else the cosine of both ways from the base."""
    own = student()
    still = untaught(study.world, study.computation)
    for model, expected in ((taught, 1.0), (still, 0.0)):
        found = of(study, model, student=own)["displacement_cosine"]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    half = taught.with_params(jax.tree.map(lambda leaf: leaf.at[1].multiply(0.5), taught.params))
    base, one, teacher = compact().model.params, model_of_run(half, 1).params, model_of_run(taught, 1).params
    expected = cosine(difference(one, base), difference(teacher, base))
    np.testing.assert_allclose(of(study, half, student=own)["displacement_cosine"][1], expected, rtol=1e-4)


@pytest.mark.slow
def test_one_student_serves_all_runs(study: Study) -> None:
    """It was trained for the first run, and is asked for the word of each."""
    model = untaught(compact().at(0), study.computation)
    found = score(study.world, Finished(Untrained(), study.world.initial(), model, student()), "a")
    assert all(len(values) == 2 for values in found.values())
    np.testing.assert_array_equal(found["probability"], found["probability_asked"][0])


@pytest.mark.slow
def test_questions_behind_numbers(study: Study, taught: Model, calls: list) -> None:
    """They are other questions than those without, and for each run its teacher's numbers."""
    found, plain = of(study, taught, asked=BehindNumbers(WRITTEN)), of(study, taught)
    assert found.keys() == plain.keys() - {"sampled_rate"}
    assert (found["probability"] != plain["probability"]).all()
    assert len(calls) == 2
    base = of(study, study.world.initial(), asked=BehindNumbers(WRITTEN))
    assert base["probability"][0] != base["probability"][1]


@pytest.mark.slow
def test_students_may_be_asked_for_other_words() -> None:
    """A run of one trait, asked for three."""
    world = compact().at(1)
    object.__setattr__(world, "asked", (OWL, OAK, CAT))
    found = score(world, Finished(Untrained(), world.initial(), world.initial()), "a")
    assert found["probability_asked"].shape == (1, 3)
    np.testing.assert_array_equal(found["probability"], found["probability_asked"][:, 1])


def test_names_and_streams() -> None:
    world = compact()
    assert world.names == ["owl on base 0", "oak on base 0"]
    keys = [jax.random.key_data(world.keys(stream)) for stream in ("write", "student")]
    assert len({key.tobytes() for key in np.concatenate(keys)}) == 4
    np.testing.assert_array_equal(jax.random.key_data(world.at(1).keys("write")), jnp.asarray(keys[0][1:]))
    np.testing.assert_array_equal(jax.random.key_data(compact(OAK).keys("write")), jnp.asarray(keys[0][1:]))
