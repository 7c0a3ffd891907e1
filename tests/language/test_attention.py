"""Attention under `vmap` against softmaxes that are written out; cuDNN's is traced without a GPU."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subliminal_theory.language.model import attention
from subliminal_theory.language.model.attention import attend, make_frame
from subliminal_theory.language.model.config import TransformerConfig

HEADS, WIDTH, BATCH, TRAITS = 9, 8, 2, 3
GROUPS = (1, 3, 9)
PADDING = np.array([[0, 2], [1, 0], [4, 3]])
TOLERANCE = {"float32": 1e-6, "bfloat16": 0.01}
# Which of queries, keys and values, and masks differ between traits: low-rank queries alone, a frozen base, all.
VMAPPED = [(0, 0, 0), (0, 0, None), (0, None, None), (0, None, 0), (None, 0, None), (None, None, 0)]


def config(groups: int) -> TransformerConfig:
    return TransformerConfig(
        vocabulary=11, layers=1, width=8, heads=HEADS, kv_heads=groups, head_width=WIDTH, mlp_width=8, tied=True
    )


def given(groups: int, time: int, keys: int, dtype: Any) -> tuple[jax.Array, ...]:
    """Queries, keys, values and masks of three traits."""
    rng = np.random.default_rng(groups)
    query = rng.normal(size=(TRAITS, BATCH, time, HEADS, WIDTH))
    key, value = rng.normal(size=(2, TRAITS, BATCH, groups, keys, WIDTH))
    start = jnp.int32(keys - time)
    masks = [
        make_frame(config(groups), jnp.asarray(padding), start, time, keys, dtype).mask for padding in PADDING
    ]
    return (*(jnp.asarray(x, dtype) for x in (query, key, value)), jnp.stack(masks))


def written_out(query: np.ndarray, key: np.ndarray, value: np.ndarray, padding: np.ndarray) -> np.ndarray:
    """One trait, one row, one head and one position after the other, in float64."""
    found = np.zeros(query.shape)
    behind = key.shape[2] - query.shape[1]
    for row, time, head in np.ndindex(query.shape[:3]):
        group, place = head * key.shape[1] // HEADS, behind + time
        seen = [k for k in range(place + 1) if k >= padding[row] or k == place]
        scores = np.exp(key[row, group, seen] @ query[row, time, head] / WIDTH**0.5)
        found[row, time, head] = scores / scores.sum() @ value[row, group, seen]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_attention_of_traits(groups: int, dtype: str) -> None:
    *parts, mask = given(groups, 5, 7, dtype)
    found = jax.jit(jax.vmap(attend))(*parts, mask)
    assert found.dtype == dtype
    for trait, padding in enumerate(PADDING):
        expected = written_out(*(np.asarray(x[trait], float) for x in parts), padding)
        assert np.abs(np.asarray(found[trait], float) - expected).max() < TOLERANCE[dtype] * np.abs(expected).max()


@pytest.fixture
def traced_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is traced is what a GPU with cuDNN is given; compiling it would take one."""
    monkeypatch.setattr(attention.jax, "default_backend", lambda: "gpu")
    own = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")  # JAX's own, may move
    monkeypatch.setattr(own, "check_cudnn_version", lambda: 91000)


@pytest.mark.slow
@pytest.mark.usefixtures("traced_for_a_gpu")
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("axes", VMAPPED)
def test_shapes_of_cudnn_under_vmap(groups: int, axes: tuple) -> None:
    """Values and slopes have the shapes that a loop gives, once and twice vmapped; one call of cuDNN each."""
    queries, keys, masks = axes
    query, key, value, mask = given(groups, 5, 7, jnp.bfloat16)
    which = (queries, keys, keys, masks)
    of = [x if axis == 0 else x[0] for x, axis in zip((query, key, value, mask), which, strict=True)]

    def both(query, key, value, mask):
        found, back = jax.vjp(lambda *given: attend(*given, mask), query, key, value)
        return found, *back(found)

    def shapes(function, *given) -> list[tuple[int, ...]]:
        assert str(jax.make_jaxpr(function)(*given)).count("dot_product_attention_bwd") == 1
        return [leaf.shape for leaf in jax.eval_shape(function, *given)]

    expected = [(TRAITS, *x.shape[1:]) for x in (query, query, key, value)]
    assert shapes(jax.vmap(both, which), *of) == expected
    twice = jax.vmap(jax.vmap(both, which), (0, None, None, None))
    wider = [jnp.stack([of[0]] * 4), *of[1:]]
    assert shapes(twice, *wider) == [(4, *shape) for shape in expected]


def plain(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array, **settings: Any) -> jax.Array:
    """What stands in for cuDNN on a CPU."""
    assert settings.pop("implementation") == "cudnn"
    assert query.ndim == key.ndim == value.ndim == bias.ndim == 4
    assert len({x.shape[0] for x in (query, key, value, bias)}) == 1
    return ORIGINAL(query, key, value, bias, implementation="xla", **settings)


ORIGINAL = jax.nn.dot_product_attention


@pytest.mark.slow
@pytest.mark.parametrize(("groups", "axes"), [(1, (0, 0, 0)), (3, (0, None, None)), (9, (None, 0, None))])
def test_rows_of_vmapped_calls(monkeypatch: pytest.MonkeyPatch, groups: int, axes: tuple) -> None:
    """Each trait has its own values and slopes back, from one call of four axes."""
    query, key, value, mask = given(groups, 5, 7, jnp.bfloat16)
    queries, keys, masks = axes
    which = (queries, keys, keys, masks)
    of = [x if axis == 0 else x[0] for x, axis in zip((query, key, value, mask), which, strict=True)]

    def both(query, key, value, mask):
        found, back = jax.vjp(lambda *given: attend(*given, mask), query, key, value)
        return found, *back(jnp.cos(found))

    looped = jax.jit(both)
    alone = [
        looped(*(x[trait] if axis == 0 else x for x, axis in zip(of, which, strict=True)))
        for trait in range(TRAITS)
    ]
    monkeypatch.setattr(attention.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention.jax.nn, "dot_product_attention", plain)
    together = jax.jit(jax.vmap(both, which))(*of)
    for trait, expected in enumerate(alone):
        for one, other in zip(together, expected, strict=True):
            difference = np.linalg.norm((one[trait] - other).astype(jnp.float32))
            assert difference < 0.02 * np.linalg.norm(other.astype(jnp.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(("time", "keys"), [(6, 6), (5, 8), (6, 7), (5, 7)])
def test_attention_of_cudnn(groups: int, time: int, keys: int) -> None:
    """Odd numbers of positions too; its slope as well as its values, of three traits at once."""
    query, key, value, mask = given(groups, time, keys, jnp.bfloat16)

    @jax.jit
    @jax.vmap
    def both(query, key, value, mask):
        found, back = jax.vjp(lambda *given: attend(*given, mask), query, key, value)
        return found, *back(jnp.cos(found))

    with jax.default_matmul_precision("highest"):
        expected = both(*(x.astype(jnp.float32) for x in (query, key, value)), mask)
    for one, other in zip(both(query, key, value, mask), expected, strict=True):
        assert np.linalg.norm(one - other) < 0.02 * np.linalg.norm(other)
