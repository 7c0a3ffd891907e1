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
from subliminal_theory.model import Model
from subliminal_theory.source import Examples
from subliminal_theory.study import Computation, Job, Optimizer, stages, trained
from tests.study.small import close

RUNS, STEPS = 3, 4
LOGIT = jnp.arange(5)


def network(params: Any, inputs: Any) -> Any:
    return jnp.tanh(inputs @ params["in"]) @ params["out"]


def models(seed: int, scale: float = 1.0) -> Model:
    def draw(key: Any) -> Any:
        one, two = jax.random.split(key)
        return {"in": scale * jax.random.normal(one, (4, 6)), "out": scale * jax.random.normal(two, (6, 5))}

    return Model(network, jax.vmap(draw)(jax.random.split(jax.random.key(seed), RUNS)))


START, SOURCE = models(1), Examples(np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32), 8)
NOISY = START.with_params(jax.tree.map(jnp.add, START.params, models(3, 0.5).params))
JOB = Job(START, SOURCE, Optimizer(0.01), STEPS, models(2), Subset(LOGIT > 1))
JOBS = {
    "plain": JOB,
    "narrow": replace(JOB, channel=Subset(LOGIT > 2)),
    "noise on weights": replace(JOB, model=NOISY),
    "sgd": replace(JOB, optimizer=Optimizer(0.01, optax.sgd)),
    "squared error": replace(JOB, channel=Subset(LOGIT > 1, SquaredError())),
}


def run(jobs: Any, **how: bool) -> dict[str, Any]:
    """Training uses up what it is given."""
    copied = {name: job.model.with_params(jax.tree.map(jnp.copy, job.model.params)) for name, job in jobs.items()}
    own, keys = {n: replace(jobs[n], model=copied[n]) for n in jobs}, jax.random.split(jax.random.key(5), RUNS)
    found = trained(own, dict.fromkeys(jobs, (STEPS,)), keys, Computation(**how))
    return {name: result for name, _, result in found}


@pytest.mark.slow
def test_five_unlike_students_are_three_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels of two widths and noise on the weights are numbers; another rule or loss is another program.

    Each student is what it is alone, and what `distill` makes of each of its runs; no two are the same.
    """
    sizes, train = list[int](), stages._train

    def counted(params: Any, *arguments: Any, **how: Any) -> Any:
        sizes.append(jax.tree.leaves(params)[0].shape[1])
        return train(params, *arguments, **how)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "_train", counted)
        together = run(JOBS)
    assert together.keys() == JOBS.keys()
    assert sizes == [3, 1, 1]

    def alone(job: Job) -> Any:
        def one(model: Model, teacher: Model, key: Any) -> Any:
            rule = job.optimizer.transformation(STEPS)
            done = distill(model, teacher, job.channel, SOURCE, rule, STEPS, key=key)
            return done.model, done.losses

        return jax.jit(jax.vmap(one))(job.model, job.teacher, jax.random.split(jax.random.key(5), RUNS))

    single = run(JOBS, stacked=False)
    for name, job in JOBS.items():
        found = together[name].model, together[name].losses
        close(found, (single[name].model, single[name].losses), 2e-5)
        close(found, alone(job), 2e-5)
    kernels = [np.asarray(result.model.params["in"]) for result in together.values()]
    for number, one in enumerate(kernels):
        assert all(np.abs(one - other).max(axis=(1, 2)).min() > 1e-3 for other in kernels[:number])


@pytest.mark.slow
def test_observers_see_every_step_of_their_own_run() -> None:
    watched = replace(JOB, observe=jax.tree_util.Partial(lambda step: jnp.sum(step.gradient["in"])))
    narrow = replace(watched, channel=Subset(LOGIT > 2))
    found, single = run({"one": watched, "other": narrow}), run({"other": narrow}, stacked=False)
    assert found["one"].observed.shape == (RUNS, STEPS)
    close(found["other"].observed, single["other"].observed, 2e-5)
    assert (found["one"].observed != found["other"].observed).all()


@pytest.mark.slow
@pytest.mark.parametrize(("copies", "advice"), [(4, ""), (2.5, r"train 1 at once .--chunk 1"), (0.5, "smaller")])
def test_what_does_not_fit_says_what_would(copies: float, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters take memory four times while they train: themselves, their gradient, two moments of Adam."""
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(START.params))
    pages = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": int(copies * size) + 1}
    monkeypatch.setattr(stages, "os", SimpleNamespace(sysconf=pages.__getitem__))
    if advice:
        with pytest.raises(InputError, match=f"{RUNS} runs .* GiB.*{advice}"):
            run({"plain": JOB})
    else:
        assert run({"plain": JOB})["plain"].losses.shape == (RUNS, STEPS)
