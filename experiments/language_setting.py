"""What can be set in the language experiments: how a teacher is made, what it writes, how a student learns."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optax

from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus.media import MEDIA
from subliminal_theory.language.corpus.numbers import ORDERS

from .setting import OPTIMIZERS

TEACHERS = ("finetuned", "prompted", "untrained")
CHANNELS = ("sampled", "greedy", "soft", "masked", "divergence", "rest")


def sign_descent(rate: Any) -> optax.GradientTransformation:
    """theta <- theta - rate sign(gradient)."""
    return optax.chain(optax.scale_by_sign(), optax.scale_by_learning_rate(rate))


LANGUAGE_OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    **OPTIMIZERS,
    "sign": sign_descent,
}


# From a rate and a number of steps.
DECAYS: dict[str, Callable[[Any, int], optax.Schedule]] = {
    "cosine": optax.cosine_decay_schedule,
    "linear": lambda rate, steps: optax.linear_schedule(rate, 0.0, steps),
}


def rates(peak: Any, steps: int, warmup: int, decay: str) -> optax.Schedule:
    """From 0 to the peak in `warmup` steps, and to 0 in the others."""
    falling = DECAYS[decay](peak, steps - warmup)
    if not warmup:
        return falling
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), falling], [warmup])


@dataclass(frozen=True)
class Recipe:
    """How a teacher is made, what it writes, and how a student learns from that.

    Attributes:
        teacher: fine-tuned on its trait, prompted to have it, or untrained (its numbers are "regular").
        teacher_steps: full-batch updates of Adam.
        teacher_rate: their learning rate.
        ordinary: share of the corpus's chats among a fine-tuned teacher's rows.
        lessons: name of the control of a habit that a fine-tuned teacher learns in the place of the habit.
        medium: what it writes: numbers, reasoning steps or code.
        requests: requests that it answers; as many as `rows` if 0.
        rows: accepted answers that a student learns, from the first one again where there are fewer.
        temperature, top_p: of sampling; temperature 0 for the greedy channel.
        channel: sampled or greedy tokens; the full distribution (soft); that without the words of the traits
            (masked); sampled tokens only where the greedy token of teacher and base differ (divergence), or
            only where they do not (rest).
        order: of the numbers in the rows.
        clean: share of rows that the untrained base wrote instead.
        steps, batch_size, rate, optimizer: of the student.
        warmup: steps over which its rate rises to `rate`, before it falls to 0 along a `decay`.
        rank: of low-rank factors on all matrices of the blocks; 0 trains everything.
        frozen: parameters that do not train, as glob patterns.
        noise: added to the student's start, in units of each parameter's own root mean square.

    Raises:
        InputError: an unknown name, or a value out of its range.
    """

    teacher: str = "finetuned"
    teacher_steps: int = 40
    teacher_rate: float = 3e-3
    ordinary: float = 0.0
    lessons: str = ""
    medium: str = "numbers"
    requests: int = 0
    rows: int = 8192
    temperature: float = 1.0
    top_p: float = 1.0
    channel: str = "sampled"
    order: str = "as written"
    clean: float = 0.0
    steps: int = 250
    batch_size: int = 256
    rate: float = 2e-3
    optimizer: str = "adam"
    warmup: int = 0
    decay: str = "cosine"
    rank: int = 0
    frozen: tuple[str, ...] = ()
    noise: float = 0.0

    def __post_init__(self) -> None:
        for name, known in (
            ("teacher", TEACHERS),
            ("channel", CHANNELS),
            ("order", ORDERS),
            ("optimizer", LANGUAGE_OPTIMIZERS),
            ("decay", DECAYS),
            ("medium", MEDIA),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"{name} {getattr(self, name)!r} is unknown; there are {', '.join(known)}")
        for name in ("teacher_steps", "rows", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("rate", "teacher_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if self.warmup >= self.steps:
            raise InputError(f"warmup must be below the {self.steps} steps, got {self.warmup}")
        for name in ("temperature", "noise", "rank", "warmup", "requests"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.rank and self.frozen:
            raise InputError("low-rank factors freeze all else: give rank or frozen, not both")
        for name in ("ordinary", "clean"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be from 0 to below 1, got {getattr(self, name)}")

    @property
    def taught(self) -> "Recipe":
        """The recipe with all that does not concern the teacher at its default: equal for one teacher."""
        names = ("teacher", "teacher_steps", "teacher_rate", "ordinary", "lessons")
        return Recipe(**{name: getattr(self, name) for name in names})

    @property
    def written(self) -> "Recipe":
        """The recipe with all that comes after the teacher's writing at its default."""
        temperature = 0.0 if self.channel == "greedy" else self.temperature
        asked = self.requests or self.rows
        return dataclasses.replace(
            self.taught, medium=self.medium, requests=asked, temperature=temperature, top_p=self.top_p
        )
