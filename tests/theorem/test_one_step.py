"""The theorem against closed forms, dense Jacobians, fitted orders and random cases."""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.architectures import AUX, BUILDERS, CLASSES, IMAGE, OUTPUTS, build
from subliminal_theory.channel import SampledToken, SoftLogits, SquaredError, Subset
from subliminal_theory.divergence import JensenShannon, ReverseKL
from subliminal_theory.errors import InputError
from subliminal_theory.estimate import log_slope
from subliminal_theory.model import from_nnx
from subliminal_theory.theorem import check, how_small
from subliminal_theory.vision.mlp import MLP
from tests.tolerances import TOLERANCE

AUXILIARY = tuple(range(CLASSES, OUTPUTS))


def perceptron(seed, sizes=(6, 5, OUTPUTS), activation="tanh", use_bias=True):
    model = from_nnx(MLP(sizes, activation=activation, use_bias=use_bias, rngs=nnx.Rngs(seed)))
    return model.apply, jax.tree.map(lambda leaf: leaf.astype(float), model.params)


def class_loss(apply, images, labels):
    def loss(params):
        return -jnp.mean(jax.nn.log_softmax(apply(params, images)[:, :CLASSES])[jnp.arange(len(labels)), labels])

    return loss


def example(dtype=float):
    apply, params = perceptron(0)
    rng = np.random.default_rng(0)
    images, inputs = jnp.asarray(rng.normal(size=(2, 9, 6)), dtype)
    trait_loss = class_loss(apply, images, jnp.asarray(rng.integers(0, CLASSES, 9)))
    return apply, jax.tree.map(lambda leaf: leaf.astype(dtype), params), trait_loss, inputs


@pytest.fixture
def toy(x64):
    return example()


@pytest.mark.slow
@pytest.mark.parametrize(
    "channel",
    [SoftLogits(), SoftLogits(2.5), SquaredError(np.linspace(0.1, 2, OUTPUTS)), Subset(AUXILIARY), SampledToken()],
    ids=["KL", "KL warm", "squared", "auxiliary", "sampled"],
)
def test_prediction_equals_dense_jacobian_and_hessian(toy, channel):
    apply, params, trait_loss, inputs = toy
    eps = 1e-6
    key = jax.random.key(0)
    report = check(apply, params, trait_loss, inputs, channel, teacher_step=eps, student_step=1e-3, key=key)

    flat, unravel = jax.flatten_util.ravel_pytree(params)
    direction = -jax.grad(lambda p: trait_loss(unravel(p)))(flat)
    jacobian = jax.jacobian(lambda p: apply(unravel(p), inputs))(flat)
    moved = np.asarray(jacobian @ direction)
    soft = SoftLogits() if isinstance(channel, SampledToken) else channel
    logits = apply(params, inputs)
    total = 0.0
    for z, u in zip(logits, moved, strict=True):
        hessian = jax.hessian(lambda s, z=z: soft.loss(s, soft.targets(None, z)))(z)
        total += u @ np.asarray(hessian) @ u
    expected = eps * total / len(inputs)
    assert float(report.predicted_inner_product) == pytest.approx(expected, rel=TOLERANCE["float64"])
    if soft is channel:
        assert float(report.inner_product) == pytest.approx(expected, rel=1e-4)
        assert report.verdict == "descends"


@pytest.mark.slow
def test_linear_squared_error_closed_form(x64):
    rng = np.random.default_rng(1)
    x, direction, theta = rng.normal(size=(8, 4)), rng.normal(size=(4, 3)), rng.normal(size=(4, 3))
    w = np.array([0.5, 1.0, 2.0])
    eps, alpha = 0.3, 0.2
    report = check(
        lambda params, inputs: inputs @ params,
        jnp.asarray(theta),
        lambda params: -jnp.sum(params * direction),
        jnp.asarray(x),
        SquaredError(w),
        teacher_step=eps,
        student_step=alpha,
    )
    inner = 2 * eps * np.mean(((x @ direction) ** 2) @ w)
    assert float(report.inner_product) == pytest.approx(inner, rel=TOLERANCE["float64"])
    assert float(report.predicted_inner_product) == pytest.approx(inner, rel=TOLERANCE["float64"])
    # The trait loss is linear, so its change is exactly minus alpha times the inner product.
    assert float(report.change) == pytest.approx(-alpha * inner, rel=TOLERANCE["float64"])
    assert float(report.predicted_change) == pytest.approx(-alpha * inner, rel=TOLERANCE["float64"])
    norm = 2 * eps * np.linalg.norm(x.T @ (x @ direction * w) / 8)
    assert float(report.student_norm) == pytest.approx(norm, rel=TOLERANCE["float64"])
    assert float(report.cosine) == pytest.approx(inner / norm / np.linalg.norm(direction))


@pytest.mark.slow
@pytest.mark.parametrize("channel", [SoftLogits(), Subset(AUXILIARY, ReverseKL(2.0)), JensenShannon()], ids=str)
def test_any_direction_of_the_teacher(toy, channel):
    """Lemma 1 for directions that are no gradient, against a trait loss that is linear, which has it for one."""
    apply, params, _, inputs = toy
    for seed in range(5):
        rng = np.random.default_rng(seed)
        direction = jax.tree.map(lambda leaf, rng=rng: jnp.asarray(rng.normal(size=leaf.shape)), params)
        steps = np.geomspace(1e-5, 1e-3, 4)
        reports = [
            check(apply, params, None, inputs, channel, teacher_step=step, direction=direction) for step in steps
        ]
        linear = check(
            apply, params, lambda p, d=direction: -optax.tree.vdot(d, p), inputs, channel, teacher_step=1e-5,
            student_step=1.0,
        )  # fmt: skip
        assert {report.verdict for report in reports} == {"aligned"}
        assert float(reports[0].inner_product) == pytest.approx(float(linear.inner_product), rel=1e-9)
        assert float(reports[0].predicted_inner_product) == pytest.approx(float(linear.predicted_inner_product))
        errors = [float(r.inner_product - r.predicted_inner_product) for r in reports]
        assert log_slope(steps, errors) == pytest.approx(2, abs=0.1)
        assert math.isnan(float(reports[0].change))
        assert "trait" not in str(reports[0])


@pytest.mark.slow
def test_a_direction_that_is_too_long_or_zero_or_blind(x64):
    """One logit sin(theta): D_S . D_T = 2 sin(eps)."""
    call = functools.partial(
        check, lambda p, x: jnp.sin(p)[None] * x, jnp.zeros(1), None, jnp.ones((1, 1)), teacher_step=3.5
    )
    one = call(SquaredError(), direction=jnp.ones(1))
    assert one.verdict == "step too large"
    assert float(one.inner_product) == pytest.approx(2 * np.sin(3.5))
    still = call(SquaredError(), direction=jnp.zeros(1))
    assert (still.verdict, still.zero_case) == ("orthogonal", "the direction is 0: the teacher does not move")
    assert call(SoftLogits(), direction=jnp.ones(1)).zero_case.startswith("blind channel")
    elsewhere = call(SquaredError(), direction=jnp.ones(1), student_params=jnp.ones(1))
    assert elsewhere.verdict == "different initialization"


@pytest.mark.slow
def test_a_direction_in_float32_below_rounding():
    report = check(
        lambda p, x: (1e4 + p[None]) * x, jnp.ones(2), None, jnp.ones((1, 1)), SquaredError(),
        teacher_step=1e-6, direction=jnp.array([1.0, -1.0]),
    )  # fmt: skip
    assert report.verdict in (
        "below rounding: use float64 or larger steps",
        "step lost to rounding: the teacher's; use float64 or a larger step",
    )
    sampled = check(
        lambda p, x: p[None] * x, jnp.zeros(3), None, jnp.ones((9, 1)), SampledToken(),
        teacher_step=0.1, direction=jnp.array([1.0, -1.0, 0.0]), key=jax.random.key(0),
    )  # fmt: skip
    assert sampled.verdict.startswith("single draw")


@pytest.mark.slow
def test_a_trait_loss_of_any_kind(toy):
    """With weight decay, a preference between two answers, and a target for hidden units."""
    apply, params, trait_loss, inputs = toy
    decayed = lambda p: trait_loss(p) + 0.1 * optax.tree.vdot(p, p)  # noqa: E731

    def preference(p):
        logits = jax.nn.log_softmax(apply(p, inputs))
        return -jnp.mean(jax.nn.log_sigmoid(2.0 * (logits[:, 0] - logits[:, 1])))

    hidden = lambda p: jnp.mean((jnp.tanh(inputs @ p["layers"][0]["kernel"]) - 0.3) ** 2)  # noqa: E731
    for loss in (decayed, preference, hidden):
        report = check(apply, params, loss, inputs, Subset(AUXILIARY), teacher_step=1e-4, student_step=1e-4)
        assert report.verdict == "descends"
        assert float(report.change) == pytest.approx(float(report.predicted_change), rel=0.02)


def test_a_trait_loss_or_a_direction(toy):
    apply, params, trait_loss, inputs = toy
    call = functools.partial(check, apply, params)
    rest, steps = (inputs, SoftLogits()), {"teacher_step": 1e-3, "student_step": 1e-3}
    with pytest.raises(InputError, match="the teacher needs a trait loss or a direction, got both"):
        call(trait_loss, *rest, direction=params, **steps)
    with pytest.raises(InputError, match="the teacher needs a trait loss or a direction, got neither"):
        call(None, *rest, teacher_step=1e-3)
    for trait, own in ((None, steps), (trait_loss, {"teacher_step": 1e-3})):
        with pytest.raises(InputError, match="student_step goes with a trait loss"):
            call(trait, *rest, direction=params if trait is None else None, **own)
    with pytest.raises(InputError, match="direction must have the structure and shapes of params"):
        call(None, *rest, direction={"layers": {0: params["layers"][0]}}, teacher_step=1e-3)


def test_orders_in_both_steps(toy):
    apply, params, trait_loss, inputs = toy
    steps = np.geomspace(1e-4, 1e-2, 6)
    one = jax.jit(
        lambda eps, alpha: check(
            apply, params, trait_loss, inputs, Subset(AUXILIARY), teacher_step=eps, student_step=alpha
        )
    )
    reports = [one(step, step) for step in steps]
    assert log_slope(steps, [float(r.inner_product) for r in reports]) == pytest.approx(1, abs=0.02)
    errors = [float(r.inner_product - r.predicted_inner_product) for r in reports]
    assert log_slope(steps, errors) == pytest.approx(2, abs=0.05)
    assert log_slope(steps**2, [float(r.change) for r in reports]) == pytest.approx(1, abs=0.02)


@pytest.mark.slow
def test_other_initialisation_imitates_the_teacher_before_its_step(toy):
    apply, params, trait_loss, inputs = toy
    _, other = perceptron(1)
    steps = np.geomspace(1e-4, 1e-2, 5)
    reports = [
        check(
            apply, params, trait_loss, inputs, SoftLogits(),
            teacher_step=step, student_step=1e-3, student_params=other,
        )
        for step in steps
    ]  # fmt: skip
    assert {r.verdict for r in reports} == {"different initialization"}
    inner = [float(r.inner_product) for r in reports]
    assert log_slope(steps, inner) == pytest.approx(0, abs=0.1)
    gaps = [float(r.inner_product - r.unupdated_inner_product) for r in reports]
    assert log_slope(steps, gaps) == pytest.approx(1, abs=0.05)
    assert log_slope(steps, [1 - float(r.unupdated_cosine) for r in reports]) == pytest.approx(2, abs=0.1)
    # Independently: the direction that imitates the teacher at its initialization.
    targets = jax.nn.softmax(apply(params, inputs))
    old = jax.grad(lambda p: -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(apply(p, inputs)), -1)))(other)
    trait = jax.grad(trait_loss)(params)
    product = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(trait), strict=True))
    assert float(reports[0].unupdated_inner_product) == pytest.approx(float(product), rel=1e-9)


@pytest.mark.slow
def test_zero_cases_are_named(toy):
    apply, params, trait_loss, inputs = toy

    def verdict(loss, channel):
        report = check(apply, params, loss, inputs, channel, teacher_step=1e-2, student_step=1e-2)
        assert abs(float(report.inner_product)) < 1e-16
        return report.verdict, report.zero_case.split(":")[0].split(" (")[0]

    head = lambda p: p["layers"][1]  # noqa: E731
    assert verdict(trait_loss, Subset((5,))) == ("orthogonal", "blind channel")
    assert verdict(trait_loss, SquaredError(0.0)) == ("orthogonal", "blind channel")
    unseen = lambda p: jnp.sum(head(p)["kernel"][:, :CLASSES] ** 2)  # noqa: E731
    assert verdict(unseen, Subset(AUXILIARY)) == ("orthogonal", "invisible trait")
    shift = lambda p: jnp.sum(head(p)["bias"][CLASSES:])  # noqa: E731
    assert verdict(shift, Subset(AUXILIARY)) == ("orthogonal", "logit shift")
    assert verdict(lambda p: jnp.sum(head(p)["bias"] * 0), SoftLogits())[1] == "the trait loss is stationary"


@pytest.mark.slow
def test_squared_error_sees_what_a_softmax_cannot(toy):
    apply, params, trait_loss, inputs = toy
    shift = lambda p: jnp.sum(p["layers"][1]["bias"][CLASSES:])  # noqa: E731
    for loss, channel in ((trait_loss, Subset((5,), SquaredError())), (shift, Subset(AUXILIARY, SquaredError()))):
        report = check(apply, params, loss, inputs, channel, teacher_step=1e-2, student_step=1e-2)
        assert report.verdict == "descends"
        assert report.zero_case == ""


@pytest.mark.slow
def test_a_step_that_is_too_large_is_called_so(x64):
    report = check(
        lambda params, inputs: inputs @ params[:, None],
        jnp.ones(2),
        lambda params: 0.5 * jnp.sum(params**2),
        jnp.eye(2),
        SquaredError(),
        teacher_step=0.1,
        student_step=100.0,
    )
    assert report.verdict == "step too large"
    assert "step too large" in str(report)


@pytest.mark.slow
def test_any_function_of_any_pytree(x64):
    params = (jnp.asarray(0.3), [jnp.arange(3.0)], {"b": jnp.ones((2, 2))})

    def apply(p, inputs):
        scale, (vector,), rest = p
        return jnp.stack([scale * inputs, inputs**2 * vector[1], jnp.sin(inputs * rest["b"][0, 1])], -1)

    report = check(
        apply, params, lambda p: p[0] ** 2 + jnp.sum(jnp.cos(p[2]["b"])), jnp.linspace(-1, 1, 5), SoftLogits(),
        teacher_step=1e-4, student_step=1e-4, weights=jnp.array([1.0, 0, 2, 1, 1]),
    )  # fmt: skip
    assert report.verdict == "descends"
    assert float(report.inner_product) == pytest.approx(float(report.predicted_inner_product), rel=1e-3)


@pytest.mark.slow
def test_positions_of_weight_zero_do_not_count(toy):
    apply, params, trait_loss, inputs = toy
    steps = {"teacher_step": 1e-3, "student_step": 1e-3}
    weights = jnp.array([1.0, 1, 1, 1, 0, 0, 0, 0, 0])
    masked = check(apply, params, trait_loss, inputs, SoftLogits(), weights=weights, **steps)
    short = check(apply, params, trait_loss, inputs[:4], SoftLogits(), **steps)
    assert float(masked.inner_product) == pytest.approx(float(short.inner_product), rel=1e-12)
    assert float(masked.predicted_inner_product) == pytest.approx(float(short.predicted_inner_product), rel=1e-12)


@pytest.mark.slow
def test_cost_is_at_most_five_gradients_and_memory_a_few_copies(x64):
    width = 512
    apply, params = perceptron(0, (width, width, width, OUTPUTS))
    inputs = jnp.ones((64, width))
    trait_loss = class_loss(apply, inputs, jnp.zeros(64, int))

    def report(params, **start):
        steps = {"teacher_step": 1e-3, "student_step": 1e-3}
        return check(apply, params, trait_loss, inputs, SoftLogits(), **steps, **start)

    gradient = jax.jit(jax.grad(trait_loss)).lower(params).compile()
    for function, arguments in (
        (report, (params,)),
        (lambda p, q: report(p, student_params=q), (params, params)),
    ):
        compiled = jax.jit(function).lower(*arguments).compile()
        ratio = compiled.cost_analysis()["flops"] / gradient.cost_analysis()["flops"]
        assert 2 < ratio <= 5
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        assert compiled.memory_analysis().temp_size_in_bytes < 8 * size


@pytest.mark.parametrize("step", ["teacher_step", "student_step"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_steps_are_refused(toy, step, value):
    apply, params, trait_loss, inputs = toy
    steps = {"teacher_step": 1e-3, "student_step": 1e-3, step: value}
    with pytest.raises(InputError, match=f"{step} must be a positive, finite number"):
        check(apply, params, trait_loss, inputs, SoftLogits(), **steps)


def test_other_bad_input_is_refused(toy):
    apply, params, trait_loss, inputs = toy
    steps = {"teacher_step": 1e-3, "student_step": 1e-3}
    with pytest.raises(InputError, match="must be a scalar"):
        check(apply, params, lambda p: apply(p, inputs), inputs, SoftLogits(), **steps)
    with pytest.raises(InputError, match=r"outside 0\.\.6"):
        check(apply, params, trait_loss, inputs, Subset((7,)), **steps)
    with pytest.raises(InputError, match="no output metric"):
        check(apply, params, trait_loss, inputs, SampledToken(0.0), **steps)
    with pytest.raises(InputError, match="give it a key"):
        check(apply, params, trait_loss, inputs, SampledToken(), **steps)
    _, other = perceptron(1, (6, 4, OUTPUTS))
    with pytest.raises(InputError, match="structure and shapes"):
        check(apply, params, trait_loss, inputs, SoftLogits(), student_params=other, **steps)
    with pytest.raises(InputError, match="teacher_step must be"):
        how_small(apply, params, trait_loss, inputs, SoftLogits(), teacher_step=-1.0)


@pytest.mark.slow
def test_how_small_is_exact_for_quadratics(x64):
    """Linear model, quadratic trait: L falls exactly while alpha < 2 D_S.D_T / D_S^T H D_S."""
    rng = np.random.default_rng(2)
    x, theta, root = rng.normal(size=(7, 5)), rng.normal(size=5), rng.normal(size=(5, 5))
    hessian, eps = root @ root.T, 0.1
    steps = how_small(
        lambda p, inputs: inputs @ p[:, None],
        jnp.asarray(theta),
        lambda p: 0.5 * p @ jnp.asarray(hessian) @ p,
        jnp.asarray(x),
        SquaredError(),
        teacher_step=eps,
    )
    d_t = -hessian @ theta
    d_s = 2 * eps * x.T @ (x @ d_t) / 7
    limit = 2 * (d_s @ d_t) / (d_s @ hessian @ d_s)
    assert float(steps.student_step) == pytest.approx(limit, rel=1e-6)
    # D_S . D_T is linear in eps here: it never fails and has no curvature.
    assert float(steps.teacher_step) == float(steps.teacher_step_searched)


def test_how_small_finds_a_teacher_step_that_is_too_large(x64):
    """One logit sin(theta), squared error: D_S . D_T is proportional to sin(eps g) and fails at eps g = pi."""
    slope = 0.5
    steps = how_small(
        lambda p, inputs: jnp.sin(p)[None, None] * inputs,
        jnp.asarray(0.0),
        lambda p: -slope * p,
        jnp.ones((1, 1)),
        SquaredError(),
        teacher_step=0.1,
        farthest=1.0,
    )
    assert float(steps.teacher_step_searched) == 0  # parameters of norm 0 give no scale
    steps = how_small(
        lambda p, inputs: jnp.sin(p - 100.0)[None, None] * inputs,
        jnp.asarray(100.0),
        lambda p: -slope * p,
        jnp.ones((1, 1)),
        SquaredError(),
        teacher_step=0.1,
        farthest=0.05,
        probes=200,
    )
    assert float(steps.teacher_step) == pytest.approx(np.pi / slope, rel=1e-6)


@pytest.mark.slow
def test_below_what_the_search_found_the_guarantee_holds(toy):
    apply, params, trait_loss, inputs = toy
    channel = Subset(AUXILIARY)
    steps = how_small(apply, params, trait_loss, inputs, channel, teacher_step=0.1, probes=96)
    run = jax.jit(
        lambda eps, alpha: check(apply, params, trait_loss, inputs, channel, teacher_step=eps, student_step=alpha)
    )
    for share in (0.01, 0.3, 0.7, 0.99):
        assert float(run(share * steps.teacher_step, 1e-3).inner_product) > 0
        assert run(0.1, share * steps.student_step).verdict == "descends"


@pytest.mark.slow
def test_how_small_is_zero_without_a_signal(toy):
    apply, params, trait_loss, inputs = toy
    unseen = lambda p: jnp.sum(p["layers"][1]["kernel"][:, :CLASSES] ** 2)  # noqa: E731
    still = lambda p: 0.0 * jnp.sum(p["layers"][1]["bias"])  # noqa: E731
    for loss, channel in ((trait_loss, Subset((5,))), (unseen, Subset(AUXILIARY)), (still, SoftLogits())):
        steps = how_small(apply, params, loss, inputs, channel, teacher_step=0.1)
        assert float(steps.teacher_step) == float(steps.student_step) == 0


# --- what rounding leaves

DTYPES = ("float64", "float32", "bfloat16")
STEPS = {"teacher_step": 0.5, "student_step": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channel", [SoftLogits(), SquaredError(), Subset(AUXILIARY)], ids=str)
def test_the_theorem_in_every_dtype(dtype, channel):
    """Sign, verdict and prediction: in float64 by definition, in shorter dtypes the same up to their rounding."""
    with jax.enable_x64(dtype == "float64"):
        report = check(*example(dtype), channel, teacher_step=0.01, student_step=1e-3)
        assert float(report.inner_product) > 0
        predicted = float(report.predicted_inner_product)
        allowed = {"float64": 0.03, "float32": 0.03, "bfloat16": 0.6}[dtype]  # 0.03 is the order eps itself
        assert float(report.inner_product) == pytest.approx(predicted, rel=allowed)
        assert report.verdict == "descends" or dtype != "float64"
        assert report.verdict.split(":")[0] in ("descends", "below rounding", "step lost to rounding")


def readme_case(dtype):
    model = from_nnx(MLP((784, 256, 256, 13), rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    images, inputs = jnp.asarray(rng.uniform(-1, 1, (2, 16, 784)), dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), model.params)
    loss = lambda p: -jnp.mean(jax.nn.log_softmax(model.apply(p, images)[:, :10])[:, 3])  # noqa: E731
    return check(model.apply, params, loss, inputs, Subset((10, 11, 12)), teacher_step=1e-3, student_step=1e-3)


@pytest.mark.slow
def test_the_example_of_the_readme():
    report = readme_case("float32")
    assert report.verdict.split(":")[0] in ("below rounding", "step lost to rounding")
    assert "use float64" in report.verdict
    assert float(report.inner_product) == pytest.approx(float(report.predicted_inner_product), rel=0.01)
    with jax.enable_x64(True):
        assert readme_case("float64").verdict == "descends"


@pytest.mark.slow
def test_a_gap_of_fourteen_nats_is_no_blind_channel():
    """Three logits in float32: D_S . D_T is 2e-6, and the trait loss falls by that much."""
    report = check(
        lambda p, x: (jnp.array([14.0, 0.0, 0.0]) + p)[None] * x, jnp.zeros(3), lambda p: p[1] - p[2],
        jnp.ones((1, 1)), SoftLogits(), teacher_step=1.0, student_step=1.0,
    )  # fmt: skip
    assert report.zero_case == ""
    assert report.verdict == "descends"
    p = np.exp([14.0, 0, 0]) / np.exp([14.0, 0, 0]).sum()
    assert float(report.predicted_inner_product) == pytest.approx(2 * p[1], rel=1e-5)


@pytest.mark.slow
def test_a_small_weight_is_no_zero():
    report = check(
        lambda p, x: p[None] * x, jnp.zeros(2), lambda p: p[1], jnp.ones((1, 1)), SquaredError([1.0, 1e-6]),
        teacher_step=1.0, student_step=1.0,
    )  # fmt: skip
    assert (report.verdict, report.zero_case) == ("descends", "")
    assert float(report.change) == pytest.approx(-2e-6, rel=1e-5)


@pytest.mark.slow
def test_cancelled_signal_is_named_in_float32():
    """The visible logit moves by 1e4 (a - a): what is left is rounding."""
    apply = lambda p, x: jnp.stack([x * (1e4 * (p[0] + p[1]) + 0.1 * p[2]), x * p[2]], -1)  # noqa: E731
    loss = lambda p: 0.3 * p[0] - 0.3 * p[1]  # noqa: E731
    report = check(
        apply, jnp.array([0.3, 0.1, 0.7]), loss, jnp.linspace(0.1, 1, 4), SoftLogits(),
        teacher_step=1e-3, student_step=1e-3,
    )  # fmt: skip
    assert report.verdict == "orthogonal"


@pytest.mark.parametrize(
    ("apply", "loss", "name"),
    [
        (lambda p, x: x * p / 0.0, lambda p: jnp.sum(p**2), "inner_product"),
        (lambda p, x: x * p, lambda p: jnp.sum(p**2) + jnp.inf, "trait_loss_before"),
        (lambda p, x: x * p, lambda p: jnp.sum(jnp.sqrt(p - 1)), "teacher_norm"),
    ],
)
def test_numbers_that_are_not_finite_are_named(apply, loss, name):
    one = lambda q, x: apply(q[None], x)  # noqa: E731
    run = jax.jit(lambda p: check(one, p, loss, jnp.ones((2, 3)), SquaredError(), **STEPS))
    report = run(jnp.ones(3))
    assert report.verdict.startswith("not finite: ")
    assert name in report.verdict


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_a_step_lost_to_rounding_is_named(who):
    steps = {"teacher_step": 1e-2, "student_step": 1e-2, f"{who}_step": 1e-9}
    report = check(
        lambda p, x: p[None] * x, jnp.ones(3), lambda p: p[1] ** 2, jnp.ones((1, 1)), SquaredError(), **steps
    )
    assert report.verdict == f"step lost to rounding: the {who}'s; use float64 or a larger step"
    assert float(getattr(report, f"{who}_kept")) == 0


@pytest.mark.slow
@pytest.mark.parametrize("channel", [SampledToken(), Subset(AUXILIARY, SampledToken())], ids=str)
def test_one_draw_decides_nothing(toy, channel):
    verdicts = {
        check(*toy, channel, teacher_step=1e-4, student_step=1e-2, key=jax.random.key(seed)).verdict
        for seed in range(8)
    }
    assert verdicts == {"single draw: one draw of targets decides nothing; average over keys"}


def test_parameters_without_a_gradient_stay(toy):
    apply, params, trait_loss, inputs = toy
    steps = {"teacher_step": 1e-3, "student_step": 1e-3}
    plain = check(apply, params, trait_loss, inputs, SoftLogits(), **steps)
    still = {"counter": jnp.int32(3), "key": jax.random.key(7), "mask": jnp.array([True, False]), "none": None}

    def masked(p, x):
        assert set(p) == {"model", *still}
        return apply(p["model"], x) * jnp.where(p["mask"][0], 1, 0)

    report = check(
        masked, {"model": params, **still}, lambda p: trait_loss(p["model"]), inputs, SoftLogits(), **steps
    )
    assert float(report.inner_product) == pytest.approx(float(plain.inner_product), rel=1e-12)
    assert report.verdict == "descends"


# --- what a channel says of itself


@dataclass(frozen=True)
class OtherMetric(SoftLogits):
    def metric(self, logits, tangent):
        return 3.5 * super().metric(logits, tangent)


@dataclass(frozen=True)
class FalseVisible(SoftLogits):
    def visible(self, n):
        return jnp.arange(n) > 0


@pytest.mark.parametrize(
    ("channel", "message"),
    [
        (OtherMetric(), "the metric of OtherMetric differs by"),
        (FalseVisible(), "the loss of FalseVisible depends on logit 0, which `visible` excludes"),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_channels_that_lie_are_refused(toy, channel, message, compiled):
    run = lambda params: check(toy[0], params, *toy[2:], channel, teacher_step=1e-3, student_step=1e-3)  # noqa: E731
    with pytest.raises(InputError, match=f"^{message}"):
        (jax.jit(run) if compiled else run)(toy[1])


@functools.cache
def compiled_case(network, kind):
    """check() of one network and kind of loss with everything else as data, at steps tiny relative to theta."""

    @jax.jit
    def run(key, data, inputs, images, labels):
        model = build(network, key)
        trait_loss = class_loss(model.apply, images, labels)
        channel = SquaredError(data[1:]) if kind == "squared" else Subset(data[1:] > 0, SoftLogits(data[0]))
        size = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(model.params)))
        probe = check(model.apply, model.params, trait_loss, inputs, channel, teacher_step=1e-6, student_step=1e-6)
        eps = 1e-6 * size / probe.teacher_norm
        alpha = 1e-6 * size * 1e-6 / jnp.maximum(probe.student_norm, 1e-300) / eps
        return check(model.apply, model.params, trait_loss, inputs, channel, teacher_step=eps, student_step=alpha)

    return run


WEIGHT = st.floats(0.0, 3.0).map(lambda w: 0.0 if w < 1 else w)


def random_case(networks):
    return st.tuples(
        st.sampled_from(networks),
        st.sampled_from(["squared", "KL"]),
        st.sampled_from(["normal", "uniform", "sparse", "one image"]),
        st.floats(0.3, 4.0),
        st.lists(WEIGHT, min_size=OUTPUTS, max_size=OUTPUTS).filter(any),
        st.floats(0.1, 3.0),
        st.integers(0, 2**32 - 1),
    )


def holds(case):
    network, kind, law, temperature, weights, scale, seed = case
    rng = np.random.default_rng(seed)
    shape = (6, *IMAGE)
    inputs = {
        "normal": lambda: rng.normal(size=shape),
        "uniform": lambda: rng.uniform(-1, 1, size=shape),
        "sparse": lambda: rng.normal(size=shape) * (rng.random(shape) < 0.2),
        "one image": lambda: np.repeat(rng.normal(size=(1, *IMAGE)), 6, 0),
    }[law]()
    report = compiled_case(network, kind)(
        jax.random.key(seed), jnp.asarray([temperature, *weights]), jnp.asarray(scale * inputs),
        jnp.asarray(rng.normal(size=shape)), jnp.asarray(rng.integers(0, CLASSES, 6)),
    )  # fmt: skip
    signal = float(report.predicted_inner_product)
    rounding = 1e-12 * float(report.teacher_norm) * float(report.student_norm)
    assert signal >= -rounding
    assert float(report.inner_product) >= -rounding
    assert report.verdict in ("orthogonal", "descends"), str(report)
    if report.verdict == "orthogonal":
        assert abs(float(report.inner_product)) <= 1e-9 * float(report.teacher_norm)


FEW = ["linear", "MLP, ReLU", "MLP, tanh", "residual, layer norm"]


@settings(max_examples=120)
@given(random_case(FEW))
def test_holds_for_random_cases(case):
    with jax.enable_x64(True):
        holds(case)


@pytest.mark.slow
@settings(max_examples=2500)
@given(random_case(list(BUILDERS)))
def test_holds_for_thousands_of_random_cases(case):
    with jax.enable_x64(True):
        holds(case)


@pytest.mark.slow
def test_sampled_tokens_carry_the_signal_on_average(toy):
    """The mean of D_S over all token sequences, weighted by their probabilities, is D_S of the soft channel."""
    apply, params, trait_loss, inputs = toy
    inputs = inputs[:1]
    direction = jax.tree.map(jnp.negative, jax.grad(trait_loss)(params))
    teacher = jax.tree.map(lambda p, d: p + 0.05 * d, params, direction)
    probabilities = jax.nn.softmax(apply(teacher, inputs))[0]
    mean = 0.0
    for token, p in enumerate(probabilities):
        loss = lambda q, token=token: SampledToken().loss(apply(q, inputs), jnp.array([token]))[0]  # noqa: E731
        gradient = jax.grad(loss)(params)
        mean -= p * sum(
            jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
        )
    soft = check(apply, params, trait_loss, inputs, SoftLogits(), teacher_step=0.05, student_step=1e-3)
    assert float(mean) == pytest.approx(float(soft.inner_product), rel=1e-9)
    assert len(AUXILIARY) == AUX
