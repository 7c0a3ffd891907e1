import functools
from dataclasses import dataclass, replace

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from subliminal_theory.channel import SampledToken, SoftLogits, SquaredError, Subset, TopK, WeightedSum
from subliminal_theory.distill import State, Trained, distill, require_finite, teach
from subliminal_theory.divergence import JensenShannon, ReverseKL
from subliminal_theory.errors import InputError
from subliminal_theory.keys import named
from subliminal_theory.model import BodyAndHead, Model, computed_in, from_nnx
from subliminal_theory.pytree import register_dataclass
from subliminal_theory.source import Batch, Examples
from subliminal_theory.theorem import check
from subliminal_theory.vision.mlp import MLP
from subliminal_theory.vision.noise import NoiseImages
from tests.tolerances import TOLERANCE

INPUTS = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
KEY = jax.random.key(7)
SGD, ADAM = optax.sgd(0.1), optax.adam(1e-2)
distill_jit = jax.jit(distill, static_argnames=("optimizer", "steps"))


def linear(params, inputs):
    return inputs @ params["kernel"]


def linear_model(seed: int, outputs: int = 3) -> Model:
    return Model(linear, {"kernel": jax.random.normal(jax.random.key(seed), (4, outputs))})


def mlp(seed: int, hidden: int = 6) -> Model:
    return from_nnx(MLP((4, hidden, 3), activation="tanh", rngs=nnx.Rngs(seed)))


def stack(*trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def close(actual, expected, rtol: float = TOLERANCE["float32"], atol: float = 1e-6) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), actual, expected)


def plain_run(student, teacher, channel, source, optimizer, steps, key, seen=None):
    """What `distill` promises, as a Python loop; `seen` gets each step's parameters, gradient and update."""
    params, state, losses = student.params, optimizer.init(student.params), []
    index, weights = source.schedule(named(key, "source"), steps)

    @jax.jit
    def one_step(params, state, index, weights, key):
        inputs = jnp.asarray(INPUTS)[index]
        targets = channel.targets(key, teacher(inputs))

        def loss(params):
            return jnp.sum(channel.loss(student.apply(params, inputs), targets) * weights) / jnp.sum(weights)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value, gradient, updates

    for step in range(steps):
        step_key = named(key, "channel", step)
        before = params
        params, state, value, gradient, updates = one_step(params, state, index[step], weights[step], step_key)
        losses.append(value)
        if seen is not None:
            seen.append((before, gradient, updates))
    return params, np.array(losses)


# --- the update


def test_one_sgd_step_by_hand() -> None:
    """z = x W, loss mean |z - y|^2, gradient 2/B x^T (z - y)."""
    student, teacher = linear_model(0), linear_model(1)
    trained = distill(student, teacher, SquaredError(), Examples(INPUTS, 20), SGD, 1, key=KEY)
    w, v = (np.asarray(model.params["kernel"], float) for model in (student, teacher))
    difference = INPUTS @ w - INPUTS @ v
    np.testing.assert_allclose(trained.losses, [(difference**2).sum(1).mean()], rtol=2e-5)
    expected = w - 0.1 * 2 / 20 * INPUTS.T @ difference
    np.testing.assert_allclose(trained.model.params["kernel"], expected, rtol=2e-5, atol=1e-6)


def test_one_sgd_step_by_hand_softmax() -> None:
    student, teacher = linear_model(0), linear_model(1)
    trained = distill(student, teacher, SoftLogits(2.0), Examples(INPUTS, 20), optax.sgd(0.5), 1, key=KEY)
    w, v = (np.asarray(model.params["kernel"], float) for model in (student, teacher))

    def softmax(z):
        e = np.exp(z / 2)
        return e / e.sum(1, keepdims=True)

    gradient = INPUTS.T @ (softmax(INPUTS @ w) - softmax(INPUTS @ v)) / 2 / 20
    np.testing.assert_allclose(trained.model.params["kernel"], w - 0.5 * gradient, rtol=2e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("channel", [SoftLogits(), SampledToken(0.7), Subset((0, 2))], ids=str)
def test_adam_steps_are_a_plain_loop(channel) -> None:
    arguments = (mlp(0), mlp(1), channel, Examples(INPUTS, 8), ADAM, 7)  # more than two epochs
    trained = distill_jit(*arguments, key=KEY)
    params, losses = plain_run(*arguments, KEY)
    close(trained.losses, losses)
    close(trained.model.params, params)


@pytest.mark.slow
def test_teach_is_a_plain_loop() -> None:
    labels = np.arange(20) % 3
    source = Examples(INPUTS, 8, labels)
    trained = teach(mlp(0), optax.softmax_cross_entropy_with_integer_labels, source, SGD, 4, key=KEY)
    params = mlp(0).params
    index, weights = source.schedule(named(KEY, "source"), 4)
    for step in range(4):

        @jax.jit
        @jax.value_and_grad
        def loss(params, step=step):
            log_p = jax.nn.log_softmax(mlp(0).apply(params, jnp.asarray(INPUTS)[index[step]]))
            picked = log_p[jnp.arange(8), jnp.asarray(labels)[index[step]]]
            return -jnp.sum(weights[step] * picked) / jnp.sum(weights[step])

        value, gradient = loss(params)
        np.testing.assert_allclose(trained.losses[step], value, rtol=2e-5)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    close(trained.model.params, params)


@pytest.mark.slow
@pytest.mark.parametrize("channel", [SoftLogits(), SquaredError(), Subset((1, 2), SoftLogits(0.5))], ids=str)
def test_student_equal_to_its_teacher_stays(channel) -> None:
    trained = distill_jit(mlp(0), mlp(0), channel, Examples(INPUTS, 8), SGD, 6, key=KEY)
    assert np.abs(trained.losses).max() <= 1e-7
    close(trained.model.params, mlp(0).params, rtol=0, atol=1e-6)


def test_imitation_falls() -> None:
    trained = distill_jit(mlp(0), mlp(1), SoftLogits(), Examples(INPUTS, 8), optax.adam(3e-2), 200, key=KEY)
    assert trained.losses[-1] < trained.losses[0] / 10


@pytest.mark.slow
def test_frozen_parameters_stay() -> None:
    student = mlp(0).freeze("layers/0/*")
    trained = distill_jit(student, mlp(1), SoftLogits(), Examples(INPUTS, 8), ADAM, 3, key=KEY).model
    before, after = mlp(0).params["layers"], trained.all_params["layers"]
    jax.tree.map(np.testing.assert_array_equal, after[0], before[0])
    assert (after[1]["kernel"] != before[1]["kernel"]).any()
    free = distill_jit(mlp(0), mlp(1), SoftLogits(), Examples(INPUTS, 8), ADAM, 3, key=KEY).model
    assert (free.params["layers"][0]["kernel"] != before[0]["kernel"]).any()


# --- what is seen on the way


def everything(step):
    return {
        "index": step.index,
        "params": step.model.params,
        "gradient": step.gradient,
        "update": step.update,
        "logits": step.model(jnp.asarray(INPUTS)[:2]),
    }


distill_seen = jax.jit(distill, static_argnames=("optimizer", "steps", "observe", "snapshots"))
RUN = (mlp(0), mlp(1), SampledToken(0.7), Examples(INPUTS, 8), ADAM)  # an epoch has 3 steps


@functools.cache
def seen():
    """A run of 7 steps with all that can be seen of it."""
    return distill_seen(*RUN, 7, key=KEY, observe=everything)


@pytest.mark.slow
def test_observed_is_a_plain_loop() -> None:
    recorded = []
    params, losses = plain_run(*RUN, 7, KEY, recorded)
    observed = seen().observed
    np.testing.assert_array_equal(observed["index"], np.arange(7))
    for name, values in zip(("params", "gradient", "update"), zip(*recorded, strict=True), strict=True):
        assert jax.tree.structure(observed[name]) == jax.tree.structure(values[0])
        close(observed[name], jax.tree.map(lambda *leaves: np.stack(leaves), *values))
    close(observed["logits"], jax.vmap(lambda params: mlp(0).apply(params, INPUTS[:2]))(observed["params"]))
    close(seen().losses, losses)
    close(seen().model.params, params)


def test_observing_changes_nothing() -> None:
    plain = distill_jit(*RUN, 7, key=KEY)
    assert plain.observed is None
    assert plain.snapshots == seen().snapshots == ()
    close(seen().losses, plain.losses)
    close(seen().model.params, plain.model.params)


@pytest.mark.slow
def test_snapshots_are_what_the_next_step_finds() -> None:
    """Whether they end an epoch, the run or neither; the rest of the run does not depend on them."""
    run, whole = distill_seen(*RUN, 7, key=KEY, observe=everything, snapshots=(1, 3, 7)), seen()
    first, third, last = (snapshot.params for snapshot in run.snapshots)
    close(first, jax.tree.map(lambda leaf: leaf[1], whole.observed["params"]))
    close(third, jax.tree.map(lambda leaf: leaf[3], whole.observed["params"]))
    close(last, whole.model.params)
    close(run.losses, whole.losses)
    close(run.observed, whole.observed)
    close(run.model.params, whole.model.params)


@pytest.mark.slow
def test_snapshots_are_shorter_runs() -> None:
    arguments = (linear_model(0), linear_model(1), SoftLogits(), Examples(INPUTS, 8), ADAM)
    run = distill_seen(*arguments, 6, key=KEY, snapshots=(2, 5))
    assert run.observed is None
    for step, snapshot in zip((2, 5), run.snapshots, strict=True):
        shorter = distill_jit(*arguments, step, key=KEY)
        close(snapshot.params, shorter.model.params)
        close(run.losses[:step], shorter.losses)


@pytest.mark.slow
def test_seen_in_an_ensemble() -> None:
    """What members do that are computed together is what each does alone."""

    def run(student, key):
        rest = linear_model(9), SoftLogits(), Examples(INPUTS, 8), SGD, 3
        return distill(student, *rest, key=key, observe=everything, snapshots=(2,))

    keys = jax.random.split(jax.random.key(3), 2)
    ensemble = jax.jit(jax.vmap(run))(stack(linear_model(0), linear_model(1)), keys)
    np.testing.assert_array_equal(ensemble.observed["index"], [[0, 1, 2]] * 2)
    single = jax.jit(run)
    for i in range(2):
        alone = single(linear_model(i), keys[i])
        close(jax.tree.map(lambda leaf, i=i: leaf[i], ensemble.observed), alone.observed)
        close(jax.tree.map(lambda leaf, i=i: leaf[i], ensemble.snapshots[0].params), alone.snapshots[0].params)


def test_seen_of_a_frozen_model() -> None:
    student = mlp(0).freeze("layers/0/*")
    rest = mlp(1), SoftLogits(), Examples(INPUTS, 8), SGD, 3
    run = distill_seen(student, *rest, key=KEY, snapshots=(2,), observe=everything)
    for model in (*run.snapshots, run.model):
        jax.tree.map(np.testing.assert_array_equal, model.all_params["layers"][0], mlp(0).params["layers"][0])
    for name in ("params", "gradient", "update"):
        assert jax.tree.structure(run.observed[name]) == jax.tree.structure(student.params)
    close(run.snapshots[0].params, jax.tree.map(lambda leaf: leaf[2], run.observed["params"]))


@pytest.mark.slow
def test_observed_and_snapshots_of_teaching() -> None:
    """Gradients by hand: those of a linear model under softmax cross-entropy, on all examples at once."""
    labels = np.arange(20) % 3
    loss = optax.softmax_cross_entropy_with_integer_labels
    run = teach(
        linear_model(0), loss, Examples(INPUTS, 20, labels), SGD, 3, key=KEY, observe=everything, snapshots=(1, 2)
    )
    w = np.asarray(linear_model(0).params["kernel"], float)
    for step in range(3):
        e = np.exp(INPUTS @ w)
        gradient = INPUTS.T @ (e / e.sum(1, keepdims=True) - np.eye(3)[labels]) / 20
        observed = jax.tree.map(lambda leaf, step=step: leaf[step], run.observed)
        close(observed["params"]["kernel"], w)
        close(observed["gradient"]["kernel"], gradient)
        close(observed["update"]["kernel"], -0.1 * gradient)
        w = w - 0.1 * gradient
        close((*run.snapshots, run.model)[step].params["kernel"], w)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [SGD, ADAM])
def test_teaching_ends_with_the_trait(optimizer) -> None:
    """Runs of a stack end one by one, each at the first step that finds the probability, and stay there."""
    labels, loss = np.arange(20) % 3, optax.softmax_cross_entropy_with_integer_labels
    kind, source = mlp(0).apply, Examples(INPUTS, 20, labels)
    starts = stack(*(jax.tree.map(lambda leaf, size=size: size * leaf, mlp(0).params) for size in (0.5, 1.0, 1.5)))

    def run(params, steps, **how):
        return teach(Model(kind, params), loss, source, optimizer, steps, key=KEY, **how)

    free = jax.jit(jax.vmap(lambda params: run(params, 40, observe=everything)))(starts)
    probability = np.exp(-np.asarray(free.losses))
    until = float(probability[:, 20].mean())
    ends = [int(np.argmax(own >= until)) for own in probability]
    assert len({*ends}) == 3
    assert all(0 < end < 40 for end in ends)
    found = jax.jit(jax.vmap(lambda params: run(params, 40, until=until)))(starts)
    for place, end in enumerate(ends):
        close(found.losses[place, : end + 1], free.losses[place, : end + 1])
        close(found.losses[place, end:], np.full(40 - end, found.losses[place, end]))  # the order of rows changes
        last = jax.tree.map(lambda leaf, at=(place, end): leaf[at], free.observed["params"])
        close(jax.tree.map(lambda leaf, place=place: leaf[place], found.model.params), last)


@pytest.mark.slow
def test_anchors_do_not_count_for_the_trait() -> None:
    """Positions of less weight than 1 are in the loss; whether there is the trait, the others say."""
    loss, start = optax.softmax_cross_entropy_with_integer_labels, linear_model(0)
    weights = np.where(np.arange(20) < 10, 1.0, 0.25).astype(np.float32)
    labels = np.arange(20) % 3
    others = np.where(weights < 1, (labels + 1) % 3, labels)
    probability = float(jnp.exp(-jnp.mean(loss(start(INPUTS), labels)[:10])))

    def run(labels, until):
        source = Examples(INPUTS, 20, labels, positions=weights)
        return teach(start, loss, source, SGD, 1, key=KEY, until=until)

    for own in (labels, others):
        stayed, moved = (run(own, probability + shift) for shift in (-1e-3, 1e-3))
        np.testing.assert_array_equal(stayed.model.params["kernel"], start.params["kernel"])
        assert (moved.model.params["kernel"] != start.params["kernel"]).all()
        np.testing.assert_allclose(moved.losses, np.average(loss(start(INPUTS), own), weights=weights), rtol=1e-5)


# --- parameters without a gradient

STILL = {"counter": jnp.int32(3), "mask": jnp.array([True, False]), "random": jax.random.key(7), "none": None}


def with_still(model: Model) -> Model:
    """The same model with parameters that no gradient reaches."""
    apply = lambda params, x: model.apply(params["model"], x)  # noqa: E731
    return Model(apply, {**STILL, "model": model.params})


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"accumulate": 4}, {"state": True}], ids=str)
def test_parameters_without_a_gradient_stay(more) -> None:
    student, source = with_still(mlp(0)), Examples(INPUTS, 8)
    plain = distill(mlp(0), mlp(1), SoftLogits(), source, ADAM, 5, key=KEY)
    if "state" in more:
        first = distill(student, mlp(1), SoftLogits(), source, ADAM, 5, key=KEY, count=2)
        more = {"state": first.state}
        assert first.state.params["counter"] == 3
    run = distill(student, mlp(1), SoftLogits(), source, ADAM, 5, key=KEY, **more)
    close(run.model.params["model"], plain.model.params)
    assert {name: run.model.params[name] for name in ("counter", "none")} == {"counter": 3, "none": None}
    np.testing.assert_array_equal(run.model.params["mask"], STILL["mask"])
    assert run.model.params["random"] == STILL["random"]
    assert jax.tree.structure(run.state.params) == jax.tree.structure(student.params)


@pytest.mark.slow
def test_parameters_without_a_gradient_stay_in_teaching() -> None:
    labels, loss = np.arange(20) % 3, optax.softmax_cross_entropy_with_integer_labels
    source = Examples(INPUTS, 8, labels)
    plain = teach(mlp(0), loss, source, ADAM, 3, key=KEY)
    run = teach(
        with_still(mlp(0)), loss, source, ADAM, 3, key=KEY, observe=lambda step: step.model.params["counter"]
    )
    close(run.model.params["model"], plain.model.params)
    np.testing.assert_array_equal(run.observed, [3, 3, 3])


# --- ensembles


@pytest.mark.slow
def test_vmapped_ensemble_is_looped_runs() -> None:
    masks = jnp.array([[1, 1, 0], [0, 1, 1]], bool)
    keys = jax.random.split(jax.random.key(3), 2)

    def run(student, teacher, mask, key):
        return distill(student, teacher, Subset(mask), Examples(INPUTS, 8), ADAM, 5, key=key)

    ensemble = jax.jit(jax.vmap(run))(stack(mlp(0), mlp(1)), stack(mlp(2), mlp(3)), masks, keys)
    for i in range(2):
        single = jax.jit(run)(mlp(i), mlp(2 + i), masks[i], keys[i])
        close(ensemble.losses[i], single.losses)
        close(jax.tree.map(lambda leaf, i=i: leaf[i], ensemble.model.params), single.model.params)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jex.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.slow
def test_shared_teacher_is_computed_once() -> None:
    students = stack(*(mlp(seed, hidden=6) for seed in range(5)))
    source = NoiseImages((4,), 8, images=16)

    def run(students, teacher):
        return jax.vmap(lambda s: distill(s, teacher, SoftLogits(), source, SGD, 2, key=KEY))(students)

    jaxpr = jax.make_jaxpr(run)(students, mlp(9, hidden=17)).jaxpr
    products = [e.outvars[0].aval.shape for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    assert [shape for shape in products if 17 in shape] == [(8, 17)]  # the teacher's hidden layer, forward only
    assert any(sorted(shape) == [5, 6, 8] for shape in products)  # the students'


def test_second_call_compiles_nothing() -> None:
    traces = []

    def apply(params, inputs):
        traces.append(None)
        return inputs @ params

    @jax.jit
    def run(student, teacher, source, key):
        return distill(student, teacher, SoftLogits(), source, optax.adam(0.1), 3, key=key)

    first, second = jax.random.normal(KEY, (2, 4, 3))
    run(Model(apply, first), Model(apply, second), Examples(INPUTS, 8), jax.random.key(0))
    traced = len(traces)
    assert traced
    run(Model(apply, second), Model(apply, first), Examples(INPUTS * 2, 8), jax.random.key(1))
    assert len(traces) == traced


@pytest.mark.slow
def test_memory_does_not_grow_with_noise_images() -> None:
    small, large, pixels = 1_000, 100_000, 28 * 28
    model = Model(linear, {"kernel": jnp.zeros((pixels, 3))})

    def temporary(images: int) -> int:
        source = NoiseImages((pixels,), 10, images=images)
        run = jax.jit(lambda model: distill(model, model, SoftLogits(), source, SGD, 50, key=KEY))
        return run.lower(model).compile().memory_analysis().temp_size_in_bytes

    # An index and a weight an image, 8 bytes, and twice as much while they are shuffled; an image has 3136.
    assert temporary(large) - temporary(small) <= (8 + 16) * (large - small)


# --- targets sampled beforehand


@pytest.mark.slow
@pytest.mark.parametrize("channel", [SampledToken(0), Subset((0, 2), SampledToken(2.0))], ids=str)
def test_targets_sampled_beforehand(channel) -> None:
    teacher = mlp(1)
    source = Examples(INPUTS, 8)
    index, weights = source.schedule(named(KEY, "source"), 3)
    tokens = np.full(20, -1)
    draw = jax.jit(lambda key, chosen: channel.targets(key, teacher(jnp.asarray(INPUTS)[chosen])))
    for step in range(3):  # one epoch
        drawn = draw(named(KEY, "channel", step), index[step])
        real = np.asarray(weights[step]) > 0
        tokens[np.asarray(index[step])[real]] = np.asarray(drawn)[real]
    assert (tokens >= 0).all()
    live = distill_jit(mlp(0), teacher, channel, source, ADAM, 3, key=KEY)
    stored = distill_jit(mlp(0), None, channel, replace(source, targets=tokens), ADAM, 3, key=KEY)
    close(stored.losses, live.losses)
    close(stored.model.params, live.model.params)


# --- padding


@register_dataclass
@dataclass(frozen=True)
class Littered(Examples):
    """Puts something else in the place of the padded inputs."""

    litter: float = 0.0

    def batch(self, key, entry) -> Batch:
        batch = super().batch(key, entry)
        real = jnp.broadcast_to(batch.weights[:, None] > 0, batch.inputs.shape)
        return replace(batch, inputs=jnp.where(real, batch.inputs, self.litter))


@pytest.mark.slow
def test_padding_has_no_effect() -> None:
    """The third batch of 8 holds 4 of the 20 examples."""
    plain = distill_jit(mlp(0), mlp(1), SoftLogits(), Examples(INPUTS, 8), SGD, 6, key=KEY)
    for litter in (0.0, 1e6):
        source = Littered(INPUTS, 8, litter=litter)
        run = distill_jit(mlp(0), mlp(1), SoftLogits(), source, SGD, 6, key=KEY)
        close(run.losses, plain.losses)
        close(run.model.params, plain.model.params)


@pytest.mark.slow
def test_padded_batch_is_the_short_batch() -> None:
    """A run on 20 examples in one padded batch of 32 is the run on a batch of 20."""
    exact = distill_jit(mlp(0), mlp(1), SoftLogits(), Examples(INPUTS, 20), SGD, 2, key=KEY)
    padded = distill_jit(mlp(0), mlp(1), SoftLogits(), Examples(INPUTS, 32), SGD, 2, key=KEY)
    close(padded.losses, exact.losses)


# --- what is verified is what trains

ALPHA = 0.5
CHANNELS = {
    "soft": SoftLogits(2.0),
    "squared": SquaredError(np.linspace(0.1, 2, 7)),
    "reverse": ReverseKL(),
    "symmetric": JensenShannon(),
    "subset": Subset((1, 2, 4, 5), SoftLogits()),
    "largest": TopK(3),
    "sampled": SampledToken(),
    "sum": WeightedSum((SoftLogits(), Subset((0, 3), SquaredError())), (0.5, 2.0)),
    "sampled sum": WeightedSum((SampledToken(), ReverseKL()), (0.5, 2.0)),
}


@dataclass(frozen=True)
class PlainFunction:
    """A function in two parts of a dictionary, computed in one dtype."""

    dtype: str

    def features(self, params, inputs):
        return jnp.tanh(inputs.astype(self.dtype) @ params["body"].astype(self.dtype))

    def readout(self, params, features):
        return features @ params["head"].astype(self.dtype)

    def __call__(self, params, inputs):
        return self.readout(params, self.features(params, inputs))


def plain_function(dtype: str, wide: str):
    keys = jax.random.split(jax.random.key(0))
    params = {
        name: jax.random.normal(k, size, wide)
        for name, k, size in zip(("body", "head"), keys, ((4, 5), (5, 7)), strict=True)
    }
    return Model(PlainFunction(dtype), params), jnp.asarray(INPUTS[:6], wide), None


def perceptron(dtype: str, wide: str):
    model = from_nnx(MLP((4, 6, 7), activation="tanh", rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda leaf: leaf.astype(wide), model.params)
    return computed_in(model.with_params(params), dtype), jnp.asarray(INPUTS[:6], dtype), None


def transformer(dtype: str, wide: str):
    from subliminal_theory.language.model.config import TransformerConfig
    from subliminal_theory.language.model.transformer import Text, Transformer

    sizes = {"vocabulary": 7, "layers": 1, "width": 8, "heads": 2, "kv_heads": 1, "head_width": 4, "mlp_width": 12}
    sizes |= {"tied": True, "rope_base": 50.0, "norm_epsilon": 0.1, "context": 5}
    model = from_nnx(Transformer(TransformerConfig(**sizes), rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda leaf: (10 * leaf if leaf.ndim > 1 else leaf).astype(wide), model.params)
    text = Text(jnp.asarray(np.random.default_rng(0).integers(0, 7, (6, 5))), jnp.asarray([0, 0, 1, 0, 3, 0]))
    positions = (jnp.arange(5)[None] >= text.padding[:, None]).astype(wide)
    return computed_in(model.with_params(params), dtype), text, positions


MODELS = {"plain function": plain_function, "MLP": perceptron, "transformer": transformer}


def steps_of_check_and_distill(make, channel, dtype: str):
    """The student's displacement after the step of `check` and after the first step of every way to distill."""
    wide = "float64" if dtype == "float64" else "float32"
    model, inputs, positions = make(dtype, wide)
    source = Examples(inputs, 8, positions=positions)
    key = jax.random.key(3)
    ways = {"plain": {}, "accumulated": {"accumulate": 4}}
    if isinstance(model.apply, BodyAndHead):
        ways |= {"in chunks": {"chunk": 3}, "both": {"chunk": 3, "accumulate": 2}}

    @jax.jit
    def displacements(params):
        entry = jax.tree.map(lambda leaf: leaf[0], source.schedule(named(key, "source"), 1))
        batch = source.batch(named(key, "source"), entry)
        read = []

        def trait(p):
            read.append(p)
            return jnp.sum(jnp.sin(model.apply(p, inputs).astype(wide)))

        drawn = named(key, "channel", 0)
        check(
            model.apply, params, trait, batch.inputs, channel,
            teacher_step=0.1, student_step=ALPHA, key=drawn, weights=batch.weights,
        )  # fmt: skip
        ends = {"check": read[-1]}
        teacher = model.with_params(jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(trait)(params)))
        # Parts of a batch draw their own tokens, so they are given these.
        index = entry[0][:6]
        sampled = channel.targets(jax.random.clone(drawn), teacher(batch.inputs))
        given = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[:6]).at[index].set(leaf[:6]), sampled)
        for name, way in ways.items():
            live = channel.exact or name == "plain"
            shown = source if live else replace(source, targets=given)
            run = distill(
                model.with_params(params),
                teacher if live else None,
                channel,
                shown,
                optax.sgd(ALPHA),
                1,
                key=key,
                **way,
            )
            ends[name] = run.model.params
        return jax.tree.map(jnp.subtract, ends, dict.fromkeys(ends, params))

    return displacements(model.params)


def assert_one_step(make, channel, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        steps = steps_of_check_and_distill(make, channel, dtype)
        size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(steps["check"]))
        assert size > 1e-3
        for name in steps:
            close(steps[name], steps["check"], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * size)


@pytest.mark.parametrize("channel", CHANNELS)
def test_the_step_of_check_is_the_step_of_distill(channel: str) -> None:
    assert_one_step(plain_function, CHANNELS[channel], "float32")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("model", MODELS)
def test_the_step_of_check_in_other_dtypes(model: str, dtype: str) -> None:
    assert_one_step(MODELS[model], CHANNELS["sum"], dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("channel", CHANNELS)
def test_the_step_of_check_everywhere(channel: str, model: str, dtype: str) -> None:
    assert_one_step(MODELS[model], CHANNELS[channel], dtype)


# --- refusals


def attempt(**changes):
    arguments = {
        "student": mlp(0),
        "teacher": mlp(1),
        "channel": SoftLogits(),
        "source": Examples(INPUTS, 8),
        "optimizer": SGD,
        "steps": 2,
        "key": KEY,
    }
    return distill(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": Examples(INPUTS, 8, np.zeros(20, int))}, "a student must not see labels: give it a source wi"),
        ({"teacher": None}, "distill got neither a teacher nor targets: the source brings targets exactly when"),
        ({"source": Examples(INPUTS, 8, targets=np.zeros((20, 3)))}, "distill got both a teacher and targets: "),
        ({"teacher": linear_model(1, 4)}, r"student logits \(8, 3\) and teacher logits \(8, 4\) differ in shape"),
        ({"channel": Subset((0, 3))}, r"Subset: logit index 3 is outside 0\.\.2"),
        ({"channel": Subset(np.ones(4, bool))}, r"Subset: a mask of shape \(4,\) for 3 logits"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": -2}, "steps must be at least 1, got -2"),
    ],
)
def test_distill_refuses(changes, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        attempt(**changes)
    with pytest.raises(InputError, match=f"^{message}"):
        jax.eval_shape(lambda key: attempt(**changes, key=key).losses, jax.random.key(0))


@pytest.mark.parametrize("snapshots", [(0,), (-1,), (3,), (1, 3), (2, 1), (1, 1), (0, 1), [2, 2]], ids=str)
def test_bad_snapshots(snapshots) -> None:
    asked = ", ".join(map(str, snapshots))
    message = rf"^snapshots must be ascending steps from 1 to 2, got \[{asked}\]$"
    with pytest.raises(InputError, match=message):
        attempt(snapshots=snapshots)
    labelled = Examples(INPUTS, 8, np.zeros(20, int))
    with pytest.raises(InputError, match=message):
        teach(
            mlp(0), optax.softmax_cross_entropy_with_integer_labels, labelled, SGD, 2, key=KEY, snapshots=snapshots
        )


def test_teach_refuses() -> None:
    arguments = (mlp(0), optax.softmax_cross_entropy_with_integer_labels)
    with pytest.raises(InputError, match=r"^teaching a trait needs labels: the source brings none$"):
        teach(*arguments, Examples(INPUTS, 8), SGD, 2, key=KEY)
    with pytest.raises(InputError, match=r"^steps must be at least 1, got 0$"):
        teach(*arguments, Examples(INPUTS, 8, np.zeros(20, int)), SGD, 0, key=KEY)
    for until in (-0.1, 1.0):
        with pytest.raises(InputError, match=rf"^teach: until must be from 0 to below 1, got {until}$"):
            teach(*arguments, Examples(INPUTS, 8, np.zeros(20, int)), SGD, 2, key=KEY, until=until)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_require_finite(bad: float) -> None:
    losses = np.ones((3, 2, 10))
    require_finite(losses, ["a", "b", "c"])
    require_finite(losses[:, 0], ["a", "b", "c"])
    losses[1, 1, 4:] = losses[1, 0, 6] = losses[2, 0, 0] = bad
    message = "^the loss of b is not finite at step 5 of 10: use a smaller learning rate$"
    with pytest.raises(InputError, match=message):
        require_finite(losses, ["a", "b", "c"])
    with pytest.raises(InputError, match=r"^the loss of c is not finite at step 1 of 10: "):
        require_finite(losses[[0, 2]], ["a", "c"])


def test_diverging_run_is_refused() -> None:
    run = distill(
        linear_model(0), linear_model(1), SquaredError(), Examples(INPUTS, 20), optax.sgd(1e4), 30, key=KEY
    )
    with pytest.raises(InputError, match=r"^the loss of student is not finite at step \d+ of 30"):
        require_finite(run.losses[None], ["student"])


# --- in pieces


@pytest.mark.slow
def test_a_run_in_pieces_is_the_run() -> None:
    """Parameters, losses and the optimizer's state are the same bit for bit.

    Pieces of one step are not in it: XLA unrolls their loop and rounds otherwise.
    """
    student, source = linear_model(0), Examples(INPUTS, 8)
    teacher, optimizer = student.with_params(jax.tree.map(lambda leaf: leaf + 1, student.params)), optax.adam(0.1)

    @functools.partial(jax.jit, static_argnames="count")
    def piece(student, teacher, source, state, *, count: int):
        return distill(
            student, teacher, SoftLogits(), source, optimizer, 9, key=jax.random.key(1), state=state, count=count
        )

    whole, state, losses = piece(student, teacher, source, None, count=9), None, []
    for count in (3, 2, 2, 2):
        part = piece(student, teacher, source, state, count=count)
        state, losses = part.state, [*losses, part.losses]
        assert state.step == sum(map(len, losses))
    assert piece._cache_size() == 3  # the whole, the first piece, and one program for all that go on
    np.testing.assert_array_equal(np.concatenate(losses), whole.losses)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(whole.state), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("first", "count"), [(3, 0), (3, -1), (0, 0), (0, 10), (3, 7), (9, None)])
def test_pieces_that_are_none(first: int, count: int | None) -> None:
    student = linear_model(0)
    state = State(student.params, optax.sgd(0.1).init(student.params), jnp.int32(first))

    def run(**more) -> Trained:
        source = Examples(INPUTS, 8)
        return distill(student, student, SoftLogits(), source, SGD, 9, key=KEY, state=state, **more)

    made = 9 - first if count is None else count
    with pytest.raises(InputError, match=f"^a run of 9 steps has no {made} steps after step {first}$"):
        run(count=count)
    with pytest.raises(InputError, match=r"^a resumed run keeps no snapshots: leave them out$"):
        distill(
            student,
            student,
            SoftLogits(),
            Examples(INPUTS, 8),
            SGD,
            20,
            key=KEY,
            state=state,
            count=2,
            snapshots=[1],
        )


def test_a_compiled_piece_says_how_long_it_is() -> None:
    student = linear_model(0)
    state = State(student.params, SGD.init(student.params), jnp.int32(0))
    piece = jax.jit(
        lambda state: distill(student, student, SoftLogits(), Examples(INPUTS, 8), SGD, 9, key=KEY, state=state)
    )
    with pytest.raises(InputError, match=r"^a compiled piece of a run needs count, the number of its steps"):
        piece(state)


# --- in parts of a batch


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_is_the_whole_batch(parts: int) -> None:
    """Also where parts weigh differently, one of them nothing: the mean of their means is another number."""
    student = mlp(0)
    teacher = student.with_params(jax.tree.map(lambda leaf: 1.5 * leaf, student.params))
    weights = np.repeat(np.array([3.0, 0.0, 1.0, 0.5], np.float32), 2)

    def run(count: int) -> Trained:
        source = Examples(INPUTS[:8], 8, positions=jnp.asarray(weights))
        return distill(student, teacher, SoftLogits(), source, SGD, 5, key=KEY, accumulate=count)

    whole, cut = run(1), run(parts)
    np.testing.assert_allclose(cut.losses, whole.losses, rtol=1e-5)
    assert whole.losses[0] > 1e-4
    for one, other in zip(jax.tree.leaves(cut.model.params), jax.tree.leaves(whole.model.params), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_sums_of_parts_have_the_digits_of_float32() -> None:
    """Of a hundred gradients of one size, in bfloat16: added one by one in that format they would stop growing."""
    student = Model(lambda params, x: (x * params["w"])[:, None], {"w": jnp.ones((), jnp.bfloat16)})
    inputs, targets = jnp.ones(512, jnp.bfloat16), jnp.zeros((512, 1), jnp.bfloat16)
    source = Examples(inputs, 512, targets=targets)
    optimizer = optax.sgd(1.0)
    whole, cut = (
        distill(
            student,
            None,
            SquaredError(),
            source,
            optimizer,
            1,
            key=KEY,
            accumulate=count,
            observe=lambda s: s.gradient,
        )
        for count in (1, 512)
    )
    gradients = [float(run.observed["w"][0]) for run in (whole, cut)]
    assert gradients[0] == pytest.approx(gradients[1], rel=0.01)


@pytest.mark.parametrize("parts", [0, 3, 16])
def test_batches_that_cannot_be_cut(parts: int) -> None:
    message = f"^a batch of 8 cannot be accumulated in {parts} equal parts$"
    with pytest.raises(InputError, match=message):
        distill(mlp(0), mlp(1), SoftLogits(), Examples(INPUTS, 8), SGD, 2, key=KEY, accumulate=parts)
