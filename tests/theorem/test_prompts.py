"""Prompted teachers: hand cases, dense least squares, random networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from subliminal_theory.channel import (
    SampledToken,
    SoftLogits,
    SquaredError,
    Subset,
    TopK,
    imitation_value_and_grad,
)
from subliminal_theory.errors import InputError
from subliminal_theory.keys import named
from subliminal_theory.theorem import check, prompt_alignment, prompt_shift

CHANNELS = {
    "KL": SoftLogits(),
    "KL warm": SoftLogits(2.5),
    "squared": SquaredError([0.2, 1.0, 3.0, 0.5]),
    "subset": Subset((0, 2, 3)),
    "top 3": TopK(3),
}


def apply(params, inputs):
    """One hidden layer; the prompt, if any, stands in the last two of five inputs."""
    return jnp.tanh(inputs @ params["in"] + params["bias"][None]) @ params["out"]


def case(seed, rows=6, width=4, prompt=0.5):
    """Parameters, a direction, rows without their prompt, weights, and logits behind the prompt."""
    rng = np.random.default_rng(seed)
    shapes = {"in": (5, width), "bias": (width,), "out": (width, 4)}
    params, direction = (
        {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()} for _ in range(2)
    )
    inputs = rng.normal(size=(rows, 5))
    inputs[:, 3:] = 0
    behind = inputs.copy()
    behind[:, 3:] = prompt * rng.normal(size=2)
    weights = jnp.asarray(rng.uniform(size=rows))
    return params, direction, jnp.asarray(inputs), weights, apply(params, jnp.asarray(behind))


def dense(params, inputs, channel, weights):
    """J [rows, n, parameters], M [rows, n, n] and normalized weights."""
    flat, unravel = ravel_pytree(params)
    logits = apply(params, inputs)
    jacobian = np.asarray(jax.jacobian(lambda p: apply(unravel(p), inputs))(flat))
    columns = [channel.metric(logits, jnp.tile(unit, (len(inputs), 1))) for unit in np.eye(logits.shape[-1])]
    return jacobian, np.stack([np.asarray(c) for c in columns], -1), np.asarray(weights / weights.sum())


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANNELS)
def test_products_against_dense_matrices_and_the_librarys_own_step(name, x64):
    channel = CHANNELS[name]
    params, direction, inputs, weights, seen = case(0)
    found = prompt_alignment(apply, params, direction, inputs, seen, channel, weights=weights)
    jacobian, metric, w = dense(params, inputs, channel, weights)
    moves = jacobian @ np.asarray(ravel_pytree(direction)[0])
    delta = np.asarray(seen - apply(params, inputs))

    def product(a, b):
        return np.einsum("r,ri,rij,rj->", w, a, metric, b)

    overlap, shown, taken = product(delta, moves), product(delta, delta), product(moves, moves)
    np.testing.assert_allclose([found.overlap, found.shown, found.moved], [overlap, shown, taken], rtol=1e-10)
    assert float(found.cosine) == pytest.approx(overlap / np.sqrt(shown * taken), rel=1e-10)
    targets = channel.targets(None, seen)
    _, gradient = imitation_value_and_grad(channel, lambda p: apply(p, inputs), params, targets, weights)
    step = -np.asarray(ravel_pytree(gradient)[0]) @ np.asarray(ravel_pytree(direction)[0])
    assert float(found.inner_product) == pytest.approx(step, rel=1e-10)
    if name == "squared":
        assert float(found.inner_product) == pytest.approx(overlap, rel=1e-10)


def test_the_overlap_is_the_leading_order_of_the_students_step(x64):
    """Of the prompt's effect: the error halves with it, relative to it."""
    errors = []
    for size in (1e-2, 5e-3):
        params, direction, inputs, weights, seen = case(1, prompt=size)
        found = prompt_alignment(apply, params, direction, inputs, seen, SoftLogits(), weights=weights)
        errors.append(float(found.inner_product / found.overlap) - 1)
    assert errors[1] / errors[0] == pytest.approx(0.5, abs=0.03)


@pytest.mark.slow
def test_a_prompt_that_shifts_a_bias_is_lemma_1(x64):
    """Linear logits: delta = J v exactly, and D_S . v is what `check` finds of a teacher that steps along v."""
    linear = lambda p, x: x @ p["in"] + p["bias"][None]  # noqa: E731
    rng = np.random.default_rng(2)
    params = {"in": jnp.asarray(rng.normal(size=(3, 4))), "bias": jnp.asarray(rng.normal(size=4))}
    inputs, shift = jnp.asarray(rng.normal(size=(5, 3))), jnp.asarray(rng.normal(size=4))
    v = {"in": jnp.zeros((3, 4)), "bias": shift}
    seen = linear(params, inputs) + 0.1 * shift[None]
    found = prompt_alignment(linear, params, v, inputs, seen, SoftLogits())
    assert float(found.cosine) == pytest.approx(1, rel=1e-12)
    trait_loss = lambda p: -jnp.sum(p["bias"] * shift)  # noqa: E731
    report = check(linear, params, trait_loss, inputs, SoftLogits(), teacher_step=0.1, student_step=1e-3)
    assert float(found.inner_product) == pytest.approx(float(report.inner_product), rel=1e-10)
    assert float(found.overlap) == pytest.approx(float(report.predicted_inner_product), rel=1e-10)
    best = prompt_shift(linear, params, inputs, seen, SquaredError(), tolerance=1e-12)
    assert float(best.cosine) == pytest.approx(1, rel=1e-10)
    assert float(best.residual) < 1e-10


@pytest.mark.slow
def test_a_prompt_at_right_angles(x64):
    """The parameter moves one of three logits, the prompt another: cosine 0 in squared error, -1/2 in KL."""
    one = lambda p, x: x * jnp.concatenate([p, jnp.zeros(2)])[None]  # noqa: E731
    params, inputs, seen = jnp.zeros(1), jnp.ones((1, 1)), jnp.array([[0.0, 0.3, 0.0]])
    for channel, cosine in ((SquaredError(), 0.0), (SoftLogits(), -0.5)):
        found = prompt_alignment(one, params, jnp.ones(1), inputs, seen, channel)
        assert float(found.cosine) == pytest.approx(cosine, abs=1e-12)
        best = prompt_shift(one, params, inputs, seen, channel)
        assert float(best.cosine) == pytest.approx(abs(cosine), abs=1e-12)  # v may turn around
    still = prompt_alignment(one, params, jnp.ones(1), inputs, jnp.zeros((1, 3)), SoftLogits())
    assert float(still.cosine) == 0


@functools.partial(jax.jit, static_argnums=(1, 2))
@functools.partial(jax.vmap, in_axes=(0, None, None))
def least_squares(seed, name, damping):
    """The shift, its cosine and residual; those of a dense solution; and the cosine of a random direction."""
    channel, keys = CHANNELS[name], jax.random.split(jax.random.key(seed), 5)
    shapes = {"in": (5, 3), "bias": (3,), "out": (3, 4)}
    params, direction = (
        {name: jax.random.normal(named(key, name), shape) for name, shape in shapes.items()} for key in keys[:2]
    )
    inputs = jax.random.normal(keys[2], (6, 5)).at[:, 3:].set(0)
    prompt = jnp.broadcast_to(jax.random.normal(keys[3], (2,)), (6, 2))
    seen, weights = apply(params, inputs.at[:, 3:].set(prompt)), jax.random.uniform(keys[4], (6,))
    found = prompt_shift(
        apply, params, inputs, seen, channel, damping=damping, steps=400, tolerance=1e-12, weights=weights
    )
    other = prompt_alignment(apply, params, direction, inputs, seen, channel, weights=weights)

    flat, unravel = ravel_pytree(params)
    logits = apply(params, inputs)
    jacobian = jax.jacobian(lambda p: apply(unravel(p), inputs))(flat)
    metric = jax.vmap(lambda unit: channel.metric(logits, jnp.tile(unit, (6, 1))), out_axes=-1)(jnp.eye(4))
    pulled = jnp.einsum("r,rip,rij->prj", weights / weights.sum(), jacobian, metric)
    gram, wanted = jnp.einsum("prj,rjq->pq", pulled, jacobian), jnp.einsum("prj,rj->p", pulled, seen - logits)
    best = jnp.linalg.lstsq(gram + damping * jnp.eye(len(flat)), wanted, rcond=1e-11)[0]
    dense = prompt_alignment(apply, params, unravel(best), inputs, seen, channel, weights=weights)
    solution = ravel_pytree(found.direction)[0]
    return solution, best, jnp.stack([found.cosine, dense.cosine, found.residual, jnp.abs(other.cosine)])


def shifts_are_those_of_dense_least_squares(seeds, name, damping):
    """And no direction has a higher cosine than the undamped one."""
    with jax.enable_x64(True):
        found = least_squares(np.asarray(seeds, np.uint32), name, damping)
        solution, best, (cosine, dense, residual, other) = *map(np.asarray, found[:2]), np.asarray(found[2]).T
        np.testing.assert_allclose(cosine, dense, atol=1e-4)
        assert (residual < 1e-4).all()
        if damping:
            np.testing.assert_allclose(solution, best, atol=1e-5)
        else:
            assert (other <= cosine + 1e-4).all()


@pytest.mark.slow
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(["squared", "subset"]))
def test_shift_against_dense_least_squares(seed, name):
    shifts_are_those_of_dense_least_squares([seed], name, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("name", CHANNELS)
def test_shift_against_dense_least_squares_in_ten_thousand_cases(name, damping):
    shifts_are_those_of_dense_least_squares(range(10_000), name, damping)


@pytest.mark.slow
def test_few_parameters_express_part_of_a_prompt(x64):
    """Rows of weight 0 do not count, and neither do parameters without a gradient."""
    params, direction, inputs, _, seen = case(3, rows=30, prompt=3.0)
    weights = jnp.where(jnp.arange(30) < 20, 1.0, 0.0)
    whole = prompt_shift(apply, params, inputs, seen, SoftLogits(), weights=weights)
    short = prompt_shift(apply, params, inputs[:20], seen[:20], SoftLogits())
    assert 0.1 < float(whole.cosine) < 0.9999
    assert float(whole.cosine) == pytest.approx(float(short.cosine), abs=1e-6)
    more, moves = ({**tree, "count": jnp.arange(2)} for tree in (params, direction))
    jitted = jax.jit(lambda p: prompt_shift(apply, p, inputs[:20], seen[:20], SoftLogits()))(more)
    assert jitted.direction["count"] is None
    assert float(jitted.cosine) == pytest.approx(float(short.cosine), abs=1e-6)
    plain = prompt_alignment(apply, params, direction, inputs, seen, SoftLogits())
    counted = prompt_alignment(apply, more, moves, inputs, seen, SoftLogits())
    assert float(plain.overlap) == float(counted.overlap)


def test_numbers_that_are_not_finite_show(x64):
    params, direction, inputs, _, seen = case(6)
    broken = seen.at[0, 0].set(jnp.nan)
    assert np.isnan(float(prompt_alignment(apply, params, direction, inputs, broken, SoftLogits()).cosine))
    found = prompt_shift(apply, params, inputs, broken, SoftLogits())
    assert np.isnan([float(found.cosine), float(found.residual)]).all()


def test_too_few_steps_leave_a_residual(x64):
    params, _, inputs, weights, seen = case(4)
    few = prompt_shift(apply, params, inputs, seen, SoftLogits(), steps=2, weights=weights)
    many = prompt_shift(apply, params, inputs, seen, SoftLogits(), steps=200, weights=weights)
    assert float(few.residual) > 1e-3 > 1e-6 >= float(many.residual)
    assert 0 < float(few.cosine) <= float(many.cosine) + 1e-9


@pytest.mark.slow
def test_sampled_tokens_have_the_metric_of_their_mean(x64):
    params, direction, inputs, weights, seen = case(5)
    soft = prompt_alignment(apply, params, direction, inputs, seen, SoftLogits(), weights=weights)
    drawn = jax.vmap(
        lambda key: prompt_alignment(
            apply, params, direction, inputs, seen, SampledToken(), weights=weights, key=key
        )
    )(jax.random.split(jax.random.key(0), 4000))
    assert float(drawn.overlap[0]) == pytest.approx(float(soft.overlap), rel=1e-10)
    values = np.asarray(drawn.inner_product)
    assert values.mean() == pytest.approx(float(soft.inner_product), abs=4 * values.std() / np.sqrt(1000))


def test_bad_input_is_refused():
    params, direction, inputs, _, seen = case(0)
    given_to = (apply, params, direction, inputs)
    with pytest.raises(InputError, match=r"teacher_logits have shape \(6, 3\), the student's \(6, 4\)"):
        prompt_alignment(*given_to, seen[:, :3], SoftLogits())
    with pytest.raises(InputError, match=r"outside 0\.\.3"):
        prompt_alignment(*given_to, seen, Subset((4,)))
    with pytest.raises(InputError, match="no output metric"):
        prompt_alignment(*given_to, seen, SampledToken(0.0))
    with pytest.raises(InputError, match="give it a key"):
        prompt_alignment(*given_to, seen, SampledToken())
    for wrong in ({"damping": -1.0}, {"damping": float("nan")}, {"steps": 0}, {"tolerance": 0.0}):
        with pytest.raises(InputError, match="damping must be at least 0, steps at least 1 and tolerance above 0"):
            prompt_shift(apply, params, inputs, seen, SoftLogits(), **wrong)
