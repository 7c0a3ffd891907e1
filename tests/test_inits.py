import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from subliminal_theory.errors import InputError
from subliminal_theory.inits import (
    Fresh,
    Interpolated,
    PerLayer,
    Perturbed,
    Policy,
    Shared,
    initialise,
)
from subliminal_theory.model import from_nnx
from subliminal_theory.vision.mlp import MLP

KEY = jax.random.key(5)
RNG = np.random.default_rng(0)


def mlp_params(seed: int, use_bias: bool = True):
    return from_nnx(MLP((4, 6, 3), use_bias=use_bias, rngs=nnx.Rngs(seed))).params


def same(actual, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def leaf(params, layer: int, name: str = "kernel"):
    return params["layers"][layer][name]


# --- policies


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


def test_per_layer_refusals() -> None:
    with pytest.raises(InputError, match=r"^PerLayer: 2 patterns and 1 policies$"):
        PerLayer(("a", "b"), (Shared(),))


def test_mapping_refusals() -> None:
    reference, fresh = mlp_params(0), mlp_params(1)
    with pytest.raises(InputError, match=r"^pattern 'layers/9/\*' matches no parameter; there are layers/0/b"):
        initialise({"layers/9/*": Shared(), "*": Fresh()}, reference, fresh, KEY)
    expected = r"^no initialisation policy for parameter layers/1/bias: add a rule, or '\*' for the rest$"
    with pytest.raises(InputError, match=expected):
        initialise({"layers/0/*": Shared(), "layers/1/kernel": Fresh()}, reference, fresh, KEY)
