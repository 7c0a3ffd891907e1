import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subliminal_theory.language.model.config import TransformerConfig
from subliminal_theory.language.model.prompted import prompted, with_prefix
from subliminal_theory.language.model.transformer import Text
from tests.language.models import opinionated

V = 7
CONFIG = TransformerConfig(
    vocabulary=V, layers=1, width=8, heads=2, kv_heads=1, head_width=4, mlp_width=8, tied=False, context=16
)
PREFIXES = np.array([[2, 5, 1], [4, 4, 0]], np.int32)
PADDING = np.array([0, 5, 5, 0])
TEXT = Text(
    jnp.asarray(np.random.default_rng(0).integers(0, V, (4, 6)), jnp.int32), jnp.asarray(PADDING, jnp.int32)
)
run = jax.jit(lambda model, text: model(text))
behind = jax.jit(with_prefix, static_argnums=2)


tiny = functools.partial(opinionated, CONFIG)


def by_hand(prefix: np.ndarray) -> list[np.ndarray]:
    """For each row the logits of its real positions, from a row of its own that begins with the prefix."""
    found = []
    for tokens, padding in zip(np.asarray(TEXT.tokens), PADDING, strict=True):
        whole = np.concatenate([prefix, tokens[padding:]])[None]
        logits = run(tiny(), Text(jnp.asarray(whole), jnp.zeros(1, jnp.int32)))
        found.append(np.asarray(logits)[0, prefix.shape[0] :])
    return found


def assert_real_positions(logits: np.ndarray, prefix: np.ndarray) -> None:
    assert logits.shape == (4, 6, V)
    for row, expected in enumerate(by_hand(prefix)):
        np.testing.assert_allclose(logits[row, PADDING[row] :], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_logits_are_those_behind_the_prefix(prefix: np.ndarray) -> None:
    assert_real_positions(run(prompted(tiny(), prefix), TEXT), prefix)


@pytest.mark.slow
def test_the_prefix_matters() -> None:
    logits = [run(model, TEXT) for model in (tiny(), *(prompted(tiny(), prefix) for prefix in PREFIXES))]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (np.abs(np.subtract(logits[first], logits[second])) > 1e-3).any(axis=(1, 2)).all()


def test_vmap_over_prefixes() -> None:
    models = jax.jit(jax.vmap(prompted, in_axes=(None, 0)))(tiny(), PREFIXES)
    logits = jax.jit(jax.vmap(lambda model: model(TEXT)))(models)
    for found, prefix in zip(logits, PREFIXES, strict=True):
        assert_real_positions(found, prefix)


def test_equal_functions_compile_once() -> None:
    first, second = (prompted(tiny(), prefix).apply for prefix in PREFIXES)
    assert first == second
    assert hash(first) == hash(second)


def test_frozen_parameters_are_seen() -> None:
    model = tiny().freeze("embedding", "layers/0/*")
    np.testing.assert_array_equal(
        run(prompted(model, PREFIXES[0]), TEXT), run(prompted(tiny(), PREFIXES[0]), TEXT)
    )


@pytest.mark.slow
def test_gradients() -> None:
    """Those of the model on a row that has the prefix, in every parameter."""
    row, prefix = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[:1]), TEXT), jnp.asarray(PREFIXES[0])
    whole = Text(jnp.asarray(np.concatenate([prefix[None], row.tokens], axis=1)), row.padding)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(1, 6, V)), jnp.float32)

    def score(params) -> jax.Array:
        return jnp.sum(weights * prompted(tiny().with_params(params), prefix)(row))

    def expected(params) -> jax.Array:
        return jnp.sum(weights * tiny().with_params(params)(whole)[:, 3:])

    found, own = (jax.jit(jax.grad(loss))(tiny().params) for loss in (score, expected))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(own), strict=True):
        assert np.any(one)
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("padding", "replaced", "expected"),
    [
        (0, 0, [8, 9, 3, 4, 5]),
        (1, 0, [3, 8, 9, 4, 5]),
        (2, 0, [3, 3, 8, 9, 5]),
        (0, 1, [8, 9, 4, 5]),
        (1, 1, [3, 8, 9, 5]),
        (0, 2, [8, 9, 5]),
        (0, 3, [8, 9]),
    ],
)
def test_with_prefix(padding: int, replaced: int, expected: list[int]) -> None:
    """Padding stays in front, as many positions as before; what stands there is the row's first token."""
    text = Text(jnp.array([[3, 4, 5]], jnp.int32), jnp.array([padding]))
    found = behind(text, jnp.array([8, 9], jnp.int32), replaced)
    np.testing.assert_array_equal(found.tokens, [expected])
    np.testing.assert_array_equal(found.padding, [padding])


def test_with_prefix_of_ragged_rows() -> None:
    prefix = PREFIXES[0]
    found = jax.tree.map(np.asarray, behind(TEXT, prefix, 0))
    assert found.tokens.shape == (4, 9)
    assert found.tokens.dtype == np.int32
    for row, padding in enumerate(PADDING):
        np.testing.assert_array_equal(found.tokens[row, padding : padding + 3], prefix)
        np.testing.assert_array_equal(found.tokens[row, padding + 3 :], np.asarray(TEXT.tokens)[row, padding:])
    np.testing.assert_array_equal(found.padding, PADDING)
