"""Words behind prompts that are computed once, against whole rows for each of their spellings."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subliminal_theory.errors import InputError
from subliminal_theory.language import spelling
from subliminal_theory.language.model.config import TransformerConfig
from subliminal_theory.language.model.lora import add_lora
from subliminal_theory.language.model.transformer import Text
from subliminal_theory.language.spelling import Spellings, heard
from subliminal_theory.model import Model, computed_in
from tests.language.models import opinionated
from tests.language.plain import spellings_of

V, COLUMNS = 7, 6
PLAIN = TransformerConfig(
    vocabulary=V, layers=2, width=8, heads=2, kv_heads=1, head_width=4, mlp_width=8, tied=False, context=16
)
WINDOWED = replace(PLAIN, windowed=(True, False), window=3)
LEARNED = replace(PLAIN, positions="learned", kv_heads=2)
tokens = st.integers(0, V - 1)
spellings = st.lists(st.lists(tokens, min_size=1, max_size=3), min_size=1, max_size=3)


@st.composite
def asked(draw) -> tuple[Text, np.ndarray]:
    """Prompts of 2 to 6 tokens, as many of the first ones alike as it happens, and three words behind each."""
    common = draw(st.lists(tokens, min_size=1, max_size=4))
    rows = [common + draw(st.lists(tokens, min_size=1, max_size=COLUMNS - 4)) for _ in range(3)]
    table = np.full((3, COLUMNS), V - 1, np.int32)
    for line, row in zip(table, rows, strict=True):
        line[COLUMNS - len(row) :] = row
    words = np.full((3, 3, 3, 3), -1, np.int32)
    for prompt in range(3):
        for word, spelt in enumerate(draw(st.lists(spellings, min_size=3, max_size=3))):
            for number, one in enumerate(spelt):
                words[prompt, word, number, : len(one)] = one
    padding = np.array([COLUMNS - len(row) for row in rows], np.int32)
    return Text(jnp.asarray(table), jnp.asarray(padding), last=1), words


def compare(model: Model, text: Text, words: np.ndarray, tolerance: float = 1e-5) -> None:
    logits, behind = jax.jit(heard)(model, text, Spellings.of(text, words))
    expected_logits, expected = spellings_of(model, replace(text, last=None), words)
    np.testing.assert_allclose(logits, expected_logits, rtol=tolerance, atol=tolerance)
    there = np.asarray(words[..., 0] >= 0)
    first = np.take_along_axis(np.asarray(logits, float), np.maximum(words[..., 0], 0).reshape(len(words), -1), 1)
    found = first.reshape(there.shape) - np.logaddexp.reduce(np.asarray(logits, float), -1)[:, None, None] + behind
    np.testing.assert_allclose(found[there], expected[there], rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@settings(max_examples=6)
@given(st.sampled_from([PLAIN, WINDOWED, LEARNED]), asked())
def test_as_whole_rows(config: TransformerConfig, given: tuple[Text, np.ndarray]) -> None:
    compare(opinionated(config), *given)


def example(count: int = 5) -> tuple[Text, np.ndarray]:
    """Prompts that begin with tokens 1 2, of two lengths, and words that begin with one another."""
    rng = np.random.default_rng(0)
    table = rng.integers(0, V, (count, COLUMNS)).astype(np.int32)
    padding = np.arange(count, dtype=np.int32) % 2
    for row, skipped in zip(table, padding, strict=True):
        row[skipped : skipped + 2] = 1, 2
    own = [[[1, 2, 3], [3, -1, -1]], [[1, 2, 4], [1, 5, -1]], [[2, 6, -1], [-1, -1, -1]]]
    return Text(jnp.asarray(table), jnp.asarray(padding), last=1), np.array([own] * count, np.int32)


def test_tree_of_spellings() -> None:
    """1 2 3, 1 2 4 and 1 5 go along one branch; 2 6 along another, of one token."""
    text, words = example()
    found = Spellings.of(text, words)
    assert [table[0].tolist() for table in found.branches] == [[[2]], [[1, 2]]]
    np.testing.assert_array_equal(found.nodes[0], [[[1, 2], [-1, -1]], [[1, 2], [1, -1]], [[0, -1], [-1, -1]]])
    assert found.shared == 2


def test_words_of_one_token_need_no_transformer() -> None:
    text, words = example()
    one = Spellings.of(text, words[..., :1])
    model = Model(
        lambda params, text: jnp.broadcast_to(params, (len(text.tokens), 1, V)), jnp.arange(V, dtype=float)
    )
    logits, behind = heard(model, text, one)
    assert logits.shape == (5, V)
    assert not behind.any()
    with pytest.raises(InputError, match="not a plain Transformer"):
        heard(model, text, Spellings.of(text, words))


@pytest.mark.slow
def test_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt after the other gives what all at once do; memory is bounded by that."""
    text, words = example()
    ask = functools.partial(heard, opinionated(PLAIN), text, Spellings.of(text, words))
    together = jax.jit(lambda: ask())()
    monkeypatch.setattr(spelling, "MEMORY", 6000)  # two prompts at once, and a row to fill up
    apart = jax.jit(lambda: ask())()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), apart, together)


@pytest.mark.slow
def test_low_rank_factors_and_narrow_formats() -> None:
    """Factors are not added to matrices in the format of these: small ones would be rounded away."""
    text, words = example()
    model = opinionated(PLAIN)
    adapted = add_lora(model, ["layers/*/kernel"], 2, 2.0, jax.random.key(0))
    rng = np.random.default_rng(1)
    moved = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, leaf.dtype), adapted.params)
    compare(adapted.with_params(moved), text, words)
    compare(computed_in(model, jnp.bfloat16), text, words, 0.03)
