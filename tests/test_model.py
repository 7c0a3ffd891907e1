import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import subliminal_theory as st
from subliminal_theory.channel import SquaredError
from subliminal_theory.distill import distill
from subliminal_theory.errors import InputError
from subliminal_theory.model import (
    Model,
    by_layer,
    computed_in,
    from_nnx,
    match_paths,
    names_in,
    rounded,
    together,
)
from subliminal_theory.source import Examples
from subliminal_theory.vision.cnn import CNN
from subliminal_theory.vision.mlp import MLP

IMAGES = np.random.default_rng(0).normal(size=(3, 4, 4)).astype(np.float32)


def mlp(seed: int, **options) -> MLP:
    return MLP((16, 6, 3), rngs=nnx.Rngs(seed), **options)


def names(params) -> list[str]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


@pytest.mark.slow
@pytest.mark.parametrize("module", [mlp(0), CNN((4, 4), (2, 3), 5, rngs=nnx.Rngs(0))], ids=["mlp", "cnn"])
def test_from_nnx_is_the_module(module: nnx.Module) -> None:
    model = from_nnx(module)
    np.testing.assert_array_equal(model(IMAGES), module(jnp.asarray(IMAGES)))
    doubled = model.with_params(jax.tree.map(lambda leaf: 2 * leaf, model.params))
    assert (doubled(IMAGES) != model(IMAGES)).any()
    np.testing.assert_array_equal(model(IMAGES), module(jnp.asarray(IMAGES)))
    assert model.frozen is None


def test_from_nnx_paths() -> None:
    assert names(from_nnx(mlp(0)).params) == [f"layers/{i}/{name}" for i in (0, 1) for name in ("bias", "kernel")]


def test_equal_structure_compiles_once() -> None:
    first, second = from_nnx(mlp(0)), from_nnx(mlp(1))
    assert first.apply == second.apply
    assert hash(first.apply) == hash(second.apply)
    assert (first.params["layers"][0]["kernel"] != second.params["layers"][0]["kernel"]).any()
    run = jax.jit(lambda model, x: model(x))
    for model in (first, second):
        np.testing.assert_allclose(run(model, IMAGES), model(IMAGES), rtol=2e-5, atol=1e-6)
    assert run._cache_size() == 1


@pytest.mark.parametrize("options", [{"activation": "tanh"}, {"use_bias": False}])
def test_other_structure_differs(options) -> None:
    assert from_nnx(mlp(0)).apply != from_nnx(mlp(0, **options)).apply


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        (["layers/0/*"], {"layers/0/bias", "layers/0/kernel"}),
        (["*/bias"], {"layers/0/bias", "layers/1/bias"}),
        (["layers/1/kernel", "*0/bias"], {"layers/1/kernel", "layers/0/bias"}),
        (["*"], {f"layers/{i}/{name}" for i in (0, 1) for name in ("bias", "kernel")}),
    ],
)
def test_freeze(patterns: list[str], frozen: set[str]) -> None:
    whole = from_nnx(mlp(0))
    model = whole.freeze(*patterns)
    assert set(names(model.frozen)) == frozen
    assert set(names(model.params)) == set(names(whole.params)) - frozen
    jax.tree.map(np.testing.assert_array_equal, model.all_params, whole.params)
    np.testing.assert_array_equal(model(IMAGES), whole(IMAGES))
    gradient = jax.grad(lambda params: jnp.sum(model.with_params(params)(IMAGES)))(model.params)
    assert names(gradient) == names(model.params)


def test_freeze_adds_up() -> None:
    model = from_nnx(mlp(0)).freeze("layers/0/*").freeze("layers/1/bias")
    assert names(model.params) == ["layers/1/kernel"]
    assert model.all_params.keys() == {"layers"}


def test_freeze_unmatched() -> None:
    model = from_nnx(mlp(0))
    expected = r"^pattern 'layers/2/\*' matches no parameter; there are layers/0/bias, layers/0/kernel, layers/1/"
    with pytest.raises(InputError, match=expected):
        model.freeze("layers/0/*", "layers/2/*")
    with pytest.raises(InputError, match=expected):
        match_paths(model.params, ["layers/2/*"])


# --- parameters of all layers

STACK = {
    "layers": {"*": {"kernel": np.arange(12.0).reshape(3, 2, 2), "bias": np.arange(6.0).reshape(3, 2)}},
    "scale": np.ones(2),
}
STACKED = Model(lambda params, inputs: inputs, STACK)


def test_names_are_those_of_single_layers() -> None:
    expected = [*(f"layers/{i}/bias" for i in range(3)), *(f"layers/{i}/kernel" for i in range(3)), "scale"]
    assert names_in(STACK) == expected
    for name, leaf in by_layer(STACK).items():
        *_, number, kind = ["", *name.split("/")]
        same = STACK["scale"] if kind == "scale" else STACK["layers"]["*"][kind][int(number)]
        np.testing.assert_array_equal(leaf, same)
    runs = jax.tree.map(lambda leaf: np.stack([leaf, leaf + 1]), STACK)
    found = by_layer(runs, axis=1)
    assert list(found) == expected
    np.testing.assert_array_equal(found["layers/2/kernel"], runs["layers"]["*"]["kernel"][:, 2])


def test_some_layers_are_frozen() -> None:
    model = STACKED.freeze("layers/[02]/kernel", "*/bias", "scale")
    assert names(model.params) == ["layers/*/kernel/1"]
    assert names(model.frozen) == ["layers/*/bias", "layers/*/kernel/0", "layers/*/kernel/2", "scale"]
    assert names_in(model.params) == ["layers/1/kernel"]
    assert by_layer(model.all_params).keys() == by_layer(STACK).keys()
    jax.tree.map(np.testing.assert_array_equal, together(model.all_params), STACK)
    assert names(model.freeze("layers/1/*").params) == []
    jax.tree.map(np.testing.assert_array_equal, together(model.freeze("*").all_params), STACK)


@pytest.mark.parametrize("patterns", [["layers/*"], ["layers/[0-2]/*"], ["layers/?/kernel", "*bias"]])
def test_all_layers_are_one_parameter(patterns: list[str]) -> None:
    model = STACKED.freeze(*patterns)
    assert (names(model.params), names(model.frozen)) == (["scale"], ["layers/*/bias", "layers/*/kernel"])


def test_layers_that_do_not_exist() -> None:
    with pytest.raises(
        InputError, match=r"^pattern 'layers/3/\*' matches no parameter; there are layers/0/bias, "
    ):
        STACKED.freeze("layers/3/*")


def test_layers_that_are_nowhere_are_zero() -> None:
    params = {"layers": {"*": {"a": (None, jnp.ones(2), None)}}, "own": (jnp.ones(1), None)}
    found = together(params)
    np.testing.assert_array_equal(found["layers"]["*"]["a"], [[0, 0], [1, 1], [0, 0]])
    assert found["own"] is params["own"]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nnx.BatchNorm(4, rngs=nnx.Rngs(0)), "BatchNorm holds state besides its parameters: mean, var"),
        (nnx.Dropout(0.5, rngs=nnx.Rngs(0)), "Dropout holds state besides its parameters: rngs/count, rngs/key"),
        (
            nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0))),
            "Sequential holds state besides its parameters: layers/1/mean, layers/1/var",
        ),
    ],
    ids=["batch norm", "dropout", "within"],
)
def test_state_is_refused(module: nnx.Module, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        from_nnx(module)


KERNEL = np.arange(6.0, dtype=np.float32).reshape(2, 3)
BIAS = np.ones(3, np.float32)


@pytest.mark.parametrize(
    ("apply", "params"),
    [
        (lambda p, x: x @ p, KERNEL),
        (lambda p, x: x @ p[0] + p[1][None], [KERNEL, BIAS]),
        (lambda p, x: x @ p[0] + p[1][None], (KERNEL, BIAS)),
        (lambda p, x: x @ p["a"][0], {"a": [KERNEL]}),
    ],
    ids=["array", "list", "tuple", "nested"],
)
def test_any_pytree(apply, params) -> None:
    model = Model(apply, params)
    x = jnp.array([[1.0, -1.0]])
    expected = np.array([[-3.0, -3.0, -3.0]]) + (1 if len(jax.tree.leaves(params)) == 2 else 0)
    for call in (lambda m, x: m(x), jax.jit(lambda m, x: m(x))):
        np.testing.assert_array_equal(call(model, x), expected)
        np.testing.assert_array_equal(call(model.freeze("*0*" if "0" in names(params)[0] else "*"), x), expected)
    stacked = jax.vmap(lambda m: m(x))(jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), model))
    np.testing.assert_array_equal(stacked, [expected, 2 * expected])


def test_public_names() -> None:
    """Modules are attributes of the package, and every public name is there."""
    assert st.theorem.check is st.check
    assert st.audit.audit.__module__ == "subliminal_theory.audit"
    assert st.inits.initialise
    assert st.alignment.follow
    assert all(hasattr(st, name) for name in st.__all__)
    assert isinstance(st.TopK(2, st.ReverseKL()), st.Channel)
    assert isinstance(st.Perturbed(0.1), st.Policy)
    assert isinstance(st.Examples(np.zeros((2, 3)), 2), st.Source)


# --- in another dtype


@pytest.mark.slow
def test_computed_in_keeps_parameters_and_gradients() -> None:
    model = from_nnx(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    half = computed_in(model, jnp.bfloat16)
    x = jnp.ones((2, 4), jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, half.params, model.params)
    assert half(x).dtype == jnp.bfloat16
    gradient = jax.grad(lambda params: jnp.sum(half.with_params(params)(x).astype(jnp.float32)))(half.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {np.dtype("float32")}
    low = rounded(half)
    assert {leaf.dtype for leaf in jax.tree.leaves(low.params)} == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(low(x), half(x))
    jax.tree.map(np.testing.assert_array_equal, rounded(model).params, model.params)


@pytest.mark.slow
def test_a_step_below_the_format_is_not_lost() -> None:
    """A parameter near 1 has steps of 2^-8 in bfloat16; a hundred of 2^-14 move it by 2^-7 and a little."""
    model = from_nnx(nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0)))
    half = computed_in(model.with_params({"kernel": jnp.ones((1, 1))}), jnp.bfloat16)
    source = Examples(jnp.ones((1, 1), jnp.bfloat16), 1, targets=jnp.full((1, 1), 100.0, jnp.bfloat16))
    optimizer = optax.chain(optax.scale_by_sign(), optax.scale(-(2.0**-14)))
    run = distill(half, None, SquaredError(), source, optimizer, 100, key=jax.random.key(0))
    assert float(run.model.params["kernel"][0, 0]) == 1 + 100 * 2.0**-14


def test_computed_in_refuses_what_it_cannot_round() -> None:
    with pytest.raises(InputError, match=r"^computed_in needs a model of from_nnx; add low-rank factors afterw"):
        computed_in(Model(lambda params, x: x @ params, KERNEL), jnp.bfloat16)
