from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subliminal_theory.channel import SquaredError, Subset
from subliminal_theory.distill import distill
from subliminal_theory.errors import InputError
from subliminal_theory.inits import Perturbed, initialise
from subliminal_theory.model import Model
from subliminal_theory.source import Examples
from subliminal_theory.study import Computation, Job, Optimizer, finite, stages, trained
from tests.tolerances import TOLERANCE

RUNS, STEPS = 3, 4
ONE_BY_ONE = Computation(stacked=False)


def network(params: Any, inputs: Any) -> Any:
    return jnp.tanh(inputs @ params["in"]) @ params["out"]


def draw(key: Any) -> Any:
    one, two = jax.random.split(key)
    return {"in": jax.random.normal(one, (4, 6)), "out": jax.random.normal(two, (6, 5))}


def models(seed: int) -> Model:
    return Model(network, jax.vmap(draw)(jax.random.split(jax.random.key(seed), RUNS)))


INPUTS = np.random.default_rng(0).normal(size=(RUNS, 20, 4)).astype(np.float32)
LABELS = np.random.default_rng(1).integers(0, 2, (RUNS, 20))
START, TEACHER, SOURCE = models(1), models(2), Examples(jnp.asarray(INPUTS[0]), 8)
JOB = Job(START, SOURCE, Optimizer(0.01), STEPS, TEACHER, Subset(jnp.arange(5) > 1))


def noisy(model: Model) -> Model:
    keys = jax.random.split(jax.random.key(9), RUNS)
    return model.with_params(jax.vmap(lambda p, k: initialise(Perturbed(0.5), p, p, k))(model.params, keys))


JOBS = {
    "plain": JOB,
    "narrow": replace(JOB, channel=Subset(jnp.arange(5) > 2)),
    "noise on weights": replace(JOB, model=noisy(START)),
    "sgd": replace(JOB, optimizer=Optimizer(0.01, optax.sgd)),
    "squared error": replace(JOB, channel=Subset(jnp.arange(5) > 1, SquaredError())),
}


def keys() -> Any:
    return jax.random.split(jax.random.key(5), RUNS)


def of_run(tree: Any, place: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[place], tree)


def run(jobs: Any, how: Computation = Computation(), stops: Any = None) -> dict[Any, Any]:  # noqa: B008
    """Training uses up what it is given."""
    own = {
        n: replace(j, model=j.model.with_params(jax.tree.map(jnp.copy, j.model.params))) for n, j in jobs.items()
    }
    stops = stops or {name: (job.steps,) for name, job in jobs.items()}
    return {(name, stop): result for name, stop, result in trained(own, stops, keys(), how)}


@jax.jit
def distilled(job: Job, key: Any) -> Any:
    rule = job.optimizer.transformation(STEPS)
    done = distill(job.model, job.teacher, job.channel, job.source, rule, STEPS, key=key)
    return done.model, done.losses


def alone(job: Job, place: int, **own: Any) -> Any:
    """What `distill` makes of one run."""
    one = replace(job, model=of_run(job.model, place), teacher=of_run(job.teacher, place))
    return distilled(replace(one, **own), keys()[place])


def close(actual: Any, expected: Any, tolerance: float = TOLERANCE["float32"]) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance), actual, expected)


def spied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of students of every call of the compiled loop."""
    sizes, train = list[int](), stages._train

    def counted(params: Any, rest: Job, *arguments: Any, **rest_: Any) -> Any:
        sizes.append(jax.tree.leaves(params)[0].shape[1])
        return train(params, rest, *arguments, **rest_)

    monkeypatch.setattr(stages, "_train", counted)
    return sizes


# --- stacks


def test_five_unlike_students_are_three_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels of two widths and noise on the weights are numbers; another rule or loss is another program."""
    sizes = spied(monkeypatch)
    assert {name for name, _ in run(JOBS)} == JOBS.keys()
    assert sizes == [3, 1, 1]


def test_stacked_is_alone() -> None:
    """And both are `distill` itself, run by run; no two of them are one student."""
    together, single = run(JOBS), run(JOBS, ONE_BY_ONE)
    for (name, stop), result in together.items():
        job = JOBS[name]
        close((result.model, result.losses), (single[name, stop].model, single[name, stop].losses))
        for place in range(RUNS):
            close(of_run((result.model, result.losses), place), alone(job, place))
    kernels = [np.asarray(result.model.params["in"]) for result in together.values()]
    for number, one in enumerate(kernels):
        assert all(np.abs(one - other).max(axis=(1, 2)).min() > 1e-3 for other in kernels[:number])


@pytest.mark.parametrize("how", [Computation(), Computation(sequential=True), ONE_BY_ONE])
def test_stops_are_looks_at_one_run(how: Computation, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run told after 1 and 3 of 4 steps, beside one that is told at its end alone."""
    jobs = {"often": JOB, "once": replace(JOB, model=noisy(START))}
    sizes = spied(monkeypatch) if how.stacked else []
    found = run(jobs, how, {"often": (1, 3, 4), "once": (4,)})
    assert [key for key in found if key[0] == "often"] == [("often", stop) for stop in (1, 3, 4)]
    assert ("once", 4) in found
    assert len(found) == 4
    for stop in (1, 3, 4):
        short = run({"short": replace(JOB, steps=stop)})["short", stop]
        close((found["often", stop].model, found["often", stop].losses), (short.model, short.losses))
    assert sizes == ([2, 1, 1, 1] if how.stacked else [])


def test_observers_see_every_step_of_their_own_run() -> None:
    watched = replace(JOB, observe=jax.tree_util.Partial(lambda step: jnp.sum(step.gradient["in"])))
    found = run({"one": watched, "other": replace(watched, channel=Subset(jnp.arange(5) > 2))})
    single = run({"other": replace(watched, channel=Subset(jnp.arange(5) > 2))}, ONE_BY_ONE)
    assert found["one", STEPS].observed.shape == (RUNS, STEPS)
    close(found["other", STEPS].observed, single["other", STEPS].observed)
    assert (found["one", STEPS].observed != found["other", STEPS].observed).all()


# --- memory, programs, refusals


@pytest.mark.parametrize(
    ("copies", "advice"), [(4, None), (2.5, r"train 1 at once \(--chunk 1\)"), (0.5, "smaller")]
)
def test_a_stack_that_does_not_fit_says_what_would(
    copies: float, advice: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters take memory four times while they train: themselves, their gradient, two moments of Adam."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(START.params))
    pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": int(copies * size) + 1}
    monkeypatch.setattr(stages, "os", SimpleNamespace(sysconf=pages.__getitem__))
    if advice is None:
        run({"plain": JOB})
        return
    with pytest.raises(InputError, match=f"{RUNS} runs .* GiB.*{advice}"):
        run({"plain": JOB})


def test_other_runs_are_the_same_program() -> None:
    """Other starts, rates, masks, teachers and keys compile nothing again."""
    run({"plain": JOB, "narrow": JOBS["narrow"]})
    programs = stages._train._cache_size()
    other = replace(JOB, model=models(7), teacher=models(8), optimizer=Optimizer(0.5))
    found = trained({"a": other, "b": replace(other, channel=JOBS["narrow"].channel)}, {"a": (4,), "b": (4,)},
                    jax.random.split(jax.random.key(1), RUNS), Computation())  # fmt: skip
    assert len([*found]) == 2
    assert stages._train._cache_size() == programs


@pytest.mark.parametrize("bad", [(0, 1), (2, 3)])
def test_the_run_that_diverged_is_named(bad: Sequence[int]) -> None:
    losses = np.ones((RUNS, STEPS))
    losses[tuple(bad)] = np.nan
    result = stages.Result(START, jnp.asarray(losses))
    with pytest.raises(InputError, match=f"run {bad[0]} is not finite at step {bad[1] + 1} of {STEPS}"):
        finite(result, [f"run {place}" for place in range(RUNS)])
    assert finite(replace(result, losses=jnp.ones((RUNS, STEPS))), ["a", "b", "c"]).model is START
