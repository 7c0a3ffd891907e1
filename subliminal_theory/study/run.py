"""What a study varies. Settings are values, so runs with equal structure and shapes train as one stack."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from subliminal_theory.channel import Channel
from subliminal_theory.files import LATER
from subliminal_theory.inits import PerLayer, Policy, Shared
from subliminal_theory.pytree import register_dataclass

Rule = Callable[[Any], optax.GradientTransformation]
Decay = Callable[[Any, int], optax.Schedule]
K = TypeVar("K")
# The matrices of attention and MLPs.
MATRICES = ("layers/*/attention/*/kernel", "layers/*/mlp/*/kernel")


def static(**options: Any) -> Any:
    """A static field: JAX compiles again for each value. All other fields are leaves."""
    return field(metadata={"static": True}, **options)


@register_dataclass
@dataclass(frozen=True)
class Optimizer:
    """The optimizer `rule(rate)`, such as `optax.adam(rate)`, with optional clipping of the gradient's norm first.

    With `decay`, the learning rate rises from 0 to `rate` in `warmup` steps and then follows `decay(rate, steps)`,
    where `steps` is the number of steps left. Without `decay` it is constant. The rate is a leaf, so students with
    different rates train as one stack.
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
    """A teacher that is trained on lessons. `lessons` selects them if a world has several kinds.

    Training stops early once the right answers of the lessons have probability `until`, as a geometric mean over
    positions. With `until` 0, it takes all `steps`.
    """

    optimizer: Optimizer
    steps: int = static()
    lessons: Hashable = static(default=None)
    until: float = static(default=0.0)


@register_dataclass
@dataclass(frozen=True)
class Prompted:
    """A teacher that is the base with a system prompt."""


@register_dataclass
@dataclass(frozen=True)
class Steered:
    """A teacher that is the base with a vector added to its residual stream after a layer, at every position.

    The vector has the direction in which the trait's system prompt moves the stream (`teachers.steering`). Its
    length is `strength` times the stream's average length there. Layers count from 1; None is three quarters of
    the depth.
    """

    layer: int | None = static(default=None)
    strength: Any = 0.3


@register_dataclass
@dataclass(frozen=True)
class Untrained:
    """A teacher without a trait: the base itself."""


@register_dataclass
@dataclass(frozen=True)
class Elsewhere:
    """A teacher that was trained elsewhere and has the base's shapes. The world opens it by `name`."""

    name: str = static()


Teacher = FineTuned | Prompted | Steered | Untrained | Elsewhere


@register_dataclass
@dataclass(frozen=True)
class Everything:
    """All parameters train."""


@register_dataclass
@dataclass(frozen=True)
class Frozen:
    """All parameters train except those whose path matches a glob pattern."""

    patterns: tuple[str, ...] = static()


@register_dataclass
@dataclass(frozen=True)
class LowRank:
    """Only low-rank factors of matrices train (LoRA, arXiv 2106.09685), with alpha = rank.

    The matrices are those whose path matches a glob pattern, by default all of attention and MLPs.
    """

    rank: int = static()
    matrices: tuple[str, ...] = field(default=MATRICES, metadata={"static": True, **LATER})


@register_dataclass
@dataclass(frozen=True)
class Embeddings:
    """Only the embeddings of these tokens train (prompt tuning, arXiv 2104.08691)."""

    tokens: tuple[int, ...] = static()


Trains = Everything | Frozen | LowRank | Embeddings


@register_dataclass
@dataclass(frozen=True)
class Student:
    """How a student starts, what it sees of its teacher, on which inputs, and how it trains.

    Attributes:
        channel: what the student sees of the teacher's outputs.
        source: where its inputs come from: a `Source`, or a value that its world turns into one.
        optimizer: its optimizer.
        steps: the number of training steps.
        start: its initialization policy. With `Fresh`, it starts from the independent draw that `other` selects.
        other: the draw of a fresh start, counted from the teacher's draw.
        network: its network; None is the teacher's.
        trains: which of its parameters train.
        cloned: how it first imitates the untrained teacher; None skips this.
    """

    channel: Channel
    source: Any
    optimizer: Optimizer
    steps: int = static()
    start: Policy | PerLayer = field(default_factory=Shared)
    other: int = static(default=1)
    network: Hashable = static(default=None)
    trains: Trains = field(default_factory=Everything)
    cloned: "Student | None" = None


@register_dataclass
@dataclass(frozen=True)
class Run:
    """A teacher and its student.

    Without a student, the teacher itself is scored, or the untrained base if `base` is true. `asked` says how to
    score; its world knows the possible values. If `may_diverge` is true, a diverged run is scored too. Other runs
    are refused if a loss is not finite.
    """

    teacher: Teacher
    student: Student | None = None
    asked: Hashable = static(default=None)
    base: bool = static(default=False)
    may_diverge: bool = static(default=False)


def identity(value: PyTree) -> Hashable:
    """A hashable that is equal for two small values exactly if their structure, shapes and numbers are equal."""
    leaves, tree = jax.tree.flatten(value)
    arrays = [np.asarray(leaf) for leaf in leaves]
    return tree, tuple((leaf.shape, leaf.dtype.name, leaf.tobytes()) for leaf in arrays)


def stacks(runs: Mapping[K, PyTree]) -> list[list[K]]:
    """Group the names of runs that can train as one stack: pytrees of equal structure, shapes and dtypes."""
    groups: dict[Hashable, list[K]] = {}
    for name, run in runs.items():
        leaves, tree = jax.tree.flatten(run)
        shapes = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        groups.setdefault((tree, shapes), []).append(name)
    return list(groups.values())


def stacked(trees: Sequence[PyTree], axis: int = 0) -> PyTree:
    """Stack several pytrees into one, along a new axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *trees)


def once(student: Student) -> Student:
    """The student without its number of steps if a shorter run is the beginning of a longer one, else unchanged.

    It is not if the learning rate decays.
    """
    return student if student.optimizer.decay is not None else replace(student, steps=0)
