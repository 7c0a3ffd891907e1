import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from subliminal_theory.channel import SoftLogits, Subset, imitation_loss
from subliminal_theory.errors import InputError
from subliminal_theory.inits import (
    Fresh,
    Interpolated,
    PerLayer,
    Perturbed,
    Policy,
    Shared,
    clone,
    initialise,
    permute_neurons,
)
from subliminal_theory.model import from_nnx
from subliminal_theory.vision.cnn import CNN
from subliminal_theory.vision.mlp import MLP
from subliminal_theory.vision.noise import NoiseImages

KEY = jax.random.key(5)
RNG = np.random.default_rng(0)


def mlp_params(seed: int, use_bias: bool = True):
    return from_nnx(MLP((4, 6, 3), use_bias=use_bias, rngs=nnx.Rngs(seed))).params


def same(actual, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def leaf(params, layer: int, name: str = "kernel"):
    return params["layers"][layer][name]


# --- policies


@pytest.mark.slow
def test_single_policies() -> None:
    reference, fresh = mlp_params(0), mlp_params(1)
    same(initialise(Shared(), reference, fresh, KEY), reference)
    same(initialise(Fresh(), reference, fresh, KEY), fresh)
    same(initialise(Interpolated(0.0), reference, fresh, KEY), reference)
    same(initialise(Interpolated(1.0), reference, fresh, KEY), fresh)
    same(initialise(Perturbed(0.0), reference, fresh, KEY), reference)


def test_interpolated_between() -> None:
    reference, fresh = mlp_params(0), mlp_params(1)
    between = initialise(Interpolated(0.25), reference, fresh, KEY)
    expected = jax.tree.map(lambda a, b: np.asarray(a) + (np.asarray(b) - np.asarray(a)) / 4, reference, fresh)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), between, expected)


@pytest.mark.parametrize("sigma", [0.1, 2.0])
def test_perturbed_scale(sigma: float) -> None:
    """The noise is normal, of sigma times the root mean square of the fresh draw, whatever the reference."""
    reference = {"a": RNG.normal(3.0, 5.0, (200, 300)), "b": np.ones((200, 300)), "bias": np.zeros(9)}
    fresh = {"a": RNG.normal(0, 0.3, (200, 300)), "b": np.full((200, 300), -0.02), "bias": np.zeros(9)}
    reference, fresh = (jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree) for tree in (reference, fresh))
    noise = jax.tree.map(np.subtract, initialise(Perturbed(sigma), reference, fresh, KEY), reference)
    for name, rms in (("a", 0.3), ("b", 0.02)):
        assert abs(noise[name].std() / (sigma * rms) - 1) < 0.05
        assert abs(noise[name].mean()) < 5 * sigma * rms / np.sqrt(60_000)
        within = np.mean(np.abs(noise[name]) < sigma * rms)
        assert abs(within - 0.6827) < 0.01
    assert not noise["bias"].any()
    assert abs(np.corrcoef(noise["a"].ravel(), noise["b"].ravel())[0, 1]) < 0.02


def test_perturbed_is_of_the_key_and_the_name() -> None:
    reference, fresh = mlp_params(0), mlp_params(1)
    first = initialise(Perturbed(1.0), reference, fresh, KEY)
    same(initialise(Perturbed(1.0), reference, fresh, KEY), first)
    alone = initialise({"layers/1/*": Perturbed(1.0), "*": Shared()}, reference, fresh, KEY)
    same(alone["layers"][1], first["layers"][1])
    other = initialise(Perturbed(1.0), reference, fresh, jax.random.key(6))
    assert (leaf(other, 0) != leaf(first, 0)).any()


def test_mapping_first_pattern_decides() -> None:
    reference, fresh = mlp_params(0), mlp_params(1)
    student = initialise({"layers/1/*": Shared(), "*": Fresh()}, reference, fresh, KEY)
    same(leaf(student, 0), leaf(fresh, 0))
    same(leaf(student, 1), leaf(reference, 1))
    same(initialise({"*": Fresh(), "layers/1/*": Shared()}, reference, fresh, KEY), fresh)


RULES = {"layers/1/*": Perturbed(0.5), "layers/*/bias": Shared(), "*": Interpolated(0.25)}


def test_per_layer_is_the_mapping_in_its_order() -> None:
    reference, fresh = mlp_params(0), mlp_params(1)
    expected = initialise(RULES, reference, fresh, jax.random.key(5))
    rules = PerLayer.of(RULES)
    assert rules.patterns == tuple(RULES)
    same(initialise(rules, reference, fresh, jax.random.key(5)), expected)
    copy = jax.tree.unflatten(jax.tree.structure(rules), jax.tree.leaves(rules))
    assert copy == rules
    compiled = jax.jit(initialise)(rules, reference, fresh, jax.random.key(5))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), compiled, expected)
    # A sorted mapping would let "*" decide for all.
    swapped = PerLayer.of(dict(sorted(RULES.items())))
    same(initialise(swapped, reference, fresh, jax.random.key(5)), initialise(RULES["*"], reference, fresh, KEY))


@pytest.mark.slow
@pytest.mark.parametrize(
    "make", [Perturbed, Interpolated, lambda x: PerLayer.of({"*/0/*": Perturbed(x), "*": Shared()})]
)
def test_policies_stack(make) -> None:
    reference, fresh = mlp_params(0), mlp_params(1)
    amounts = (0.25, 1.0)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(make, map(jnp.float32, amounts)))
    starts = jax.vmap(lambda policy: initialise(policy, reference, fresh, jax.random.key(2)))(stacked)
    for i, amount in enumerate(amounts):
        alone = initialise(make(amount), reference, fresh, jax.random.key(2))
        one = jax.tree.map(lambda leaf, i=i: leaf[i], starts)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), one, alone)


def test_policies_of_one_structure_have_no_leaves_of_their_own() -> None:
    assert jax.tree.leaves((Shared(), Fresh())) == []
    assert jax.tree.leaves(PerLayer.of(RULES)) == [0.5, 0.25]
    assert all(isinstance(policy, Policy) for policy in RULES.values())


@pytest.mark.parametrize(
    "rules", [{"*": Perturbed(0.5)}, {"layers/1/*": Perturbed(0.5), "layers/2/kernel": Shared(), "*": Fresh()}]
)
def test_layers_in_one_parameter_are_layers_apart(rules: dict[str, Policy]) -> None:
    apart = [{"layers": {i: mlp_params(seed + i)["layers"][0] for i in range(3)}} for seed in (0, 10)]
    one = [
        {"layers": {"*": jax.tree.map(lambda *leaves: jnp.stack(leaves), *tree["layers"].values())}}
        for tree in apart
    ]
    expected, found = initialise(rules, *apart, jax.random.key(5)), initialise(rules, *one, jax.random.key(5))
    for layer in range(3):
        same(jax.tree.map(lambda leaf, i=layer: leaf[i], found["layers"]["*"]), expected["layers"][layer])


def test_per_layer_refusals() -> None:
    with pytest.raises(InputError, match=r"^PerLayer: 2 patterns and 1 policies$"):
        PerLayer(("a", "b"), (Shared(),))


def test_mapping_refusals() -> None:
    reference, fresh = mlp_params(0), mlp_params(1)
    with pytest.raises(InputError, match=r"^pattern 'layers/9/\*' matches no parameter; there are layers/0/b"):
        initialise({"layers/9/*": Shared(), "*": Fresh()}, reference, fresh, KEY)
    expected = r"^no initialization policy for parameter layers/1/bias: add a rule, or '\*' for the rest$"
    with pytest.raises(InputError, match=expected):
        initialise({"layers/0/*": Shared(), "layers/1/kernel": Fresh()}, reference, fresh, KEY)


# --- permutations


def with_biases(params):
    """Biases that are not 0, so that their order shows."""
    return jax.tree.map(lambda x: x + np.linspace(-1, 1, x.size, dtype=np.float32) if x.ndim == 1 else x, params)


@pytest.mark.slow
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_permute_neurons_keeps_the_function(kind: str, use_bias: bool) -> None:
    rngs = nnx.Rngs(0)
    if kind == "mlp":
        module = MLP((42, 10, 10, 3), use_bias=use_bias, rngs=rngs)
    else:
        module = CNN((7, 6), (10, 10), 3, use_bias=use_bias, rngs=rngs)  # flattens 2 x 2 maps of 10 features
    model = from_nnx(module)
    model = model.with_params(with_biases(model.params))
    images = jnp.asarray(RNG.normal(size=(5, 7, 6)), jnp.float32)
    moved = jax.jit(lambda params: permute_neurons(params, [0, 1, 2], KEY))(model.params)
    run = jax.jit(lambda model: model(images))
    np.testing.assert_allclose(run(model.with_params(moved)), run(model), rtol=2e-5, atol=1e-5)
    for layer in range(3):
        assert (leaf(moved, layer) != leaf(model.params, layer)).any()
        np.testing.assert_array_equal(np.sort(leaf(moved, layer), None), np.sort(leaf(model.params, layer), None))
    if use_bias:
        same(leaf(moved, 2, "bias"), leaf(model.params, 2, "bias"))
        assert (leaf(moved, 0, "bias") != leaf(model.params, 0, "bias")).any()
    assert jax.tree.structure(moved) == jax.tree.structure(model.params)


@pytest.mark.slow
def test_permute_neurons_orders_are_independent() -> None:
    size = 10
    params = {"layers": {i: {"kernel": jnp.zeros((size, size)), "bias": jnp.arange(size)} for i in range(3)}}
    moved = permute_neurons(params, [0, 1, 2], KEY)
    first, second, last = (leaf(moved, i, "bias").tolist() for i in range(3))
    assert sorted(first) == sorted(second) == last
    assert first != second
    assert leaf(permute_neurons(params, [0, 1, 2], jax.random.key(6)), 0, "bias").tolist() != first
    same(leaf(params, 0, "bias"), np.arange(size))


def test_permute_neurons_missing_layer() -> None:
    with pytest.raises(InputError, match=r"^no layer 2; there are \[0, 1\]$"):
        permute_neurons(mlp_params(0), [0, 1, 2], KEY)


# --- clones


@pytest.mark.slow
def test_clone_matches_what_is_visible() -> None:
    student, reference = (from_nnx(MLP((9, 24, 5), rngs=nnx.Rngs(seed))) for seed in (0, 1))
    visible = Subset((1, 2, 3, 4))
    source = NoiseImages((9,), 32)
    cloned = jax.jit(lambda a, b: clone(a, b, visible, source, optax.adam(1e-2), 300, key=KEY))(student, reference)
    held_out = jnp.asarray(RNG.uniform(-1, 1, (200, 9)), jnp.float32)

    def distance(model, channel) -> float:
        targets = channel.targets(None, reference(held_out))
        return float(imitation_loss(channel, model(held_out), targets, jnp.ones(200)))

    assert distance(cloned.model, visible) < distance(student, visible) / 10
    assert distance(cloned.model, SoftLogits()) > 10 * distance(cloned.model, visible)
    assert (leaf(cloned.model.params, 0) != leaf(reference.params, 0)).all()
