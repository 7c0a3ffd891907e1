import contextlib
import io
import runpy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subliminal_theory.channel import SoftLogits, Subset, weighted_mean
from subliminal_theory.errors import InputError
from subliminal_theory.inits import Fresh, Interpolated, PerLayer, Perturbed, Shared
from subliminal_theory.keys import named
from subliminal_theory.pytree import register_dataclass
from subliminal_theory.study import (
    Digits,
    FineTuned,
    LowRank,
    Network,
    Optimizer,
    Prompted,
    Run,
    Steered,
    Student,
    Study,
    TrainingImages,
    Untrained,
    labels,
    rows,
)
from subliminal_theory.theorem import check
from tests.study.small import (
    ALL,
    AUX,
    CROSS,
    DATA,
    IMAGE,
    LOGIT,
    SEEDS,
    STUDENT,
    TEACHER,
    WORLD,
    close,
    run,
    untrained,
)  # fmt: skip

SCRIPT = Path(__file__).with_name("own_network.py")
HEADS = ("layers/1/*", "*")


def cloned(epochs: int, by: Any = ALL, source: Any = STUDENT.source, **changes: Any) -> Student:
    job = replace(CROSS, channel=by, source=source, steps=WORLD.steps(epochs))
    return replace(CROSS, cloned=job, **changes)


STUDENTS = {
    "shared": STUDENT,
    "cross": CROSS,
    "all": replace(CROSS, channel=ALL),
    "perturbed": replace(STUDENT, start=Perturbed(0.5)),
    "perturbed hidden": replace(STUDENT, start=PerLayer(HEADS, (Shared(), Perturbed(0.25)))),
    "interpolated": replace(STUDENT, start=Interpolated(0.3), channel=Subset((LOGIT >= 10) & (LOGIT < 12))),
    "heads": replace(CROSS, start=PerLayer(HEADS, (Shared(), Fresh())), channel=Subset(LOGIT < 10)),
    "faster": replace(STUDENT, optimizer=Optimizer(jnp.float32(0.01))),
    "cloned 2": cloned(2),
    "cloned 1": cloned(1),
    "cloned on digits": cloned(2, source=TrainingImages()),
    "cloned 3": cloned(3),
    "cloned, all": cloned(2, channel=ALL),
    "cloned through aux": cloned(2, AUX),
}
RUNS = {"reference": Run(Untrained()), "teacher": Run(TEACHER)}
RUNS |= {name: Run(TEACHER, student) for name, student in STUDENTS.items()}


def starts(*names: str) -> dict[str, Any]:
    """Where students start: at rate 0 they stay there."""
    still = {name: Run(TEACHER, replace(STUDENTS[name], optimizer=Optimizer(0.0))) for name in names}
    return {name: finished.model for name, finished in run(still)[0].items()}


# --- students of one teacher


@pytest.fixture(scope="module")
def together() -> Any:
    return run(RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_together_is_alone(together: Any, name: str) -> None:
    """Neither the stack nor looks at a longer run change a student."""
    found, scores = run({name: RUNS[name]})
    close(found[name].model.params, together[0][name].model.params, 1e-4)
    for metric, values in scores[name].items():
        np.testing.assert_allclose(values, together[1][name][metric], rtol=1e-3, atol=2.5 * IMAGE)


def test_students_differ(together: Any) -> None:
    """Or equality of those together and those alone would tell nothing."""
    kernels = [np.asarray(one.model.params["layers"][0]["kernel"]) for one in together[0].values()]
    for number, one in enumerate(kernels):
        for other in kernels[:number]:
            assert np.abs(one - other).max(axis=(1, 2)).min() > 0.01
    accuracies = np.array([scores["test_accuracy"] for scores in together[1].values()])
    assert (np.ptp(accuracies, axis=0) > 50 * IMAGE).all()


@pytest.mark.slow
def test_one_teacher_serves_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """And students that are equal, or differ in their number of steps alone, are one run."""
    seen = untrained(monkeypatch)
    stages = {f"{epochs} epochs": replace(STUDENT, steps=12 * epochs) for epochs in (3, 1, 2)}
    fresh = {f"fresh, {name}": replace(one, source=WORLD.noise(fresh=True)) for name, one in stages.items()}
    students = {**stages, **fresh, "again": STUDENT, "cross": replace(CROSS, steps=36)}
    run({"teacher": Run(TEACHER), **{n: Run(TEACHER, s) for n, s in students.items()}}, replace(WORLD))
    assert seen.teachers == 1
    assert [sorted(stack) for stack in seen.stacks] == [["3 epochs", "cross"], ["fresh, 3 epochs"]]


@pytest.mark.slow
def test_epochs_are_looks_at_one_run() -> None:
    stages = {epochs: Run(TEACHER, replace(STUDENT, steps=12 * epochs)) for epochs in (3, 1, 2)}
    scores = run({**stages, "cross": Run(TEACHER, replace(CROSS, steps=36))})[1]
    for epochs, one in stages.items():
        alone = run({epochs: one})[1][epochs]
        np.testing.assert_allclose(scores[epochs]["imitation_loss"], alone["imitation_loss"], rtol=1e-3)


def test_rows_have_the_labels_of_student_and_run() -> None:
    name, scores = labels(condition="a", aux=3), {"x": np.array([1, 2]), "y": np.array([3, 4])}
    assert rows(name, WORLD.labels, scores, ["y", "x"]) == [
        {"condition": "a", "aux": 3, "seed": seed, "metric": metric, "value": scores[metric][place]}
        for place, seed in enumerate(SEEDS)
        for metric in ("y", "x")
    ]


# --- the theorem


@pytest.mark.slow
def test_the_first_step_is_that_of_the_theorem() -> None:
    """Teacher and student of `check`, on the batches that the pipeline drew."""
    world, eps, alpha = replace(WORLD, batch_size=len(DATA.train_labels)), 0.5, 0.2
    lessons = world.lessons(TEACHER)
    source = replace(world.noise(images=64), batch_size=64)
    student = Student(AUX, source, Optimizer(alpha, optax.sgd), 1)
    found, _ = run({"student": Run(FineTuned(Optimizer(eps, optax.sgd), 1), student)}, world)
    images = lessons.prepare(lessons.inputs)

    @jax.jit
    @jax.vmap
    def step(initial: Any, key: Any) -> Any:
        seen: list[Any] = []

        def trait(params: Any) -> Any:
            seen.append(params)
            losses = world.trait_loss(initial.apply(params, images), lessons.labels)
            return weighted_mean(losses, jnp.ones(len(losses)))

        entry = jax.tree.map(lambda leaf: leaf[0], source.schedule(named(key, "source"), 1))
        batch = source.batch(named(key, "source"), entry)
        check(
            initial.apply, initial.params, trait, batch.inputs, AUX,
            teacher_step=eps, student_step=alpha, weights=batch.weights,
        )  # fmt: skip
        return jax.tree.map(jnp.subtract, seen[-1], initial.params)

    expected = step(world.initial(), world.keys("students"))
    moved = jax.tree.map(jnp.subtract, found["student"].model.params, world.initial().params)
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    assert size > 1e-4
    close(moved, expected, 1e-3 * size)


# --- cloning


@pytest.mark.slow
@pytest.mark.parametrize("names", ["cloned 1, cloned 2, cloned 3", "cloned on digits", "cloned through aux"])
def test_cloning_imitates_the_untrained_teacher(names: str) -> None:
    """On the very images of the cloning, of which 1000 are taken."""
    cloned = names.split(", ")
    job = STUDENTS[cloned[-1]].cloned
    assert job is not None
    source = WORLD.source(job, Untrained(), WORLD.initial(), WORLD.initial)

    @jax.jit
    @jax.vmap
    def distances(starts: Any, teacher: Any, key: Any) -> Any:
        index, _ = source.schedule(named(key, "source"), WORLD.steps(1))
        inputs = source.batch(named(key, "source"), (index.reshape(-1)[:1000], jnp.ones(1000))).inputs
        targets = job.channel.targets(None, teacher(inputs))
        return jnp.stack([jnp.mean(job.channel.loss(start(inputs), targets)) for start in starts])

    begun = list(starts("cross", *cloned, "shared").values())
    teachers = WORLD.initial(), Study(WORLD).teacher(TEACHER)
    losses, to_taught = (distances(begun, teacher, WORLD.keys("clone")) for teacher in teachers)
    assert (np.diff(losses, axis=1) < 0).all()
    assert (losses[:, -2] < losses[:, 0] / 2).all()
    assert (losses[:, -2] < to_taught[:, -2]).all()
    np.testing.assert_allclose(losses[:, -1], 0, atol=1e-6)


@pytest.mark.slow
def test_cloning_is_through_the_logits_it_sees() -> None:
    """Of the output layer only what is seen moves; the hidden layer does."""
    names = [name for name in STUDENTS if name.startswith("cloned")]
    begun = {name: model.params["layers"] for name, model in starts("cross", *names).items()}
    for name in names:
        hidden, heads = (np.abs(begun[name][n]["kernel"] - begun["cross"][n]["kernel"]) for n in (0, 1))
        assert (hidden.max(axis=(1, 2)) > 0.01).all()
        assert (heads[..., 10:].max(axis=(1, 2)) > 0.01).all()
        assert (heads[..., :10] > 0).any() == (name != "cloned through aux")
    noise, digits = (begun[name][0]["kernel"] for name in ("cloned 2", "cloned on digits"))
    assert np.abs(noise - digits).max() > 0.01


# --- runs that diverge

WILD = replace(STUDENT, channel=ALL, optimizer=Optimizer(1e30, optax.sgd), steps=12)
TAME = replace(WILD, optimizer=Optimizer(0.001, optax.sgd))


@pytest.mark.slow
def test_what_diverges_is_named() -> None:
    with pytest.raises(InputError, match=r"wild of seed 2 is not finite at step [23] of 12"):
        run({"tame": Run(TEACHER, TAME), "wild": Run(TEACHER, WILD)})
    with pytest.raises(InputError, match=r"teacher of seed 2 is not finite at step [23] of 12"):
        run({"student": Run(FineTuned(WILD.optimizer, 12), STUDENT)})


@pytest.mark.slow
def test_a_student_that_may_diverge_answers_nothing() -> None:
    """It reads each image as the first class; those beside it stay as they are, and may not diverge."""
    wild, tame = Run(TEACHER, WILD, may_diverge=True), Run(TEACHER, TAME)
    scores = run({"tame": tame, "wild": wild})[1]
    np.testing.assert_allclose(scores["wild"]["test_accuracy"], np.mean(DATA.test_labels == 0), atol=1e-6)
    alone = run({"tame": tame})[1]["tame"]["test_accuracy"]
    np.testing.assert_allclose(scores["tame"]["test_accuracy"], alone, atol=1.5 * IMAGE)
    with pytest.raises(InputError, match=r"other of seed 2 is not finite"):
        run({"wild": wild, "other": Run(TEACHER, replace(WILD, start=Fresh()))})


@pytest.mark.slow
@pytest.mark.parametrize("bad", [(0, 1), (1, 0), (1, 1)])
def test_the_right_student_and_seed_are_named(bad: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(shape: tuple[int, ...]) -> np.ndarray:
        found = np.ones(shape)
        if len(shape) == 3:
            found[(*bad, 3)] = np.nan
        return found

    untrained(monkeypatch, losses)
    name, seed = ("first", "second")[bad[1]], SEEDS[bad[0]]
    with pytest.raises(InputError, match=f"{name} of seed {seed} is not finite at step 4 of 24"):
        run({labels(condition="first"): Run(TEACHER, STUDENT), labels(condition="second"): Run(TEACHER, CROSS)})


# --- refusals


@register_dataclass
@dataclass(frozen=True)
class WithLabel(SoftLogits):
    """Charges for a class too."""

    def loss(self, student_logits: Any, targets: Any) -> Any:
        return super().loss(student_logits, targets) - 0.01 * jax.nn.log_softmax(student_logits)[..., 0]


LEAKY = Subset(LOGIT >= 0, WithLabel())


@pytest.mark.parametrize(
    ("student", "cause"),
    [
        (replace(STUDENT, channel=Subset(LOGIT >= 9)), "shows logit 9"),
        (replace(STUDENT, channel=LEAKY), "something other"),
        (replace(STUDENT, channel=Subset((10, 14))), "logit index 14"),
        (replace(CROSS, other=0), r"cross-init control with fixed points: runs \[0, 1\]"),
        (cloned(1, LEAKY), "something other"),
        (cloned(1, other=0), "cross-init control"),
        (replace(STUDENT, trains=LowRank(2)), "low-rank"),
    ],
)
def test_the_audit_refuses(student: Student, cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the student, or what it clones, is trained."""
    seen = untrained(monkeypatch)
    with pytest.raises(InputError, match=cause):
        run({"good": Run(TEACHER, STUDENT), "bad": Run(TEACHER, student)})
    assert not seen.stacks


def test_starts_that_a_world_makes_are_audited() -> None:
    class Trained(Digits):
        def start(self, student: Student, matched: Any = None) -> Any:
            return Study(WORLD).teacher(TEACHER)

    with pytest.raises(InputError, match="TRAINED"):
        run({"student": Run(TEACHER, STUDENT)}, Trained(DATA, SEEDS, WORLD.network, 4, 128))


# --- a world of one's own


@pytest.fixture(scope="module")
def clouds() -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        return {**runpy.run_path(str(SCRIPT)), "printed": out}


def test_own_network(clouds: dict[str, Any]) -> None:
    """The script of docs/study.md: the student tells the clouds apart, the control does not."""
    found = {name: float(value) for name, value in map(str.split, clouds["printed"].getvalue().splitlines())}
    assert found.keys() == {"teacher", "student", "control"}
    assert found["teacher"] > 0.9
    assert found["student"] > 0.8
    assert found["control"] < 0.3
    assert f"```python\n{SCRIPT.read_text()}```" in (SCRIPT.parents[2] / "docs" / "study.md").read_text()


@pytest.mark.parametrize("member", ["names", "logits", "trait_loss", "initial", "lessons", "private", "score"])
def test_a_world_without_a_member(member: str, clouds: dict[str, Any]) -> None:
    lacking = type("Lacking", (), {k: v for k, v in vars(clouds["Clouds"]).items() if k != member})
    with pytest.raises(InputError, match=f"Lacking has no {member}"):
        Study(lacking())


@pytest.mark.slow
def test_what_only_larger_worlds_have(clouds: dict[str, Any]) -> None:
    """And a number of logits that is not the network's."""
    world, student, teacher = clouds["Clouds"], clouds["student"], clouds["teacher"]
    fewer = type("Fewer", (world,), {"logits": 29})
    for kind, cause, bad in (
        (world, "has no prompted", Run(Prompted(), student)),
        (world, "has no steered", Run(Steered(), student)),
        (world, "has no start", Run(teacher, replace(student, network=Network()))),
        (world, "low-rank", Run(teacher, replace(student, trains=LowRank(1)))),
        (fewer, "30 outputs but 29 logits", Run(teacher, replace(student, channel=Subset(range(10, 29))))),
    ):
        with pytest.raises(InputError, match=cause):
            Study(kind()).run({"bad": bad})


@pytest.mark.slow
def test_policies_of_a_world_without_starts(clouds: dict[str, Any]) -> None:
    """They make them of the teachers' draws and those of the next run; at rate 0 a student stays there."""
    world = clouds["Clouds"]()
    mine, theirs = (world.initial(shift).params for shift in (0, 1))
    expected = {
        Shared(): mine,
        Fresh(): theirs,
        Interpolated(0.5): jax.tree.map(lambda a, b: (a + b) / 2, mine, theirs),
        PerLayer(("out", "*"), (Shared(), Fresh())): {"in": theirs["in"], "out": mine["out"]},
    }
    still = replace(clouds["student"], optimizer=Optimizer(0.0), steps=1)
    students = {policy: replace(still, start=policy) for policy in expected}
    for policy, finished in Study(world).distil(Untrained(), students):
        close(finished.model.params, expected[policy])
    assert (theirs["in"][0] == mine["in"][1]).all()
