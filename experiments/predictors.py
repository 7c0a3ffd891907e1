"""What is known of a student before it trains, by products with Jacobians alone."""

import functools
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from subliminal_theory.alignment import cosine, difference
from subliminal_theory.channel import Subset, imitation_value_and_grad, weighted_mean
from subliminal_theory.keys import named
from subliminal_theory.model import Model
from subliminal_theory.pytree import register_dataclass
from subliminal_theory.source import Source
from subliminal_theory.study import Optimizer
from subliminal_theory.study.digits import ClassLoss
from subliminal_theory.theorem import compare_tokens, displacement, prompt_alignment, sharpness
from subliminal_theory.theorem.contraction import gauss_newton
from subliminal_theory.theorem.krylov import lanczos, spectrum

IMAGES = 512  # of the student's inputs, on which means over positions are taken
PRODUCTS = 30  # of the Gauss-Newton matrix


@register_dataclass
@dataclass(frozen=True)
class Case:
    """A student before its training: its teacher's start, its own, the teacher, labeled images, its settings."""

    base: PyTree
    start: Model
    teacher: Model
    taught: tuple[Array, Array]
    channel: Subset
    source: Source
    optimizer: Optimizer
    classes: int = field(metadata={"static": True})


def trait_loss(classes: int, model: Model, taught: tuple[Array, Array]) -> Float[Array, ""]:
    """Cross-entropy of the class logits on labeled images, in nats."""
    images, labels = taught
    return weighted_mean(ClassLoss(classes)(model(images), labels), jnp.ones(len(labels)))


@functools.partial(jax.jit, static_argnames="steps")
def predict(case: Case, steps: int, rate: Float[Array, ""], key: Key[Array, ""]) -> dict[str, Array]:
    """The predictors of a student of `steps` steps, and `start_loss`, the trait loss at its start. Scalars.

    D_T is the teacher's displacement, g the gradient of the trait loss; f, J and G are the student's at its start.

    * `signal`: A = g^T G g, the rate at which the theorem's student lowers the trait loss.
    * `first_step`: D_S . (-g), the rate at which this student does, at its first step.
    * `kl`: KL(teacher || its own start) in nats an input, within the visible logits.
    * `coverage`: cosine of the first update and D_T.
    * `cos_metric`: cos_M(f_T - f, -J g).
    * `contraction`: -g . s_n, s_n = (I - Pi_n)(theta_T - theta_S), the fall of the trait loss to leading order.
      Pi_n is the product of I - a G_t over the student's batches, for gradient descent at a = `rate`, but at most
      at 1 / sharpness, so that it is a contraction. For other optimizers, of which it does not speak, give inf.
    * `top`: the share of |D_T|^2 on eigenvectors of G whose eigenvalue is at least 1 / (a steps).
    """
    start, teacher, channel, apply = case.start, case.teacher, case.channel, case.start.apply
    loss, gradient = jax.value_and_grad(lambda p: trait_loss(case.classes, start.with_params(p), case.taught))(
        start.params
    )
    downhill, taught = optax.tree.scale(-1, gradient), difference(teacher.params, case.base)
    source_key = named(key, "source")
    inputs = case.source.batch(source_key, (jnp.arange(IMAGES), jnp.ones(IMAGES))).inputs
    seen = teacher(inputs)
    here = prompt_alignment(apply, start.params, downhill, inputs, seen, channel)

    rate = jnp.minimum(rate, 1 / sharpness(apply, start.params, inputs, channel, products=PRODUCTS).value)
    gap, rates = difference(teacher.params, start.params), jnp.full(steps, rate)
    moved = displacement(apply, start.params, gap, case.source, channel, rates=rates, key=key)
    nodes, weights = spectrum(*lanczos(gauss_newton(apply, start.params, inputs, channel), taught, PRODUCTS))
    return {
        "signal": here.moved,
        "first_step": here.inner_product,
        "kl": compare_tokens(seen, start.with_params(case.base)(inputs), where=channel.where).kl,
        "coverage": cosine(_first_update(case, steps, source_key), taught),
        "cos_metric": here.cosine,
        "contraction": optax.tree.vdot(downhill, moved),
        "top": jnp.sum(weights, where=nodes * rate * steps >= 1),
        "start_loss": loss,
    }


def _first_update(case: Case, steps: int, source_key: Key[Array, ""]) -> PyTree:
    entry = jax.tree.map(lambda leaf: leaf[0], case.source.schedule(source_key, steps))
    batch, params = case.source.batch(source_key, entry), case.start.params
    targets = case.channel.targets(None, case.teacher(batch.inputs))
    logits = lambda p: case.start.apply(p, batch.inputs)  # noqa: E731
    _, gradient = imitation_value_and_grad(case.channel, logits, params, targets, batch.weights)
    optimizer = case.optimizer.transformation(steps)
    return optimizer.update(gradient, optimizer.init(params), params)[0]
