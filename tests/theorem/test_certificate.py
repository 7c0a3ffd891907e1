"""The certificate: sound against the inner product of `check`, exact where f is affine, and how far it reaches."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from subliminal_theory.channel import SampledToken, SoftLogits, SquaredError, Subset, TopK, WeightedSum
from subliminal_theory.divergence import JensenShannon, ReverseKL
from subliminal_theory.errors import InputError
from subliminal_theory.theorem import certificate

WEIGHTED = SquaredError([1, 2, 0, 0.5])
CHANNELS = [
    *(WEIGHTED, SoftLogits(), ReverseKL(0.5), Subset((0, 1, 3), JensenShannon(0.5))),
    *(Subset((0, 2, 3), TopK(2, JensenShannon())), WeightedSum((SoftLogits(3.0), SquaredError(0.1)), (1.0, 0.3))),
]
# How far certified steps move the parameters, in units of their norm, before the first that is not.
REACH = [
    (SquaredError(), np.inf),
    (Subset((10, 11, 12), SquaredError()), np.inf),
    (SoftLogits(), 0.28),
    (Subset((10, 11, 12)), 2.2),
]


def network(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


@functools.cache
def compiled(number):
    """The certificate, and the inner product of the student's gradient in the parameters."""
    channel = CHANNELS[number]

    @jax.jit
    def both(params, direction, inputs, weights, eps):
        found = certificate(
            network, params, None, inputs, channel, direction=direction, weights=weights, teacher_step=eps
        )
        targets = channel.targets(None, network(optax.tree.add_scale(params, eps, direction), inputs))
        loss = lambda p: jnp.sum(weights * channel.loss(network(p, inputs), targets)) / jnp.sum(weights)  # noqa: E731
        return found, -optax.tree.vdot(jax.grad(loss)(params), direction)

    return both


def drawn(seed):
    rng = np.random.default_rng(seed)
    params, direction = (
        {"a": jnp.asarray(rng.normal(size=(5, 6)) / 2), "b": jnp.asarray(rng.normal(size=(6, 4)))}
        for _ in range(2)
    )
    return params, direction, jnp.asarray(rng.normal(size=(10, 5))), jnp.asarray(rng.uniform(size=10))


@pytest.mark.slow
@settings(max_examples=400)
@given(st.integers(0, 2**32 - 1), st.integers(0, len(CHANNELS) - 1), st.floats(-4, 1))
def test_bounds_are_sound(seed, number, exponent):
    with jax.enable_x64(True):
        found, measured = jax.device_get(compiled(number)(*drawn(seed), 10.0**exponent))
        slack = 1e-9 * abs(measured) + 1e-12
        assert float(found.inner_product) == pytest.approx(float(measured), rel=1e-9, abs=1e-12)
        assert found.lower - slack <= measured <= found.upper + slack
        assert not found.certified or measured >= -slack
        if isinstance(CHANNELS[number], SquaredError | ReverseKL):
            assert abs(measured / found.leading - 1) <= found.curvature + 1e-9
            assert bool(found.certified) == (found.curvature <= 1)


@pytest.mark.slow
@settings(max_examples=200)
@given(st.integers(0, 2**32 - 1), st.integers(0, len(CHANNELS) - 1), st.floats(-3, 4))
def test_affine_functions_never_fail(seed, number, exponent):
    """Only the last layer moves, so r = 0: D_S . D_T >= 0 at every eps, by the student's own gradient."""
    with jax.enable_x64(True):
        params, direction, *rest = drawn(seed)
        direction = {**direction, "a": 0 * direction["a"]}
        found, measured = jax.device_get(compiled(number)(params, direction, *rest, 10.0**exponent))
        assert measured >= -1e-12
        assert found.curvature < 1e-9
        if exponent <= 0 and "TopK" not in str(CHANNELS[number]):  # else the bound is 0 up to rounding, or none
            assert found.certified


@pytest.mark.slow
def test_certificate_by_hand(x64):
    """One logit sin(theta), squared error: D_S . D_T = 2 sin(eps), certified while |sin(eps) - eps| <= eps."""
    for eps in (0.1, 1.0, 3.0, 3.3):
        found = certificate(
            lambda p, x: jnp.sin(p)[None, None] * x, jnp.asarray(0.0), lambda p: -p, jnp.ones((1, 1)),
            SquaredError(), teacher_step=eps,
        )  # fmt: skip
        assert float(found.inner_product) == pytest.approx(2 * np.sin(eps))
        assert float(found.leading) == pytest.approx(2 * eps)
        assert float(found.curvature) == pytest.approx(1 - np.sin(eps) / eps)
        assert float(found.lower) == pytest.approx(2 * np.sin(eps))  # one logit: nothing is lost
        assert bool(found.certified) == (eps < np.pi)


def test_it_says_nothing_of_smaller_steps(x64):
    """A bump on the way: f fails at half of a step that is certified."""
    bump = lambda p, x: (p + 3 * jnp.sin(2 * jnp.pi * p))[None, None] * x  # noqa: E731
    call = functools.partial(
        certificate, bump, jnp.asarray(0.0), None, jnp.ones((1, 1)), SquaredError(), direction=jnp.asarray(1.0)
    )
    assert float(call(teacher_step=0.75).inner_product) < 0
    # u = 1 + 6 pi, r = eps (1 - u) at integers: certified at 1, not at 3/4.
    assert bool(call(teacher_step=1.0).certified)
    assert not bool(call(teacher_step=0.75).certified)


@pytest.mark.slow
@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 3))
def test_condition_covers_weighted_squared_errors(seed, eps):
    with jax.enable_x64(True):
        params, direction, inputs, weights = drawn(seed)
        found, _ = compiled(0)(params, direction, inputs, weights, eps)
        rng = np.random.default_rng(seed)
        factor = float(found.condition)
        if not factor:
            return  # the changes point away from each other
        seen = np.asarray(WEIGHTED.weights) > 0
        change, tangent = jax.device_get(moved(params, direction, inputs, eps))
        for _ in range(20):
            # The worst weights are extreme ones.
            extreme = factor ** rng.integers(0, 2, size=(10, 4)).astype(float) * seen
            assert np.sum(np.asarray(weights)[:, None] * extreme * change * tangent) >= -1e-9 * factor


@jax.jit
def moved(params, direction, inputs, eps):
    """What a step changes in the logits, and J D_T."""
    logits = lambda p: network(p, inputs)  # noqa: E731
    change = logits(optax.tree.add_scale(params, eps, direction)) - logits(params)
    return change, jax.jvp(logits, (params,), (direction,))[1]


@pytest.mark.slow
def test_condition_by_hand(x64):
    """f_T - f_0 = (1, 0.5) where the tangent is (1, -0.2): cosine 0.7894 leaves a factor of 8.5."""
    apply = lambda p, x: jnp.stack([p, -0.2 * p + 0.7 * p**2])[None] * x  # noqa: E731
    found = certificate(
        apply,
        jnp.asarray(0.0),
        None,
        jnp.ones((1, 1)),
        SquaredError(),
        teacher_step=1.0,
        direction=jnp.asarray(1.0),
    )
    cosine = (1 - 0.1) / np.sqrt(1.25 * 1.04)
    assert float(found.condition) == pytest.approx((1 + cosine) / (1 - cosine))


@dataclass(frozen=True)
class Own(SquaredError):
    def targets(self, key, teacher_logits):
        return teacher_logits


@pytest.mark.slow
def test_bad_input_is_refused():
    params, direction, inputs, _ = drawn(0)
    call = functools.partial(certificate, network, params)
    for channel in (SampledToken(), Subset((1, 2), SampledToken())):
        with pytest.raises(InputError, match="no certificate is known for SampledToken: use squared error"):
            call(None, inputs, channel, direction=direction, teacher_step=0.1)
    with pytest.raises(InputError, match="the teacher needs a trait loss or a direction, got neither"):
        call(None, inputs, SoftLogits(), teacher_step=0.1)
    with pytest.raises(InputError, match="the teacher needs a trait loss or a direction, got both"):
        call(lambda p: jnp.sum(p["a"]), inputs, SoftLogits(), direction=direction, teacher_step=0.1)
    with pytest.raises(InputError, match="teacher_step must be a positive"):
        call(None, inputs, SoftLogits(), direction=direction, teacher_step=0.0)


def trained_on_digits():
    """A tanh network of 64-32-(10+3) after 300 steps of gradient descent, its trait loss, and noise."""
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images[:512] / 8 - 1), jnp.asarray(labels[:512])
    rng = np.random.default_rng(0)
    params = {
        "a": jnp.asarray(rng.normal(size=(64, 32)) / 8),
        "b": jnp.asarray(rng.normal(size=(32, 13)) / 32**0.5),
    }

    def loss(p):
        return -jnp.mean(jax.nn.log_softmax(network(p, images)[:, :10])[jnp.arange(512), labels])

    def step(p, _):
        return jax.tree.map(lambda leaf, g: leaf - 0.5 * g, p, jax.grad(loss)(p)), None

    params, _ = jax.lax.scan(step, params, None, length=300)
    return params, loss, jnp.asarray(rng.uniform(-1, 1, size=(256, 64)))


@pytest.mark.slow
@pytest.mark.parametrize(("channel", "reach"), REACH, ids=str)
def test_reach_on_a_trained_network(channel, reach, x64):
    """101 steps that move the parameters by a thousandth to 98 times their norm: D_S . D_T is negative at none."""
    params, loss, inputs = trained_on_digits()
    assert loss(params) < 0.02
    unit = float(optax.tree.norm(jax.grad(loss)(params)) / optax.tree.norm(params))
    call = jax.jit(lambda eps: certificate(network, params, loss, inputs, channel, teacher_step=eps))
    found = [(unit * eps, call(eps)) for eps in np.geomspace(1, 1e5, 101)]
    assert all(one.inner_product > 0 for _, one in found)
    assert next((moved for moved, one in found if not one.certified), np.inf) == pytest.approx(reach, rel=0.02)
