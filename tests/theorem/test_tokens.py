"""How many sampled tokens carry a trait: hand cases, Monte Carlo, random networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import expit, log_softmax, rel_entr, softmax

from subliminal_theory.channel import SampledToken, imitation_value_and_grad
from subliminal_theory.errors import InputError
from subliminal_theory.theorem import compare_tokens, sign_probability, step_tokens, tokens_needed
from tests.tolerances import TOLERANCE

EPS = 0.1


def network(seed, positions=7, width=5, logits=4, scale=1.0):
    """A tanh layer in plain JAX, its parameters, some direction, and inputs."""
    rng = np.random.default_rng(seed)
    params, direction = (
        {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
        for shapes in [{"in": (3, width), "out": (width, logits), "bias": (logits,)}] * 2
    )
    direction = jax.tree.map(lambda leaf: scale * leaf, direction)
    apply = lambda p, x: jnp.tanh(x @ p["in"]) @ p["out"] + p["bias"][None]  # noqa: E731
    return apply, params, direction, jnp.asarray(rng.normal(size=(positions, 3)))


def moved(params, direction, eps):
    return jax.tree.map(lambda p, d: p + eps * d, params, direction)


def test_a_bernoulli_logit_by_hand(x64):
    """Two logits (0, theta): A = p (1 - p), KL from the two probabilities."""
    theta, eps = 0.7, 0.05
    found = step_tokens(
        lambda p, x: x * jnp.stack([jnp.zeros(()), p])[None], jnp.asarray(theta), jnp.asarray(1.0),
        jnp.ones((3, 1)), teacher_step=eps,
    )  # fmt: skip
    p, q = expit(theta), expit(theta + eps)
    kl = q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
    assert float(found.predicted_kl) == pytest.approx(eps**2 * p * (1 - p) / 2, rel=TOLERANCE["float64"])
    assert float(found.measured.kl) == pytest.approx(kl, rel=1e-9)
    assert float(found.measured.visible) == 1
    assert float(found.needed(2.0)) == pytest.approx(4 / (2 * kl), rel=1e-9)
    assert float(tokens_needed(kl)) == pytest.approx(1.96**2 / 2 / kl)
    # At n* tokens the sign is right with probability Phi(z); four times as many double z.
    for times, z in ((1, 1.5), (4, 3.0)):
        n = times * float(tokens_needed(kl, 1.5))
        assert float(sign_probability(n, kl)) == pytest.approx(stats.norm.cdf(z))


def test_no_difference_needs_endless_tokens(x64):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)))
    same = compare_tokens(logits + 3.0, logits)
    assert float(same.kl) == pytest.approx(0, abs=1e-15)
    assert float(tokens_needed(0.0)) == float(tokens_needed(-1e-18)) == np.inf
    assert float(sign_probability(100, 0.0)) == float(sign_probability(0, 0.3)) == 0.5


def steps_of_tokens(apply, params, direction, inputs):
    """D_S . D_T of a student that reads one token, for each position and token."""

    def one(position, token):
        x, target = inputs[position][None], jnp.full(1, token)
        _, gradient = imitation_value_and_grad(SampledToken(), lambda p: apply(p, x), params, target, jnp.ones(1))
        return -sum(jnp.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))

    n = apply(params, inputs).shape[-1]
    over_tokens = jax.vmap(one, (None, 0))
    return np.asarray(jax.vmap(over_tokens, (0, None))(jnp.arange(len(inputs)), jnp.arange(n)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_sign_probability_against_monte_carlo(seed, x64):
    """20,000 students of n tokens each, positions drawn at random, by the library's own student step."""
    apply, params, direction, inputs = network(seed, scale=0.5)
    found = step_tokens(apply, params, direction, inputs, teacher_step=EPS)
    table = steps_of_tokens(apply, params, direction, inputs).ravel()
    law = softmax(np.asarray(apply(moved(params, direction, EPS), inputs)), axis=-1).ravel() / len(inputs)
    rng, students = np.random.default_rng(seed), 20_000
    for n in (50, 400, 3200):
        right = np.mean(rng.multinomial(n, law, size=students) @ table > 0)
        # Of order eps: the third moments of one token, which the leading order leaves out.
        assert right == pytest.approx(float(sign_probability(n, found.measured.kl)), abs=0.02)
    drawn = rng.choice(law.size, p=law, size=200_000)
    strength = 2 * float(found.predicted_kl) / EPS**2
    np.testing.assert_allclose(table[drawn].var(), strength, rtol=0.12)  # O(eps) and noise
    exact_mean, exact_variance = law @ table, law @ table**2 - (law @ table) ** 2
    np.testing.assert_allclose([exact_mean / EPS, exact_variance], strength, rtol=0.12)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_at_another_temperature_the_sign_is_that_of_the_difference_from_the_base(temperature, x64):
    """Less the mean step on the base's tokens at the same positions; that mean itself is not 0."""
    apply, params, direction, inputs = network(3, scale=0.15)
    found = step_tokens(apply, params, direction, inputs, teacher_step=EPS, temperature=temperature)
    table = steps_of_tokens(apply, params, direction, inputs)
    base, taught = (
        softmax(np.asarray(apply(p, inputs)) / temperature, axis=-1)
        for p in (params, moved(params, direction, EPS))
    )
    control = np.sum(base * table) / len(inputs)
    assert abs(control) > 0.005
    rng = np.random.default_rng(0)
    for each in (150, 1500):  # tokens at each position
        total = sum(
            rng.multinomial(each, law, size=10_000) @ step for law, step in zip(taught, table, strict=True)
        )
        n = each * len(inputs)
        right = np.mean(total / n > control)
        assert right == pytest.approx(float(sign_probability(n, found.measured.kl)), abs=0.02)


def test_tokens_needed_are_those_of_a_likelihood_ratio_test(x64):
    """Level 1 - Phi(z): power 1/2 at n*, Phi(z) at 4 n*."""
    apply, params, direction, inputs = network(4, scale=0.4)
    base, taught = (
        log_softmax(np.asarray(apply(p, inputs)), axis=-1).ravel() - np.log(len(inputs))
        for p in (params, moved(params, direction, EPS))
    )
    z, rng = 1.5, np.random.default_rng(0)
    needed = float(step_tokens(apply, params, direction, inputs, teacher_step=EPS).needed(z))
    for times, power in ((1, 0.5), (4, stats.norm.cdf(z))):
        null, other = (
            rng.multinomial(round(times * needed), np.exp(law), size=20_000) @ (taught - base)
            for law in (base, taught)
        )
        assert np.mean(other > np.quantile(null, stats.norm.cdf(z))) == pytest.approx(power, abs=0.02)


def test_moments_of_a_large_step_where_logits_move_by_the_tangent_alone(x64):
    """Linear logits: the mean is KL(T || 0) + KL(0 || T), the variance that of the log ratio, at any size."""
    rng = np.random.default_rng(5)
    logits, delta = rng.normal(size=(2, 6))
    zero, taught = softmax(logits), softmax(logits + 2 * delta)
    step = 2 * (delta - zero @ delta)  # of each token: score . (theta_T - theta_0)
    both = compare_tokens(jnp.asarray(logits + 2 * delta), jnp.asarray(logits)).kl
    both += compare_tokens(jnp.asarray(logits), jnp.asarray(logits + 2 * delta)).kl
    assert taught @ step == pytest.approx(float(both), rel=1e-12)
    ratio = np.log(taught / zero)
    variance = taught @ ratio**2 - (taught @ ratio) ** 2
    assert taught @ step**2 - (taught @ step) ** 2 == pytest.approx(variance, rel=1e-12)


@pytest.mark.parametrize("where", [(0, 2, 5), np.array([True, False, True, False, False, True])])
def test_visible_logits_and_temperature(where, x64):
    """The conditional law of the visible tokens; the chain rule gives the whole KL back."""
    rng, temperature, hidden = np.random.default_rng(6), 1.7, [1, 3, 4]
    teacher, base = rng.normal(size=(2, 3, 2, 6))
    weights = rng.uniform(size=(3, 2))
    found = compare_tokens(
        jnp.asarray(teacher), jnp.asarray(base), weights=jnp.asarray(weights), temperature=temperature, where=where
    )
    laws = [softmax(z / temperature, axis=-1) for z in (teacher, base)]

    def mean(values):
        return np.sum(weights * values) / weights.sum()

    parts, masses = [], []
    for chosen in ([0, 2, 5], hidden):
        mass = [law[..., chosen].sum(-1) for law in laws]
        conditional = [law[..., chosen] / m[..., None] for law, m in zip(laws, mass, strict=True)]
        parts.append(np.sum(rel_entr(*conditional), axis=-1))
        masses.append(mass)
    assert float(found.kl) == pytest.approx(mean(parts[0]), rel=1e-10)
    assert float(found.visible) == pytest.approx(mean(masses[0][0]), rel=1e-12)
    assert float(found.kl_drawn) == pytest.approx(mean(masses[0][0] * parts[0]), rel=1e-10)
    chain = sum(rel_entr(*mass) + mass[0] * part for mass, part in zip(masses, parts, strict=True))
    whole = compare_tokens(
        jnp.asarray(teacher), jnp.asarray(base), weights=jnp.asarray(weights), temperature=temperature
    )
    assert float(whole.kl) == pytest.approx(mean(chain), rel=1e-10)
    assert float(whole.kl) == float(whole.kl_drawn)


def test_weights_say_how_often_a_position_is_read(x64):
    apply, params, direction, inputs = network(7, positions=3)
    weighted = step_tokens(
        apply, params, direction, inputs, teacher_step=EPS, weights=jnp.array([2.0, 0, 1]), where=(0, 1, 3)
    )
    listed = step_tokens(apply, params, direction, inputs[jnp.array([0, 0, 2])], teacher_step=EPS, where=(0, 1, 3))
    for a, b in zip(jax.tree.leaves(weighted), jax.tree.leaves(listed), strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-12)


def test_under_jit_with_parameters_that_have_no_gradient(x64):
    apply, params, direction, inputs = network(8)
    more, moves = ({**tree, "steps": jnp.arange(3)} for tree in (params, direction))
    plain = step_tokens(apply, params, direction, inputs, teacher_step=EPS)
    run = jax.jit(lambda p, d, eps: step_tokens(apply, p, d, inputs, teacher_step=eps))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(run(more, moves, EPS)), strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-12)


@functools.partial(jax.jit, static_argnums=(1, 2))
@functools.partial(jax.vmap, in_axes=(0, None, None, 0))
def linear_step(seed, logits, masked, temperature):
    """2 KL / (eps^2 A) - 1 of logits that are linear in parameters, and how far eps J D_T / T spreads."""
    keys = jax.random.split(jax.random.key(seed), 4)
    params, direction = (jax.random.normal(key, (3, logits)) for key in keys[:2])
    inputs, eps = jax.random.normal(keys[2], (2, 3)), 10 ** jax.random.uniform(keys[3], minval=-2.0)
    where = (0, logits - 1) if masked else None
    found = step_tokens(
        lambda p, x: x @ p, params, direction, inputs, teacher_step=eps, temperature=temperature, where=where
    )
    moves = (inputs @ direction)[:, jnp.array(where or range(logits))] * eps / temperature
    spread = jnp.max(jnp.max(moves, axis=-1) - jnp.min(moves, axis=-1))
    return found.measured.kl / found.predicted_kl - 1, spread, found.measured.visible


def prediction_errors_are_bounded(seeds, logits, masked, temperatures):
    """The variance along the step grows or falls by at most e^spread, as its slope is a third cumulant."""
    with jax.enable_x64(True):
        seeds, temperatures = np.asarray(seeds, np.uint32), np.asarray(temperatures, float)
        errors, spread, visible = map(np.asarray, linear_step(seeds, logits, masked, temperatures))
        assert (np.abs(errors) <= np.expm1(spread) + 1e-8).all()
        assert ((visible > 0) & (visible <= 1 + 1e-12)).all()


SHAPES = [(2, False), (5, False), (5, True)]


@pytest.mark.slow
@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from(SHAPES), temperature=st.floats(0.5, 3.0))
def test_kl_of_linear_logits(seed, shape, temperature):
    prediction_errors_are_bounded([seed], *shape, [temperature])


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_kl_of_linear_logits_in_ten_thousand_cases(shape):
    prediction_errors_are_bounded(range(10_000), *shape, np.linspace(0.5, 3.0, 10_000))


@pytest.mark.parametrize("z", [0.0, -1.0, float("nan"), float("inf")])
def test_a_confidence_that_is_none_is_refused(z):
    with pytest.raises(InputError, match="z must be positive and finite"):
        tokens_needed(0.1, z)


def test_bad_logits_are_refused():
    logits = jnp.zeros((2, 3))
    for teacher, settings_of, cause in (
        (jnp.zeros((2, 4)), {}, r"teacher_logits \(2, 4\) and base_logits \(2, 3\) differ"),
        (logits, {"temperature": 0.0}, "temperature must be positive"),
        (logits, {"where": (3,)}, r"logit index 3 is outside 0\.\.2"),
        (logits, {"where": np.zeros(3, bool)}, "no logit is selected"),
    ):
        with pytest.raises(InputError, match=cause):
            compare_tokens(teacher, logits, **settings_of)


def test_a_direction_of_another_tree_is_refused() -> None:
    with pytest.raises(InputError, match=r"^direction must have the structure and shapes of params"):
        step_tokens(lambda p, x: x * p, jnp.ones(3), jnp.ones(2), jnp.ones((4, 3)), teacher_step=0.1)
