"""What a user gives by mistake: a module for a Model, half a channel, arguments in another order, a mean."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from flax import linen, nnx

import subliminal_theory
from experiments.app import command
from subliminal_theory import (
    Examples,
    InputError,
    Model,
    SoftLogits,
    Subset,
    WeightedSum,
    check,
    distill,
    from_nnx,
    teach,
)
from subliminal_theory.distill import Trained, require_finite
from subliminal_theory.language.hub.checkpoint import load_checkpoint

KEY, SGD = jax.random.key(0), optax.sgd(0.1)
INPUTS = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
LABELS = np.arange(8) % 3


@pytest.fixture(autouse=True)
def _as_for_users() -> Iterator[None]:
    """Tests check annotations; a user's program does not."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


class Net(nnx.Module):
    def __init__(self) -> None:
        self.layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))

    def __call__(self, inputs: Any) -> Any:
        return self.layer(inputs)


@jax.tree_util.register_pytree_node_class
class WithFunction:
    """A pytree with a function among its leaves, as modules of equinox are."""

    def __init__(self, weight: Any, activation: Any) -> None:
        self.weight, self.activation = weight, activation

    def tree_flatten(self) -> tuple[Any, None]:
        return (self.weight, self.activation), None

    @classmethod
    def tree_unflatten(cls, _: None, leaves: Any) -> "WithFunction":
        return cls(*leaves)


WithFunction.__module__ = "equinox._module"
MODULE = WithFunction(jnp.ones((4, 3)), jnp.tanh)


def run(student: Any, teacher: Any, channel: Any = None, source: Any = None) -> Trained:
    return distill(student, teacher, channel or SoftLogits(), source or Examples(INPUTS, 4), SGD, 2, key=KEY)


def cross_entropy(logits: Any, labels: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def taught(model: Any, loss: Any = cross_entropy) -> Trained:
    return teach(model, loss, Examples(INPUTS, 4, LABELS), SGD, 2, key=KEY)


def message(call: Any) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_module_is_taken_as_its_model() -> None:
    net = Net()
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(net)))
    for ours, theirs in ((taught(net), taught(from_nnx(net))), (run(net, net), run(from_nnx(net), from_nnx(net)))):
        jax.tree.map(np.testing.assert_array_equal, ours.model.params, theirs.model.params)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(net)), before)


def test_a_trained_model_goes_back_into_its_module() -> None:
    net = Net()
    trained = taught(net).model
    nnx.update(net, nnx.State(trained.params))
    np.testing.assert_allclose(net(INPUTS), trained(INPUTS), rtol=1e-6)


def test_objects_that_are_no_model() -> None:
    said = "WithFunction is no Model: params, static = equinox.partition(module, equinox.is_inexact_array), then "
    assert message(lambda: run(MODULE, MODULE)).startswith(said)
    said = "Dense is no Model: Model(module.apply, module.init(key, inputs))"
    assert message(lambda: taught(linen.Dense(3))) == said
    for wrong in (lambda params, inputs: inputs, {"kernel": 1.0}, None):
        name = type(wrong).__name__
        assert message(lambda wrong=wrong: taught(wrong)) == (
            f"{name} is no Model: give Model(apply, params) or an NNX module"
        )


def test_what_is_said_about_linen_works() -> None:
    module = linen.Dense(3)
    model = Model(module.apply, module.init(KEY, INPUTS))
    assert run(model, model).losses.shape == (2,)


def test_parameters_that_are_no_arrays() -> None:
    def apply(module: Any, inputs: Any) -> Any:
        return module.activation(inputs @ module.weight)

    model = Model(apply, MODULE)
    said = "parameter 1 is a PjitFunction and no array; of an equinox module, params, static = equinox.partition("
    calls = (
        lambda: run(model, model),
        lambda: check(
            apply, MODULE, lambda m: jnp.sum(m.weight), INPUTS, SoftLogits(), teacher_step=1, student_step=1
        ),
    )
    for call in calls:
        assert message(call).startswith(said)


def test_a_module_for_a_function() -> None:
    model = from_nnx(Net())
    for wrong in (Net(), model):
        told = message(
            lambda wrong=wrong: check(
                wrong, model.params, lambda p: 0.0, INPUTS, SoftLogits(), teacher_step=1, student_step=1
            )
        )
        assert told.startswith(
            f"check wants a function, got {type(wrong).__name__}: give model.apply and model.params"
        )


class NoMetric:
    """A channel without the metric."""

    exact = True

    def targets(self, key: Any, teacher_logits: Any) -> Any:
        return teacher_logits

    def loss(self, student_logits: Any, targets: Any) -> Any:
        return jnp.sum((student_logits - targets) ** 2, axis=-1)

    def visible(self, n: int) -> Any:
        return jnp.ones(n, bool)


class Mean(NoMetric):
    """A channel that reduces its loss."""

    def loss(self, student_logits: Any, targets: Any) -> Any:
        return jnp.mean((student_logits - targets) ** 2)

    def metric(self, logits: Any, tangent: Any) -> Any:
        return 2 * tangent


class Whole(NoMetric):
    """A complete channel that knows nothing of other channels."""

    def metric(self, logits: Any, tangent: Any) -> Any:
        return 2 * tangent


NEEDS = "a channel, such as SoftLogits(), needs exact, targets, loss, metric, visible"


@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: Subset([0], c), lambda c: WeightedSum((c,), (1.0,))])
def test_a_channel_without_a_method(wrap: Any) -> None:
    model = from_nnx(Net())
    channel = wrap(NoMetric())
    calls = (
        lambda: run(model, model, channel),
        lambda: check(
            model.apply, model.params, lambda p: jnp.sum(p["layer"]["bias"]), INPUTS, channel,
            teacher_step=1e-3, student_step=1e-3,
        ),
    )  # fmt: skip
    for call in calls:
        assert message(call) == f"NoMetric has no metric: {NEEDS}"


def test_an_object_that_is_no_channel() -> None:
    model = from_nnx(Net())
    assert message(lambda: run(model, model, "kl")) == f"str has no exact, targets, loss, metric, visible: {NEEDS}"


def test_own_channel_inside_a_subset_sees_no_more_than_the_subset() -> None:
    """`Subset` hides logits from a channel that knows nothing of subsets."""
    model = from_nnx(Net())
    teacher = model.with_params(jax.tree.map(lambda leaf: leaf + 1.0, model.params))
    trained = run(model, teacher, Subset([1], Whole())).model.params["layer"]
    moved = np.asarray(trained["kernel"] != model.params["layer"]["kernel"]).any(0)
    assert moved.tolist() == [False, True, False]


def test_losses_that_are_means() -> None:
    model = from_nnx(Net())
    told = message(lambda: taught(model, lambda logits, labels: cross_entropy(logits, labels).mean()))
    assert told == (
        "teach: the loss has shape () for logits (4, 3): return one value per position, (4,), and not their mean"
    )
    told = message(lambda: run(model, model, Mean()))
    assert told.startswith("the loss of Mean has shape () for logits (8, 3): return one value per position")


def test_examples_in_another_order_or_as_lists() -> None:
    assert message(lambda: Examples(INPUTS, LABELS, 4)) == (
        "Examples: batch_size must be a number, got ndarray; the order is Examples(inputs, batch_size, labels)"
    )
    model = from_nnx(Net())
    told = message(lambda: run(model, model, source=Examples(INPUTS.tolist(), 4)))
    assert told == "Examples: inputs have a float where an array is wanted: use jnp.asarray"


def test_divergence_is_told() -> None:
    model = from_nnx(Net())
    source = Examples(INPUTS, 4, LABELS)

    def trained(rate: float) -> Trained:
        return teach(model, lambda logits, _: jnp.sum(logits**2, -1), source, optax.sgd(rate), 60, key=KEY)

    wild = trained(1e6)
    assert bool(wild.diverged)
    assert not bool(trained(1e-3).diverged)
    with pytest.raises(InputError, match=r"the loss of student is not finite at step \d+ of 60"):
        require_finite(wild.losses[None], ["student"])
    many = jax.vmap(trained)(jnp.array([1e-3, 1e6]))
    assert many.diverged.tolist() == [False, True]


def test_checkpoint_as_text(tmp_path: Path) -> None:
    for folder in (tmp_path / "none", str(tmp_path / "none")):
        assert message(lambda folder=folder: load_checkpoint(folder)).endswith("with config.json")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"subliminal_theory {subliminal_theory.__version__}\n"
