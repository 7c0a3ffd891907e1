"""From settings to trained runs: the parts of a sweep.

Cells with the same teacher share it. Students whose settings differ in mere values (initialisation, logits seen,
learning rate) train as one stack, on the same inputs and one pass of the teacher; those that differ in epochs only
are one student, seen several times.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from subliminal_theory.channel import Channel
from subliminal_theory.distill import Trained, require_finite
from subliminal_theory.errors import InputError
from subliminal_theory.keys import named
from subliminal_theory.model import Model
from subliminal_theory.runs import Row
from subliminal_theory.source import Examples, Source
from subliminal_theory.vision.datasets import ImageDataset

from .app.contract import Part, from_preset, option, validate
from .laboratory import Laboratory, data_of, load_data
from .setting import DIGITS, Cell, Setting


@dataclass(frozen=True)
class SweepConfig:
    """What every experiment of the MNIST laboratory can set."""

    data_dir: str | None = option(
        None, "where the idx files are (default $SUBLIMINAL_DATA, then the cache, then a download)", recorded=False
    )
    seeds: int = option(20, "independent runs", minimum=1)
    first_seed: int = option(0, "their seeds are this one and those that follow", minimum=0)
    chunk: int | None = option(None, "runs trained at once (1 on a CPU, 20 on an accelerator)", minimum=1)

    def parts(self, cells: Sequence[Cell]) -> list[Part]:
        """The parts of these cells for all seeds."""
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        return parts(cells, seeds, chunk=self.chunk or 1, data_dir=self.data_dir)


@dataclass(frozen=True)
class TrainingConfig(SweepConfig):
    """What experiments can set that vary a few things around one training recipe."""

    data: str = option("mnist", "mnist | digits | auto (mnist, else digits) | a folder of idx files")
    epochs: int = option(5, "passes of the teacher over the training images", minimum=1)
    student_epochs: int | None = option(None, "passes of the students (as the teacher)", minimum=1)
    batch_size: int = option(1024, "images a step", minimum=1)

    def dataset(self) -> ImageDataset:
        """The images."""
        return load_data(self.data, self.data_dir)

    def setting(self, **changes: Any) -> Setting:
        """The setting of this configuration; `changes` are what distinguishes it."""
        common = {
            "data": self.data,
            "teacher_epochs": self.epochs,
            "epochs": self.student_epochs or self.epochs,
            "batch_size": self.batch_size,
        }
        return Setting(**{**common, **changes})


# On so few images it takes more passes to learn as much.
EMBEDDED_DIGITS: dict[str, Any] = {"data": "digits", "epochs": 9, "student_epochs": 27, "batch_size": 128}


def configure_sweep(
    presets: Mapping[str, SweepConfig], preset: str | None, changes: dict[str, Any]
) -> SweepConfig:
    """Resolve what is automatic: data that can be had, the preset that suits them, the chunk."""
    config = dataclasses.replace(from_preset(presets, preset), **changes)
    validate(config)
    if isinstance(config, TrainingConfig):
        if config.data == "digits" and config.data_dir is not None:
            raise InputError(
                "--data-dir is a folder of idx files, but the digits are embedded: leave one of the two out"
            )
        found = load_data(config.data, config.data_dir).name
        if preset is None and found == "digits" and "digits" in presets:
            preset = "digits"
        name = found if config.data == "auto" else config.data
        config = dataclasses.replace(from_preset(presets, preset), **{**changes, "data": name})
    if config.chunk is None:
        config = dataclasses.replace(config, chunk=1 if jax.default_backend() == "cpu" else 20)
    return config


def chunks(seeds: range, chunk: int, run: Callable[[Sequence[int]], list[Row]]) -> list[Part]:
    """A part for each chunk of seeds."""
    groups = [seeds[first : first + chunk] for first in range(0, len(seeds), chunk)]
    return [Part(f"seeds-{group[0]:05d}", len(group), functools.partial(run, group)) for group in groups]


def parts(cells: Sequence[Cell], seeds: range, *, chunk: int = 1, data_dir: str | None = None) -> list[Part]:
    """A part for each teacher and chunk of seeds, with all the cells of that teacher.

    Raises:
        InputError: there is no cell.
    """
    if not cells:
        raise InputError("there is nothing to run: no setting is left")
    groups: dict[Setting, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.setting.teacher_only(), []).append(cell)
    found = []
    for number, group in enumerate(groups.values()):
        prefix = f"teacher-{number:03d}-" if len(groups) > 1 else ""
        for first in range(0, len(seeds), chunk):
            chosen = seeds[first : first + chunk]
            wanted = [cell for cell in group if cell.seeds is None or first < cell.seeds]
            if not wanted:
                continue
            name = f"{prefix}seeds-{chosen[0]:05d}"
            found.append(Part(name, len(chosen), functools.partial(run_group, wanted, chosen, data_dir)))
    return found


@dataclass(frozen=True)
class Classroom:
    """The teachers of some seeds: where they started, what they became, and the keys of their runs."""

    laboratory: Laboratory
    seeds: Sequence[int]
    keys: Key[Array, " runs"]
    other_keys: Key[Array, " runs"]
    init: Model
    teacher: Model

    def start(self, setting: Setting) -> Model:
        """Where the students of a setting start, before any cloning."""
        return _start(self.laboratory.at(setting), self.init, self.keys, self.other_keys)

    def stream(self, name: str) -> Key[Array, " runs"]:
        """A named random stream of each run."""
        return jax.vmap(lambda key: named(key, name))(self.keys)


def classroom(setting: Setting, seeds: Sequence[int], data_dir: str | None = None) -> Classroom:
    """Teach the teachers of a setting for some seeds."""
    setting = setting.teacher_only()
    data = data_of(setting, data_dir)
    laboratory = Laboratory(setting, data)
    # The control starts where the teacher of the next seed started: no run is its own control.
    keys, other_keys = (jax.vmap(jax.random.key)(jnp.asarray(seeds) + shift) for shift in (0, 1))
    init = _initial(laboratory, keys)
    rate = jnp.float32(setting.learning_rate)
    taught = _teach(_shapes(laboratory), init, _digits(data, setting.batch_size), rate, keys)
    require_finite(taught.losses, [f"the teacher of seed {seed}" for seed in seeds])
    return Classroom(laboratory, seeds, keys, other_keys, init, taught.model)


def run_group(cells: Sequence[Cell], seeds: Sequence[int], data_dir: str | None = None) -> list[Row]:
    """Rows of the cells of one teacher for some seeds."""
    data = data_of(cells[0].setting, data_dir)
    names = {cell.setting: cell.labels["condition"] for cell in reversed(cells) if cell.who == "student"}
    tame = {cell.setting for cell in cells if cell.who == "student" and not cell.may_diverge}
    students = {setting: Laboratory(setting, data) for setting in reversed(names)}
    room = classroom(cells[0].setting, seeds, data_dir)
    laboratory, init, teacher = room.laboratory, room.init, room.teacher
    starts = _cloned({student: room.start(student) for student in students}, room)
    for student in students:
        students[student].audit(starts[student], init, teacher)
    finished = _distilled(starts, room, teacher, "students", {setting: names[setting] for setting in tame})

    values: dict[tuple[Any, str], np.ndarray] = {}
    everyone: dict[Any, Model] = {"reference": init, "teacher": teacher}
    for student, (model, loss) in finished.items():
        everyone[student], values[student, "imitation_loss"] = model, loss
    for whose, model in everyone.items():
        values[whose, laboratory.setting.accuracy] = np.asarray(
            _accuracy(_shapes(laboratory), model, *_test(data))
        )
    return [
        {
            **cell.labels,
            "seed": int(seed),
            "metric": metric,
            "value": float(values[cell.setting if cell.who == "student" else cell.who, metric][place]),
        }
        for place, seed in enumerate(seeds)
        for cell in cells
        for metric in cell.metrics
    ]


def _shapes(laboratory: Laboratory) -> Laboratory:
    return laboratory.at(laboratory.setting.shapes_only())


def _distilled(
    starts: Mapping[Setting, Model], room: Classroom, teacher: Model, stream: str, names: Mapping[Setting, str]
) -> dict[Setting, tuple[Model, np.ndarray]]:
    """What the students of each setting have become, and their loss, mean over the last epoch.

    Settings that differ in epochs only are one run, seen several times. Those with a name may not diverge.
    """
    runs: dict[Setting, list[Setting]] = {}
    for setting in starts:
        runs.setdefault(dataclasses.replace(setting, epochs=1), []).append(setting)
    seen = {max(alike, key=lambda setting: setting.epochs): alike for alike in runs.values()}
    stacks: dict[Setting, list[Setting]] = {}
    for setting in seen:
        stacks.setdefault(setting.student_shapes(), []).append(setting)
    found = {}
    for stack in stacks.values():
        laboratories = [room.laboratory.at(setting) for setting in stack]
        epoch = laboratories[0].steps(1, _source(laboratories[0]))
        stops = sorted({setting.epochs for one in stack for setting in seen[one]})
        run = _imitate_stack(
            laboratories,
            [starts[setting] for setting in stack],
            teacher,
            room.stream(stream),
            tuple(epoch * stop for stop in stops[:-1]),
        )
        tame = {place: names[s] for place, one in enumerate(stack) for s in reversed(seen[one]) if s in names}
        if tame:
            losses = run.losses[:, list(tame)].reshape(-1, run.losses.shape[-1])
            require_finite(losses, [f"{name} of seed {seed}" for seed in room.seeds for name in tame.values()])
        models = dict(zip(stops, (*run.snapshots, run.model), strict=True))
        for place, one in enumerate(stack):
            for setting in seen[one]:
                losses = run.losses[:, place, epoch * (setting.epochs - 1) : epoch * setting.epochs]
                found[setting] = _nth(models[setting.epochs], place), np.asarray(losses.mean(-1))
    return found


def _imitate_stack(
    stack: Sequence[Laboratory],
    starts: Sequence[Model],
    teacher: Model,
    keys: Key[Array, " runs"],
    snapshots: tuple[int, ...] = (),
) -> Trained:
    """Students [runs, stack, ...] of one shape, distilled together."""
    models, channels = _stacked(starts, 1), _stacked([laboratory.channel() for laboratory in stack], 0)
    rates = jnp.asarray([laboratory.setting.rate for laboratory in stack], jnp.float32)
    source = _source(stack[0])
    shapes = stack[0].at(stack[0].setting.student_shapes())
    return _imitate(shapes, models, teacher, channels, source, rates, keys, snapshots)


def _start(laboratory: Laboratory, init: Model, keys: Key[Array, " runs"], others: Key[Array, " runs"]) -> Model:
    shapes = dataclasses.replace(laboratory.setting.student_shapes(), start=laboratory.setting.start, epochs=1)
    amount = jnp.float32(laboratory.setting.amount)
    return _started(laboratory.at(shapes), init, keys, others, amount)


def _cloned(starts: Mapping[Setting, Model], room: Classroom) -> dict[Setting, Model]:
    """The starts, those to be cloned matched first; students cloned alike share one run."""
    jobs = {
        student: dataclasses.replace(student.cloning(), epochs=student.cloning_epochs)
        for student in starts
        if student.cloning_epochs
    }
    names = dict.fromkeys(jobs.values(), "a cloning run")
    matched = _distilled({job: starts[student] for student, job in jobs.items()}, room, room.init, "clone", names)
    return {**starts, **{student: matched[job][0] for student, job in jobs.items()}}


def _nth(models: Model, place: int) -> Model:
    return jax.tree.map(lambda leaf: leaf[:, place], models)


def _stacked(trees: Sequence[Any], axis: int) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *trees)


@functools.cache
def _digits(data: ImageDataset, batch_size: int) -> Examples:
    return Laboratory(Setting(batch_size=batch_size), data).digits()


@functools.cache
def _test(data: ImageDataset) -> tuple[Array, Array]:
    return Laboratory(Setting(), data).test()


def _source(laboratory: Laboratory) -> Source:
    if laboratory.setting.inputs == DIGITS:
        return _digits(laboratory.data, laboratory.setting.batch_size).without_labels()
    return laboratory.source()


# Compiled once for every shape: a laboratory is static, all that it holds besides shapes comes as an argument.
@functools.partial(jax.jit, static_argnames="laboratory")
def _initial(laboratory: Laboratory, keys: Key[Array, " runs"]) -> Model:
    return jax.vmap(laboratory.initial)(keys)


@functools.partial(jax.jit, static_argnames="laboratory")
def _started(
    laboratory: Laboratory, init: Model, keys: Key[Array, " runs"], others: Key[Array, " runs"], amount: Array
) -> Model:
    return jax.vmap(laboratory.start, in_axes=(0, 0, 0, None))(init, keys, others, amount)


@functools.partial(jax.jit, static_argnames="laboratory")
def _teach(
    laboratory: Laboratory, init: Model, digits: Examples, rate: Array, keys: Key[Array, " runs"]
) -> Trained:
    return jax.vmap(laboratory.teach, in_axes=(0, None, None, 0))(init, digits, rate, keys)


@functools.partial(jax.jit, static_argnames=("laboratory", "snapshots"))
def _imitate(
    laboratory: Laboratory,
    students: Model,
    teacher: Model,
    channels: Channel,
    source: Source,
    rates: Float[Array, " stack"],
    keys: Key[Array, " runs"],
    snapshots: tuple[int, ...],
) -> Trained:
    imitate = functools.partial(laboratory.imitate, snapshots=snapshots)
    return jax.vmap(imitate, in_axes=(0, 0, None, None, None, 0))(students, teacher, channels, source, rates, keys)


@functools.partial(jax.jit, static_argnames="laboratory")
def _accuracy(laboratory: Laboratory, models: Model, images: Array, labels: Array) -> Float[Array, " runs"]:
    return jax.vmap(laboratory.accuracy, in_axes=(0, None, None))(models, images, labels)
