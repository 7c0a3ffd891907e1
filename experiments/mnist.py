"""Auxiliary-logit distillation: a student that never sees a digit learns to read digits from noise.

A teacher MLP learns digits on its first ten logits; m auxiliary logits are never trained. A student that
starts at the teacher's initialisation imitates the teacher's auxiliary logits on noise images alone, and
then reads digits with its own, never trained, class logits. A student of another initialisation does not.
(doi 10.1038/s41586-026-10319-8, main text and Extended Data Fig. 2.)
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Key
from matplotlib.figure import Figure

from experiments.contract import Part, from_preset, option, validate
from experiments.figures import bars
from subliminal_theory.audit import audit, require_same_template
from subliminal_theory.channel import Channel, SoftLogits, SquaredError, Subset
from subliminal_theory.distill import Trained, distill, require_finite, teach
from subliminal_theory.errors import InputError
from subliminal_theory.keys import named
from subliminal_theory.model import Model, from_nnx
from subliminal_theory.runs import Results, Row
from subliminal_theory.source import Batch, Examples
from subliminal_theory.vision.datasets import ImageDataset, load
from subliminal_theory.vision.mlp import MLP
from subliminal_theory.vision.noise import UniformNoise

STUDENTS = ("student_aux", "student_all", "cross_aux", "cross_all")
CONDITIONS = ("reference", "teacher", *STUDENTS)
LABELS = {
    "reference": "reference\n(untrained)",
    "teacher": "teacher",
    "student_aux": "student,\nauxiliary\nlogits",
    "student_all": "student,\nall logits",
    "cross_aux": "other init,\nauxiliary\nlogits",
    "cross_all": "other init,\nall logits",
}
OPTIMIZERS = {
    "adam": optax.adam,
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
}


@dataclass(frozen=True)
class Config:
    """Settings of the six-condition experiment; the defaults are those of the released script."""

    data: str = option("mnist", "mnist | digits | auto (mnist, else digits) | a folder of idx files")
    data_dir: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "where the idx files are (default $SUBLIMINAL_DATA, then the cache, then a download)",
            "recorded": False,
        },
    )
    seeds: int = option(20, "independent runs, seeds 0, 1, ...", minimum=1)
    aux: int = option(3, "m, the number of auxiliary logits", minimum=1)
    width: int = option(256, "neurons of each hidden layer", minimum=1)
    depth: int = option(2, "hidden layers", minimum=0)
    epochs: int = option(5, "passes of the teacher over the training images", minimum=1)
    student_epochs: int | None = option(None, "passes of the students over the noise (as the teacher)", minimum=1)
    noise_images: int | None = option(
        None,
        "noise images per run, repeated each epoch (as many as training images; 0: never repeat)",
        minimum=0,
    )
    noise_bits: int = option(32, "random bits a noise pixel", choices=(8, 32))
    batch_size: int = option(1024, "images a step", minimum=1)
    optimizer: str = option("adam", "of teacher and students, fresh for each", choices=tuple(OPTIMIZERS))
    learning_rate: float = option(3e-4, "step size of the optimizer", positive=True)
    channel_loss: str = option("kl", "what the student descends", choices=("kl", "mse"))
    chunk: int | None = option(None, "runs trained at once (1 on a CPU, 20 on an accelerator)", minimum=1)


PRESETS = {
    "released": Config(),
    "nature": Config(aux=50),
    "digits": Config(data="digits", aux=50, epochs=9, student_epochs=27, batch_size=128),
}


def configure(preset: str | None, changes: dict[str, Any]) -> Config:
    """Resolve what is automatic: data that can be had, the preset that suits them, the chunk."""
    asked = dataclasses.replace(from_preset(PRESETS, preset), **changes)
    validate(asked)
    wanted = asked.data
    if wanted == "digits" and asked.data_dir is not None:
        raise InputError(
            "--data-dir is a folder of idx files, but the digits are embedded: leave one of the two out"
        )
    data = load_data(wanted, asked.data_dir)
    if preset is None and data.name == "digits":
        preset = "digits"
    name = data.name if wanted == "auto" else wanted
    config = dataclasses.replace(from_preset(PRESETS, preset), **{**changes, "data": name})
    if config.chunk is None:
        config = dataclasses.replace(config, chunk=1 if jax.default_backend() == "cpu" else 20)
    return config


@functools.cache
def load_data(name: str, data_dir: str | None) -> ImageDataset:
    """A data set of this experiment, read once a process."""
    return load(name, Path(data_dir) if data_dir is not None else None)


@dataclass(frozen=True)
class Scale:
    """Pixels 0..maximum to [-1, 1]."""

    maximum: int

    def __call__(self, pixels: Array) -> Float[Array, "..."]:
        """Scaled pixels in float32."""
        return pixels.astype(jnp.float32) * (2 / self.maximum) - 1


@dataclass(frozen=True)
class Laboratory:
    """The experiment for one data set and one configuration, as pure functions of run keys."""

    config: Config
    data: ImageDataset

    @property
    def outputs(self) -> int:
        """Class logits and auxiliary logits."""
        return self.data.classes + self.config.aux

    @property
    def scale(self) -> Scale:
        """The preparation of pixels."""
        return Scale(self.data.maximum)

    def digits(self) -> Examples:
        """The teacher's labelled training images, kept as bytes on the device."""
        labels = jnp.asarray(self.data.train_labels.astype(np.int32))
        images = jnp.asarray(self.data.train_images)
        return Examples(images, self.config.batch_size, labels, prepare=self.scale)

    def test(self) -> tuple[Array, Array]:
        """Test images as bytes, and their labels."""
        return jnp.asarray(self.data.test_images), jnp.asarray(self.data.test_labels.astype(np.int32))

    @property
    def noise(self) -> UniformNoise:
        """What the students are shown."""
        images = len(self.data.train_labels) if self.config.noise_images is None else self.config.noise_images
        return UniformNoise(self.data.image_shape, self.config.batch_size, images or None, self.config.noise_bits)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Of teacher and students alike."""
        return OPTIMIZERS[self.config.optimizer](self.config.learning_rate)

    def steps(self, images: int, epochs: int) -> int:
        """Steps of so many epochs, the last batch of each perhaps partial."""
        return epochs * -(-images // self.config.batch_size)

    def initial(self, key: Key[Array, ""]) -> Model:
        """The network of one run before anything is trained."""
        pixels = self.data.image_shape[0] * self.data.image_shape[1]
        sizes = (pixels, *[self.config.width] * self.config.depth, self.outputs)
        return from_nnx(MLP(sizes, rngs=nnx.Rngs(named(key, "init"))))

    def channels(self) -> Channel:
        """The channels of `STUDENTS`, stacked: auxiliary logits or all, in turn."""
        of = SoftLogits() if self.config.channel_loss == "kl" else SquaredError()
        auxiliary = jnp.arange(self.outputs) >= self.data.classes
        everything = jnp.ones(self.outputs, bool)
        masks = [auxiliary if name.endswith("aux") else everything for name in STUDENTS]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *[Subset(mask, of) for mask in masks])

    def trait_loss(self, logits: Float[Array, "batch n"], labels: Array) -> Float[Array, "batch"]:
        """Cross-entropy of the class logits."""
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, : self.data.classes], labels)

    def teacher(self, model: Model, digits: Examples, key: Key[Array, ""]) -> Trained:
        """Teach one run's network to read digits."""
        steps = self.steps(len(self.data.train_labels), self.config.epochs)
        return teach(model, self.trait_loss, digits, self.optimizer, steps, named(key, "teacher"))

    def students(self, models: Model, teacher: Model, channels: Channel, key: Key[Array, ""]) -> Trained:
        """Distil one run's students, stacked on a leading axis: they share the noise and the teacher's pass."""
        images = self.noise.images or len(self.data.train_labels)
        steps = self.steps(images, self.config.student_epochs or self.config.epochs)

        def one(student: Model, channel: Channel) -> Trained:
            return distill(student, teacher, channel, self.noise, self.optimizer, steps, named(key, "students"))

        return jax.vmap(one)(models, channels)

    def accuracy(self, model: Model, images: Array, labels: Array) -> Float[Array, ""]:
        """Share of test images whose largest class logit is the label."""
        logits = model(self.scale(images))[:, : self.data.classes]
        return jnp.mean(jnp.argmax(logits, axis=-1) == labels)


def plan(config: Config) -> list[Part]:
    """Seeds in chunks."""
    return in_chunks(config, compile_chunk(Laboratory(config, load_data(config.data, config.data_dir))))


def in_chunks(config: Config, run_chunk: Callable[[Sequence[int]], list[Row]]) -> list[Part]:
    """A part for each chunk of seeds."""
    chunk = config.chunk or 1
    starts = range(0, config.seeds, chunk)
    groups = [range(start, min(start + chunk, config.seeds)) for start in starts]
    return [Part(f"seeds-{seeds[0]:05d}", len(seeds), functools.partial(run_chunk, seeds)) for seeds in groups]


def compile_chunk(laboratory: Laboratory) -> Callable[[Sequence[int]], list[Row]]:
    """A function from seeds to rows; it is compiled at its first call and keeps the data on the device."""
    digits, test = laboratory.digits(), laboratory.test()
    require_same_template(teacher=repr(digits.prepare), evaluation=repr(laboratory.scale))
    channels = laboratory.channels()
    initial = jax.jit(jax.vmap(laboratory.initial))
    teach_all = jax.jit(jax.vmap(laboratory.teacher, in_axes=(0, None, 0)))
    distil_all = jax.jit(jax.vmap(laboratory.students, in_axes=(0, 0, None, 0)))
    measure = jax.jit(jax.vmap(jax.vmap(laboratory.accuracy, in_axes=(0, None, None)), in_axes=(0, None, None)))

    def run(seeds: Sequence[int]) -> list[Row]:
        seed = jnp.asarray(seeds)
        keys = jax.vmap(jax.random.key)(seed)
        init = initial(keys)
        # The control starts where the teacher of the next seed started: no run is its own control.
        other = initial(jax.vmap(jax.random.key)(seed + 1))
        teacher = teach_all(init, digits, keys)
        require_finite(teacher.losses, [f"the teacher of seed {s}" for s in seeds])
        starts = [other if name.startswith("cross") else init for name in STUDENTS]
        for name, start in zip(STUDENTS, starts, strict=True):
            audit_student(laboratory, name, start, init, teacher.model)
        models = jax.tree.map(lambda *leaves: jnp.stack(leaves, 1), *starts)
        students = distil_all(models, teacher.model, channels, keys)
        require_finite(students.losses, [f"a student of seed {s}" for s in seeds])
        everyone = jax.tree.map(
            lambda a, b, c: jnp.concatenate([a[:, None], b[:, None], c], 1),
            *(init, teacher.model, students.model),
        )
        accuracy = np.asarray(measure(everyone, *test))
        return [
            {"condition": name, "seed": int(s), "metric": "test_accuracy", "value": float(value)}
            for s, values in zip(seeds, accuracy, strict=True)
            for name, value in zip(CONDITIONS, values, strict=True)
        ]

    return run


def first_batch(source: UniformNoise, key: Key[Array, ""]) -> Batch:
    """What a student is shown first."""
    return source.batch(key, jax.tree.map(lambda leaf: leaf[0], source.schedule(key, 1)))


def audit_student(laboratory: Laboratory, name: str, start: Model, init: Model, teacher: Model) -> None:
    """Refuse what would make a student's accuracy meaningless."""
    classes = laboratory.data.classes
    key = named(jax.random.key(0), "audit")
    audit(
        student_init=start.params,
        teacher_init=init.params,
        teacher=teacher.params,
        channel=jax.tree.map(lambda leaf: leaf[STUDENTS.index(name)], laboratory.channels()),
        logits=laboratory.outputs,
        batch=jax.eval_shape(lambda: first_batch(laboratory.noise, key)),
        private=range(classes) if name.endswith("aux") else (),
        cross_init=name.startswith("cross"),
    )


def report(results: Results, config: Config) -> str:
    """A line for each condition."""
    lines = [f"test accuracy on {config.data}, mean and 95% t interval over runs"]
    for group, estimate in results.estimates():
        lines.append(f"  {group['condition']:12} {estimate}")
    return "\n".join(lines)


def plot(results: Results, config: Config) -> Figure:
    """Bars with intervals, single runs as dots."""
    groups = {LABELS[name]: results.values(condition=name) for name in CONDITIONS}
    title = (
        f"{config.data}, m = {config.aux} auxiliary logits, {config.channel_loss.upper()}: "
        "digits are read from imitating noise"
    )
    return bars(groups, ylabel="test accuracy (share of digits read)", title=title, chance=0.1)
