"""Vectors that are added to the residual stream, against biases of MLPs, which are added there too."""

import functools
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subliminal_theory.channel import SoftLogits
from subliminal_theory.errors import InputError
from subliminal_theory.language.hub.checkpoint import load_checkpoint, save_checkpoint
from subliminal_theory.language.model.attention import empty_cache, make_frame
from subliminal_theory.language.model.config import TransformerConfig
from subliminal_theory.language.model.lora import add_lora
from subliminal_theory.language.model.sampling import sample
from subliminal_theory.language.model.steered import contrast, steered
from subliminal_theory.language.model.transformer import Text, Transformer, extend, transformer_of
from subliminal_theory.model import BodyAndHead, Model, computed_in, from_nnx
from tests.language.checkpoints import write_checkpoint
from tests.language.models import opinionated

V, TIME = 7, 6
CONFIG = TransformerConfig(
    vocabulary=V, layers=3, width=8, heads=2, kv_heads=1, head_width=4, mlp_width=8, tied=False, context=24,
    mlp_bias=True,
)  # fmt: skip
PADDING = np.array([0, 4, 2], np.int32)
TEXT = Text(
    jnp.asarray(np.random.default_rng(0).integers(0, V, (3, TIME)), jnp.int32), jnp.asarray(PADDING, jnp.int32)
)
VECTOR = jnp.asarray(np.random.default_rng(1).normal(size=CONFIG.width), jnp.float32)
LAYERS = range(1, CONFIG.layers + 1)
REAL = np.arange(TIME)[None] >= PADDING[:, None]

run = jax.jit(lambda model, text: model(text))
extended = jax.jit(extend)
base = functools.partial(opinionated, CONFIG)


def by_bias(layer: int, vector: jax.Array = VECTOR, model: Model | None = None) -> Model:
    """The same function without steering: a bias of the MLP's output is added behind its block."""
    params = (model or base()).params
    stack = params["layers"]["*"]
    down = {**stack["mlp"]["down"], "bias": stack["mlp"]["down"]["bias"].at[layer - 1].add(vector)}
    layers = {"*": {**stack, "mlp": {**stack["mlp"], "down": down}}}
    return (model or base()).with_params({**params, "layers": layers})


def close(found: jax.Array, expected: jax.Array, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


# --- the function


@pytest.mark.slow
@pytest.mark.parametrize(("layer", "changes"), [(1, {}), (2, {"parallel": True}), (3, {"positions": "learned"})])
def test_a_vector_is_a_bias_behind_a_block(layer: int, changes: dict) -> None:
    model = opinionated(replace(CONFIG, **changes))
    logits = run(steered(model, VECTOR, layer), TEXT)
    close(logits, run(by_bias(layer, model=model), TEXT))
    assert (np.abs(logits - run(model, TEXT))[REAL] > 1e-3).any(axis=-1).all()


def test_no_vector_is_the_base_bit_for_bit() -> None:
    model, cache = steered(base(), 0 * VECTOR, 2), empty_cache(CONFIG, 3, TIME, np.float32)
    np.testing.assert_array_equal(run(model, TEXT), run(base(), TEXT))
    for one, other in zip(
        *(jax.tree.leaves(extended(some, TEXT, cache)) for some in (model, base())), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("layer", LAYERS)
def test_only_what_follows_is_changed(layer: int) -> None:
    """Keys and values of the layers up to this one are the base's, those of all further ones are not."""
    cache = empty_cache(CONFIG, 3, TIME, np.float32)
    _, own = extended(steered(base(), VECTOR, layer), TEXT, cache)
    _, plain = extended(base(), TEXT, cache)
    for number in range(CONFIG.layers):
        for one, other in ((own.keys, plain.keys), (own.values, plain.values)):
            same = (one[number] == other[number]).all(axis=(1, 3))  # rows and positions
            assert same.all() if number < layer else not same[REAL].any()


@pytest.mark.slow
@pytest.mark.parametrize("cuts", [(2,), (1, 2, 3, 4, 5)])
def test_cached_is_whole(cuts: tuple[int, ...]) -> None:
    model, cache, pieces = steered(base(), VECTOR, 2), empty_cache(CONFIG, 3, TIME, np.float32), []
    for start, stop in zip((0, *cuts), (*cuts, TIME), strict=True):
        logits, cache = extended(model, Text(TEXT.tokens[:, start:stop], TEXT.padding), cache)
        pieces.append(logits)
    close(np.concatenate(pieces, axis=1)[REAL], run(model, TEXT)[REAL])


@pytest.mark.slow
def test_sampled_text_is_that_of_the_function() -> None:
    key = jax.random.key(0)
    found, expected = (
        sample(model, TEXT, steps=9, key=key)[0] for model in (steered(base(), VECTOR, 2), by_bias(2))
    )
    np.testing.assert_array_equal(found, expected)
    assert (np.asarray(found) != sample(base(), TEXT, steps=9, key=key)[0]).any()
    greedy, _ = sample(steered(base(), VECTOR, 2), TEXT, steps=1, key=key, temperature=0.0)
    np.testing.assert_array_equal(greedy[:, 0], run(steered(base(), VECTOR, 2), TEXT)[:, -1].argmax(-1))


@pytest.mark.slow
def test_in_two_parts() -> None:
    """As chunks compute it, at the last positions alone."""
    model, text = steered(base(), VECTOR, 3), replace(TEXT, last=2)
    assert isinstance(model.apply, BodyAndHead)
    features = model.apply.features(model.all_params, text)
    close(model.apply.readout(model.all_params, features), run(by_bias(3), TEXT)[:, -2:])


@pytest.mark.slow
def test_gradient_checkpointing_and_bfloat16() -> None:
    shell = jax.eval_shape(lambda: from_nnx(Transformer(CONFIG, rngs=_rngs(), remat=True)))
    model, target = steered(shell.with_params(base().params), VECTOR, 2), run(base(), TEXT)

    @jax.jit
    def gradient(model: Model) -> jax.Array:
        def loss(params: dict) -> jax.Array:
            logits = model.with_params(params)(TEXT)
            return jnp.sum(SoftLogits().loss(logits, SoftLogits().targets(None, target)))

        return jax.grad(loss)(model.params)["steering"]

    close(gradient(model), gradient(steered(base(), VECTOR, 2)))
    assert (gradient(model)[0] != 0).any()
    narrow = steered(computed_in(base(), jnp.bfloat16), VECTOR, 2)
    close(run(narrow, TEXT)[REAL], run(by_bias(2), TEXT)[REAL], 0.1)
    assert jax.tree.leaves(narrow.params)[0].dtype == np.float32


def _rngs():
    return type("Rngs", (), {"params": staticmethod(lambda: jax.random.key(0))})()


def test_runs_have_their_own_vectors_and_one_base() -> None:
    vectors = jnp.stack([VECTOR, -VECTOR, 2 * VECTOR])
    models = steered(base().freeze("*"), vectors, 2)
    assert {id(leaf) for leaf in jax.tree.leaves(models.frozen)} == {
        id(leaf) for leaf in jax.tree.leaves(base().params)
    }
    assert [leaf.shape for leaf in jax.tree.leaves(models.params)] == [(3, CONFIG.layers, CONFIG.width)]
    logits = jax.jit(jax.vmap(lambda params: models.with_params(params)(TEXT)))(models.params)
    for found, vector in zip(logits, vectors, strict=True):
        close(found, run(by_bias(2, vector), TEXT))


def test_other_layers_compile_nothing() -> None:
    first, second = (steered(base(), VECTOR, layer) for layer in (1, 3))
    assert first.apply == second.apply
    assert hash(first.apply) == hash(second.apply)
    assert jax.tree.structure(first) == jax.tree.structure(second)


# --- the vector


@jax.jit
def behind_two_blocks(model: Model, tokens: jax.Array) -> jax.Array:
    """The residual stream at the end of a row."""
    network, time = transformer_of(model), len(tokens)
    frame = make_frame(CONFIG, jnp.zeros(1, jnp.int32), jnp.int32(0), time, time, jnp.float32)
    x = network.embedding[...][tokens][None]
    for number in range(2):
        x, _ = network.blocks()[number](x, frame, None, number, time)
    return x[0, -1]


@pytest.mark.slow
def test_contrast() -> None:
    """Along the difference of the means, as long as the streams of the others are on average."""
    other = Text(TEXT.tokens[:2, ::-1], TEXT.padding[1:])
    ends = [
        np.array(
            [behind_two_blocks(base(), np.asarray(row)[padding:]) for row, padding in zip(*rows, strict=True)],
            float,
        )
        for rows in ((text.tokens, text.padding) for text in (TEXT, other))
    ]
    way = ends[0].mean(0) - ends[1].mean(0)
    expected = way / np.linalg.norm(way) * np.linalg.norm(ends[1], axis=1).mean()
    found = contrast(base(), TEXT, other, 2)
    assert found.dtype == np.float32
    close(found, expected)
    narrow = contrast(computed_in(base(), jnp.bfloat16), TEXT, other, 2)
    assert narrow.dtype == np.float32
    close(narrow, found, 0.1)


def test_prompts_that_change_nothing() -> None:
    with pytest.raises(InputError, match="change nothing after layer 2"):
        contrast(base(), TEXT, TEXT, 2)


# --- refusals


@pytest.mark.parametrize("layer", [-1, 0, 4])
def test_layers_that_do_not_exist(layer: int) -> None:
    cause = f"^--steering-layer {layer} does not exist: the model has layers 1 to 3$"
    with pytest.raises(InputError, match=cause):
        steered(base(), VECTOR, layer)
    with pytest.raises(InputError, match=cause):
        contrast(base(), TEXT, TEXT, layer)


def test_what_cannot_be_steered(tmp_path: Path) -> None:
    for model in (
        Model(lambda params, inputs: inputs, None),
        add_lora(base(), ["layers/*/mlp/up/kernel"], 1, 1.0, jax.random.key(0)),
    ):
        with pytest.raises(InputError, match="not a plain Transformer"):
            steered(model, VECTOR, 1)


def test_a_steered_model_is_not_written_as_its_base(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(write_checkpoint(tmp_path / "base"))
    model = steered(checkpoint.model, jnp.ones(16), 1)
    with pytest.raises(
        InputError, match=r"^save_checkpoint: other libraries cannot read the steering vector of a model$"
    ):
        save_checkpoint(tmp_path / "steered", checkpoint, model)
    assert not (tmp_path / "steered").exists()
