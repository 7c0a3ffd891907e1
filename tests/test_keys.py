import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from subliminal_theory.keys import named

KEY = jax.random.key(0)


def data(*names) -> tuple[int, ...]:
    return tuple(jax.random.key_data(named(KEY, *names)).tolist())


def test_streams_are_frozen() -> None:
    """These numbers must never change: every published run was drawn from such streams."""
    assert data("source", 3) == (747980938, 776882112)
    assert data() == (0, 0)


@settings(max_examples=30)
@given(st.text(max_size=20))
def test_string_is_its_hash(name: str) -> None:
    digest = hashlib.sha256(name.encode()).hexdigest()
    folded = jax.random.fold_in(KEY, int(digest[:8], 16))
    assert data(name) == tuple(jax.random.key_data(folded).tolist())


def test_names_fold_in_order() -> None:
    streams = [("a",), ("b",), ("a", "b"), ("b", "a"), ("ab",), ("a", 0), (0, "a"), (0,), (1,), ("0",), ()]
    assert len({data(*names) for names in streams}) == len(streams)
    np.testing.assert_array_equal(
        jax.random.key_data(named(named(KEY, "a"), 3)), jax.random.key_data(named(KEY, "a", 3))
    )


def test_many_names_differ() -> None:
    keys = jax.vmap(lambda i: jax.random.key_data(named(KEY, "run", i)))(jnp.arange(10_000))
    assert len(np.unique(keys, axis=0)) == 10_000


def test_traced_integers() -> None:
    traced = jax.jit(lambda i: jax.random.key_data(named(KEY, "channel", i)))(jnp.asarray(7))
    assert tuple(traced.tolist()) == data("channel", 7) == data("channel", np.int32(7))


def test_base_keys_differ() -> None:
    other = jax.random.key_data(named(jax.random.key(1), "source", 3))
    assert tuple(other.tolist()) != data("source", 3)
