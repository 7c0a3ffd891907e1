"""What a study asks of a model and its trait: the protocol of digits, the compact model and checkpoints."""

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
from subliminal_theory.study.run import FineTuned, Frozen, LowRank, Student, Teacher, identity

T = TypeVar("T")


@dataclass(frozen=True)
class Finished:
    """A model of runs that is ready to be scored: a student, or the teacher itself where there is no student.

    `losses` [runs, steps] belong to the student, `taught` is the teacher's model of runs, `asked` the run's own
    way of scoring.
    """

    teacher: Teacher
    taught: Model
    model: Model
    student: Student | None = None
    losses: Float[Array, "runs steps"] | None = None
    asked: Any = None


class World(Protocol):
    """A model, a trait and how the trait is read, for several runs at once.

    Attributes:
        names: what messages call each run.
        logits: how many logits the model has.
        trait_loss: `trait_loss(logits, labels)`, one value per position; equal in equal worlds.

    Every study needs these. A world may have more; the brackets say what holds for a world without:

        computation: how runs are computed [`Computation()`].
        keys(stream): a named random stream of each run [of the keys 0, 1, 2, ...].
        stream(student, cloning): the stream of a student's training, or of the imitation of the untrained teacher
            before it [one for all students].
        start(student, matched): where students start, a model of runs; `matched` is what already imitates the
            untrained teacher [`by_policy`].
        source(student, teacher, taught, shown): the student's inputs, a source without labels or one `PerRun`,
            with targets where nobody is asked; `taught` is the teacher's model of runs, `shown()` the same as
            students see it [the student's own `source`].
        prompted(): teachers behind a system prompt [none]. steered(teacher): steered ones [none].
        opened(name): the model, not one of runs, of a teacher that was taught elsewhere [none].
        at(run), parts(): some of the runs [all at once].
        train(jobs, stops, keys, decided_by): another `trained`; `decided_by` has the teacher or student of jobs.
        memo: what is kept.
    """

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def logits(self) -> int: ...

    @property
    def trait_loss(self) -> Callable[[Array, PyTree], Array]: ...

    def initial(self) -> Model:
        """Where the teachers start, a model of runs."""

    def lessons(self, teacher: FineTuned) -> Any:
        """What teaches the trait: a source with labels, or one `PerRun`."""

    def private(self, student: Student) -> Sequence[int]:
        """The logits in which the trait is read, if the student's channel must not show them."""

    def score(self, finished: Finished, name: Any) -> Mapping[str, np.ndarray]:
        """Metrics of a model, [runs, ...] each."""


def numbered(world: World, stream: str) -> Key[Array, " runs"]:
    """A named random stream of each run: those of the keys 0, 1, 2, ..."""
    return jax.vmap(lambda run: named(jax.random.key(run), stream))(jnp.arange(len(world.names)))


def one_stream(student: Student, cloning: bool) -> str:
    """The same stream for all students."""
    return "clone" if cloning else "students"


def by_policy(
    world: Any, keys: Callable[[str], Key[Array, " runs"]], student: Student, matched: Model | None = None
) -> Model:
    """The student's policy on `world.initial()`, whose independent draws are `world.initial(other)`.

    Raises:
        InputError: the student has another network, or low-rank factors.
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
    """The model of runs with all parameters frozen that the student does not train.

    Raises:
        InputError: low-rank factors.
    """
    if isinstance(student.trains, LowRank):
        raise InputError("low-rank factors are for language models: train everything, or freeze patterns")
    return model.freeze(*student.trains.patterns) if isinstance(student.trains, Frozen) else model


class Memo:
    """What was made, each once: the key is the function that makes it and the values that it is made from.

    Of what is large, only the last `most` that a function made are kept.
    """

    def __init__(self, most: int = 8) -> None:
        self._made: dict[Any, Any] = {}
        self._large, self._most = dict[str, list[Any]](), most

    def __call__(self, function: Callable[..., T], *values: Any, large: bool = False) -> T:
        """What `function()` gives for these values."""
        kind = function.__qualname__
        key = (kind, identity(values))
        if key in self._made:
            return self._made[key]
        kept = self._large.setdefault(kind, [])
        while large and len(kept) >= self._most:
            self._made.pop(kept.pop(0), None)  # before its memory is needed
        made = self._made[key] = function()
        kept += [key] * large
        return made


def require(world: Any, member: str) -> Any:
    """A member that not every world has.

    Raises:
        InputError: this one has none; names both.
    """
    found = getattr(world, member, None)
    if found is None:
        needs = "every world needs it" if hasattr(World, member) else "such a run is for a world that has it"
        raise InputError(f"{type(world).__name__} has no {member}: {needs}")
    return found
