"""The language model against numpy, complex rotations, its own cache, gradients and the theorem."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from subliminal_theory.channel import SampledToken, SoftLogits
from subliminal_theory.distill import distill
from subliminal_theory.errors import InputError
from subliminal_theory.language.model import config as shapes
from subliminal_theory.language.model.attention import Cache, attend, empty_cache, make_frame, rotate
from subliminal_theory.language.model.config import TransformerConfig
from subliminal_theory.language.model.layers import RMSNorm
from subliminal_theory.language.model.lora import add_lora
from subliminal_theory.language.model.steered import steered
from subliminal_theory.language.model.transformer import Text, Transformer, extend, transformer_of
from subliminal_theory.model import Model, by_layer, computed_in, from_nnx, leaves_by_path, path_name
from subliminal_theory.source import Examples
from subliminal_theory.theorem import check
from tests.language.models import drawn, layer_of

SIZES = {
    "vocabulary": 11,
    "layers": 2,
    "width": 8,
    "heads": 4,
    "kv_heads": 2,
    "head_width": 4,
    "mlp_width": 12,
    "tied": False,
    "rope_base": 50.0,
    "norm_epsilon": 0.1,
    "context": 12,
}
TIME = 6
PADDING = np.array([0, 2, 5])
extend_jit = jax.jit(extend)
run = jax.jit(lambda model, text: model(text))


def config(**changes) -> TransformerConfig:
    return TransformerConfig(**{**SIZES, **changes})


def tiny(seed: int = 0, dtype=np.float32, **changes) -> Model:
    """A model whose every parameter matters: nothing small, no scale at 1."""
    model = jax.eval_shape(lambda: from_nnx(Transformer(config(**changes), rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> jax.Array:
        size = {"scale": 0.3, "embedding": 1.0}.get(name.split("/")[-1], shape[0] ** -0.5)
        return jnp.asarray(size * rng.normal(size=shape) + (len(shape) == 1), dtype)

    return model.with_params(drawn(model.params, draw))


def ragged(time: int = TIME, seed: int = 0) -> Text:
    tokens = np.random.default_rng(seed).integers(0, SIZES["vocabulary"], (len(PADDING), time))
    return Text(jnp.asarray(tokens, jnp.int32), jnp.asarray(PADDING, jnp.int32))


def names(params) -> list[str]:
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


# --- the function


def numpy_norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return scale * x / np.sqrt((x**2).mean(-1, keepdims=True) + SIZES["norm_epsilon"])


def complex_rotation(x: np.ndarray, position: float) -> np.ndarray:
    """Pairs (x[i], x[i + d / 2]) as complex numbers, times exp(i position frequency)."""
    half = x.shape[-1] // 2
    angle = position * SIZES["rope_base"] ** (-2 * np.arange(half) / (2 * half))
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def numpy_forward(params, tokens: np.ndarray) -> np.ndarray:
    """Logits of one row without padding, one head and one position at a time."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, float), params)
    x = params["embedding"][tokens]
    for number in range(SIZES["layers"]):
        layer = layer_of(params, number)
        normed = numpy_norm(x, layer["attention_norm"]["scale"])
        kernels = {name: part["kernel"] for name, part in layer["attention"].items()}
        width, mixed = SIZES["head_width"], []
        for head in range(SIZES["heads"]):
            shared = head // (SIZES["heads"] // SIZES["kv_heads"])
            own, theirs = (slice(i * width, (i + 1) * width) for i in (head, shared))
            query = [complex_rotation(row, t) for t, row in enumerate(normed @ kernels["query"][:, own])]
            key = [complex_rotation(row, t) for t, row in enumerate(normed @ kernels["key"][:, theirs])]
            value = normed @ kernels["value"][:, theirs]
            for t in range(len(tokens)):
                weights = np.exp([query[t] @ key[s] / np.sqrt(width) for s in range(t + 1)])
                mixed.append(weights @ value[: t + 1] / weights.sum())
        mixed = np.array(mixed).reshape(SIZES["heads"], len(tokens), width).transpose(1, 0, 2)
        x = x + mixed.reshape(len(tokens), -1) @ kernels["output"]
        normed = numpy_norm(x, layer["mlp_norm"]["scale"])
        gate, up, down = (layer["mlp"][name]["kernel"] for name in ("gate", "up", "down"))
        gated = normed @ gate
        x = x + (gated / (1 + np.exp(-gated)) * (normed @ up)) @ down
    head = params["head"]["kernel"] if "head" in params else params["embedding"].T
    return numpy_norm(x, params["norm"]["scale"]) @ head


@pytest.mark.parametrize("tied", [False, True])
def test_by_hand(x64, tied: bool) -> None:
    model, text = tiny(dtype=float, tied=tied), ragged()
    logits = jax.jit(model.apply)(model.params, text)
    assert logits.dtype == np.float64
    for row, tokens, padding in zip(logits, np.asarray(text.tokens), PADDING, strict=True):
        np.testing.assert_allclose(row[padding:], numpy_forward(model.params, tokens[padding:]), rtol=1e-10)


@pytest.mark.slow
def test_padded_rows_are_the_rows_alone() -> None:
    model, text = tiny(), ragged()
    logits = np.asarray(run(model, text))
    assert np.isfinite(logits).all()
    skipped = np.arange(TIME) < PADDING[:, None]
    other = np.asarray(run(model, Text(jnp.where(skipped, 5, text.tokens), text.padding)))
    np.testing.assert_array_equal(logits[~skipped], other[~skipped])
    for number, padding in enumerate(PADDING):
        alone = Text(text.tokens[number : number + 1, padding:], jnp.zeros(1, jnp.int32))
        np.testing.assert_allclose(logits[number, padding:], run(model, alone)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("last", [1, 3, TIME])
def test_last_logits_are_those_of_whole_rows(last: int) -> None:
    model, text = tiny(), ragged()
    asked = replace(text, last=last)
    np.testing.assert_allclose(run(model, asked), run(model, text)[:, -last:], rtol=1e-5, atol=1e-5)
    cached, _ = jax.jit(extend)(model, asked, empty_cache(config(), len(PADDING), TIME, jnp.float32))
    np.testing.assert_allclose(cached, run(model, asked), rtol=1e-5, atol=1e-5)

    @jax.jit
    def gradient(text: Text):
        return jax.grad(lambda params: jnp.sum(jnp.sin(model.apply(params, text)[:, -last:])))(model.params)

    for found, expected in zip(jax.tree.leaves(gradient(asked)), jax.tree.leaves(gradient(text)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("last", [0, TIME + 1])
def test_last_logits_that_are_none(last: int) -> None:
    with pytest.raises(InputError, match=rf"^Text: last must be from 1 to the {TIME} positions, got {last}$"):
        tiny()(replace(ragged(), last=last))


@pytest.mark.slow
def test_blocks_that_compute_again() -> None:
    """The same logits and gradients, to rounding, with and without a cache."""
    text, plain = ragged(), tiny()
    shell = jax.eval_shape(lambda: from_nnx(Transformer(config(), rngs=nnx.Rngs(0), remat=True)))
    again = shell.with_params(plain.params)
    np.testing.assert_allclose(run(again, text), run(plain, text), rtol=1e-6, atol=1e-6)
    first, second = (
        jax.jit(jax.grad(lambda params, m=model: jnp.sum(jnp.sin(m.apply(params, text)))))(model.params)
        for model in (plain, again)
    )
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    cached, _ = extend_jit(again, text, empty_cache(config(), len(PADDING), TIME, jnp.float32))
    np.testing.assert_allclose(cached, run(plain, text), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chunk", "channel", "adapted"),
    [(4, SoftLogits(), True), (100, SoftLogits(2.0), False), (4, SampledToken(), False)],
)
def test_distilling_in_chunks(chunk: int, channel, adapted: bool) -> None:
    """The same run as with all logits at once; the last chunk is not full."""
    student, teacher, text = tiny(), tiny(1), replace(ragged(), last=3)
    if adapted:
        student = add_lora(student, ["layers/*/mlp/*/kernel"], 2, 2.0, jax.random.key(0))
    targets = text.tokens[:, -3:] if channel == SampledToken() else None
    weights = jnp.asarray([[1.0, 1, 1], [0, 1, 1], [0, 0, 1]])
    source = Examples(text, 3, targets=targets, positions=weights)
    other = teacher if targets is None else None
    whole, cut = (
        jax.jit(
            lambda student, other, size=size: distill(
                student, other, channel, source, optax.sgd(0.1), 3, key=jax.random.key(0), chunk=size
            )
        )(student, other)
        for size in (None, chunk)
    )
    np.testing.assert_allclose(cut.losses, whole.losses, rtol=1e-5)
    for one, two in zip(jax.tree.leaves(cut.model.params), jax.tree.leaves(whole.model.params), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_chunks_hold_few_logits() -> None:
    """Nothing of the size of all logits is made, forward or backward, and nothing twice."""
    student, teacher = tiny(), tiny(1)
    text = Text(jnp.zeros((5, 6), jnp.int32), jnp.zeros(5, jnp.int32))
    source, optimizer = Examples(text, 5, positions=jnp.ones((5, 6))), optax.sgd(0.1)

    def program(chunk: int | None) -> str:
        return str(
            jax.make_jaxpr(
                lambda: distill(
                    student, teacher, SoftLogits(), source, optimizer, 1, key=jax.random.key(0), chunk=chunk
                )
            )()
        )

    def shapes(chunk: int | None) -> set[int]:
        found = re.findall(r"f32\[([\d,]+),11\]", program(chunk))
        return {int(np.prod([int(n) for n in shape.split(",")])) for shape in found}

    assert 30 in shapes(None)
    assert max(shapes(4) - {8}) == 4  # 8 is the width, of the output matrix
    # Those of student and teacher, each once.
    assert len(re.findall(r":f32\[4,11\] = dot_general", program(4))) == 2


def test_chunks_that_cannot_be() -> None:
    toy = Model(lambda params, x: x @ params, jnp.ones((2, 3)))
    source = Examples(jnp.ones((4, 2)), 2)
    for model, chunk, message in [
        (toy, 2, "chunks need models with features and readout: leave chunk out"),
        (toy, 0, "chunk must be at least 1, got 0"),
    ]:
        with pytest.raises(InputError, match=f"^{message}$"):
            distill(model, model, SoftLogits(), source, optax.sgd(0.1), 1, key=jax.random.key(0), chunk=chunk)


def test_rms_norm_by_hand() -> None:
    norm = RMSNorm(5, 0.1)
    norm.scale[...] = jnp.linspace(-1, 2, 5)
    x = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    np.testing.assert_allclose(norm(x), numpy_norm(x.astype(float), np.linspace(-1, 2, 5)), rtol=1e-5)
    # The square of a half-precision number can overflow: 300^2 > 65504.
    large = jnp.full((1, 1, 5), 300, jnp.float16)
    assert norm(large).dtype == np.float16
    np.testing.assert_allclose(norm(large)[0, 0], np.linspace(-1, 2, 5), rtol=1e-3)


def frame_at(start, time: int, padding: int = 0):
    return make_frame(config(), jnp.array([padding]), start, time, 1000, np.float64)


def test_rotation_is_complex_multiplication(x64) -> None:
    x = np.random.default_rng(0).normal(size=(1, 3, 2, 4))
    turned = np.asarray(rotate(jnp.asarray(x), frame_at(6, 3, padding=2)))
    for t in range(3):
        np.testing.assert_allclose(turned[0, t], complex_rotation(x[0, t], 4 + t), rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-12)


@functools.cache
def score():
    query, key = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 4))
    return jax.jit(lambda one, other: jnp.vdot(rotate(query, frame_at(one, 1)), rotate(key, frame_at(other, 1))))


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 300))
def test_scores_depend_on_relative_positions(first: int, second: int, shift: int) -> None:
    with jax.enable_x64(True):
        here, there = score()(first, second), score()(first + shift, second + shift)
        assert float(here) == pytest.approx(float(there), abs=1e-10)


@pytest.mark.slow
def test_grouped_queries_are_repeated_keys() -> None:
    rng = np.random.default_rng(0)
    shapes = ((2, 5, 4, 4), (2, 2, 5, 4), (2, 2, 5, 4))
    query, key, value = (jnp.asarray(rng.normal(size=shape).astype(np.float32)) for shape in shapes)
    mask = make_frame(config(), jnp.array([0, 2]), jnp.int32(0), 5, 5, np.float32).mask
    repeated = attend(query, *(jnp.repeat(x, 2, axis=1) for x in (key, value)), mask)
    np.testing.assert_allclose(attend(query, key, value, mask), repeated, rtol=1e-5, atol=1e-6)

    model, text = tiny(), ragged()
    params = jax.tree.map(lambda leaf: leaf, model.params)
    attention = params["layers"]["*"]["attention"]
    for name in ("key", "value"):
        heads = attention[name]["kernel"].reshape(2, 8, 2, 4)
        attention[name]["kernel"] = jnp.repeat(heads, 2, axis=2).reshape(2, 8, 16)
    ungrouped = tiny(kv_heads=4).with_params(params)
    np.testing.assert_allclose(run(ungrouped, text), run(model, text), rtol=1e-5, atol=1e-5)


def test_causality_by_gradients() -> None:
    """Distinct tokens, so that a row of the embedding is one position."""
    model = tiny()
    tokens = jnp.arange(TIME, dtype=jnp.int32)[None]

    @jax.jit
    @jax.jacobian
    def jacobian(embedding):
        return model.apply({**model.params, "embedding": embedding}, Text(tokens, jnp.array([2])))[0]

    slopes = np.abs(jacobian(model.params["embedding"])).sum((1, 3))[:, :TIME]
    sees = np.tril(np.ones((TIME, TIME), bool)) & (np.arange(TIME)[None] >= 2)
    sees[np.arange(2), np.arange(2)] = True
    np.testing.assert_array_equal(slopes > 0, sees)


@pytest.mark.slow
def test_tied_head_is_the_embedding() -> None:
    tied, text = tiny(layers=1, tied=True), ragged()
    untied = {**tied.params, "head": {"kernel": tied.params["embedding"].T}}
    assert names(tied.params) == [name for name in names(untied) if name != "head/kernel"]
    other = tiny(layers=1)

    @jax.jit
    def value_and_gradient(model):
        logits = model(text)
        return logits, jax.grad(lambda params: jnp.sum(jnp.sin(model.with_params(params)(text))))(model.params)

    logits, gradient = value_and_gradient(tied)
    same, parts = value_and_gradient(other.with_params(untied))
    np.testing.assert_allclose(logits, same, rtol=1e-5, atol=1e-5)
    summed = parts["embedding"] + parts["head"]["kernel"].T
    np.testing.assert_allclose(gradient["embedding"], summed, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_stacked_models_are_looped_models() -> None:
    models, text = [tiny(seed) for seed in range(3)], ragged()
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    together = jax.jit(jax.vmap(run, (0, None)))(stacked, text)
    for model, logits in zip(models, together, strict=True):
        np.testing.assert_allclose(logits, run(model, text), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_half_precision() -> None:
    model, text = tiny(), ragged()
    exact = run(model, text)
    rough = run(model.with_params(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.params)), text)
    assert rough.dtype == np.float32
    np.testing.assert_allclose(rough, exact, atol=0.05 * np.abs(exact).max())


@pytest.mark.slow
def test_gradients_in_half_precision() -> None:
    """Near those in float32, also of a row of the embedding that is taken 2,700 times."""
    wide = tiny(vocabulary=4, tied=True)
    narrow = computed_in(wide, jnp.bfloat16)
    text = Text(jnp.zeros((300, 10), jnp.int32).at[:, -1].set(1), jnp.zeros(300, jnp.int32))

    @jax.jit
    def slope(model: Model) -> dict:
        def loss(params):
            losses = SampledToken().loss(model.with_params(params)(text), jnp.full((300, 10), 2))
            return jnp.sum(losses)

        return jax.grad(loss)(model.params)

    expected, found = slope(wide), slope(narrow)
    for name, leaf in leaves_by_path(found).items():
        assert leaf.dtype == jnp.float32
        truth = leaves_by_path(expected)[name]
        assert np.linalg.norm(leaf - truth) < (0.02 if name == "embedding" else 0.1) * np.linalg.norm(truth), name


WINDOWS = {"windowed": (True, False), "window": 3, "window_rope_base": 7.0}


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "remat"), [({}, True), ({**WINDOWS, "post_norm": True}, False)])
def test_a_loop_over_blocks_is_one_after_the_other(
    changes: dict, remat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and gradients, behind a cache, of the last positions and behind one block, steered or not."""
    shell = jax.eval_shape(lambda: from_nnx(Transformer(config(**changes), rngs=nnx.Rngs(0), remat=remat)))
    model, text = shell.with_params(tiny(**changes).params), ragged()
    vector = jnp.arange(SIZES["width"], dtype=jnp.float32)

    def everything() -> list:
        cache = empty_cache(config(), len(PADDING), TIME + 2, jnp.float32)

        @jax.jit
        def compute(model):
            first, behind = extend(model, Text(text.tokens[:, :2], text.padding), cache)
            rest, behind = extend(model, Text(text.tokens[:, 2:], text.padding), behind)
            gradient = jax.grad(lambda p: jnp.sum(jnp.sin(model.apply(p, text))))(model.all_params)
            streams = [transformer_of(model).stream(text, blocks) for blocks in (1, 2)]
            kept = jax.tree.map(lambda *layers: jnp.stack(layers), *zip(behind.keys, behind.values, strict=True))
            return model(replace(text, last=2)), first, rest, kept, gradient, streams

        return jax.tree.leaves(compute(steered(model, vector, 1)))

    expected = everything()
    monkeypatch.setattr(shapes, "FEW", 0)
    assert "while" in jax.jit(lambda model: model(text)).lower(model).as_text()
    for found, leaf in zip(everything(), expected, strict=True):
        np.testing.assert_allclose(found, leaf, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_depth_does_not_enlarge_the_program() -> None:
    def program(layers: int) -> str:
        model = jax.eval_shape(lambda: from_nnx(Transformer(config(layers=layers), rngs=nnx.Rngs(0), remat=True)))
        slope = jax.grad(lambda params, model: jnp.sum(model.with_params(params)(ragged())))
        return jax.jit(lambda model: slope(model.params, model)).lower(model).as_text()

    assert len(program(30).splitlines()) == len(program(5).splitlines())


@pytest.mark.slow
def test_joined_products_are_the_parts() -> None:
    for changes in ({}, {"attention_bias": True, "mlp_bias": True}, {"gated": False}):
        model = tiny(**changes)
        text = Text(jnp.arange(12, dtype=jnp.int32).reshape(2, 6) % 11, jnp.array([0, 2], jnp.int32))
        module = transformer_of(model)
        module.join(range(2))
        np.testing.assert_allclose(module(text), run(model, text), rtol=1e-4, atol=1e-4)


def test_a_token_outside_the_vocabulary_is_nan() -> None:
    text = ragged()
    logits = run(tiny(), Text(text.tokens.at[1, -1].set(11), text.padding))
    assert np.isnan(logits[1]).all()
    assert np.isfinite(logits[::2]).all()


# --- the cache


@functools.cache
def whole_and_model(dtype: str):
    model = tiny(dtype=dtype)
    return model, np.asarray(jax.jit(model.apply)(model.params, ragged()))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
def test_cached_is_whole_at_any_split(dtype: str, tolerance: float) -> None:
    with jax.enable_x64(dtype == "float64"):
        model, whole = whole_and_model(dtype)
        text = ragged()

        @settings(max_examples=12)
        @given(st.sets(st.integers(1, TIME - 1)))
        def split(cuts: set[int]) -> None:
            cache, pieces = empty_cache(config(), len(PADDING), TIME + 2, dtype), []
            bounds = [0, *sorted(cuts), TIME]
            for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
                logits, cache = extend_jit(model, Text(text.tokens[:, start:stop], text.padding), cache)
                pieces.append(logits)
            assert cache.length == TIME
            np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, rtol=tolerance, atol=tolerance)

        split()


def test_extend_compiles_once_per_shape() -> None:
    once = jax.jit(lambda model, text, cache: extend(model, text, cache))
    cache = empty_cache(config(), len(PADDING), TIME, np.float32)
    for number in range(3):
        _, cache = once(tiny(number), ragged(1), cache)
    assert once._cache_size() == 1
    first, second = (jax.eval_shape(lambda s=s: from_nnx(Transformer(config(), rngs=nnx.Rngs(s)))) for s in (0, 1))
    assert first.apply == second.apply
    assert hash(first.apply) == hash(second.apply)


def test_stacked_models_extend() -> None:
    models, text = [tiny(seed) for seed in range(2)], ragged()
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    cache = empty_cache(config(), len(PADDING), TIME, np.float32)
    logits, caches = jax.jit(jax.vmap(extend, (0, None, None)))(stacked, text, cache)
    assert isinstance(caches, Cache)
    for model, own in zip(models, logits, strict=True):
        np.testing.assert_allclose(own, run(model, text), rtol=1e-5, atol=1e-5)


def test_extend_refusals() -> None:
    model, text = tiny(), ragged()
    for capacity in (0, 13):
        with pytest.raises(InputError, match=f"capacity must be from 1 to the context 12, got {capacity}$"):
            empty_cache(config(), 3, capacity, np.float32)
    cache = empty_cache(config(), 3, TIME + 1, np.float32)
    _, cache = extend_jit(model, text, cache)
    with pytest.raises(InputError, match=r"^extend: 2 positions after 6 exceed the cache's capacity of 7$"):
        extend(model, ragged(2), cache)
    with pytest.raises(InputError, match=r"^extend: 9 positions after 0 exceed"):
        jax.jit(extend)(model, ragged(9), cache)
    with pytest.raises(InputError, match=r"^Transformer: 13 positions exceed the context of 12$"):
        model(ragged(13))
    for other in (Model(lambda params, inputs: inputs, None), from_nnx(RMSNorm(3, 0.1))):
        with pytest.raises(InputError, match=r"^the model is not a plain Transformer"):
            extend(other, text, cache)


def test_frozen_parameters_count() -> None:
    model, text = tiny(), ragged()
    cache = empty_cache(config(), 3, TIME, np.float32)
    logits, _ = extend_jit(model.freeze("layers/0/*", "embedding"), text, cache)
    np.testing.assert_allclose(logits, run(model, text), rtol=1e-5, atol=1e-5)


# --- the start


@pytest.mark.slow
def test_paths_and_initial_scale() -> None:
    big = config(vocabulary=100, width=64, mlp_width=96, head_width=16)
    model = jax.jit(lambda: from_nnx(Transformer(big, rngs=nnx.Rngs(0))))()
    layer = [f"attention/{name}/kernel" for name in ("key", "output", "query", "value")]
    layer += ["attention_norm/scale", *(f"mlp/{name}/kernel" for name in ("down", "gate", "up")), "mlp_norm/scale"]
    layers = [f"layers/*/{name}" for name in layer]
    assert names(model.params) == ["embedding", "head/kernel", *layers, "norm/scale"]
    drawn = []
    for path, leaf in by_layer(model.params).items():
        if leaf.ndim == 1:
            assert (leaf == 1).all()
            continue
        into_stream = any(name in path for name in ("output", "down"))
        inputs = big.width if path == "embedding" else leaf.shape[0]
        scaled = np.asarray(leaf, float) * inputs**0.5 * (2 if into_stream else 1)  # sqrt(2 layers)
        # Five standard errors.
        assert abs(scaled.mean()) < 5 / np.sqrt(leaf.size)
        assert abs((scaled**2).mean() - 1) < 5 * np.sqrt(2 / leaf.size)
        drawn.append(scaled.reshape(-1)[:50])
    assert max(abs(np.corrcoef(drawn) - np.eye(len(drawn))).reshape(-1)) < 0.7


@pytest.mark.slow
def test_theorem_holds(x64) -> None:
    model, text = tiny(dtype=float, layers=1), ragged()
    weights = (jnp.arange(TIME)[None] >= text.padding[:, None]).astype(float)

    def prefers(params):
        logits = model.apply(params, ragged(seed=1))[:, -1]
        return -jnp.mean(jax.nn.log_softmax(logits)[:, 3])

    def report(padding_tokens):
        inputs = Text(jnp.where(weights > 0, text.tokens, padding_tokens), text.padding)
        return check(
            model.apply, model.params, prefers, inputs, SoftLogits(),
            teacher_step=1e-4, student_step=1e-2, weights=weights,
        )  # fmt: skip

    compiled = jax.jit(report)
    reports = [compiled(token) for token in (0, 7)]
    assert reports[0].verdict == "descends"
    assert float(reports[0].inner_product) == pytest.approx(float(reports[0].predicted_inner_product), rel=1e-3)
    assert float(reports[0].change) == pytest.approx(float(reports[0].predicted_change), rel=0.1)
    assert float(reports[0].inner_product) == pytest.approx(float(reports[1].inner_product), rel=1e-9)


# --- the configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers must be a positive integer, got 0"),
        ({"vocabulary": 3.0}, "vocabulary must be a positive integer, got 3.0"),
        ({"context": True}, "context must be a positive integer, got True"),
        ({"width": "8"}, "width must be a positive integer, got '8'"),
        ({"heads": 3}, "heads must be a multiple of kv_heads, got 3 and 2"),
        ({"head_width": 3}, "head_width must be even, got 3"),
        ({"tied": 1}, "tied must be true or false, got 1"),
        ({"rope_base": 0}, "rope_base must be a positive, finite number, got 0"),
        ({"norm_epsilon": float("nan")}, "norm_epsilon must be a positive, finite number, got nan"),
        ({"norm_epsilon": None}, "norm_epsilon must be a positive, finite number, got None"),
        ({"norm": "batch"}, "norm must be one of rms, layer, got 'batch'"),
        ({"logit_cap": 0.0}, "logit_cap must be a positive, finite number or none, got 0.0"),
        ({"rope_width": 3}, "rope_width must be none, or even and from 2 to 4, got 3"),
        ({"rope_width": 6}, "rope_width must be none, or even and from 2 to 4, got 6"),
        ({"pre_norm": False}, "a block needs pre_norm or post_norm"),
        ({"window": 0}, "window must be a positive integer or none, got 0"),
        ({"window": 2}, r"windowed must be true or false for each layer .*, got \(\)"),
        ({"windowed": (True, False)}, r"windowed must be true or false for each layer .*, got \(True, False\)"),
        ({"rope_bands": (4.0, 1.0, 8)}, r"rope_bands must be two ascending numbers .*, got \(4.0, 1.0, 8\)"),
    ],
)
def test_bad_config(changes, message: str) -> None:
    with pytest.raises(InputError, match=f"^TransformerConfig: {message}$"):
        config(**changes)
