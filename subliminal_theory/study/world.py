"""What a study asks of a model and its trait: the protocol of digits, the compact model and checkpoints."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from subliminal_theory.errors import InputError
from subliminal_theory.model import Model
from subliminal_theory.study.run import FineTuned, Student, Teacher, identity
from subliminal_theory.study.stages import Computation

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
        labels: the labels of each run's rows, such as its seed.
        logits: how many logits the model has.
        trait_loss: `trait_loss(logits, labels)`, one value per position; equal in equal worlds.
        computation: how runs are computed.
    """

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def labels(self) -> Sequence[Mapping[str, Any]]: ...

    @property
    def logits(self) -> int: ...

    @property
    def trait_loss(self) -> Callable[[Array, PyTree], Array]: ...

    @property
    def computation(self) -> Computation: ...

    def keys(self, stream: str) -> Key[Array, " runs"]:
        """A named random stream of each run."""

    def stream(self, student: Student, cloning: bool) -> str:
        """The stream of a student's training, or of the imitation of the untrained teacher before it."""

    def initial(self) -> Model:
        """Where the teachers start, a model of runs."""

    def start(self, student: Student, matched: Model | None = None) -> Model:
        """Where students start, a model of runs; `matched` is what already imitates the untrained teacher."""

    def lessons(self, teacher: FineTuned) -> Any:
        """What teaches the trait: a source with labels, or one `PerRun`."""

    def source(self, student: Student, teacher: Teacher, taught: Model, shown: Callable[[], Model]) -> Any:
        """The student's inputs: a source without labels, or one `PerRun`; with targets where nobody is asked.

        `taught` is the teacher's model of runs, `shown()` the same as students see it.
        """

    def private(self, student: Student) -> Sequence[int]:
        """The logits in which the trait is read, if the student's channel must not show them."""

    def score(self, finished: Finished, name: Any) -> Mapping[str, np.ndarray]:
        """Metrics of a model, [runs, ...] each."""


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


def require(world: Any, method: str) -> Any:
    """A method that not every world has.

    Raises:
        InputError: this one has none; names both.
    """
    found = getattr(world, method, None)
    if found is None:
        raise InputError(f"{type(world).__name__} has no {method}: such a run is for a world that has it")
    return found
