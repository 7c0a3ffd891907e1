"""Many steps of a student against `distill`, dense matrices and cases by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subliminal_theory.channel import SampledToken, SoftLogits, SquaredError, Subset, TopK
from subliminal_theory.distill import distill
from subliminal_theory.divergence import JensenShannon, ReverseKL
from subliminal_theory.errors import InputError
from subliminal_theory.estimate import log_slope
from subliminal_theory.keys import named
from subliminal_theory.model import Model
from subliminal_theory.source import Buckets, Examples, with_batch
from subliminal_theory.theorem import contraction, displacement, sharpness
from subliminal_theory.theorem.contraction import gauss_newton

KEY = jax.random.key(3)
CHANNELS = [
    SoftLogits(),
    SoftLogits(0.5),
    SquaredError([1, 2, 0, 0.5]),
    Subset((1, 2, 3), ReverseKL(2.0)),
    TopK(3),
]


def network(p, x):
    return jnp.tanh(x @ p["a"]) @ p["b"]


def drawn(seed):
    """Parameters, trait loss and inputs of a random tanh network."""
    rng = np.random.default_rng(seed)
    params = {"a": jnp.asarray(rng.normal(size=(5, 6)) / 2), "b": jnp.asarray(rng.normal(size=(6, 4)))}
    images, inputs = jnp.asarray(rng.normal(size=(7, 5))), jnp.asarray(rng.normal(size=(10, 5)))
    labels = jnp.asarray(rng.integers(0, 4, 7))
    trait = lambda p: -jnp.mean(jax.nn.log_softmax(network(p, images))[jnp.arange(7), labels])  # noqa: E731
    return params, trait, inputs


def dense(params, inputs, channel, weights=None):
    """G by a dense Jacobian and Hessians of the loss in the logits, in NumPy."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    jacobian = np.asarray(jax.jacobian(lambda v: network(unravel(v), inputs))(flat))
    logits = network(params, inputs)
    weights = np.ones(len(inputs)) if weights is None else np.asarray(weights)
    total = 0.0
    for j, z, w in zip(jacobian, logits, weights, strict=True):
        hessian = np.asarray(jax.hessian(lambda s, z=z: channel.loss(s, channel.targets(None, z)))(z))
        total += w * j.T @ hessian @ j
    return total / weights.sum()


def run(apply, params, trait, source, channel, rates, eps, key=KEY, direction=None, optimizer=None, start=None):
    """The displacement of `distill`'s student over eps, and the change of the trait loss."""
    direction = jax.tree.map(jnp.negative, jax.grad(trait)(params)) if direction is None else direction
    teacher = jax.tree.map(lambda p, d: p + eps * d, params, direction)
    optimizer = optimizer or optax.sgd(lambda count: jnp.asarray(rates)[count])
    start = params if start is None else start
    out = distill(Model(apply, start), Model(apply, teacher), channel, source, optimizer, len(rates), key=key)
    moved = jax.tree.map(lambda a, b: (a - b) / eps, out.model.params, params)
    return moved, float(trait(out.model.params) - trait(params))


@pytest.mark.slow
@pytest.mark.parametrize("channel", CHANNELS, ids=str)
def test_products_and_sharpness_equal_a_dense_matrix(channel, x64):
    params, _, inputs = drawn(0)
    weights = jnp.asarray(np.random.default_rng(1).uniform(size=10))
    expected = dense(params, inputs, channel, weights)
    product = gauss_newton(network, params, inputs, channel, weights)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    found = jax.vmap(lambda v: jax.flatten_util.ravel_pytree(product(unravel(v)))[0])(jnp.eye(flat.size))
    np.testing.assert_allclose(found, expected, atol=1e-12 * np.abs(expected).max())
    largest = sharpness(network, params, inputs, channel, weights=weights)
    assert float(largest.value) == pytest.approx(np.linalg.eigvalsh(expected)[-1], rel=1e-9)
    scales = jax.tree.map(lambda leaf: jnp.exp(jnp.sin(1.0 + jnp.arange(leaf.size))).reshape(leaf.shape), params)
    roots = np.sqrt(np.asarray(jax.flatten_util.ravel_pytree(scales)[0]))
    largest = sharpness(network, params, inputs, channel, weights=weights, preconditioner=scales)
    scaled = roots[:, None] * expected * roots
    assert float(largest.value) == pytest.approx(np.linalg.eigvalsh(scaled)[-1], rel=1e-9)


@pytest.mark.slow
@settings(max_examples=150)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["uniform", "geometric", "clustered", "low rank"]))
def test_sharpness_of_large_matrices_lies_between_its_bounds(seed, spectrum):
    """Linear logits under squared error: G = 2 X^T X / rows is any matrix of known eigenvalues."""
    size = 400
    rng = np.random.default_rng(seed)
    eigenvalues = {
        "uniform": lambda: rng.uniform(size=size),
        "geometric": lambda: 0.95 ** np.arange(size),
        "clustered": lambda: 1 - 1e-3 * rng.uniform(size=size),
        "low rank": lambda: np.where(np.arange(size) < 10, rng.uniform(size=size), 0),
    }[spectrum]()
    found = jax.device_get(compiled_sharpness()(jnp.sqrt(jnp.asarray(eigenvalues, float)), jax.random.key(seed)))
    largest = eigenvalues.max()
    assert found.value <= largest * (1 + 1e-5)
    assert found.value >= 0.99 * largest  # 1% in 30 products
    assert found.above >= largest * (1 - 1e-5)
    assert found.above <= 1.04 * found.value
    assert np.abs(eigenvalues - found.value).min() <= found.residual + 1e-5


@functools.cache
def compiled_sharpness():
    """Of diag(root^2): one row for each parameter, one logit."""

    def apply(p, x):
        return (x * p)[:, None]

    count = 400
    channel = SquaredError(0.5 * count)  # M = 400, the mean over 400 rows divides by it
    return jax.jit(lambda root, key: sharpness(apply, jnp.zeros(count, root.dtype), root, channel, key=key))


@pytest.mark.slow
@pytest.mark.parametrize("products", [2, 5, 30])
def test_few_products_still_bound(products, x64):
    params, _, inputs = drawn(1)
    expected = np.linalg.eigvalsh(dense(params, inputs, SoftLogits()))[-1]
    for seed in range(20):
        found = sharpness(network, params, inputs, SoftLogits(), products=products, key=jax.random.key(seed))
        assert float(found.value) <= expected * (1 + 1e-12)
        assert float(found.above) >= expected * (1 - 1e-12)


@pytest.mark.slow
def test_one_parameter_and_no_curvature(x64):
    one = sharpness(lambda p, x: x @ p, jnp.ones((1, 1)), jnp.ones((4, 1)), SquaredError(1.5))
    assert (float(one.value), float(one.above), float(one.residual)) == (3.0, 3.0, 0.0)
    none = sharpness(lambda p, x: x @ p, jnp.ones((1, 1)), jnp.ones((4, 1)), SoftLogits())
    assert (float(none.value), float(none.above)) == (0.0, 0.0)


@pytest.mark.slow
def test_overshooting_by_hand(x64):
    """One logit theta x, squared error, x = 1: G = 2, and the change is exactly -eps (1 - (1 - 2 a)^n)."""
    apply, params, inputs = lambda p, x: x @ p[:, None], jnp.zeros(1), jnp.ones((1, 1))
    trait = lambda p: -jnp.sum(p)  # noqa: E731
    for rate, rises, verdict in (
        (0.4, False, "holds"),
        (1.0, False, "holds"),
        (1.05, True, "exceeds 2 at step 1"),
    ):
        for eps in (0.1, 1e-3, 1e-5):
            expected = -eps * (1 - (1 - 2 * rate) ** 20)
            source, rates = Examples(inputs, 1), np.full(20, rate)
            found = contraction(
                apply, params, trait, source, SquaredError(), teacher_step=eps, rates=rates, key=KEY
            )
            assert float(found.predicted_change) == pytest.approx(expected, rel=1e-9, abs=1e-15)
            assert found.verdict.startswith(verdict)
            _, change = run(apply, params, trait, source, SquaredError(), rates, eps)
            assert change == pytest.approx(expected, rel=1e-9, abs=1e-12)
            assert (change > 1e-12) == rises
    assert expected == pytest.approx(5.727e-5, rel=1e-3)  # a rise of 5.73 eps at a lambda = 2.1


def test_momentum_rises_below_its_own_limit(x64):
    """Heavy ball is stable up to a lambda = 2 (1 + b). At b = 0.9, a lambda = 3.6, two steps: 1 - p_2 = -2.52."""
    apply, params, inputs = lambda p, x: x @ p[:, None], jnp.zeros(1), jnp.ones((1, 1))
    trait, eps = lambda p: -jnp.sum(p), 1e-3
    momentum, rate = 0.9, 1.8
    first = 1 - 2 * rate
    second = (1 + momentum - 2 * rate) * first - momentum
    assert second == pytest.approx(3.52)
    optimizer = optax.sgd(rate, momentum=momentum)
    _, change = run(
        apply, params, trait, Examples(inputs, 1), SquaredError(), np.full(2, rate), eps, optimizer=optimizer
    )
    assert change == pytest.approx(-eps * (1 - second), rel=1e-9)
    assert change > 0


@pytest.mark.slow
@pytest.mark.parametrize("channel", [*CHANNELS, JensenShannon()], ids=str)
def test_prediction_is_the_leading_order_of_distill(channel, x64):
    """Minibatches with a short last one, rates that change, within and beyond the condition."""
    params, trait, inputs = drawn(2)
    source, steps = Examples(inputs, 4), np.array([1e-3, 1e-4, 1e-5])
    call = functools.partial(contraction, network, params, trait, source, channel, key=KEY)
    shares = np.array([0.1, 0.5, 2.4, 0.0, 1.0, 0.3, 1.9])
    rates = shares / np.asarray(call(teacher_step=1.0, rates=np.ones(7)).sharpness.value)
    errors = []
    for eps in steps:
        found = call(teacher_step=eps, rates=rates)
        moved, change = run(network, params, trait, source, channel, rates, eps)
        errors.append(change - float(found.predicted_change))
        direction = jax.tree.map(jnp.negative, jax.grad(trait)(params))
        expected = displacement(network, params, direction, source, channel, rates=rates, key=KEY)
        gap = optax.tree.norm(jax.tree.map(jnp.subtract, moved, expected))
        assert float(gap) < 100 * eps * float(optax.tree.norm(expected))
        assert change / float(found.predicted_change) == pytest.approx(1, abs=100 * eps)
    assert log_slope(steps, errors) == pytest.approx(2, abs=0.05)


@pytest.mark.slow
def test_sharpness_of_every_step_is_that_of_its_batch(x64):
    params, trait, inputs = drawn(3)
    rates = np.full(6, 0.1)
    for source in (Examples(inputs, 4), Buckets((Examples(inputs[:4], 2), Examples(inputs[4:], 2)))):
        found = contraction(network, params, trait, source, SoftLogits(), teacher_step=1e-3, rates=rates, key=KEY)
        batches = []
        schedule = source.schedule(named(KEY, "source"), 6)
        for t in range(6):
            entry = jax.tree.map(lambda leaf, t=t: leaf[t], schedule)
            batch = with_batch(source, named(KEY, "source"), entry, lambda batch: batch)
            batches.append(np.linalg.eigvalsh(dense(params, batch.inputs, SoftLogits(), batch.weights))[-1])
        np.testing.assert_allclose(found.sharpness.value, batches, rtol=1e-9)


@pytest.mark.slow
def test_a_mixed_sequence(x64):
    """Other batches, channel, visible logits and temperature halfway: call after call, as distill is called."""
    params, trait, inputs = drawn(4)
    pieces = [
        (SoftLogits(), Examples(inputs, 3), np.full(3, 0.8), jax.random.key(1)),
        (Subset((0, 2), SoftLogits(3.0)), Examples(inputs[:6], 6), np.full(4, 2.0), jax.random.key(2)),
        (SquaredError(0.1), Examples(-inputs, 5), np.full(2, 0.3), jax.random.key(3)),
    ]
    direction = jax.tree.map(jnp.negative, jax.grad(trait)(params))
    expected = None
    for channel, source, rates, key in pieces:
        expected = displacement(network, params, direction, source, channel, rates=rates, key=key, start=expected)
    for eps in (1e-3, 1e-5):
        student = params
        for channel, source, rates, key in pieces:
            moved, change = run(network, params, trait, source, channel, rates, eps, key=key, start=student)
            student = jax.tree.map(lambda p, m, eps=eps: p + eps * m, params, moved)
        predicted = -eps * float(optax.tree.vdot(direction, expected))
        assert change / predicted == pytest.approx(1, abs=300 * eps)
        assert predicted < 0


@pytest.mark.slow
def test_one_preconditioner_for_both(x64):
    params, trait, inputs = drawn(5)
    scales = jax.tree.map(
        lambda leaf: jnp.exp(2 * jnp.sin(1.0 + jnp.arange(leaf.size))).reshape(leaf.shape), params
    )
    direction = jax.tree.map(lambda s, g: -s * g, scales, jax.grad(trait)(params))
    rates, eps = np.full(8, 0.2), 1e-5
    precondition = optax.stateless(lambda g, _: jax.tree.map(jnp.multiply, scales, g))
    _, change = run(
        network, params, trait, Examples(inputs, 4), SoftLogits(), rates, eps, direction=direction,
        optimizer=optax.chain(precondition, optax.sgd(0.2)),
    )  # fmt: skip
    found = contraction(
        network, params, trait, Examples(inputs, 4), SoftLogits(), teacher_step=eps, rates=rates, key=KEY,
        preconditioner=scales,
    )  # fmt: skip
    assert change / float(found.predicted_change) == pytest.approx(1, abs=1e-3)


@functools.cache
def compiled_run(number):
    """Prediction and measured change of 12 steps at given shares of each step's own limit."""
    channel = CHANNELS[number]

    @jax.jit
    def both(params, images, labels, inputs, shares):
        source = Examples(inputs, 5)
        trait = lambda p: -jnp.mean(jax.nn.log_softmax(network(p, images))[jnp.arange(7), labels])  # noqa: E731
        call = functools.partial(
            contraction, network, params, trait, source, channel, teacher_step=1e-5, key=KEY, products=40
        )
        rates = 2 * shares / call(rates=shares).sharpness.value
        found = call(rates=rates)
        direction = jax.tree.map(jnp.negative, jax.grad(trait)(params))
        teacher = jax.tree.map(lambda p, d: p + 1e-5 * d, params, direction)
        out = distill(
            Model(network, params), Model(network, teacher), channel, source,
            optax.sgd(lambda count: rates[count]), 12, key=KEY,
        )  # fmt: skip
        return found.predicted_change, trait(out.model.params) - trait(params)

    return both


@pytest.mark.slow
@settings(max_examples=150)
@given(
    st.integers(0, 2**32 - 1), st.integers(0, len(CHANNELS) - 1),
    st.lists(st.floats(0.01, 1.0), min_size=12, max_size=12),
)  # fmt: skip
def test_no_rise_within_the_condition(seed, number, shares):
    """Random tanh networks, batches, channels and rates up to the limit of every step, through distill itself."""
    with jax.enable_x64(True):
        params, _, inputs = drawn(seed)
        rng = np.random.default_rng(seed)
        images, labels = jnp.asarray(rng.normal(size=(7, 5))), jnp.asarray(rng.integers(0, 4, 7))
        predicted, change = compiled_run(number)(params, images, labels, inputs, jnp.asarray(shares))
        assert float(predicted) < 0
        assert float(change) < 0
        assert float(change) == pytest.approx(float(predicted), rel=0.02)


@pytest.mark.slow
def test_verdicts(x64):
    params, trait, inputs = drawn(6)
    largest = np.linalg.eigvalsh(dense(params, inputs, SoftLogits()))[-1]
    call = functools.partial(
        contraction, network, params, trait, Examples(inputs, 10), SoftLogits(), teacher_step=1e-3, key=KEY
    )
    assert call(rates=np.full(3, 1.9 / largest)).verdict == "holds"
    verdict = call(rates=np.array([1, 1, 2.2, 3]) / largest).verdict
    assert verdict.startswith("exceeds 2 at step 3: rate times sharpness is from 2.2 to ")
    undecided = call(rates=np.array([1.99, 0.1]) / largest, products=6).verdict
    assert undecided.startswith("undecided at step 1: rate times sharpness is from 1.9")
    assert call(rates=np.array([0.1]) / largest, products=2).verdict.endswith("to inf")


def test_parameters_without_a_gradient_stay(x64):
    params, trait, inputs = drawn(7)
    more = {"net": params, "count": jnp.int32(3), "key": jax.random.key(0)}
    call = functools.partial(contraction, teacher_step=1e-3, rates=np.ones(3), key=KEY)
    rest = (Examples(inputs, 4), SoftLogits())
    one = call(network, params, trait, *rest)
    two = call(lambda p, x: network(p["net"], x), more, lambda p: trait(p["net"]), *rest)
    assert float(one.predicted_change) == pytest.approx(float(two.predicted_change), rel=1e-12)


def test_prediction_costs_one_product_a_step(x64):
    """A product is a linear forward and backward pass; a gradient of the loss as many."""
    width = 256
    params = {"a": jnp.ones((width, width)), "b": jnp.ones((width, width))}
    inputs = jnp.ones((32, width))

    def flops(function):
        cost = jax.jit(function).lower(params).compile().cost_analysis()
        return cost["flops"]

    gradient = flops(jax.grad(lambda p: jnp.sum(network(p, inputs))))
    steps = flops(
        lambda p: displacement(network, p, p, Examples(inputs, 32), SoftLogits(), rates=np.ones(1), key=KEY)
    )
    assert steps < 3 * gradient


BAD = [
    ({"rates": np.ones(0)}, r"rates must be a vector, one for each step, got shape \(0,\)"),
    ({"rates": np.array([0.1, -0.1])}, "rates must be finite and not negative"),
    ({"rates": np.array([np.nan])}, "rates must be finite"),
    ({"channel": SampledToken()}, "SampledToken is not exact: sampled targets move a student by more"),
    ({"channel": Subset((9,))}, r"outside 0\.\.3"),
    ({"source": Examples(jnp.ones((4, 5)), 2, labels=jnp.ones(4))}, "the source has labels or targets"),
    ({"source": Examples(jnp.ones((4, 5)), 2, targets=jnp.ones((4, 4)))}, "the source has labels or targets"),
    ({"preconditioner": {"a": jnp.ones((5, 6))}}, "preconditioner must have the structure and shapes of params"),
    ({"products": 1}, "products must be at least 2, got 1"),
    ({"teacher_step": 0.0}, "teacher_step must be a positive, finite number"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_input_is_refused(change, message):
    params, trait, inputs = drawn(0)
    good = {"source": Examples(inputs, 4), "channel": SoftLogits(), "teacher_step": 1e-3, "rates": np.ones(2)}
    with pytest.raises(InputError, match=f"^.*{message}"):
        contraction(network, params, trait, key=KEY, **{**good, **change})


def test_bad_preconditioners_and_directions_are_refused():
    params, _, inputs = drawn(0)
    negative = jax.tree.map(lambda leaf: -jnp.ones_like(leaf), params)
    with pytest.raises(InputError, match="preconditioner must be finite and not negative"):
        sharpness(network, params, inputs, SoftLogits(), preconditioner=negative)
    with pytest.raises(InputError, match="direction must have the structure and shapes of params"):
        displacement(
            network, params, {"a": params["a"]}, Examples(inputs, 4), SoftLogits(), rates=np.ones(2), key=KEY
        )
