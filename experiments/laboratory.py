"""One setting of the MNIST experiments on its data, as pure functions of run keys."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Key

from subliminal_theory.audit import audit, require_same_template
from subliminal_theory.channel import Channel, SoftLogits, SquaredError, Subset
from subliminal_theory.distill import Trained, distill, teach
from subliminal_theory.errors import InputError
from subliminal_theory.inits import Fresh, Interpolated, Perturbed, Policy, Shared, initialise
from subliminal_theory.keys import named
from subliminal_theory.model import Model, from_nnx
from subliminal_theory.source import Examples, Source, batch_shapes
from subliminal_theory.vision.cnn import CNN
from subliminal_theory.vision.datasets import ImageDataset, load
from subliminal_theory.vision.mlp import MLP
from subliminal_theory.vision.noise import NoiseImages

from .setting import DIGITS, OPTIMIZERS, Setting


@functools.cache
def load_data(name: str, data_dir: str | None) -> ImageDataset:
    """A data set of these experiments, read once a process."""
    return load(name, Path(data_dir) if data_dir is not None else None)


@functools.cache
def _held_out(data: ImageDataset) -> ImageDataset:
    return data.held_out()


def data_of(setting: Setting, data_dir: str | None) -> ImageDataset:
    """The data of a setting."""
    data = load_data(setting.data, data_dir)
    return _held_out(data) if setting.validation else data


@dataclass(frozen=True)
class Scale:
    """Pixels 0..maximum to [-1, 1]."""

    maximum: int

    def __call__(self, pixels: Array) -> Float[Array, "..."]:
        """Scaled pixels in float32."""
        return pixels.astype(jnp.float32) * (2 / self.maximum) - 1


@dataclass(frozen=True)
class Laboratory:
    """One setting on its data, as pure functions of run keys.

    Raises:
        InputError: the student is to share an output layer that its network cannot have.
    """

    setting: Setting
    data: ImageDataset

    def __post_init__(self) -> None:
        if self.setting.start == "shared_heads" and self.setting.other_architecture:
            own, shared = self.at(self.setting.student_architecture()).output_layer(), self.output_layer()
            if own != shared:
                raise InputError(
                    f"a student with an output layer of {own} cannot share its teacher's of {shared}: give both "
                    "as many features, and biases or none"
                )

    @property
    def outputs(self) -> int:
        """Class logits and auxiliary logits."""
        return self.data.classes + self.setting.aux

    @property
    def scale(self) -> Scale:
        """The preparation of pixels."""
        return Scale(self.data.maximum)

    def digits(self) -> Examples:
        """The teacher's labelled training images, kept as bytes on the device."""
        labels = jnp.asarray(self.data.train_labels.astype(np.int32))
        images = jnp.asarray(self.data.train_images)
        return Examples(images, self.setting.batch_size, labels, prepare=self.scale)

    def test(self) -> tuple[Array, Array]:
        """Test images as bytes, and their labels."""
        return jnp.asarray(self.data.test_images), jnp.asarray(self.data.test_labels.astype(np.int32))

    def source(self) -> Source:
        """What the student is shown: noise, or the training images without their labels."""
        if self.setting.inputs == DIGITS:
            return self.digits().without_labels()
        images = len(self.data.train_labels) if self.setting.images is None else self.setting.images
        return NoiseImages(self.data.image_shape, self.setting.batch_size, images or None, self.setting.inputs)

    def steps(self, epochs: float, source: Source | None = None) -> int:
        """Steps of so many epochs over a source or the training images, the last batch of each perhaps partial.

        Part of an epoch is a whole number of steps, rounded up.
        """
        images = source.images if isinstance(source, NoiseImages) else None
        epoch = -(-(images or len(self.data.train_labels)) // self.setting.batch_size)
        return math.ceil(Fraction(str(epochs)) * epoch)

    def initial(self, key: Key[Array, ""]) -> Model:
        """The teacher's network of one run before anything is trained."""
        setting, rngs = self.setting, nnx.Rngs(named(key, "init"))
        height, width = self.data.image_shape
        if setting.network == "cnn":
            channels = [setting.width * 2**layer for layer in range(setting.depth)]
            network: Callable[..., nnx.Module] = functools.partial(
                CNN, self.data.image_shape, channels, self.outputs
            )
        else:
            height, width = self.data.image_shape
            network = functools.partial(MLP, (height * width, *[setting.width] * setting.depth, self.outputs))
        return from_nnx(
            network(activation=setting.activation, use_bias=setting.bias, init_law=setting.init_law, rngs=rngs)
        )

    def output_layer(self) -> str:
        """The shapes of the teacher's output layer."""
        layers = jax.eval_shape(self.initial, jax.random.key(0)).params["layers"]
        return ", ".join(f"{name} {leaf.shape}" for name, leaf in layers[self.setting.depth].items())

    def at(self, setting: Setting) -> "Laboratory":
        """The same data under another setting."""
        return dataclasses.replace(self, setting=setting)

    def start(self, init: Model, key: Key[Array, ""], other_key: Key[Array, ""], amount: Array | float) -> Model:
        """Where the student starts, before any cloning; `init` is where its teacher started."""
        student = self.at(self.setting.student_architecture())
        other, output = student.initial(other_key), student.setting.depth
        if self.setting.start in ("shared", "cross"):
            return init if self.setting.start == "shared" else other
        if self.setting.start == "shared_heads":
            layers = {**other.params["layers"], output: init.params["layers"][self.setting.depth]}
            return other.with_params({**other.params, "layers": layers})
        heads = f"layers/{output}/*"
        policies: dict[str, Policy | Mapping[str, Policy]] = {
            "perturbed": Perturbed(amount),
            "perturbed_hidden": {heads: Shared(), "*": Perturbed(amount)},
            "interpolated": Interpolated(amount),
            "shared_hidden": {heads: Fresh(), "*": Shared()},
        }
        params = initialise(policies[self.setting.start], init.params, other.params, named(key, "start"))
        return init.with_params(params)

    def channel(self) -> Channel:
        """What of the teacher the student sees."""
        logit = jnp.arange(self.outputs)
        shown = self.data.classes + (self.setting.shown or self.setting.aux)
        masks = {
            "aux": (logit >= self.data.classes) & (logit < shown),
            "all": logit < shown,
            "classes": logit < self.data.classes,
        }
        of = SoftLogits() if self.setting.channel_loss == "kl" else SquaredError()
        return Subset(masks[self.setting.sees], of)

    def trait_loss(self, logits: Float[Array, "batch n"], labels: Array) -> Float[Array, "batch"]:
        """Cross-entropy of the class logits."""
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, : self.data.classes], labels)

    def teach(self, model: Model, digits: Examples, rate: Float[Array, ""], key: Key[Array, ""]) -> Trained:
        """Teach one run's network to read digits."""
        optimizer = OPTIMIZERS[self.setting.optimizer](rate)
        steps = self.steps(self.setting.teacher_epochs)
        return teach(model, self.trait_loss, digits, optimizer, steps, named(key, "teacher"))

    def student_optimizer(self, rate: Float[Array, ""] | float) -> optax.GradientTransformation:
        """The student's optimiser at a learning rate."""
        return OPTIMIZERS[self.setting.student_optimizer or self.setting.optimizer](rate)

    def imitate(
        self,
        students: Model,
        teacher: Model,
        channels: Channel,
        source: Source,
        rates: Float[Array, " students"],
        key: Key[Array, ""],
        snapshots: tuple[int, ...] = (),
    ) -> Trained:
        """Distil one run's students, stacked on a leading axis: they share the inputs and the teacher's pass."""
        steps = self.steps(self.setting.epochs, source)

        def one(student: Model, channel: Channel, rate: Float[Array, ""]) -> Trained:
            optimizer = self.student_optimizer(rate)
            return distill(student, teacher, channel, source, optimizer, steps, key, snapshots=snapshots)

        return jax.vmap(one)(students, channels, rates)

    def accuracy(self, model: Model, images: Array, labels: Array) -> Float[Array, ""]:
        """Share of test images whose largest class logit is the label."""
        logits = model(self.scale(images))[:, : self.data.classes]
        return jnp.mean(jnp.argmax(logits, axis=-1) == labels)

    def audit(self, start: Model, init: Model, teacher: Model) -> None:
        """Refuse what would make a student's accuracy meaningless; models have a leading axis of runs."""
        source = self.source()
        prepare = source.prepare if isinstance(source, Examples) else self.scale
        require_same_template(teacher=repr(self.scale), student=repr(prepare))
        audit(
            student_init=start.params,
            teacher_init=init.params,
            teacher=teacher.params,
            channel=self.channel(),
            logits=self.outputs,
            batch=batch_shapes(source),
            private=range(self.data.classes) if self.setting.sees == "aux" else (),
            cross_init=self.setting.start == "cross",
        )


def cnn_student(data: ImageDataset, width: int) -> dict[str, Any]:
    """Fields of a `Setting`: a student of five convolutions with as many features as an MLP's hidden layer.

    At 28 x 28 pixels and 256 features its hidden layers have 392,320 parameters, those of the MLP 266,752. Three
    convolutions of 4, 8 and 16 channels, 1,504 parameters, cannot imitate it: in 20 epochs of `mnist_heads` their
    loss stays 3 to 5 times that of an MLP that shares nothing either.
    """
    height, breadth = data.image_shape
    maps = width // (-(-height // 32) * -(-breadth // 32))
    return {"student_network": "cnn", "student_depth": 5, "student_width": maps // 16}
