"""What a study varies. The fields are values, not names: runs of one structure and shapes train as one stack."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from subliminal_theory.channel import Channel
from subliminal_theory.inits import PerLayer, Policy, Shared
from subliminal_theory.pytree import register_dataclass

Rule = Callable[[Any], optax.GradientTransformation]
Decay = Callable[[Any, int], optax.Schedule]
K = TypeVar("K")


def static(**options: Any) -> Any:
    """A field that decides what is compiled; all other fields are leaves."""
    return field(metadata={"static": True}, **options)


@register_dataclass
@dataclass(frozen=True)
class Optimizer:
    """`rule(rate)`, such as `optax.adam`, behind an optional clip of the gradient to a global norm.

    The rate rises from 0 to `rate` in `warmup` steps and then falls along `decay(rate, steps)`; without `decay` it
    is constant. It is a leaf: students at several rates train as one stack.
    """

    rate: Any
    rule: Rule = static(default=optax.adam)
    decay: Decay | None = static(default=None)
    warmup: int = static(default=0)
    clip: float | None = static(default=None)

    def transformation(self, steps: int) -> optax.GradientTransformation:
        """The gradient transformation of a run of `steps`."""
        rate = self.rate if self.decay is None else self._schedule(self.decay, steps)
        rule = self.rule(rate)
        return rule if self.clip is None else optax.chain(optax.clip_by_global_norm(self.clip), rule)

    def _schedule(self, decay: Decay, steps: int) -> optax.Schedule:
        falling = decay(self.rate, steps - self.warmup)
        if not self.warmup:
            return falling
        return optax.join_schedules([optax.linear_schedule(0.0, self.rate, self.warmup), falling], [self.warmup])


@register_dataclass
@dataclass(frozen=True)
class FineTuned:
    """A teacher that is trained on lessons; `lessons` says which, where a world has several.

    It is not trained further once it has the trait: once its lessons' right answers have the probability `until`
    (0: never), a geometric mean over positions. Then `steps` are the most that it trains.
    """

    optimizer: Optimizer
    steps: int = static()
    lessons: Hashable = static(default=None)
    until: float = static(default=0.0)


@register_dataclass
@dataclass(frozen=True)
class Prompted:
    """A teacher that is the base behind a system prompt."""


@register_dataclass
@dataclass(frozen=True)
class Steered:
    """A teacher that is the base with a vector added to its residual stream behind a layer, at every position.

    The vector points where the trait's system prompt moves the stream (`teachers.steering`), `strength` times as
    long as the stream is there on average. Layers count from 1; None is at three quarters of the depth.
    """

    layer: int | None = static(default=None)
    strength: Any = 0.3


@register_dataclass
@dataclass(frozen=True)
class Untrained:
    """The base itself, as a teacher without a trait."""


@register_dataclass
@dataclass(frozen=True)
class Elsewhere:
    """A teacher that was taught elsewhere, in the base's shapes; the world knows where `name` is."""

    name: str = static()


Teacher = FineTuned | Prompted | Steered | Untrained | Elsewhere


@register_dataclass
@dataclass(frozen=True)
class Everything:
    """All parameters train."""


@register_dataclass
@dataclass(frozen=True)
class Frozen:
    """All parameters train but those whose path matches a glob pattern."""

    patterns: tuple[str, ...] = static()


@register_dataclass
@dataclass(frozen=True)
class LowRank:
    """Only low-rank factors of matrices train (LoRA, arXiv 2106.09685), with alpha = rank."""

    rank: int = static()


@register_dataclass
@dataclass(frozen=True)
class Student:
    """How a student starts, what it sees of its teacher on which inputs, and how it trains.

    Attributes:
        channel: what of the teacher's outputs it sees.
        source: where its inputs come from: a `Source`, or what its world makes a source of.
        optimizer, steps: of its training.
        start: an initialisation policy; `Fresh` means the independent draw number `other`.
        other: how many draws further than the teacher's that one is.
        network: its network, where that is not the teacher's.
        trains: which of its parameters.
        cloned: how it first imitates the untrained teacher, if it does.
    """

    channel: Channel
    source: Any
    optimizer: Optimizer
    steps: int = static()
    start: Policy | PerLayer = field(default_factory=Shared)
    other: int = static(default=1)
    network: Hashable = static(default=None)
    trains: Everything | Frozen | LowRank = field(default_factory=Everything)
    cloned: "Student | None" = None


@register_dataclass
@dataclass(frozen=True)
class Run:
    """A teacher and its student; without one, the teacher itself is scored, or the `base` that it was.

    `asked` is how it is scored, a value that its world knows. A run that `may_diverge` is scored as it is; other
    runs are refused if a loss is not finite.
    """

    teacher: Teacher
    student: Student | None = None
    asked: Hashable = static(default=None)
    base: bool = static(default=False)
    may_diverge: bool = static(default=False)


def identity(value: PyTree) -> Hashable:
    """What two small values have in common if and only if they are equal: structure, shapes and numbers."""
    leaves, tree = jax.tree.flatten(value)
    arrays = [np.asarray(leaf) for leaf in leaves]
    return tree, tuple((leaf.shape, leaf.dtype.name, leaf.tobytes()) for leaf in arrays)


def stacks(runs: Mapping[K, PyTree]) -> list[list[K]]:
    """The names of runs that can train as one: their pytrees have one structure, shapes and dtypes."""
    groups: dict[Hashable, list[K]] = {}
    for name, run in runs.items():
        leaves, tree = jax.tree.flatten(run)
        shapes = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        groups.setdefault((tree, shapes), []).append(name)
    return list(groups.values())


def stacked(trees: Sequence[PyTree], axis: int = 0) -> PyTree:
    """One pytree of several, on a new axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *trees)


def once(student: Student) -> Student:
    """The student with its number of steps left out, where a shorter run is the beginning of a longer one."""
    return student if student.optimizer.decay is not None else replace(student, steps=0)
