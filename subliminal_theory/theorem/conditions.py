"""Which imitation losses the theorem covers: the conditions of doi 10.1038/s41586-026-10319-8 on a loss L(z; y).

z are the student's logits at a position, y the teacher's. The theorem requires that

(a) z = y is a minimum for every y: grad_z L(y; y) = 0, and the Hessian M(y) = L_zz(y; y) is positive semidefinite;
(b) -L_zy(y; y) is symmetric and positive semidefinite;
(c) its null space is the same everywhere, and grad_z L(z; y) is orthogonal to it for all z and y.

Only (a) and (c) need a check, because (b) follows from (a): differentiate grad_z L(y; y) = 0 along y to get
L_zz + L_zy = 0, so -L_zy = M. By (a), D_S . D_T = eps A + O(eps^2) with A >= 0. By (c), A = 0 implies
D_S . D_T = 0 for every eps.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from subliminal_theory.audit import probes, refuse_wrong_channel
from subliminal_theory.channel import Channel
from subliminal_theory.errors import InputError
from subliminal_theory.theorem.krylov import lanczos, ritz

PRODUCTS, STEPS = 200, 64
FEW = 256  # draws for second derivatives
# A smaller share of a gradient or of the largest curvature counts as 0: two derivatives keep half the digits.
SMALL = 1e-7
NEAR = 1e-3
NULL_SPACES = ("constant", "locally constant", "moves")
LARGE = 2.0  # logits
SIGMAS = 5.5
CHUNK = 64


@dataclass(frozen=True)
class Conditions:
    """The result of `covers`. Its truth value is `covered`.

    Attributes:
        covered: whether (a) and (c) hold at the tested logits.
        reason: why the loss is covered, or what fails.
        exact: True if the loss is exact. False if its targets are random; then the result is a Monte Carlo
            estimate for the mean loss over draws of the targets.
        gradient: the largest |entry| of grad_z L at z = y, as a share of its largest |entry| at all tested logits.
            For random targets, the loss is the mean loss. nan if the loss is refused before this is measured.
        curvature: the smallest eigenvalue of M over the largest in magnitude. nan if the gradient decides already.
        null_space: `constant` if (c) holds; `locally constant` if (c) holds only for teachers near the student, as
            for a channel whose targets choose logits; `moves` if (c) fails; empty if (a) fails already.
    """

    covered: bool
    reason: str
    exact: bool
    gradient: float = float("nan")
    curvature: float = float("nan")
    null_space: str = ""

    def __bool__(self) -> bool:
        return self.covered

    def __str__(self) -> str:
        return f"{'covered' if self.covered else 'not covered'}: {self.reason}"


def covers(channel: Channel, logits: int, *, key: Key[Array, ""] | None = None, draws: int = 4096) -> Conditions:
    """Whether the theorem covers a loss on `logits` logits. Tests conditions (a) and (c).

    The test takes derivatives in float64 at eight teachers and eight students with fixed, irregular logits. It
    uses Jacobian-vector products and never builds M. If a condition fails, that is certain. If a condition holds,
    it holds at the tested logits. For a loss with one formula this is strong evidence, but not a proof. If the
    channel is not `exact`, the gradient of the mean loss is estimated from `draws` draws of the targets with
    `key`. It counts as 0 within 5.5 standard errors, and `reason` says which gradients are too small to see. The
    cost is several hundred gradients of the loss, and 256 times as many if the targets are random.

    Raises:
        InputError: the channel selects logits that do not exist; `draws` is below 256.
    """
    if draws < 256:
        raise InputError(f"covers: draws must be at least 256, got {draws}")
    channel.visible(logits)
    try:
        refuse_wrong_channel(channel, logits, key)
    except InputError as error:
        return Conditions(False, str(error), channel.exact)
    draws -= draws % CHUNK
    with jax.enable_x64(True):
        base = jax.random.key(0) if key is None else jax.random.clone(key)
        seeds = jax.random.key_data(jax.random.split(base, draws)).reshape(draws // CHUNK, CHUNK, -1)
        measure = jax.jit(lambda size: _measure(channel, logits, seeds, size))
        found = _judge(channel, _Measured(*jax.device_get(measure(LARGE))), draws)
        if found.null_space in ("locally constant", "moves"):
            # At a low temperature, large logits make eigenvalues of M too small to distinguish from 0.
            other = _judge(channel, _Measured(*jax.device_get(measure(LARGE / 20))), draws)
            found = min(found, other, key=lambda one: (*NULL_SPACES, "").index(one.null_space))
        if not found or channel.exact:  # `refuse_wrong_channel` has checked the metric of an exact channel
            return found
        try:
            images = jax.jit(lambda: _images(channel, logits, seeds))()
        except InputError as error:
            return replace(found, covered=False, reason=str(error))
    mean, deviation, metric = jax.device_get(images)
    largest, wrong = float(np.abs(mean).max()), np.abs(mean - metric)
    if (wrong > SIGMAS * deviation + (10 / FEW + SMALL) * largest).any():
        reason = f"`metric` differs by {wrong.max() / largest:.2g} of its size from the mean Hessian: correct it"
        return replace(found, covered=False, reason=reason)
    return found


@dataclass(frozen=True)
class _Measured:
    """Derivatives of a loss, or of its mean over draws, at logits [8, n]; see `_measure`."""

    gradient: np.ndarray  # at z = y
    deviation: np.ndarray  # the standard error of `gradient`, 0 if the loss is exact
    away: np.ndarray  # the gradient where z is not y
    ritz: np.ndarray  # the Ritz values of M
    unseen: np.ndarray  # the largest share of a gradient in the null space of M, for distant teachers
    unseen_near: np.ndarray  # the same for teachers near the student


def _judge(channel: Channel, found: _Measured, draws: int) -> Conditions:
    exact, mean, deviation = channel.exact, found.gradient, found.deviation
    scale = max(float(np.abs(found.away).max()), float(np.abs(mean).max()))
    if not np.isfinite(scale):
        return Conditions(False, "the loss has a gradient that is not finite", exact)
    if scale == 0:
        return Conditions(True, "the loss is constant: nothing is transmitted", exact, 0.0, 0.0, "constant")
    # A value that never came up in D draws may still have a probability of up to 10 / D.
    allowed = np.full_like(mean, SMALL * scale) if exact else SIGMAS * deviation + 10 * scale / draws
    gradient = float(np.abs(mean).max()) / scale
    if not (np.abs(mean) <= allowed).all():
        place = np.unravel_index(np.abs(mean).argmax(), mean.shape)
        told = f"gradient {mean[place]:+.2g}"
        if exact:
            reason = f"(a) fails: where the student equals the teacher, the loss has {told}"
        else:
            reason = (
                f"(a) fails on average: where the student equals the teacher, the mean loss has {told} "
                f"(standard error {deviation[place]:.1g}, Monte Carlo over {draws} draws)"
            )
        return Conditions(False, reason, exact, gradient)
    largest = np.abs(found.ritz).max()
    curvature = float(found.ritz[0] / largest) if largest > 0 else 0.0
    if not curvature > -SMALL:
        reason = f"(a) fails: equality is not a minimum, the smallest curvature is {curvature:.2g} of the largest"
        return Conditions(False, reason, exact, gradient, curvature)
    shares = (float(found.unseen), float(found.unseen_near), 0.0)
    null_space = next(name for name, share in zip(NULL_SPACES, shares, strict=True) if share <= SMALL)
    numbers = (exact, gradient, curvature, null_space)
    if null_space == "moves":
        reason = (
            "(c) fails: a shift of the logits that M does not see changes the loss elsewhere "
            f"({found.unseen:.2g} of the gradient), so A = 0 does not make D_S . D_T vanish"
        )
        return Conditions(False, reason, *numbers)
    told = (
        ""
        if exact
        else (
            f" on average (Monte Carlo over {draws} draws: a mean gradient below {allowed.max():.1g} "
            "would not be seen)"
        )
    )
    where = "" if null_space == "constant" else " for teachers near the student: targets choose what is compared"
    reason = f"equality is stationary and a minimum{told}, and the null space of M is {null_space}{where}"
    return Conditions(True, reason, *numbers)


def _measure(channel: Channel, n: int, seeds: Array, size: Float[Array, ""]) -> tuple[Array, ...]:
    """The fields of `_Measured` at logits of this size. `seeds` are key data [chunks, CHUNK, ...]."""
    teacher, student, tangent = probes(n)
    teacher, student = size * teacher, size * student

    def gradient(z: Array, y: Array, some: Array = seeds[: FEW // CHUNK]) -> tuple[Array, Array]:
        return _moments(channel, lambda key: _slope(channel, key, y)(z), z, some)

    def metric(logits: Array) -> Callable[[Array], Array]:
        return lambda v: jax.jvp(lambda z: gradient(z, logits)[0], (logits,), (v,))[1]

    values, _ = ritz(*lanczos(metric(teacher), tangent, min(teacher.size, STEPS)))
    others = (teacher, student + NEAR * size * tangent)
    unseen = [_unseen(metric(student), gradient(student, other)[0]) for other in others]
    return (*gradient(teacher, teacher, seeds), gradient(student, teacher)[0], values, *unseen)


def _images(channel: Channel, n: int, seeds: Array) -> tuple[Array, Array, Array]:
    """The mean Hessian times a tangent, its standard error, and the channel's `metric` of the tangent."""
    logits, _, tangent = probes(n)

    def image(key: Any) -> Array:
        return jax.jvp(_slope(channel, key, logits), (logits,), (tangent,))[1]

    return (*_moments(channel, image, logits, seeds[: FEW // CHUNK]), channel.metric(logits, tangent))


def _slope(channel: Channel, key: Any, teacher: Array) -> Callable[[Array], Array]:
    targets = channel.targets(key, teacher)
    return jax.grad(lambda z: jnp.sum(channel.loss(z, targets)))


def _moments(channel: Channel, draw: Callable[[Any], Array], like: Array, seeds: Array) -> tuple[Array, Array]:
    """Mean over draws, and its standard error. One draw and 0 if the loss is exact."""
    wrap = jax.random.wrap_key_data
    if channel.exact:
        return draw(wrap(seeds[0, 0])), jnp.zeros_like(like)

    def add(sums: tuple[Array, Array], chunk: Array) -> tuple[tuple[Array, Array], None]:
        found = jax.vmap(lambda seed: draw(wrap(seed)))(chunk)
        return (sums[0] + jnp.sum(found, 0), sums[1] + jnp.sum(found**2, 0)), None

    (first, second), _ = jax.lax.scan(add, (jnp.zeros_like(like), jnp.zeros_like(like)), seeds)
    count = seeds.shape[0] * seeds.shape[1]
    mean = first / count
    return mean, jnp.sqrt(jnp.maximum(second / count - mean**2, 0) / count)


def _unseen(metric: Callable[[Array], Array], gradient: Float[Array, "positions n"]) -> Float[Array, ""]:
    """The largest share of a gradient that lies in the null space of M at its position.

    The method of conjugate residuals reduces the residual g - M x until M annihilates it. If M is ill-conditioned,
    a residual may remain that M does not annihilate; it is not counted.
    """

    def inner(a: Array, b: Array) -> Array:
        return jnp.sum(a * b, axis=-1, keepdims=True)

    def over(a: Array, b: Array) -> Array:
        return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)

    def step(carry: Any, _: None) -> Any:
        rest, along, image_rest, image = carry
        rest_after = rest - over(inner(rest, image_rest), inner(image, image)) * image
        image_after = metric(rest_after)
        turn = over(inner(rest_after, image_after), inner(rest, image_rest))
        return (rest_after, rest_after + turn * along, image_after, image_after + turn * image), None

    first, size = metric(gradient), jnp.linalg.norm(gradient, axis=-1)
    length = min(PRODUCTS, 2 * gradient.shape[-1] + 8)
    (rest, _, image_rest, _), _ = jax.lax.scan(step, (gradient, gradient, first, first), None, length=length)
    norm = jnp.linalg.norm(rest, axis=-1)
    # |M g| / |g| estimates the larger eigenvalues.
    largest = jnp.max(over(jnp.linalg.norm(first, axis=-1), size))
    annihilated = jnp.linalg.norm(image_rest, axis=-1) <= 1e-9 * largest * norm
    return jnp.max(jnp.where(annihilated, over(norm, size), 0))
