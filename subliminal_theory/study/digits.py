"""Digits as a world. The trait is to know the labels of images; auxiliary logits of the network have no labels."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Key

from subliminal_theory.audit import require_same_template
from subliminal_theory.errors import InputError
from subliminal_theory.inits import Fresh, PerLayer, Policy, Shared, initialise
from subliminal_theory.keys import named
from subliminal_theory.model import Model, from_nnx
from subliminal_theory.source import Examples, Source
from subliminal_theory.study.run import FineTuned, Student, Teacher
from subliminal_theory.study.stages import Computation
from subliminal_theory.study.world import Finished, Memo, restricted
from subliminal_theory.vision.cnn import CNN
from subliminal_theory.vision.datasets import ImageDataset
from subliminal_theory.vision.mlp import MLP
from subliminal_theory.vision.noise import NoiseImages


@dataclass(frozen=True)
class Scale:
    """Scales pixels from 0..maximum to [-1, 1]."""

    maximum: int

    def __call__(self, pixels: Array) -> Float[Array, "..."]:
        """The scaled pixels in float32."""
        return pixels.astype(jnp.float32) * (2 / self.maximum) - 1


@dataclass(frozen=True)
class ClassLoss:
    """Cross-entropy of the class logits, in nats."""

    classes: int

    def __call__(self, logits: Float[Array, "batch n"], labels: Array) -> Float[Array, " batch"]:
        """One value per image."""
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, : self.classes], labels)


@dataclass(frozen=True)
class Network:
    """The shape of a multilayer perceptron, or of a convolutional network whose width doubles with every layer."""

    convolutional: bool = False
    depth: int = 2
    width: int = 256
    activation: str = "relu"
    bias: bool = True
    init_law: str = "lecun_normal"

    def build(self, image_shape: tuple[int, int], outputs: int, rngs: nnx.Rngs) -> nnx.Module:
        """The untrained module."""
        options: dict[str, Any] = {"activation": self.activation, "use_bias": self.bias, "init_law": self.init_law}
        if self.convolutional:
            channels = [self.width * 2**layer for layer in range(self.depth)]
            return CNN(image_shape, channels, outputs, rngs=rngs, **options)
        sizes = (math.prod(image_shape), *[self.width] * self.depth, outputs)
        return MLP(sizes, rngs=rngs, **options)

    @property
    def output_layer(self) -> str:
        """A glob pattern for the parameters of the output layer."""
        return f"layers/{self.depth}/*"


@dataclass(frozen=True)
class TrainingImages:
    """A student's source: the images that taught the teacher, without their labels."""


@dataclass(frozen=True, eq=False)
class Digits:
    """Runs of a network on labeled images, one for each seed.

    A student with a fresh start (a control) starts from the draw of the next seed. The class logits come first,
    then `auxiliary` more logits. If `data` is `data.held_out()`, accuracy is measured on held-out training images.
    """

    data: ImageDataset
    seeds: Sequence[int]
    network: Network = field(default_factory=Network)
    auxiliary: int = 3
    batch_size: int = 1024
    metric: str = "test_accuracy"
    memo: Memo = field(default_factory=Memo, init=False)

    computation = Computation()

    @property
    def names(self) -> list[str]:
        """The names of the runs in messages."""
        return [f"seed {seed}" for seed in self.seeds]

    @property
    def labels(self) -> list[Mapping[str, Any]]:
        """The labels of each run's result rows."""
        return [{"seed": int(seed)} for seed in self.seeds]

    @property
    def logits(self) -> int:
        """The number of class logits and auxiliary logits."""
        return self.data.classes + self.auxiliary

    @property
    def trait_loss(self) -> ClassLoss:
        """Cross-entropy of the class logits."""
        return ClassLoss(self.data.classes)

    @property
    def scale(self) -> Scale:
        """How pixels are scaled."""
        return Scale(self.data.maximum)

    def _roots(self, shift: int = 0) -> Key[Array, " runs"]:
        return jax.vmap(jax.random.key)(jnp.asarray(self.seeds) + shift)

    def keys(self, stream: str) -> Key[Array, " runs"]:
        """The random stream of each run with this name."""
        return jax.vmap(lambda key: named(key, stream))(self._roots())

    def builder(self, network: Network | None = None) -> Callable[[Key[Array, ""]], Model]:
        """A function from a key to an untrained model."""
        return _Builder(network or self.network, self.data.image_shape, self.logits)

    def initial(self) -> Model:
        """The untrained teachers, a model of runs."""
        return self.memo(lambda: _initial(self.builder(), self._roots()), "initial")

    def start(self, student: Student, matched: Model | None = None) -> Model:
        """Where students start. The policy applies to the teacher's parameters.

        A student with another network shares only the teacher's output layer.
        """
        return restricted(matched or self._begin(student), student)

    def _begin(self, student: Student) -> Model:
        if isinstance(student.start, Shared) and student.network is None:
            return self.initial()
        own = student.network or self.network
        assert isinstance(own, Network)
        head, initial = None, None if own != self.network and isinstance(student.start, Fresh) else self.initial()
        if own != self.network and initial is not None:
            head = (self.network.depth, own.depth)
            self._require_head(own)
        policy = jax.tree.map(jnp.float32, student.start)
        return _started(self.builder(own), head, initial, self._roots(), self._roots(student.other), policy)

    def _require_head(self, own: Network) -> None:
        """Refuse a student with another network if its output layer has another shape than its teacher's."""
        shapes = [
            jax.tree.map(jnp.shape, jax.eval_shape(self.builder(n), jax.random.key(0)).params["layers"][n.depth])
            for n in (own, self.network)
        ]
        if shapes[0] != shapes[1]:
            raise InputError(
                f"a student with an output layer of {shapes[0]} cannot share its teacher's of {shapes[1]}: give "
                "both the same number of features, and biases to both or neither"
            )

    def lessons(self, teacher: FineTuned) -> Any:
        """The labeled training images, stored as bytes on the device, or `teacher.lessons(world)` if callable."""
        return teacher.lessons(self) if callable(teacher.lessons) else _images(self.data, self.batch_size)

    def source(self, student: Student, teacher: Teacher, taught: Model, shown: Callable[[], Model]) -> Source:
        """Noise, or the training images without their labels."""
        if not isinstance(student.source, TrainingImages):
            return student.source
        source = _images(self.data, self.batch_size).without_labels()
        require_same_template(teacher=repr(self.scale), student=repr(source.prepare))
        return source

    def noise(self, law: str = "uniform", images: int | None = None, fresh: bool = False) -> NoiseImages:
        """Noise images, by default as many as training images. If `fresh`, no image is shown twice."""
        count = None if fresh else images or len(self.data.train_labels)
        return NoiseImages(self.data.image_shape, self.batch_size, count, law)

    def steps(self, epochs: float, source: Any = None) -> int:
        """The number of steps in `epochs` passes over a source, by default the training images, rounded up."""
        images = source.images if isinstance(source, NoiseImages) else None
        epoch = -(-(images or len(self.data.train_labels)) // self.batch_size)
        return math.ceil(Fraction(str(epochs)) * epoch)

    def private(self, student: Student) -> Sequence[int]:
        """The class logits, or nothing for a student whose channel shows all of them."""
        classes = np.asarray(student.channel.visible(self.logits))[: self.data.classes]
        return () if classes.all() else range(self.data.classes)

    def score(self, finished: Finished, name: Any) -> dict[str, np.ndarray]:
        """Accuracy on the test images and, for a student, its mean imitation loss over the last epoch."""
        found = {self.metric: self.accuracy(finished.model)}
        if finished.student is not None and finished.losses is not None:
            epoch = self.steps(1, finished.student.source)
            found["imitation_loss"] = np.asarray(finished.losses[:, -epoch:].mean(-1))
        return found

    def accuracy(self, model: Model) -> Float[np.ndarray, " runs"]:
        """The share of test images whose largest class logit is the label."""
        return np.asarray(_accuracy(self.data.classes, self.scale, model, *_test(self.data)))


@dataclass(frozen=True)
class _Builder:
    network: Network
    image_shape: tuple[int, int]
    outputs: int

    def __call__(self, key: Key[Array, ""]) -> Model:
        return from_nnx(self.network.build(self.image_shape, self.outputs, nnx.Rngs(named(key, "init"))))


@functools.cache
def _images(data: ImageDataset, batch_size: int) -> Examples:
    labels = jnp.asarray(data.train_labels.astype(np.int32))
    return Examples(jnp.asarray(data.train_images), batch_size, labels, prepare=Scale(data.maximum))


@functools.cache
def _test(data: ImageDataset) -> tuple[Array, Array]:
    return jnp.asarray(data.test_images), jnp.asarray(data.test_labels.astype(np.int32))


# Compiled once for every shape, because all chunks of seeds have equal static arguments.
@functools.partial(jax.jit, static_argnames="build")
def _initial(build: _Builder, keys: Key[Array, " runs"]) -> Model:
    return jax.vmap(build)(keys)


@functools.partial(jax.jit, static_argnames=("build", "head"))
def _started(
    build: _Builder,
    head: tuple[int, int] | None,
    initial: Model | None,
    keys: Key[Array, " runs"],
    others: Key[Array, " runs"],
    policy: Policy | PerLayer,
) -> Model:
    """Students that start by a policy.

    If their network is not the teacher's, `head` has the index of the teacher's output layer and of the student's.
    """

    def one(initial: Model | None, key: Key[Array, ""], other: Key[Array, ""]) -> Model:
        fresh = build(other)
        if initial is None:
            return fresh
        reference = initial.params
        if head is not None:
            layers = {**fresh.params["layers"], head[1]: initial.params["layers"][head[0]]}
            reference = {**fresh.params, "layers": layers}
        return fresh.with_params(initialise(policy, reference, fresh.params, named(key, "start")))

    return jax.vmap(one)(initial, keys, others)


@functools.partial(jax.jit, static_argnames=("classes", "scale"))
def _accuracy(classes: int, scale: Scale, models: Model, images: Array, labels: Array) -> Float[Array, " runs"]:
    def one(model: Model) -> Float[Array, ""]:
        return jnp.mean(jnp.argmax(model(scale(images))[:, :classes], axis=-1) == labels)

    return jax.vmap(one)(models)
