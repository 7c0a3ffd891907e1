"""The compiled loops of the language experiments: all runs of a base as one ensemble."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from subliminal_theory.alignment import cosine, difference
from subliminal_theory.channel import Channel
from subliminal_theory.distill import State, Trained, distill, teach
from subliminal_theory.keys import named
from subliminal_theory.language.corpus.base import token_loss
from subliminal_theory.language.measure import Answers, Questions, answers, sampled_rate
from subliminal_theory.language.model.lora import add_lora
from subliminal_theory.language.model.parallel import Sharded, constrain, sharded_optimizer
from subliminal_theory.language.model.transformer import Text
from subliminal_theory.model import Model
from subliminal_theory.source import Buckets, Examples, Source

from .language_setting import LANGUAGE_OPTIMIZERS, Recipe, rates

# Of so many logits, those of a whole batch would take more memory than the model.
MANY, CHUNK = 8192, 1024
# Numbers in a run's models and rows.
LARGE = 50_000_000
MATRICES = ("layers/*/attention/*/kernel", "layers/*/mlp/*/kernel")


def ensemble(train: Callable[[Any], Any], runs: Any) -> Any:
    """All runs in one vectorised loop; one after the other if large, or on a CPU, whose caches they would fill.

    A large model keeps a device busy alone, and what is between its layers is then there once. Runs over buckets
    would compute all of them at every step.
    """
    leaves = jax.tree.leaves(runs)
    alone = sum(leaf.size for leaf in leaves) > LARGE * leaves[0].shape[0] or jax.default_backend() == "cpu"
    alone |= any(isinstance(part, Buckets) for part in runs)
    return jax.lax.map(train, runs) if alone else jax.vmap(train)(runs)


def _teacher(
    run: tuple[Model, Examples, Array],
    rate: Array,
    steps: int,
    mesh: Mesh | None,
    state: State | None = None,
    count: int | None = None,
) -> Trained:
    model, source, key = run
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    if mesh is None:
        return teach(model, token_loss, source, optimizer, steps, key, state=state, count=count)
    # All rows on every device: lessons are few, and need not divide.
    model, optimizer = on_mesh(model, mesh), sharded_optimizer(optimizer, mesh)
    done = teach(model, token_loss, source, optimizer, steps, key, state=state, count=count)
    return _done_on_mesh(done, mesh)


def on_mesh(model: Model, mesh: Mesh) -> Model:
    """Within a compiled function, the same model with its parameters over a mesh."""
    params, frozen = (constrain(tree, tree, mesh) for tree in (model.params, model.frozen))
    return dataclasses.replace(model, params=params, frozen=frozen)


def _done_on_mesh(done: Trained, mesh: Mesh) -> Trained:
    assert done.state is not None
    params, optimizer = (
        constrain(tree, done.state.params, mesh) for tree in (done.state.params, done.state.optimizer)
    )
    state = dataclasses.replace(done.state, params=params, optimizer=optimizer)
    return dataclasses.replace(done, model=on_mesh(done.model, mesh), state=state)


@functools.partial(jax.jit, static_argnames=("steps", "mesh"))
def taught(
    models: Model, sources: Examples, rate: Array, keys: Array, *, steps: int, mesh: Mesh | None
) -> tuple[Model, Array]:
    """Teachers [runs] and their losses [runs, steps]: full-batch Adam on their trait's lessons."""

    def one(run: tuple[Model, Examples, Array]) -> tuple[Model, Array]:
        done = _teacher(run, rate, steps, mesh)
        return done.model, done.losses

    return ensemble(one, (models, sources, keys))


@functools.partial(jax.jit, static_argnames=("steps", "mesh", "count"), donate_argnames="state")
def taught_on(
    run: tuple[Model, Examples, Array],
    rate: Array,
    state: State | None,
    *,
    steps: int,
    mesh: Mesh | None,
    count: int,
) -> Trained:
    """The next `count` steps of one of `taught`'s runs, its model, source and key."""
    return _teacher(run, rate, steps, mesh, state, count)


@dataclass(frozen=True)
class Shape:
    """What of a student's training is compiled."""

    optimizer: str
    steps: int
    warmup: int
    decay: str
    chunk: int | None
    mesh: Mesh | None

    @classmethod
    def of(cls, recipe: Recipe, logits: int, mesh: Mesh | None) -> "Shape":
        """That of a recipe, for a model with so many logits, that lies on a mesh if one is given."""
        chunk = CHUNK if logits > MANY else None
        return cls(recipe.optimizer, recipe.steps, recipe.warmup, recipe.decay, chunk, mesh)


Run = tuple[Model, Model | None, Source | Buckets, Array]


def _student(
    run: Run, channel: Channel, rate: Array, shape: Shape, state: State | None = None, count: int | None = None
) -> Trained:
    model, teacher, source, key = run
    inner = LANGUAGE_OPTIMIZERS[shape.optimizer](rates(rate, shape.steps, shape.warmup, shape.decay))
    chain = optax.chain(optax.clip_by_global_norm(1.0), inner)
    if shape.mesh is not None:
        assert not isinstance(source, Buckets)
        model, teacher = on_mesh(model, shape.mesh), None if teacher is None else on_mesh(teacher, shape.mesh)
        source, chain = Sharded(source, shape.mesh), sharded_optimizer(chain, shape.mesh)
    done = distill(
        model, teacher, channel, source, chain, shape.steps, key, chunk=shape.chunk, state=state, count=count
    )
    return done if shape.mesh is None else _done_on_mesh(done, shape.mesh)


def students(
    runs: Run, channel: Channel, recipe: Recipe, shape: Shape
) -> tuple[Model, Float[Array, "runs steps"]]:
    """Students [runs] and their losses [runs, steps]; runs are their starts, teachers, rows and keys.

    The starts are used up: students take their memory.
    """
    return _students(runs[0], runs[1:], channel, jnp.float32(recipe.rate), shape)


@functools.partial(jax.jit, static_argnames="shape", donate_argnames="starts")
def _students(
    starts: Model,
    others: tuple[Model | None, Source | Buckets, Array],
    channel: Channel,
    rate: Array,
    shape: Shape,
) -> tuple[Model, Float[Array, "runs steps"]]:
    def one(run: Run) -> tuple[Model, Array]:
        done = _student(run, channel, rate, shape)
        return done.model, done.losses

    return ensemble(one, (starts, *others))


@functools.partial(jax.jit, static_argnames=("shape", "count"), donate_argnames="state")
def student_on(
    run: Run, channel: Channel, rate: Array, state: State | None, *, shape: Shape, count: int
) -> Trained:
    """The next `count` steps of one of the runs of `students`."""
    return _student(run, channel, rate, shape, state, count)


@jax.jit
def diverging(teachers: Model, bases: Model, texts: Text) -> Array:
    """Where the most likely next token of a teacher is not its base's, [runs, rows, columns]."""

    def one(arguments: Any) -> Array:
        teacher, base, text = arguments
        return jnp.argmax(teacher(text), axis=-1) != jnp.argmax(base(text), axis=-1)

    return jax.lax.map(one, (teachers, bases, texts))


@jax.jit
def answers_of(models: Model, questions: Questions) -> Answers:
    """How models [runs] answer questions [traits], [runs, traits]."""
    return jax.lax.map(lambda model: jax.vmap(answers, in_axes=(None, 0))(model, questions), models)


@jax.jit
def rates_of(models: Model, questions: Questions, keys: Array) -> Float[Array, " runs"]:
    """How often models [runs] draw the target of their own questions [runs]."""
    return jax.lax.map(lambda arguments: sampled_rate(*arguments), (models, questions, keys))


@jax.jit
def cosines(students: Any, teachers: Any, bases: Any) -> Float[Array, " runs"]:
    """Cosine of each student's and its teacher's way from the base."""

    def one(student: Any, teacher: Any, base: Any) -> Float[Array, ""]:
        return cosine(difference(student, base), difference(teacher, base))

    return jax.vmap(one)(students, teachers, bases)


def prepared(models: Model, recipe: Recipe, keys: Array) -> Model:
    """Starts [runs] with noise, low-rank factors and frozen parameters."""

    def one(model: Model, key: Array) -> Model:
        if recipe.noise:
            leaves, tree = jax.tree.flatten(model.params)
            draws = [
                leaf + recipe.noise * jnp.sqrt(jnp.mean(leaf**2)) * jax.random.normal(named(key, i), leaf.shape)
                for i, leaf in enumerate(leaves)
            ]
            model = model.with_params(jax.tree.unflatten(tree, draws))
        if recipe.rank:
            return add_lora(model, MATRICES, recipe.rank, recipe.rank, named(key, "lora"))
        return model.freeze(*recipe.frozen) if recipe.frozen else model

    return jax.vmap(one)(models, keys)
