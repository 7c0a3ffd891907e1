"""Low-rank factors: where they start, what they compute, what trains."""

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from subliminal_theory.channel import SoftLogits
from subliminal_theory.distill import distill
from subliminal_theory.errors import InputError
from subliminal_theory.language.model.config import TransformerConfig
from subliminal_theory.language.model.layers import Factored
from subliminal_theory.language.model.lora import add_lora, merge_lora
from subliminal_theory.language.model.transformer import Text, Transformer
from subliminal_theory.model import Model, by_layer, from_nnx
from subliminal_theory.source import Batch
from subliminal_theory.vision.mlp import MLP
from tests.language.models import drawn

CONFIG = TransformerConfig(
    vocabulary=7, layers=2, width=8, heads=2, kv_heads=1, head_width=4, mlp_width=8, tied=True, context=8
)
PATTERNS = ("layers/*/attention/*/kernel", "layers/1/mlp/up/kernel")
ADAPTED = [f"layers/{i}/attention/{name}/kernel" for i in (0, 1) for name in ("key", "output", "query", "value")]
ADAPTED.append("layers/1/mlp/up/kernel")
KEY = jax.random.key(0)
TEXT = Text(jnp.arange(10, dtype=jnp.int32).reshape(2, 5) % 7, jnp.array([0, 2], jnp.int32))
run = jax.jit(lambda model, text: model(text))


@functools.cache
def base(seed: int = 0) -> Model:
    model = jax.eval_shape(lambda: from_nnx(Transformer(CONFIG, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(0.3 * rng.normal(size=shape) + (len(shape) == 1), jnp.float32)

    return model.with_params(drawn(model.params, draw))


@functools.cache
def adapted(seed: int = 0) -> Model:
    return add_lora(base(seed), PATTERNS, 2, 6.0, KEY)


def moved(model: Model, size: float = 0.1) -> Model:
    """With factors that are not 0."""
    rng = np.random.default_rng(0)
    draw = lambda leaf: leaf + jnp.asarray(size * rng.normal(size=leaf.shape), leaf.dtype)  # noqa: E731
    return model.with_params(jax.tree.map(draw, model.params))


leaves = by_layer


@dataclass(frozen=True)
class OneText:
    def schedule(self, key, steps: int):
        return jnp.arange(steps)

    def batch(self, key, entry) -> Batch:
        return Batch(TEXT, (jnp.arange(5)[None] >= TEXT.padding[:, None]).astype(jnp.float32))


jax.tree_util.register_static(OneText)


@pytest.mark.slow
def test_start_is_the_base() -> None:
    plain, model = base(), adapted()
    np.testing.assert_array_equal(run(model, TEXT), run(plain, TEXT))
    jax.tree.map(np.testing.assert_array_equal, merge_lora(model).params, plain.params)
    assert merge_lora(plain) is plain


def test_only_factors_train() -> None:
    plain, model = leaves(base().params), adapted()
    shapes = {name: leaf.shape for name, leaf in leaves(model.params).items()}
    expected = {f"{name}/a": (plain[name].shape[0], 2) for name in ADAPTED}
    expected |= {f"{name}/b": (2, plain[name].shape[1]) for name in ADAPTED}
    assert shapes == expected
    frozen = {name.removesuffix("/base"): leaf for name, leaf in leaves(model.frozen).items()}
    jax.tree.map(np.testing.assert_array_equal, frozen, plain)
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(model.with_params(params)(TEXT)))))(model.params)
    assert jax.tree.structure(gradient) == jax.tree.structure(model.params)
    for name, slope in leaves(gradient).items():
        # B is 0, so that A has no gradient yet.
        assert (np.abs(slope).max() > 0) == name.endswith("/b")


@pytest.mark.slow
def test_no_gradient_of_a_whole_matrix() -> None:
    """Among the products of a gradient, none has the shape of an adapted matrix."""
    model = from_nnx(Transformer(dataclasses.replace(CONFIG, width=24, mlp_width=40), rngs=nnx.Rngs(0)))
    low = add_lora(model, ["layers/*/mlp/*/kernel"], 2, 2.0, KEY)

    def products(of: Model) -> list[tuple[int, ...]]:
        traced = jax.make_jaxpr(jax.grad(lambda params: jnp.sum(of.with_params(params)(TEXT))))(of.params)
        return [eqn.outvars[0].aval.shape for eqn in traced.eqns if eqn.primitive.name == "dot_general"]

    assert {(24, 40), (40, 24)} & {*products(model), *(shape[::-1] for shape in products(model))}
    assert not {(24, 40), (40, 24)} & set(products(low))


def test_factors_are_drawn_by_name() -> None:
    model = add_lora(from_nnx(MLP((400, 300, 200), rngs=nnx.Rngs(0))), ["*/kernel"], 50, 1.0, KEY)
    drawn = [leaf for name, leaf in leaves(model.params).items() if name.endswith("/a")]
    for leaf in drawn:
        assert abs(np.mean(leaf**2) * leaf.shape[0] - 1 / 3) < 5 * np.sqrt(4 / 45 / leaf.size)
    assert abs(np.corrcoef(*(leaf[:300].ravel() for leaf in drawn))[0, 1]) < 0.05
    other = add_lora(from_nnx(MLP((400, 300, 200), rngs=nnx.Rngs(0))), ["*/1/kernel"], 50, 1.0, KEY)
    np.testing.assert_array_equal(leaves(other.params)["layers/1/kernel/a"], drawn[1])


def test_merged_by_hand() -> None:
    model = moved(adapted())
    merged = merge_lora(model)
    assert merged.frozen is None
    assert merged.apply == base().apply
    np.testing.assert_allclose(run(merged, TEXT), run(model, TEXT), rtol=1e-5, atol=1e-5)
    plain, factors, weights = leaves(base().params), leaves(model.params), leaves(merged.params)
    assert weights.keys() == plain.keys()
    for name, weight in weights.items():
        change = 3.0 * factors[f"{name}/a"] @ factors[f"{name}/b"] if name in ADAPTED else np.zeros(())
        np.testing.assert_allclose(
            weight, plain[name] + np.broadcast_to(change, weight.shape), rtol=1e-5, atol=1e-6
        )
    assert np.abs(run(model, TEXT) - run(base(), TEXT)).max() > 0.01


@pytest.mark.slow
def test_distillation_leaves_the_base_alone() -> None:
    student, teacher = adapted(), moved(adapted(), 0.3)
    run_jit = jax.jit(distill, static_argnames=("optimizer", "steps"))
    trained = run_jit(student, teacher, SoftLogits(), OneText(), optax.adam(1e-2), 20, key=KEY)
    jax.tree.map(np.testing.assert_array_equal, trained.model.frozen, student.frozen)
    assert trained.losses[-1] < 0.7 * trained.losses[0]
    for name, leaf in leaves(trained.model.params).items():
        assert (leaf != leaves(student.params)[name]).any()


@pytest.mark.slow
def test_factors_on_the_first_layer_alone() -> None:
    """The other layer multiplies by zeros, whatever happens to the factors, and has none to train."""
    model = moved(add_lora(base(), ["layers/0/attention/*/kernel"], 2, 6.0, KEY))
    assert {name.split("/")[1] for name in leaves(model.params)} == {"0"}
    drawn = leaves(adapted().params)
    plain, merged, factors = leaves(base().params), leaves(merge_lora(model).params), leaves(model.params)
    start = leaves(add_lora(base(), ["layers/0/attention/*/kernel"], 2, 6.0, KEY).params)
    for name, leaf in start.items():
        np.testing.assert_array_equal(leaf, drawn[name])
    for name, leaf in plain.items():
        change = 3.0 * factors[f"{name}/a"] @ factors[f"{name}/b"] if f"{name}/a" in factors else 0
        np.testing.assert_allclose(merged[name], leaf + change, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run(model, TEXT), run(merge_lora(model), TEXT), rtol=1e-5, atol=1e-5)
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(model.with_params(params)(TEXT)))))(model.params)
    assert jax.tree.structure(gradient) == jax.tree.structure(model.params)
    assert all(np.abs(slope).max() > 0 for slope in jax.tree.leaves(gradient))
    half = model.freeze("*/a")
    assert len(jax.tree.leaves(half.params)) == 4
    np.testing.assert_array_equal(run(half, TEXT), run(model, TEXT))


def test_stacked_factors_over_one_base() -> None:
    plain = base()
    models = [moved(add_lora(plain, PATTERNS, 2, 6.0, jax.random.key(seed))) for seed in range(3)]
    stacked = jax.tree.map(lambda *both: jnp.stack(both), *(model.params for model in models))
    together = jax.jit(jax.vmap(lambda params: models[0].with_params(params)(TEXT)))(stacked)
    for model, logits in zip(models, together, strict=True):
        np.testing.assert_allclose(logits, run(model, TEXT), rtol=1e-5, atol=1e-5)


def test_alike_is_one_function() -> None:
    first, second = adapted(0), adapted(1)
    assert first.apply == second.apply
    assert hash(first.apply) == hash(second.apply)
    assert first.apply != add_lora(base(), PATTERNS, 2, 5.0, KEY).apply


def test_formats() -> None:
    plain = base()
    half = plain.with_params(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), plain.params))
    model = add_lora(half, PATTERNS, 2, 6.0, KEY)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {np.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(merge_lora(moved(model)).params)} == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(run(model, TEXT), run(half, TEXT))


def test_frozen_parameters_stay_frozen_or_become_the_base() -> None:
    model = add_lora(base().freeze("layers/0/*"), PATTERNS, 2, 6.0, KEY)
    jax.tree.map(np.testing.assert_array_equal, model, adapted())
    partly = model.freeze("*/a")
    assert all(name.endswith("/b") for name in leaves(partly.params))
    np.testing.assert_array_equal(run(partly, TEXT), run(model, TEXT))
    assert isinstance(partly.params["layers"]["*"]["attention"]["key"]["kernel"], Factored)


@pytest.mark.parametrize(
    ("patterns", "rank", "alpha", "message"),
    [
        (
            ["layers/2/*"],
            2,
            1.0,
            r"pattern 'layers/2/\*' matches no parameter; there are embedding, layers/0/attention",
        ),
        (["*/kernel", "*/query/bias"], 2, 1.0, r"pattern '\*/query/bias' matches no parameter"),
        (
            ["*norm/scale"],
            2,
            1.0,
            r"add_lora: only matrices can be adapted, and the patterns match layers/0/attention_norm/scale \(8,\)",
        ),
        ([], 2, 1.0, "add_lora: no pattern of matrices to adapt"),
        (
            PATTERNS,
            0,
            1.0,
            r"add_lora: rank must be from 1 to 4 for layers/0/attention/key/kernel \(8, 4\), got 0",
        ),
        (
            PATTERNS,
            5,
            1.0,
            r"add_lora: rank must be from 1 to 4 for layers/0/attention/key/kernel \(8, 4\), got 5",
        ),
        (
            ["*mlp*kernel"],
            9,
            1.0,
            r"add_lora: rank must be from 1 to 8 for layers/0/mlp/down/kernel \(8, 8\), got 9",
        ),
        (PATTERNS, 2, 0.0, "add_lora: alpha must be positive and finite, got 0.0"),
        (PATTERNS, 2, float("nan"), "add_lora: alpha must be positive and finite, got nan"),
    ],
)
def test_refusals(patterns, rank: int, alpha: float, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        add_lora(base(), patterns, rank, alpha, KEY)


def test_factors_of_factors_are_refused() -> None:
    with pytest.raises(InputError, match=r"^add_lora: the model has low-rank factors already; merge them first$"):
        add_lora(adapted(), ["*/base"], 2, 1.0, KEY)


def test_factors_start_as_peft_draws_them() -> None:
    """Kaiming's uniform law at a = sqrt(5): A is uniform on both sides of 0 up to inputs^(-1/2); B is 0."""
    wide = Model(lambda params, inputs: inputs @ params["w"], {"w": jnp.zeros((400, 90))})
    factors = add_lora(wide, ["w"], 64, 1.0, KEY).params["w"]
    share = np.sort(np.asarray(factors.a).ravel()) * 400**0.5
    law = np.linspace(-1, 1, share.size)
    assert share.shape == (25_600,)
    assert np.abs(share).max() <= 1
    np.testing.assert_allclose(share, law, atol=0.03)
    np.testing.assert_array_equal(factors.b, 0)
