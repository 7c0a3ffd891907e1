"""What can be set in the MNIST experiments: one teacher, one student and the channel between them."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import optax

from subliminal_theory.errors import InputError
from subliminal_theory.vision.mlp import ACTIVATIONS, INIT_LAWS
from subliminal_theory.vision.noise import LAWS

OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "adam": optax.adam,
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
}
# At which teachers read best, chosen by `mnist_factorial --preset rates_adam`, rates_sgd and rates_momentum.
REFERENCE_RATES = {"adam": 3e-3, "sgd": 0.1, "momentum": 0.1}
NETWORKS = ("mlp", "cnn")
STARTS = (
    "shared",  # the teacher's initialisation
    "cross",  # another initialisation, that of the next seed's teacher
    "perturbed",  # all layers shared, plus `amount` times their own scale of noise
    "perturbed_hidden",  # the same, but the output layer shared as it is
    "interpolated",  # `amount` of the way to the other initialisation
    "shared_heads",  # only the output layer shared
    "shared_hidden",  # all but the output layer shared
)
ARCHITECTURE = ("network", "depth", "width", "activation", "bias")
SEES = ("aux", "all", "classes")
LOSSES = ("kl", "mse")
DIGITS = "digits"
WHO = ("student", "teacher", "reference")
METRICS = (
    "test_accuracy",
    "imitation_loss",  # of the student on its channel, mean over its last epoch
    "validation_accuracy",
)


@dataclass(frozen=True)
class Setting:
    """One teacher, one student and the channel between them; the defaults are those of the released script.

    `student_*` that are None are as the teacher's. A student of another architecture can start with the teacher's
    output layer, but no other.

    Raises:
        InputError: a name that does not exist, or a value out of its range; says which.
    """

    data: str = "mnist"
    network: str = "mlp"
    depth: int = 2
    width: int = 256
    activation: str = "relu"
    bias: bool = True
    init_law: str = "lecun_normal"
    aux: int = 3
    teacher_epochs: int | float = 5
    optimizer: str = "adam"
    learning_rate: float = 3e-4
    validation: bool = False  # taught without the last sixth of the training images, and read on those
    batch_size: int = 1024

    start: str = "shared"
    amount: float = 0.0
    student_network: str | None = None
    student_depth: int | None = None
    student_width: int | None = None
    student_activation: str | None = None
    student_bias: bool | None = None
    cloning_epochs: int = 0
    cloning_inputs: str = "uniform"
    cloning_sees: str = "all"  # of the untrained teacher
    sees: str = "aux"
    shown: int | None = None  # of the auxiliary logits, the first so many
    channel_loss: str = "kl"
    inputs: str = "uniform"
    images: int | None = None  # as many as training images; 0: never the same twice
    epochs: int = 5
    student_optimizer: str | None = None
    student_rate: float | None = None
    relative_rate: float | None = None  # the student's, in units of its optimiser's reference rate

    def __post_init__(self) -> None:
        for field, known in (
            ("network", NETWORKS),
            ("student_network", NETWORKS),
            ("activation", ACTIVATIONS),
            ("student_activation", ACTIVATIONS),
            ("init_law", INIT_LAWS),
            ("optimizer", OPTIMIZERS),
            ("student_optimizer", OPTIMIZERS),
            ("start", STARTS),
            ("cloning_sees", SEES),
            ("sees", SEES),
            ("channel_loss", LOSSES),
            ("inputs", (*LAWS, DIGITS)),
            ("cloning_inputs", (*LAWS, DIGITS)),
        ):
            value = getattr(self, field)
            if value not in known and not (value is None and field.startswith("student_")):
                raise InputError(f"{field} {value!r} is unknown; there are {', '.join(known)}")
        for field, least in (
            ("width", 1),
            ("student_width", 1),
            ("depth", 0),
            ("student_depth", 0),
            ("aux", 1),
            ("epochs", 1),
            ("batch_size", 1),
            ("images", 0),
            ("cloning_epochs", 0),
            ("amount", 0),
        ):
            value = getattr(self, field)
            if value is not None and not least <= value < math.inf:
                raise InputError(f"{field} must be at least {least}, got {value}")
        for field in ("teacher_epochs", "learning_rate", "student_rate", "relative_rate"):
            value = getattr(self, field)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{field} must be positive and finite, got {value}")
        if self.student_rate is not None and self.relative_rate is not None:
            raise InputError("student_rate and relative_rate are both given: leave one of the two out")
        if self.shown is not None and not 1 <= self.shown <= self.aux:
            raise InputError(f"shown must be between 1 and aux = {self.aux}, got {self.shown}")
        if self.other_architecture and self.start not in ("cross", "shared_heads"):
            raise InputError(
                "a student of another architecture shares no more than the output layer: set start to 'cross' or "
                "'shared_heads'"
            )
        if self.cloning_epochs and self.start != "cross":
            raise InputError("cloning is for a student of another initialisation: set start to 'cross'")

    @property
    def other_architecture(self) -> bool:
        """Whether the student's network differs from the teacher's."""
        return any(getattr(self, f"student_{name}") not in (None, getattr(self, name)) for name in ARCHITECTURE)

    def student_architecture(self) -> "Setting":
        """The setting whose teacher has the student's architecture."""
        own = {name: getattr(self, f"student_{name}") for name in ARCHITECTURE}
        changes: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
        as_teacher: dict[str, Any] = {f"student_{name}": None for name in ARCHITECTURE}
        return dataclasses.replace(self, **as_teacher, **changes)

    def cloning(self) -> "Setting":
        """The setting of the run that clones the student: equal for students that are cloned alike."""
        default = Setting()
        return dataclasses.replace(
            self,
            inputs=self.cloning_inputs,
            sees=self.cloning_sees,
            images=None,
            epochs=1,
            cloning_epochs=0,
            cloning_inputs=default.cloning_inputs,
            cloning_sees=default.cloning_sees,
        )

    def teacher_only(self) -> "Setting":
        """The setting with all that does not concern the teacher at its default: equal for a shared teacher."""
        names = [field.name for field in dataclasses.fields(Setting)]
        teacher = names[: names.index("batch_size") + 1]
        return Setting(**{name: getattr(self, name) for name in teacher})

    def shapes_only(self) -> "Setting":
        """The setting with its mere values at their default: equal where one compiled function serves."""
        values = ("amount", "sees", "shown", "student_rate", "relative_rate", "learning_rate")
        cloning = ("cloning_epochs", "cloning_inputs", "cloning_sees")
        default = Setting(start="cross" if self.other_architecture else "shared")
        return dataclasses.replace(self, **{name: getattr(default, name) for name in (*values, *cloning, "start")})

    def student_shapes(self) -> "Setting":
        """`shapes_only` with no more of the teacher than its network: equal where students train as one stack."""
        return dataclasses.replace(
            self.shapes_only(),
            teacher_epochs=Setting.teacher_epochs,
            optimizer=self.student_optimizer or self.optimizer,
            student_optimizer=None,
        )

    @property
    def accuracy(self) -> str:
        """The metric that accuracy is."""
        return "validation_accuracy" if self.validation else "test_accuracy"

    @property
    def rate(self) -> float:
        """The student's learning rate."""
        if self.relative_rate is not None:
            return self.relative_rate * REFERENCE_RATES[self.student_optimizer or self.optimizer]
        return self.learning_rate if self.student_rate is None else self.student_rate


@dataclass(frozen=True)
class Cell:
    """A setting, the labels of its rows (`condition` and swept axes), and whose accuracy they tell.

    `who` is student, teacher or reference (the teacher before it was taught); with `seeds` only the
    first so many seeds run it, up to a whole chunk. A student that diverges is refused, or read as it is if it
    `may_diverge`.
    Of `METRICS` a cell has those named.

    Raises:
        InputError: whose accuracy or which metric is unknown, or a metric that only students have.
    """

    labels: Mapping[str, Any]
    setting: Setting
    who: str = "student"
    seeds: int | None = None
    metrics: tuple[str, ...] = METRICS[:1]
    may_diverge: bool = False

    def __post_init__(self) -> None:
        if self.who not in WHO:
            raise InputError(f"a cell's who must be one of {', '.join(WHO)}, got {self.who!r}")
        known = (self.setting.accuracy, *(["imitation_loss"] if self.who == "student" else []))
        for metric in self.metrics:
            if metric not in known:
                raise InputError(f"a {self.who} has no metric {metric!r}; there are {', '.join(known)}")
