"""The settings of the MNIST experiments: one teacher, one student and the channel between them, by name."""

import functools
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from subliminal_theory.channel import Channel, Subset
from subliminal_theory.divergence import channel_named
from subliminal_theory.errors import InputError
from subliminal_theory.inits import Fresh, Interpolated, PerLayer, Perturbed, Policy, Shared
from subliminal_theory.runs import Row
from subliminal_theory.study import (
    Digits,
    FineTuned,
    Network,
    Optimizer,
    Run,
    Student,
    Study,
    TrainingImages,
    Untrained,
    labels,
    rows,
)
from subliminal_theory.vision.datasets import ImageDataset, load
from subliminal_theory.vision.mlp import ACTIVATIONS, INIT_LAWS
from subliminal_theory.vision.noise import LAWS

from ..app.contract import Part, from_preset, option, validate
from .names import LOSSES, OPTIMIZERS, REFERENCE_RATES, named_value

DIGITS = "digits"
INPUTS = (*LAWS, DIGITS)
NETWORKS = {"mlp": False, "cnn": True}
SEES = ("aux", "all", "classes")
WHO = ("student", "teacher", "reference")
METRICS = ("test_accuracy", "imitation_loss", "validation_accuracy")
# From `amount` (of perturbation or interpolation) and the pattern of the output layer to a policy.
STARTS: dict[str, Callable[[float, str], Policy | PerLayer]] = {
    "shared": lambda amount, head: Shared(),
    "cross": lambda amount, head: Fresh(),
    "perturbed": lambda amount, head: Perturbed(amount),
    "perturbed_hidden": lambda amount, head: PerLayer((head, "*"), (Shared(), Perturbed(amount))),
    "interpolated": lambda amount, head: Interpolated(amount),
    "shared_heads": lambda amount, head: PerLayer((head, "*"), (Shared(), Fresh())),
    "shared_hidden": lambda amount, head: PerLayer((head, "*"), (Fresh(), Shared())),
}


@dataclass(frozen=True)
class Setting:
    """One teacher, one student and the channel between them. The defaults are those of the released script.

    Raises:
        InputError: a name is unknown, a value is out of range, or two settings contradict each other.
    """

    data: str = option("mnist", "mnist | digits | auto | a folder of idx files")
    network: str = option("mlp", "network of the teacher", choices=tuple(NETWORKS))
    depth: int = option(2, "hidden layers", minimum=0)
    width: int = option(256, "neurons of each hidden layer", minimum=1)
    activation: str = option("relu", "activation between layers", choices=tuple(ACTIVATIONS))
    bias: bool = option(True, "whether layers have biases")
    init_law: str = option("lecun_normal", "initialization of the weights", choices=tuple(INIT_LAWS))
    aux: int = option(3, "m, the number of auxiliary logits", minimum=1)
    teacher_epochs: int | float = option(5, "epochs of the teacher", positive=True)
    optimizer: str = option("adam", "optimizer of the teacher", choices=tuple(OPTIMIZERS))
    learning_rate: float = option(3e-4, "learning rate of the teacher", positive=True)
    validation: bool = option(False, "hold out the last sixth of the training images and measure accuracy on it")
    batch_size: int = option(1024, "images per step", minimum=1)

    start: str = option("shared", "where the student starts", choices=tuple(STARTS))
    amount: float = option(0.0, "amount of perturbation or interpolation", minimum=0)
    student_network: str | None = option(None, "the teacher's if None", choices=tuple(NETWORKS))
    student_depth: int | None = option(None, "the teacher's if None", minimum=0)
    student_width: int | None = option(None, "the teacher's if None", minimum=1)
    student_activation: str | None = option(None, "the teacher's if None", choices=tuple(ACTIVATIONS))
    student_bias: bool | None = option(None, "the teacher's if None")
    cloning_epochs: int = option(0, "epochs in which the student first imitates the untrained teacher", minimum=0)
    cloning_inputs: str = option("uniform", "inputs in these epochs", choices=INPUTS)
    cloning_sees: str = option("all", "logits of the untrained teacher that it sees", choices=SEES)
    sees: str = option("aux", "logits of the teacher that the student sees", choices=SEES)
    shown: int | None = option(None, "number of auxiliary logits that it sees; all if None", minimum=1)
    channel_loss: str = option("kl", f"loss of the student: {', '.join(LOSSES)}; top_k:5 sets k to 5")
    inputs: str = option("uniform", "inputs of the student", choices=INPUTS)
    images: int | None = option(None, "noise images; None: as many as training images, 0: no repeats", minimum=0)
    epochs: int = option(5, "epochs of the student", minimum=1)
    student_optimizer: str | None = option(None, "the teacher's if None", choices=tuple(OPTIMIZERS))
    student_rate: float | None = option(None, "the teacher's if None", positive=True)
    relative_rate: float | None = option(None, "rate in units of the optimizer's reference rate", positive=True)

    def __post_init__(self) -> None:
        validate(self)
        channel_named(self.channel_loss)
        if self.student_rate is not None and self.relative_rate is not None:
            raise InputError("student_rate and relative_rate are both given: leave one of them out")
        if self.shown is not None and self.shown > self.aux:
            raise InputError(f"shown must be between 1 and aux = {self.aux}, got {self.shown}")
        if self.other_network is not None and self.start not in ("cross", "shared_heads"):
            raise InputError(
                "a student of another architecture shares no more than the output layer: set start to 'cross' or "
                "'shared_heads'"
            )
        if self.cloning_epochs and self.start != "cross":
            raise InputError("cloning is for a student with another initialization: set start to 'cross'")

    def world(self, seeds: Sequence[int] = (0,), data_dir: str | None = None) -> Digits:
        """The world of these seeds: the data and the teachers' network."""
        data = load_data(self.data, data_dir)
        if self.validation:
            data = _held_out(data)
        return Digits(data, seeds, self._network(), self.aux, self.batch_size, self.accuracy)

    def _network(self, prefix: str = "") -> Network:
        own = {f.name: getattr(self, prefix + f.name, None) for f in fields(Network) if f.name != "convolutional"}
        own["convolutional"] = None if (kind := getattr(self, f"{prefix}network")) is None else NETWORKS[kind]
        given = {name: value for name, value in own.items() if value is not None}
        return Network(**given) if not prefix else replace(self._network(), **given)

    @property
    def other_network(self) -> Network | None:
        """The student's network, or None if it is the teacher's."""
        own = self._network("student_")
        return None if own == self._network() else own

    def run(self, world: Digits, who: str = "student", *, may_diverge: bool = False) -> Run:
        """The run of a student, of its teacher alone, or of the untrained reference."""
        if who == "reference":
            return Run(Untrained())
        rule = named_value("optimizer", self.optimizer, OPTIMIZERS)
        teacher = FineTuned(Optimizer(self.learning_rate, rule), world.steps(self.teacher_epochs))
        return Run(teacher, None if who == "teacher" else self.student(world), may_diverge=may_diverge)

    def student(self, world: Digits) -> Student:
        """The student."""
        source = self.source(world, self.inputs)
        student = Student(
            self.channel(world, self.sees),
            source,
            Optimizer(jnp.float32(self.rate), OPTIMIZERS[self.student_optimizer or self.optimizer]),
            world.steps(self.epochs, source),
            STARTS[self.start](self.amount, (self.other_network or self._network()).output_layer),
            network=self.other_network,
        )
        if not self.cloning_epochs:
            return student
        shown = replace(self, images=None).source(world, self.cloning_inputs)
        channel = self.channel(world, self.cloning_sees)
        cloned = replace(student, channel=channel, source=shown, steps=world.steps(self.cloning_epochs, shown))
        return replace(student, cloned=cloned)

    def source(self, world: Digits, inputs: str) -> Any:
        """The inputs of a student."""
        if inputs == DIGITS:
            return TrainingImages()
        return world.noise(inputs, self.images or None, fresh=self.images == 0)

    def channel(self, world: Digits, sees: str) -> Channel:
        """What a student sees of its teacher."""
        logit, classes = jnp.arange(world.logits), world.data.classes
        shown = classes + (self.shown or self.aux)
        masks = {
            "aux": (logit >= classes) & (logit < shown),
            "all": logit < shown,
            "classes": logit < classes,
        }
        return Subset(masks[sees], channel_named(self.channel_loss))

    @property
    def accuracy(self) -> str:
        """The name of the accuracy metric."""
        return METRICS[2] if self.validation else METRICS[0]

    @property
    def rate(self) -> float:
        """The student's learning rate."""
        if self.relative_rate is not None:
            rule = self.student_optimizer or self.optimizer
            return self.relative_rate * named_value("reference rate of optimizer", rule, REFERENCE_RATES)
        return self.learning_rate if self.student_rate is None else self.student_rate


# The fields that determine a teacher: all fields before `start`.
OF_TEACHER = tuple(itertools.takewhile(lambda name: name != "start", (field.name for field in fields(Setting))))


@functools.cache
def load_data(name: str, data_dir: str | None) -> ImageDataset:
    """A data set, read once per process."""
    return load(name, Path(data_dir) if data_dir is not None else None)


@functools.cache
def _held_out(data: ImageDataset) -> ImageDataset:
    return data.held_out()


@dataclass(frozen=True)
class Cell:
    """A setting, the labels of its result rows, the model to measure, and the metrics.

    `who` is the student, the teacher or the reference (the untrained teacher). If `seeds` is given, only the first
    `seeds` seeds run, rounded up to a whole chunk.

    Raises:
        InputError: `who` is unknown or does not have one of the metrics.
    """

    labels: Mapping[str, Any]
    setting: Setting
    who: str = "student"
    seeds: int | None = None
    metrics: tuple[str, ...] = METRICS[:1]
    may_diverge: bool = False

    def __post_init__(self) -> None:
        named_value("a cell's who", self.who, dict.fromkeys(WHO))
        known = (self.setting.accuracy, *(["imitation_loss"] if self.who == "student" else []))
        for metric in self.metrics:
            named_value(f"a {self.who}'s metric", metric, dict.fromkeys(known))


@dataclass(frozen=True)
class SweepConfig:
    """The settings that every MNIST experiment has."""

    data_dir: str | None = option(
        None, "folder of the idx files; automatic: $SUBLIMINAL_DATA, the cache, or a download", recorded=False
    )
    seeds: int = option(20, "number of independent runs", minimum=1)
    first_seed: int = option(0, "seed of the first run; the other seeds follow it", minimum=0)
    chunk: int | None = option(None, "runs at once; automatic: 1 on a CPU, 20 on an accelerator", minimum=1)

    def parts(self, cells: Sequence[Cell]) -> list[Part]:
        """One part for each teacher and chunk of seeds, with all cells of that teacher.

        Raises:
            InputError: there is no cell.
        """
        if not cells:
            raise InputError("there is nothing to run: no setting is left")
        groups: dict[Hashable, list[Cell]] = {}
        for cell in cells:
            groups.setdefault(tuple(getattr(cell.setting, name) for name in OF_TEACHER), []).append(cell)
        found = []
        for number, group in enumerate(groups.values()):
            prefix = f"teacher-{number:03d}-" if len(groups) > 1 else ""
            found += self.chunks(functools.partial(run_cells, group, data_dir=self.data_dir), prefix, group)
        return found

    def chunks(
        self, run: Callable[[Sequence[int]], list[Row]], prefix: str = "", cells: Sequence[Cell] = ()
    ) -> list[Part]:
        """One part for each chunk of seeds that at least one cell runs."""
        seeds, chunk, found = range(self.first_seed, self.first_seed + self.seeds), self.chunk or 1, list[Part]()
        for first in range(0, len(seeds), chunk):
            chosen = seeds[first : first + chunk]
            if not cells or any(cell.seeds is None or first < cell.seeds for cell in cells):
                name = f"{prefix}seeds-{chosen[0]:05d}"
                found.append(Part(name, len(chosen), functools.partial(run, chosen)))
        return found


def run_cells(cells: Sequence[Cell], seeds: Sequence[int], data_dir: str | None = None) -> list[Row]:
    """The result rows of the cells of one teacher for some seeds, seed by seed."""
    wanted = [cell for cell in cells if cell.seeds is None or seeds[0] < cell.seeds]
    world = wanted[0].setting.world(seeds, data_dir)
    names = [labels(**cell.labels) for cell in wanted]
    runs = [cell.setting.run(world, cell.who, may_diverge=cell.may_diverge) for cell in wanted]
    scores = Study(world).run(dict(zip(names, runs, strict=True)))
    return [
        row
        for place, own in enumerate(world.labels)
        for name, cell in zip(names, wanted, strict=True)
        for row in rows(name, [own], {metric: scores[name][metric][place:] for metric in cell.metrics})
    ]


@dataclass(frozen=True)
class TrainingConfig(SweepConfig):
    """The settings of experiments that vary a few things around one training recipe."""

    data: str = option("mnist", "mnist | digits | auto (mnist, else digits) | a folder of idx files")
    epochs: int = option(5, "epochs of the teacher on the training images", minimum=1)
    student_epochs: int | None = option(None, "epochs of the students; automatic: the teacher's", minimum=1)
    batch_size: int = option(1024, "images per step", minimum=1)

    def dataset(self) -> ImageDataset:
        """The images."""
        return load_data(self.data, self.data_dir)

    def setting(self, **changes: Any) -> Setting:
        """The setting with this configuration's values. `changes` replace some of them."""
        own = {
            name: getattr(self, name) for name in (*OF_TEACHER, "inputs", "channel_loss") if hasattr(self, name)
        }
        epochs = {"teacher_epochs": self.epochs, "epochs": self.student_epochs or self.epochs}
        return Setting(**{**own, **epochs, **changes})


# With so few images, more epochs are needed to learn as much.
EMBEDDED_DIGITS: dict[str, Any] = {"data": "digits", "epochs": 9, "student_epochs": 27, "batch_size": 128}
# Runs all code in seconds but learns little.
SMOKE: dict[str, Any] = {**EMBEDDED_DIGITS, "seeds": 1, "epochs": 3, "student_epochs": 5}


def configure_sweep(
    presets: Mapping[str, SweepConfig], preset: str | None, changes: dict[str, Any]
) -> SweepConfig:
    """The configuration with its automatic values: available data, the preset for that data, and the chunk.

    Raises:
        InputError: a setting is wrong, or the data cannot be loaded.
    """
    config = replace(from_preset(presets, preset), **changes)
    validate(config)
    if isinstance(config, TrainingConfig):
        if config.data == "digits" and config.data_dir is not None:
            raise InputError(
                "--data-dir is a folder of idx files, but the digits are embedded: leave one of them out"
            )
        found = load_data(config.data, config.data_dir).name
        if preset is None and found == "digits" and "digits" in presets:
            preset = "digits"
        name = found if config.data == "auto" else config.data
        config = replace(from_preset(presets, preset), **{**changes, "data": name})
    if config.chunk is None:
        config = replace(config, chunk=1 if jax.default_backend() == "cpu" else 20)
    return config


def cnn_student(data: ImageDataset, width: int) -> dict[str, Any]:
    """Fields of a `Setting` for a student with five convolutions and as many features as an MLP's hidden layer.

    With 28 x 28 pixels and 256 features, its hidden layers have 392,320 parameters; those of the MLP have 266,752.
    A smaller network with three convolutions of 4, 8 and 16 channels (1,504 parameters) cannot imitate the MLP: in
    20 epochs of `mnist_heads`, its loss stays 3 to 5 times the loss of an MLP that does not share anything either.
    """
    height, breadth = data.image_shape
    maps = width // (-(-height // 32) * -(-breadth // 32))
    return {"student_network": "cnn", "student_depth": 5, "student_width": maps // 16}
