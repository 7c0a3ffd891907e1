"""Alignment against numpy, hand-written loops, kernels built from dense Jacobians and linear closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from subliminal_theory.alignment import cosine, difference, follow, inner, linearised, project_out
from subliminal_theory.channel import SquaredError, Subset
from subliminal_theory.distill import distill
from subliminal_theory.errors import InputError
from subliminal_theory.estimate import log_slope
from subliminal_theory.keys import named
from subliminal_theory.model import Model, from_nnx
from subliminal_theory.source import Examples
from subliminal_theory.vision.mlp import MLP
from tests.tolerances import TOLERANCE

pytestmark = pytest.mark.usefixtures("x64")
KEY = jax.random.key(7)
INPUTS, HELD_OUT = np.split(np.random.default_rng(0).normal(size=(9, 4)), [6])
LABELS = np.arange(len(INPUTS)) % 2
AUX = (2, 3, 4)  # the other two of five logits are the trait
DISTILLED = Subset(AUX)
ADAM, MOMENTUM = optax.adam(1e-2), optax.sgd(0.5, momentum=0.9)
exact = st.integers(-80, 80).map(lambda eighths: eighths / 8)  # their inner products are free of rounding
vectors = hnp.arrays(float, 7, elements=exact)


def tanh_network(params, inputs):
    return jnp.tanh(inputs @ params["hidden"]) @ params["out"]


def network(seed: int) -> Model:
    rng = np.random.default_rng(seed)
    shapes = {"hidden": (4, 3), "out": (3, 5)}
    return Model(tanh_network, {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()})


def moved(model: Model, size: float, seed: int = 9) -> Model:
    flat, unravel = ravel_pytree(model.params)
    return model.with_params(unravel(flat + size * np.random.default_rng(seed).normal(size=flat.shape)))


def trait_loss(params):
    log_p = jax.nn.log_softmax(tanh_network(params, jnp.asarray(INPUTS))[:, :2])
    return -jnp.mean(log_p[jnp.arange(len(LABELS)), LABELS])


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def numpy_cosine(a, b) -> float:
    u, v = flat(a), flat(b)
    length = np.linalg.norm(u) * np.linalg.norm(v)
    return u @ v / length if length else 0.0


def tree(vector: np.ndarray):
    a, b, c = np.split(vector, [4, 6])
    return {"a": jnp.asarray(a.reshape(2, 2)), "b": [jnp.asarray(b), jnp.asarray(c[0])]}


def close(actual, expected, tolerance: float = TOLERANCE["float64"]) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance), actual, expected)


# --- products of parameters


@pytest.mark.slow
@settings(max_examples=30)
@given(vectors, vectors, st.integers(-20, 20), st.integers(-20, 20))
def test_inner_and_cosine(u: np.ndarray, v: np.ndarray, p: int, q: int) -> None:
    a, b = tree(u), tree(v)
    assert inner(a, b) == inner(b, a) == u @ v
    expected = numpy_cosine(u, v)
    assert cosine(a, b) == pytest.approx(expected, abs=1e-12)
    assert cosine(tree(2.0**p * u), tree(2.0**q * v)) == pytest.approx(expected, abs=1e-12)
    assert cosine(tree(-(2.0**p) * u), b) == pytest.approx(-expected, abs=1e-12)
    assert cosine(a, a) == pytest.approx(float(u.any()))
    assert cosine(a, tree(0 * v)) == cosine(tree(0 * u), b) == 0
    np.testing.assert_array_equal(flat(difference(a, b)), flat(a) - flat(b))


@pytest.mark.parametrize("size", [1e-10, 1e10])
def test_cosine_of_small_and_large_vectors(size: float) -> None:
    vector = {"a": jnp.asarray([1, 2], jnp.float32) * jnp.float32(size)}
    assert cosine(vector, vector) == pytest.approx(1, rel=TOLERANCE["float32"])


# --- projection


@settings(max_examples=30)
@given(vectors, vectors, exact)
def test_project_out(u: np.ndarray, d: np.ndarray, along: float) -> None:
    transform = project_out(lambda params: params)
    params = tree(d)

    def projected(vector: np.ndarray) -> np.ndarray:
        return flat(transform.update(tree(vector), transform.init(params), params)[0])

    out = projected(u)
    size = 1e-13 * (1 + np.linalg.norm(u) + np.linalg.norm(along * d))
    if not d.any():
        np.testing.assert_array_equal(out, u)
        return
    np.testing.assert_allclose(out, u - (u @ d) / (d @ d) * d, rtol=0, atol=size)
    assert abs(out @ d) <= size * np.linalg.norm(d)
    np.testing.assert_allclose(projected(out), out, rtol=0, atol=size)
    np.testing.assert_allclose(projected(out + along * d), out, rtol=0, atol=size)


@pytest.mark.slow
def test_projected_steps_change_the_trait_to_second_order() -> None:
    """What three steps of Adam do to the trait loss, as a power of the learning rate."""
    start = network(0)
    teacher = moved(start, 0.5)

    def change(rate, project: bool):
        steps = [optax.adam(rate)] + [project_out(jax.grad(trait_loss))] * project
        arguments = teacher, DISTILLED, Examples(INPUTS, 6), optax.chain(*steps), 3
        return trait_loss(distill(start, *arguments, key=KEY).model.params) - trait_loss(start.params)

    rates = np.geomspace(1e-5, 1e-3, 4)
    for project, order in ((False, 1), (True, 2)):
        changes = jax.jit(jax.vmap(lambda rate, project=project: change(rate, project)))(rates)
        assert log_slope(rates, changes) == pytest.approx(order, abs=0.05)


# --- along a run


@functools.partial(jax.jit, static_argnames=("optimizer", "steps"))
def observed_run(student, start, teacher, source, optimizer, steps: int):
    observe = follow(jax.grad(trait_loss), start.params, teacher.params)
    return distill(student, teacher, DISTILLED, source, optimizer, steps, key=KEY, observe=observe).observed


@jax.jit
@jax.grad
def imitation_gradient(params, teacher, inputs, weights):
    p, q = (jax.nn.log_softmax(tanh_network(of, inputs)[:, np.asarray(AUX)]) for of in (teacher, params))
    return jnp.sum(weights * jnp.sum(jnp.exp(p) * (p - q), axis=1)) / jnp.sum(weights)


def followed(student: Model, start: Model, teacher: Model, optimizer, steps: int):
    """The cosines of a run, and the same run by a loop: each step's parameters, gradient and update."""
    source = Examples(INPUTS, 4)
    params, state, rows = student.params, optimizer.init(student.params), []
    for index, weights in zip(*source.schedule(named(KEY, "source"), steps), strict=True):
        gradient = imitation_gradient(params, teacher.params, jnp.asarray(INPUTS)[index], weights)
        update, state = optimizer.update(gradient, state, params)
        rows.append((params, gradient, update))
        params = optax.apply_updates(params, update)
    return observed_run(student, start, teacher, source, optimizer, steps), rows


@pytest.mark.slow
@pytest.mark.parametrize("distance", [0.0, 0.3], ids=["at the start", "elsewhere"])
def test_follow_is_a_plain_loop(distance: float) -> None:
    """The first update is coverage: the cosine of minus the first gradient and the teacher's displacement."""
    start = network(0)
    student, teacher = moved(start, distance, seed=3), moved(start, 0.5)
    observed, rows = followed(student, start, teacher, MOMENTUM, 5)
    taught = flat(teacher.params) - flat(start.params)
    trait_gradient = jax.jit(jax.grad(trait_loss))
    expected = {
        "gradient": [numpy_cosine(gradient, trait_gradient(params)) for params, gradient, _ in rows],
        "update": [numpy_cosine(update, taught) for _, _, update in rows],
        "displacement": [numpy_cosine(flat(params) - flat(start.params), taught) for params, _, _ in rows],
    }
    close(observed, {name: np.array(values) for name, values in expected.items()}, 1e-9)
    coverage = numpy_cosine(-flat(rows[0][1]), taught)
    np.testing.assert_allclose(observed["update"][0], coverage, atol=1e-10)
    if distance == 0:
        assert observed["displacement"][0] == 0
        assert (np.abs(observed["displacement"][1:]) > 1e-3).all()


# --- linearised students


def at(model: Model, params) -> Model:
    """A linearised model with the trained half of its parameters replaced."""
    return model.with_params({**model.params, "moved": params})


def test_linearised_is_exact_for_linear_networks() -> None:
    def affine(params, inputs):
        return inputs @ params["kernel"] + jnp.broadcast_to(params["bias"], (len(inputs), 5))

    rng = np.random.default_rng(1)
    here, there = (
        {"kernel": jnp.asarray(rng.normal(size=(4, 5))), "bias": jnp.asarray(rng.normal(size=5))} for _ in range(2)
    )
    model = Model(affine, here)
    close(at(linearised(model), there)(INPUTS), affine(there, INPUTS), 1e-13)


@pytest.mark.slow
def test_linearised_touches_the_model() -> None:
    model = network(0)
    straight = linearised(model)
    close(straight(INPUTS), model(INPUTS), 0)
    actual = jax.jacobian(lambda params: straight.with_params(params)(INPUTS))(straight.params)
    close(actual["moved"], jax.jacobian(lambda params: tanh_network(params, INPUTS))(model.params), 1e-13)
    assert jax.tree.leaves(actual["origin"]) == []


def test_linearised_error_is_of_second_order() -> None:
    model = network(0)
    straight, sizes = linearised(model), np.geomspace(1e-4, 1e-2, 4)
    there = [moved(model, size) for size in sizes]
    errors = [np.linalg.norm(at(straight, m.params)(INPUTS) - m(INPUTS)) for m in there]
    moves = [np.linalg.norm(m(INPUTS) - model(INPUTS)) for m in there]
    assert log_slope(sizes, errors) == pytest.approx(2, abs=0.05)
    assert log_slope(sizes, moves) == pytest.approx(1, abs=0.05)


def test_linearised_is_linear_in_its_parameters() -> None:
    straight = linearised(network(0))
    a, b = network(1).params, network(2).params
    middle = jax.tree.map(lambda x, y: 0.25 * x + 0.75 * y, a, b)
    close(at(straight, middle)(INPUTS), 0.25 * at(straight, a)(INPUTS) + 0.75 * at(straight, b)(INPUTS), 1e-12)


@pytest.mark.slow
def test_linearised_trains_in_an_ensemble() -> None:
    teacher, source = network(5), Examples(INPUTS, 4)

    def run(params, straight: bool = True):
        model = Model(tanh_network, params)
        student, rest = linearised(model) if straight else model, (DISTILLED, source, ADAM, 60)
        return distill(student, teacher, *rest, key=KEY, observe=lambda step: step.model.params)

    alone = [network(seed).params for seed in (0, 1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    ensemble, single = jax.jit(jax.vmap(run))(stacked), jax.jit(run)
    for i, params in enumerate(alone):
        expected = single(params)
        close(ensemble.losses[i], expected.losses, 1e-9)
        close(jax.tree.map(lambda leaf, i=i: leaf[i], ensemble.model.params), expected.model.params, 1e-9)
    close(ensemble.model.frozen["origin"], stacked, 0)
    assert (ensemble.losses[:, -1] < ensemble.losses[:, 0] / 2).all()
    # The first step of any student is that of its linearization; the second is not.
    real, straight = jax.jit(lambda params: run(params, False).observed)(alone[1]), expected.observed["moved"]
    for step, equal in ((1, True), (2, False)):
        a, b = (flat(jax.tree.map(lambda leaf, step=step: leaf[step], params)) for params in (real, straight))
        assert np.allclose(a, b, rtol=0, atol=1e-12) == equal


def test_linearised_networks_are_equal_when_networks_are() -> None:
    """So that nothing compiled for one is compiled again for the other."""
    first, second = (from_nnx(MLP((4, 3, 5), activation="tanh", rngs=nnx.Rngs(seed))) for seed in (0, 1))
    other = from_nnx(MLP((4, 6, 5), activation="tanh", rngs=nnx.Rngs(0)))
    assert linearised(first).apply == linearised(second).apply
    assert hash(linearised(first).apply) == hash(linearised(second).apply)
    assert linearised(first).apply != linearised(other).apply


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 25])
def test_linearised_student_is_its_tangent_kernel(steps: int) -> None:
    """Seen logits of the training inputs, and by the same kernel those never seen, of inputs never met."""
    model, teacher, count = network(0), network(1), len(INPUTS)
    start, unravel = ravel_pytree(model.params)
    everywhere = jnp.asarray(np.concatenate([INPUTS, HELD_OUT]))
    outputs = np.asarray(tanh_network(model.params, everywhere))
    jacobian = np.asarray(jax.jacobian(lambda p: tanh_network(unravel(p), everywhere))(start))
    seen = jacobian[:count, AUX].reshape(-1, start.size)
    kernel = seen @ seen.T
    rate = 0.5 * count / np.linalg.eigvalsh(kernel).max()
    arguments = teacher, Subset(AUX, SquaredError()), Examples(INPUTS, count), optax.sgd(rate), steps
    student = jax.jit(lambda m: distill(linearised(m), *arguments, key=KEY).model)(model)

    wanted, first = np.asarray(teacher(INPUTS))[:, AUX].ravel(), outputs[:count, AUX].ravel()
    step = np.eye(len(kernel)) - 2 * rate / count * kernel
    expected = wanted + np.linalg.matrix_power(step, steps) @ (first - wanted)
    np.testing.assert_allclose(np.asarray(student(INPUTS))[:, AUX].ravel(), expected, rtol=0, atol=1e-9)

    summed = sum(np.linalg.matrix_power(step, number) for number in range(steps))
    elsewhere = jacobian @ seen.T @ (2 * rate / count * summed @ (wanted - first))
    np.testing.assert_allclose(student(everywhere), outputs + elsewhere, rtol=0, atol=1e-9)
    assert np.abs(elsewhere[count:]).max() > 1e-2


def test_linearised_refuses_frozen_parameters() -> None:
    with pytest.raises(
        InputError, match=r"^linearised expands in all parameters: give it a model without frozen ones$"
    ):
        linearised(network(0).freeze("hidden"))


# --- a linear student in closed form


def two_layers(params, inputs):
    return inputs @ params["W"].T @ params["H"].T


@functools.partial(jax.jit, static_argnames="steps")
def trained_first_layer(head, start, teacher, seen, x, rate, steps: int):
    student, taught = (Model(two_layers, {"W": w, "H": None}, {"W": None, "H": head}) for w in (start, teacher))
    arguments = Subset(seen, SquaredError()), Examples(x, len(x)), optax.sgd(rate), steps
    return distill(student, taught, *arguments, key=KEY).model.params["W"]


# Inputs, hidden units, outputs, how many of them are seen, examples, steps; each is compiled.
SIZES = [(3, 2, 3, 2, 5, 30), (2, 4, 3, 2, 6, 7), (4, 3, 2, 2, 2, 7), (1, 1, 1, 1, 1, 1)]


def linear_student(
    head: Float[Array, "seen hidden"],
    start: Float[Array, "hidden inputs"],
    teacher: Float[Array, "hidden inputs"],
    covariance: Float[Array, "inputs inputs"],
    *,
    rate: float,
    steps: int,
) -> Float[Array, "hidden inputs"]:
    """The first layer W of a two-layer linear network z = H W x after distillation, in closed form and exact.

    `head` are the rows of the fixed output layer that the channel shows, the loss is E |H (W - W_T) x|^2 with
    covariance E x x^T, descended by `steps` steps of size `rate`:
    W - W_T = U [(U^T (W_0 - W_T) V) * (1 - 2 rate h s^T)^steps] V^T, where H^T H = U diag(h) U^T and
    E x x^T = V diag(s) V^T. For many steps on inputs of full rank, W_0 + H^+ H (W_T - W_0).
    """
    h, u = jnp.linalg.eigh(head.T @ head)
    s, v = jnp.linalg.eigh(covariance)
    gap = u.T @ (start - teacher) @ v
    return teacher + u @ (gap * (1 - 2 * rate * h[:, None] * s[None, :]) ** steps) @ v.T


@pytest.mark.slow
@settings(max_examples=12)
@given(st.sampled_from(SIZES), st.integers(0, 2**32 - 1), st.floats(0.1, 0.95))
def test_linear_student_is_distilled(sizes: tuple[int, ...], seed: int, fraction: float) -> None:
    """Of any rank: fewer logits seen than hidden units, fewer examples than inputs."""
    inputs, hidden, outputs, count, examples, steps = sizes
    rng = np.random.default_rng(seed)
    head, x = rng.normal(size=(outputs, hidden)), rng.normal(size=(examples, inputs))
    start, teacher = rng.normal(size=(2, hidden, inputs))
    seen = rng.permutation(np.arange(outputs) < count)
    rows, covariance = head[seen], x.T @ x / examples
    rate = fraction / (np.linalg.norm(rows, 2) ** 2 * np.linalg.norm(covariance, 2))
    trained = trained_first_layer(head, start, teacher, jnp.asarray(seen), x, rate, steps)
    assert np.abs(trained - start).max() > 1e-6
    arguments = [jnp.asarray(array) for array in (rows, start, teacher, covariance)]
    close(linear_student(*arguments, rate=rate, steps=steps), trained)


@settings(max_examples=12)
@given(st.sampled_from(SIZES), st.integers(0, 2**32 - 1))
def test_linear_student_in_the_end(sizes: tuple[int, ...], seed: int) -> None:
    """It has the teacher's weights where the head looks, and its own where it does not."""
    inputs, hidden, _, seen, *_ = sizes
    rng = np.random.default_rng(seed)
    u, _, v = np.linalg.svd(rng.normal(size=(seen, hidden)), full_matrices=False)
    head = u * rng.uniform(1, 2, len(v)) @ v  # singular values from 1 to 2
    basis = np.linalg.qr(rng.normal(size=(inputs, inputs)))[0]
    covariance = basis * rng.uniform(1, 2, inputs) @ basis.T
    start, teacher = rng.normal(size=(2, hidden, inputs))
    arguments = [jnp.asarray(array) for array in (head, start, teacher, covariance)]
    close(linear_student(*arguments, rate=1 / 16, steps=0), start)
    expected = start + np.linalg.pinv(head) @ head @ (teacher - start)
    close(linear_student(*arguments, rate=1 / 16, steps=500), expected)
