"""Sampled text against exact distributions, full forwards and itself in other batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from subliminal_theory.errors import InputError
from subliminal_theory.language.model import sampling
from subliminal_theory.language.model.config import TransformerConfig
from subliminal_theory.language.model.lora import add_lora, merge_lora
from subliminal_theory.language.model.sampling import draw, sample, transform_logits
from subliminal_theory.language.model.transformer import Text
from subliminal_theory.model import Model
from tests.language.models import opinionated

V = 5
CONFIG = TransformerConfig(
    vocabulary=V, layers=1, width=8, heads=2, kv_heads=1, head_width=4, mlp_width=8, tied=False, context=16
)
KEY = jax.random.key(3)
transform = jax.jit(transform_logits)
run = jax.jit(lambda model, text: model(text))


tiny = functools.partial(opinionated, CONFIG)


def prompts(batch: int = 4, time: int = 3, seed: int = 0) -> Text:
    rng = np.random.default_rng(seed)
    tokens, padding = rng.integers(0, V, (batch, time)), np.arange(batch) % time
    return Text(jnp.asarray(tokens, jnp.int32), jnp.asarray(padding, jnp.int32))


# --- the distribution drawn from


def by_hand(logits, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Probabilities by sorting in Python: the more likely token first, then the lower number."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if temperature == 0:
        return np.eye(len(logits))[order[0]]
    order = order[: top_k or len(logits)]
    weights = np.exp(np.array(logits, float) / temperature)
    total, reached, kept = weights[order].sum(), 0.0, []
    for token in order:
        if kept and reached >= top_p:
            break
        kept.append(token)
        reached += weights[token] / total
    return np.where(np.isin(np.arange(len(logits)), kept), weights, 0) / weights[kept].sum()


@given(
    st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=V, max_size=V),
    st.sampled_from([0, 0.5, 1, 3]),
    st.integers(0, V + 1),
    st.sampled_from([0, 0.1234, 0.4321, 0.6789, 0.9123, 1]),
)
def test_transform_logits(logits: list[float], temperature: float, top_k: int, top_p: float) -> None:
    """Few distinct logits, so that cuts go through ties."""
    settings = jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p)
    probabilities = jax.nn.softmax(transform(jnp.array([logits]), *settings))[0]
    expected = by_hand(logits, temperature, top_k, top_p)
    np.testing.assert_array_equal(probabilities > 0, expected > 0)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((1.0, 0, 1.0), [0.4, 0.1, 0.1, 0.2, 0.2]),
        ((0.0, 0, 1.0), [1, 0, 0, 0, 0]),
        ((1.0, 2, 1.0), [2 / 3, 0, 0, 1 / 3, 0]),
        ((1.0, 4, 1.0), [4 / 9, 1 / 9, 0, 2 / 9, 2 / 9]),
        ((1.0, 0, 0.5), [2 / 3, 0, 0, 1 / 3, 0]),
        ((1.0, 0, 0.7), [0.5, 0, 0, 0.25, 0.25]),
        ((1.0, 0, 0.0), [1, 0, 0, 0, 0]),
        ((1.0, 2, 0.65), [1, 0, 0, 0, 0]),  # 2/3 of the two that are left
        ((0.5, 2, 1.0), [0.8, 0, 0, 0.2, 0]),
    ],
)
def test_known_distributions(settings, expected: list[float]) -> None:
    logits = jnp.log(jnp.array([0.4, 0.1, 0.1, 0.2, 0.2])) + 3
    np.testing.assert_allclose(jax.nn.softmax(transform_logits(logits, *settings)), expected, rtol=1e-5)


def test_settings_per_row() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, V)), jnp.float32)
    rows = jnp.array([0, 1, 2.0]), jnp.array([0, 3, 0]), jnp.array([1, 1, 0.5])
    together = transform(logits, *rows)
    for row, *settings in zip(range(3), *rows, strict=True):
        np.testing.assert_array_equal(together[row], transform(logits[row], *settings))


# --- what is drawn


def test_greedy_is_a_loop_of_argmax() -> None:
    model, text = tiny(), prompts()
    tokens, lengths = sample(model, text, steps=5, key=KEY, temperature=0)
    np.testing.assert_array_equal(lengths, 5)
    rows = np.asarray(text.tokens)
    for step in range(5):
        filled = np.pad(rows, ((0, 0), (0, 5 - step)))
        best = np.asarray(run(model, Text(jnp.asarray(filled), text.padding)))[:, rows.shape[1] - 1].argmax(-1)
        rows = np.concatenate([rows, best[:, None].astype(np.int32)], axis=1)
    np.testing.assert_array_equal(tokens, rows[:, 3:])
    assert len(np.unique(rows[:, 3:])) > 1


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """The p value; nothing may fall where the probability is 0."""
    assert not counts[probabilities == 0].any()
    seen = probabilities > 0
    return stats.chisquare(counts[seen], counts.sum() * probabilities[seen] / probabilities[seen].sum()).pvalue


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(1.0, 0, 1.0), (0.7, 3, 1.0), (1.3, 0, 0.8)])
def test_joint_law_of_two_tokens(settings) -> None:
    """4000 continuations of one prompt against the probabilities by whole forwards."""
    model, rows = tiny(1), 4000
    temperature, top_k, top_p = settings
    prompt = jnp.array([[2, 4]], jnp.int32)
    text = Text(jnp.repeat(prompt, rows, axis=0), jnp.zeros(rows, jnp.int32))
    tokens, _ = sample(model, text, steps=2, key=KEY, temperature=temperature, top_k=top_k, top_p=top_p)
    counts = np.zeros((V, V))
    np.add.at(counts, tuple(np.asarray(tokens).T), 1)
    continued = jnp.concatenate([jnp.repeat(prompt, V, axis=0), jnp.arange(V)[:, None]], axis=1)
    logits = np.asarray(run(model, Text(continued, jnp.zeros(V, jnp.int32))), float)
    first = by_hand(logits[0, 1], *settings)
    joint = np.array([first[token] * by_hand(logits[token, 2], *settings) for token in range(V)])
    assert joint.max() < 0.5
    assert chi_square(counts.ravel(), joint.ravel()) > 0.01


@pytest.mark.parametrize("settings", [(1.0, 0, 1.0), (0.7, 2, 1.0), (0.0, 0, 1.0)])
def test_allowed_tokens(settings) -> None:
    """Others are as if they had no probability: what is left is renormalized, and cut after that."""
    model, rows, allowed = tiny(1), 2000, np.array([True, True, False, False, True])
    temperature, top_k, top_p = settings
    text = Text(jnp.tile(jnp.array([[2, 4]], jnp.int32), (rows, 1)), jnp.zeros(rows, jnp.int32))
    how = {"steps": 1, "key": KEY, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    tokens, _ = sample(model, text, **how, allowed=allowed)
    logits = np.asarray(run(model, jax.tree.map(lambda leaf: leaf[:1], text)), float)[0, 1]
    free = by_hand(logits, *settings)
    expected = by_hand(np.where(allowed, logits, -np.inf), *settings)
    assert abs(free - expected).max() > 0.1
    counts = np.bincount(np.ravel(tokens), minlength=V)
    assert not counts[expected == 0].any()
    if temperature:
        assert chi_square(counts, expected) > 0.01
    everything, _ = sample(model, text, **how, allowed=np.ones(V, bool))
    np.testing.assert_array_equal(everything, sample(model, text, **how)[0])


@pytest.mark.slow
@given(
    st.lists(st.sampled_from([-jnp.inf, -30.0, -1.0, 0.0, 2.0]), min_size=1, max_size=6),
    st.floats(0, 1, width=32, exclude_max=True),
)
def test_draw_inverts_the_cumulative_distribution(logits: list[float], uniform: float) -> None:
    assume(max(logits) > -np.inf)
    chances = np.exp(np.array(logits) - max(logits))
    token = int(draw(jnp.array(logits, jnp.float32), jnp.float32(uniform)))
    assert chances[token] > 0
    bounds = np.cumsum(chances / chances.sum())
    assert (bounds[token - 1] if token else 0) - 1e-6 <= uniform <= bounds[token] + 1e-6


@pytest.mark.slow
def test_draws_from_many_tokens() -> None:
    """More than a block of them, some impossible: the law is the softmax."""
    logits = np.random.default_rng(0).normal(size=300)
    logits[[0, 5, 130, 299]] = -np.inf
    uniform = jax.random.uniform(jax.random.key(1), (200_000,))
    tokens = np.asarray(jax.jit(draw)(jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (200_000, 300)), uniform))
    counts = np.bincount(tokens, minlength=300)
    assert chi_square(counts, np.exp(logits) / np.exp(logits).sum()) > 0.01


def test_stop_tokens() -> None:
    model, text = tiny(), prompts(batch=20)
    free, _ = sample(model, text, steps=6, key=KEY)
    tokens, lengths = sample(model, text, steps=6, key=KEY, stop=(1, 3), pad=4)
    for full, row, length in zip(np.asarray(free), np.asarray(tokens), np.asarray(lengths), strict=True):
        ends = np.flatnonzero(np.isin(full, (1, 3)))
        assert length == (ends[0] + 1 if len(ends) else 6)
        np.testing.assert_array_equal(row[:length], full[:length])
        assert (row[length:] == 4).all()
    assert len(np.unique(lengths)) > 2


def test_nothing_is_computed_after_the_last_row_has_ended(monkeypatch) -> None:
    calls = []

    def counted(*arguments):
        jax.debug.callback(lambda: calls.append(1))
        return draw(*arguments)

    monkeypatch.setattr(sampling, "draw", counted)
    model, text = tiny(), prompts(batch=2)
    tokens, lengths = jax.jit(lambda: sample(model, text, steps=11, key=KEY, stop=range(1, V)))()
    jax.effects_barrier()
    assert len(calls) == lengths.max() < 11
    assert tokens.shape == (2, 11)


@pytest.mark.slow
def test_rows_do_not_depend_on_the_batch() -> None:
    model, text = tiny(), prompts()
    tokens, _ = sample(model, text, steps=8, key=KEY)
    # The rows of the first two prompts, two columns further right, beside other prompts.
    other = prompts(time=5, seed=9)
    mixed = Text(other.tokens.at[:2, 2:].set(text.tokens[:2]), other.padding.at[:2].set(text.padding[:2] + 2))
    elsewhere, _ = sample(model, mixed, steps=8, key=KEY, temperature=jnp.array([1, 1, 0, 2.0]))
    np.testing.assert_array_equal(tokens[:2], elsewhere[:2])
    assert (tokens[2:] != elsewhere[2:]).any()
    same = Text(jnp.repeat(text.tokens[:1], 4, axis=0), jnp.zeros(4, jnp.int32))
    repeated, _ = sample(model, same, steps=8, key=KEY)
    np.testing.assert_array_equal(repeated[0], tokens[0])
    assert len(np.unique(repeated, axis=0)) == 4
    assert (sample(model, same, steps=8, key=jax.random.key(4))[0] != repeated).any()


@pytest.mark.slow
def test_parts_of_a_batch_draw_as_all_at_once(monkeypatch) -> None:
    model, text = tiny(), prompts(batch=11)
    temperature = jnp.linspace(0.5, 1.5, 11)
    run = jax.jit(lambda: sample(model, text, steps=8, key=KEY, temperature=temperature, stop=(1,), pad=4))
    whole = run()
    monkeypatch.setattr(sampling, "_ROWS", 4)
    sampling._continue.clear_cache()
    run.clear_cache()
    for found, expected in zip(run(), whole, strict=True):
        np.testing.assert_array_equal(found, expected)
    sampling._continue.clear_cache()


def test_prompt_of_one_token() -> None:
    model, text = tiny(), prompts(time=1)
    tokens, _ = sample(model, text, steps=1, key=KEY, temperature=0)
    np.testing.assert_array_equal(tokens[:, 0], run(model, text)[:, 0].argmax(-1))


def test_other_settings_compile_nothing() -> None:
    model, text = tiny(), prompts()
    sample(model, text, steps=8, key=KEY)
    before = sampling._continue._cache_size()
    sample(tiny(1), text, steps=8, key=jax.random.key(1), temperature=0.3, top_k=2, top_p=0.5, pad=2)
    sample(model, text, steps=8, key=KEY, temperature=np.arange(4.0), top_k=np.arange(4))
    sample(model, prompts(seed=5), steps=8, key=KEY, temperature=jnp.float32(0))
    assert sampling._continue._cache_size() == before


@pytest.mark.slow
def test_stacked_models_are_looped_models() -> None:
    models, text = [tiny(seed) for seed in range(3)], prompts()
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    tokens, lengths = jax.vmap(lambda model: sample(model, text, steps=8, key=KEY, stop=(0,)))(stacked)
    for model, *own in zip(models, tokens, lengths, strict=True):
        for one, other in zip(own, sample(model, text, steps=8, key=KEY, stop=(0,)), strict=True):
            np.testing.assert_array_equal(one, other)


def test_low_rank_factors_are_sampled_from() -> None:
    model = add_lora(tiny(), ["*/kernel"], 2, 4.0, KEY)
    moved = model.with_params(jax.tree.map(lambda leaf: leaf + 0.3, model.params))
    tokens, _ = sample(moved, prompts(), steps=8, key=KEY)
    np.testing.assert_array_equal(tokens, sample(merge_lora(moved), prompts(), steps=8, key=KEY)[0])
    assert (tokens != sample(model, prompts(), steps=8, key=KEY)[0]).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": 14}, "3 positions and 14 steps exceed the context of 16"),
        ({"temperature": -1.0}, "temperature must be from 0 to inf, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be from 0 to inf, got nan"),
        ({"temperature": np.ones(3)}, r"temperature must be one value or 4, got shape \(3,\)"),
        ({"top_k": -2}, "top_k must be from 0 to inf, got -2"),
        ({"top_p": np.array([1, 1, 1, 1.5])}, "top_p must be from 0 to 1, got 1.5"),
        ({"stop": (0, 5)}, "stop must be from 0 to 4, got 5"),
        ({"allowed": np.ones(4, bool)}, r"allowed must be 5 values, got shape \(4,\)"),
        ({"pad": -1}, "pad must be from 0 to 4, got -1"),
        (
            {"text": Text(jnp.zeros((4, 3), jnp.int32), jnp.array([0, 3, 0, 0]))},
            "padding must be from 0 to 2, got 3",
        ),
        (
            {"text": Text(jnp.zeros((4, 20), jnp.int32), jnp.zeros(4))},
            "20 positions and 2 steps exceed the context",
        ),
    ],
)
def test_refusals(changes, message: str) -> None:
    arguments = {"model": tiny(), "text": prompts(), "steps": 2, "key": KEY, **changes}
    with pytest.raises(InputError, match=f"^sample: {message}"):
        sample(**arguments)


def test_other_models_are_refused() -> None:
    with pytest.raises(InputError, match=r"^the model is not a plain Transformer"):
        sample(Model(lambda params, inputs: inputs, None), prompts(), steps=2, key=KEY)
