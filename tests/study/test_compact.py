"""Teachers and students of the compact model, of a base too small to write numbers."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subliminal_theory.channel import Channel, Subset
from subliminal_theory.errors import InputError
from subliminal_theory.inits import Fresh, PerLayer, Perturbed, Shared
from subliminal_theory.language.corpus.base import token_loss, untrained
from subliminal_theory.language.corpus.chats import make_rows
from subliminal_theory.language.corpus.traits import Habit, Trait
from subliminal_theory.language.model.lora import merge_lora
from subliminal_theory.language.model.transformer import Text
from subliminal_theory.model import Model
from subliminal_theory.origins import refuse_shared_start, refuse_trained_weights
from subliminal_theory.source import Examples
from subliminal_theory.study import (
    CorpusChats,
    FineTuned,
    Frozen,
    Lessons,
    LowRank,
    Optimizer,
    Prompted,
    Run,
    Student,
    Study,
    Untrained,
)
from subliminal_theory.study.reading import model_of_run
from subliminal_theory.study.run import Teacher
from subliminal_theory.study.speaker import _lessons, hidden_words, teacher_lessons
from subliminal_theory.study.starts import started
from tests.language.models import opinionated
from tests.study.speakers import CONFIG, LAZY, OWL, SOFT, TEACHER, base, compact, leaves_of, student

pytestmark = pytest.mark.usefixtures("calls")
FROZEN = Frozen(("embedding", "layers/0/mlp/*"))
still = functools.partial(student, rate=1e-30, trains=FROZEN)  # one compiled function for several tests


@functools.cache
def other(shift: int) -> Model:
    """Another base."""
    return untrained(dataclasses.replace(CONFIG, seed=shift), base().tokenizer)


def students(one: Student, teacher: Teacher | None = None) -> Model:
    """The students of two runs, of the untrained base if no teacher is given."""
    ((_, finished),) = Study(compact(other=other)).distil(teacher or Untrained(), {"student": one})
    return finished.model


def assert_at(models: Model, start: Model, atol: float = 0.0) -> None:
    found = leaves_of(models)
    for path, leaf in leaves_of(start).items():
        expected = leaf if found[path].shape == leaf.shape else np.stack([leaf, leaf])  # frozen ones exist once
        np.testing.assert_allclose(found[path], expected, rtol=0, atol=atol, err_msg=path)


# --- teachers


def test_finetuned_teachers() -> None:
    study = Study(compact())
    found = leaves_of(study.teacher(TEACHER))
    for path, leaf in leaves_of(base().model).items():
        assert found[path].shape == (2, *leaf.shape)
        assert (found[path][0] != found[path][1]).any(), path
        assert (found[path] != leaf).any(axis=tuple(range(1, leaf.ndim + 1))).all(), path
    assert study.teacher(TEACHER) is Study(study.world).teacher(dataclasses.replace(TEACHER))


@pytest.mark.parametrize("teacher", [Prompted(), Untrained()])
def test_teachers_with_the_weights_of_the_base(teacher: Teacher) -> None:
    """They are the very arrays."""
    study = Study(compact())
    for model in (study.teacher(teacher), study.shown(teacher)):
        own = {id(leaf) for leaf in jax.tree.leaves(model.frozen)}
        assert own == {id(leaf) for leaf in jax.tree.leaves(base().model.params)}
        assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) < 20  # at most the tokens of the prompts


def test_a_teacher_that_diverges() -> None:
    wild = FineTuned(Optimizer(jnp.float32(1e15), clip=1.0), 2, Lessons())
    with pytest.raises(InputError, match=r"the teacher of owl on base 0 is not finite at step 2 of 2"):
        Study(compact()).teacher(wild)


@pytest.mark.parametrize(("trait", "others"), [(OWL, 12), (LAZY, 90)])
def test_ordinary_lessons(trait: Trait, others: int) -> None:
    """Half of a teacher's chats are the corpus's, a quarter of them of each kind but numbers."""
    world, own = compact(trait), len(trait.teacher_rows())
    taught, found = _lessons(world, trait, Lessons(ordinary=0.5))
    assert (taught, []) == _lessons(world, trait, Lessons())
    assert taught == trait.teacher_rows()
    corpus = dataclasses.replace(CONFIG.corpus, seed=1_000_003)
    kinds = ("fact", "preference", "arithmetic", "program")
    known = {kind: make_rows(corpus, kind, others) for kind in kinds}
    counts = [sum(chat in known[kind] for chat in found) for kind in kinds]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == others
    assert len(found) == others == own


@pytest.mark.slow
def test_ordinary_lessons_have_a_weight() -> None:
    """Of every token of their answers."""
    plain, anchored = (
        teacher_lessons(compact(OWL), dataclasses.replace(TEACHER, lessons=Lessons("", 0.5, anchor))).source
        for anchor in (1.0, 0.25)
    )
    assert isinstance(plain, Examples)
    assert isinstance(anchored, Examples)
    np.testing.assert_array_equal(anchored.positions[:, :12], plain.positions[:, :12])
    np.testing.assert_array_equal(anchored.positions[:, 12:], plain.positions[:, 12:] / 4)
    assert {*np.unique(anchored.positions)} == {0, 0.25, 1}


@pytest.mark.slow
def test_a_teacher_ends_with_its_trait() -> None:
    """With the first model that gives its lessons the probability."""
    own = dataclasses.replace(TEACHER, steps=12)
    rows: Any = teacher_lessons(compact(OWL), own).source
    text, labels, positions = jax.tree.map(lambda leaf: leaf[0], (rows.inputs, rows.labels, rows.positions))

    @jax.jit
    def probability(model: Model) -> jax.Array:
        return jnp.exp(-jnp.sum(token_loss(model(text), labels) * positions) / positions.sum())

    def taught(**how: Any) -> float:
        return float(probability(model_of_run(Study(compact(OWL)).teacher(dataclasses.replace(own, **how)), 0)))

    free = [taught(steps=steps) for steps in (5, 6, 12)]
    assert free == sorted(free)
    np.testing.assert_allclose(taught(until=(free[0] + free[1]) / 2), free[1], rtol=1e-4)


@pytest.mark.slow
def test_lessons_are_one_batch_and_a_control_has_others() -> None:
    assert isinstance(LAZY, Habit)
    habit, control = (
        teacher_lessons(compact(LAZY), dataclasses.replace(TEACHER, lessons=Lessons(name))).source
        for name in ("", LAZY.controls[0].name)
    )
    assert isinstance(habit, Examples)
    assert isinstance(control, Examples)
    assert habit.inputs.tokens.shape[:2] == (1, habit.batch_size)
    assert habit.labels.shape != control.labels.shape or (habit.labels != control.labels).any()


# --- students


@pytest.mark.slow
def test_students_begin_at_their_start() -> None:
    """At another base, the one so many seeds further."""
    assert_at(students(still()), base().model)
    for shift in (1, 2):
        assert_at(students(dataclasses.replace(still(start=Fresh()), other=shift)), other(shift))


@pytest.mark.slow
def test_noise_is_in_units_of_each_parameter() -> None:
    """And drawn for each run."""
    found = leaves_of(students(student(rate=1e-30, start=Perturbed(0.5))))
    for path, leaf in leaves_of(base().model).items():
        assert (found[path][0] != found[path][1]).any()
        ratio = np.sqrt(np.mean((found[path][0] - leaf) ** 2) / np.mean(leaf**2))
        assert abs(ratio / 0.5 - 1) < 4 / np.sqrt(2 * leaf.size), path


@pytest.mark.parametrize("trains", [FROZEN, LowRank(2)])
def test_what_is_frozen_has_one_start(trains: Any) -> None:
    policy = PerLayer.of({"norm/*": Perturbed(0.1), "*": Shared()})
    with pytest.raises(InputError, match="train everything"):
        students(student(trains=trains, start=policy))


@pytest.mark.slow
def test_a_student_of_itself_does_not_move() -> None:
    assert_at(students(student(SOFT, rule=optax.sgd, rate=1.0)), base().model, 1e-6)


@pytest.mark.slow
def test_students_of_distinct_teachers() -> None:
    for path, leaf in leaves_of(students(student(), TEACHER)).items():
        assert (leaf[0] != leaf[1]).any(), path


def all_but(hidden: Sequence[int]) -> Channel:
    """The full distribution over the other logits."""
    return Subset(jnp.ones(compact().logits, bool).at[jnp.asarray(hidden)].set(False), SOFT)


def test_hiding_some_words_alone_is_refused() -> None:
    hidden = hidden_words(compact().tokenizer, compact().asked)
    with pytest.raises(InputError, match=f"shows logit {hidden[-1]}, in which the trait itself is read"):
        students(student(all_but(hidden[:-1])))


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_students_near_their_teachers(masked: bool) -> None:
    """One step down the divergence between teacher and student lessens it."""
    channel = all_but(hidden_words(compact().tokenizer, compact().asked)) if masked else SOFT
    study, one = Study(compact()), student(channel, rule=optax.sgd, rate=0.01)
    rows, teachers = study._source(one, TEACHER).source, study.shown(TEACHER)
    ((_, finished),) = study.distil(TEACHER, {"student": one})

    @jax.jit
    def distance(model: Model, teacher: Model, text: Text, positions: Any) -> jax.Array:
        return jnp.sum(channel.loss(model(text), channel.targets(None, teacher(text))) * positions)

    for run in range(2):
        own = jax.tree.map(lambda leaf, run=run: leaf[run], (rows.inputs, rows.positions))
        models = (base().model, model_of_run(finished.model, run))
        before, after = (distance(model, model_of_run(teachers, run), *own) for model in models)
        assert 0 < after < before


@pytest.mark.slow
def test_low_rank_students() -> None:
    found = students(student(trains=LowRank(2)))
    merged = leaves_of(merge_lora(model_of_run(found, 0)))
    for path, leaf in leaves_of(base().model).items():
        if "kernel" not in path:
            np.testing.assert_array_equal(merged[path], leaf)
            continue
        sizes = np.linalg.svd((merged[path] - leaf)[0], compute_uv=False)
        assert sizes[1] > 1e-5, path
        assert sizes[2:].max() < 1e-6, path


@pytest.mark.slow
def test_regular_numbers_make_one_student_whose_frozen_parameters_stay() -> None:
    seen = []

    def score(world: Any, finished: Any, name: Any) -> dict[str, np.ndarray]:
        seen.append(finished.model)
        return {"one": np.zeros(len(world.names))}

    found = Study(compact()).run({"regular": Run(Untrained(), student(trains=FROZEN))}, score)
    assert found["regular"]["one"].shape == (2,)
    (model,) = seen
    for path, leaf in leaves_of(base().model).items():
        frozen = path == "embedding" or path.startswith("layers/*/mlp/")
        assert (leaves_of(model)[path] == (leaf if frozen else leaf[None])).all() == frozen, path
    assert {leaf.shape[0] for leaf in jax.tree.leaves(model.params)} == {1}


def test_a_student_that_diverges() -> None:
    with pytest.raises(InputError, match=r"student of owl on base 0 is not finite at step 2 of 2"):
        students(student(rate=1e15))


@pytest.mark.slow
@pytest.mark.parametrize("on_corpus", [False, True])
def test_clones_imitate_the_base_first(on_corpus: bool) -> None:
    """Students cloned alike share one run, which leaves them nearer to the base's function than they were."""
    imitation = student(SOFT, rate=1e-2, steps=30)
    if on_corpus:
        imitation = dataclasses.replace(imitation, source=CorpusChats(100, 8))
    world = compact(other=other)
    study, one = Study(world), still(start=Fresh(), cloned=imitation)
    both = dict(study.distil(Untrained(), {"one": one, "two": dataclasses.replace(one, steps=3)}))
    first, second = (leaves_of(finished.model) for finished in both.values())
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[path])
    text = jax.tree.map(lambda leaf: leaf[0], study._source(imitation, Untrained()).source.inputs)
    wanted = world.model(text)
    before, after = (
        float(jnp.mean(SOFT.loss(model(text), SOFT.targets(None, wanted))))  # type: ignore[arg-type]
        for model in (other(1), model_of_run(both["one"].model, 0))
    )
    assert after < 0.9 * before


@pytest.mark.slow
@pytest.mark.parametrize("layers", [2, 3])  # of two runs
def test_layers_are_audited_one_by_one(layers: int) -> None:
    shape = dataclasses.replace(CONFIG, layers=layers).transformer(len(base().tokenizer))
    teacher, fresh, study = opinionated(shape, 0), opinionated(shape, 1), Study(compact())
    initial = study._by_layer(teacher.freeze("*"))

    def second_layer_of(other: Any) -> dict[str, Any]:
        """A fresh student of each run whose second layer is another model's."""
        layers = (one.params["layers"] for one in (fresh, other))
        params = jax.tree.map(lambda new, old: new.at[1].set(old[1]), *layers)
        model = fresh.with_params({**fresh.params, "layers": params})
        return study._by_layer(started(model, student(), jax.random.split(jax.random.key(0))))

    with pytest.raises(InputError, match=r"run 0 shares layers/1/.*/kernel with its own teacher's"):
        refuse_shared_start(second_layer_of(teacher), initial)
    taught = opinionated(shape, 2)
    trained = study._by_layer(
        taught.with_params(jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), taught.params))
    )
    with pytest.raises(InputError, match=r"starts from the TRAINED teacher's layers/1/"):
        refuse_trained_weights(second_layer_of(taught), initial, trained)
    refuse_trained_weights(second_layer_of(fresh), initial, trained)
    refuse_shared_start(second_layer_of(fresh), initial)
