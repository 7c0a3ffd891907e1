"""`World`: what a study needs from a model and its trait. Digits, compact models and checkpoints implement it."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from subliminal_theory.errors import InputError
from subliminal_theory.inits import Shared, initialise
from subliminal_theory.keys import named
from subliminal_theory.model import Model
from subliminal_theory.study.run import Embeddings, FineTuned, Frozen, LowRank, Student, Teacher, identity

T = TypeVar("T")


@dataclass(frozen=True)
class Finished:
    """A model of runs that is ready to be scored: a student, or the teacher itself if there is no student.

    `losses` [runs, steps] are the student's. `taught` is the teacher's model of runs. `asked` is the run's own way
    of scoring.
    """

    teacher: Teacher
    taught: Model
    model: Model
    student: Student | None = None
    losses: Float[Array, "runs steps"] | None = None
    asked: Any = None


class World(Protocol):
    """A model, a trait and a way to measure the trait, for several runs at once.

    Attributes:
        names: the name of each run in messages.
        logits: the number of logits of the model.
        trait_loss: `trait_loss(logits, labels)`, one value per position; equal in equal worlds.

    Every world must have these attributes and the methods below. A world may also have the following members. The
    brackets give the default for a world without the member.

        computation: how runs are computed [`Computation()`].
        keys(stream): the random stream of each run with this name [from the keys 0, 1, 2, ...].
        stream(student, cloning): the name of the random stream of a student's training or, if `cloning`, of its
            cloning beforehand [one for all students, and one for all cloning].
        start(student, matched): where students start, a model of runs. `matched` is a model that already imitates
            the untrained teacher, or None [`by_policy`].
        source(student, teacher, taught, shown): the student's inputs, a source without labels or a `PerRun`. It
            has targets if the teacher's logits are not needed. `taught` is the teacher's model of runs; `shown()`
            gives it as students see it [the student's own `source`].
        prompted(): teachers with a system prompt [none].
        steered(teacher): steered teachers [none].
        opened(name): the model of a teacher that was trained elsewhere, without an axis of runs [none].
        at(run): the world of one run [none].
        parts(): worlds of some of the runs, to be computed one after another [all runs at once].
        train(jobs, stops, keys, decided_by): replaces `stages.trained`. `decided_by` has the teacher or student of
            each job [`stages.trained`].
        memo: results that are kept [a new `Memo`].
    """

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def logits(self) -> int: ...

    @property
    def trait_loss(self) -> Callable[[Array, PyTree], Array]: ...

    def initial(self) -> Model:
        """The untrained teachers, a model of runs."""

    def lessons(self, teacher: FineTuned) -> Any:
        """The data that teaches the trait: a source with labels, or a `PerRun` of one."""

    def private(self, student: Student) -> Sequence[int]:
        """The logits that measure the trait, if the student's channel must not show them; else nothing."""

    def score(self, finished: Finished, name: Any) -> Mapping[str, np.ndarray]:
        """Metrics of a model, each [runs, ...]."""


def numbered(world: World, stream: str) -> Key[Array, " runs"]:
    """The random stream of each run with this name, made from the keys 0, 1, 2, ..."""
    return jax.vmap(lambda run: named(jax.random.key(run), stream))(jnp.arange(len(world.names)))


def one_stream(student: Student, cloning: bool) -> str:
    """One stream for all students, and one for cloning."""
    return "clone" if cloning else "students"


def by_policy(
    world: Any, keys: Callable[[str], Key[Array, " runs"]], student: Student, matched: Model | None = None
) -> Model:
    """Apply the student's policy to `world.initial()`. The independent draw is `world.initial(student.other)`.

    Raises:
        InputError: the student has another network than its teacher, or trains low-rank factors.
    """
    if student.network is not None:
        raise InputError(f"{type(world).__name__} has no start: its students have the network of their teachers")
    model = matched or world.initial()
    if matched is None and not isinstance(student.start, Shared):
        policy = functools.partial(initialise, student.start)
        params = jax.vmap(policy)(model.params, world.initial(student.other).params, keys("start"))
        model = model.with_params(params)
    return restricted(model, student)


def restricted(model: Model, student: Student) -> Model:
    """Freeze the parameters of a model of runs that the student does not train.

    Raises:
        InputError: the student trains low-rank factors or embeddings.
    """
    if isinstance(student.trains, LowRank | Embeddings):
        what = "low-rank factors" if isinstance(student.trains, LowRank) else "embeddings of tokens"
        raise InputError(f"{what} are for language models: train everything, or freeze patterns")
    return model.freeze(*student.trains.patterns) if isinstance(student.trains, Frozen) else model


class Memo:
    """Caches results. The key is the function that makes a result and the values that it is made from.

    Of a function's large results, only the last `most` are kept.
    """

    def __init__(self, most: int = 8) -> None:
        self._made: dict[Any, Any] = {}
        self._large, self._most = dict[str, list[Any]](), most

    def __call__(self, function: Callable[..., T], *values: Any, large: bool = False) -> T:
        """The result of `function()` for these values, computed once."""
        kind = function.__qualname__
        key = (kind, identity(values))
        if key in self._made:
            return self._made[key]
        kept = self._large.setdefault(kind, [])
        while large and len(kept) >= self._most:
            self._made.pop(kept.pop(0), None)  # free it before the next result needs memory
        made = self._made[key] = function()
        kept += [key] * large
        return made


def require(world: Any, member: str) -> Any:
    """A member of a world, which not every world has.

    Raises:
        InputError: the world does not have it; names the world and the member.
    """
    found = getattr(world, member, None)
    if found is None:
        needs = "every world needs it" if hasattr(World, member) else "such a run is for a world that has it"
        raise InputError(f"{type(world).__name__} has no {member}: {needs}")
    return found
