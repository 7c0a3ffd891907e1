import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import special

from subliminal_theory.errors import InputError
from subliminal_theory.model import from_nnx
from subliminal_theory.vision.cnn import CNN
from subliminal_theory.vision.mlp import ACTIVATIONS, INIT_LAWS, MLP, activation_named, initialisers

RNG = np.random.default_rng(0)
BY_HAND = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "gelu": lambda x: x * special.expit(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)),  # the tanh form
    "sigmoid": special.expit,
    "identity": lambda x: x,
}


def parameters(module: nnx.Module):
    """Its parameters with biases that are not 0, and as float64 arrays layer by layer."""
    params = from_nnx(module).params
    params = jax.tree.map(lambda x: x + np.linspace(-1, 1, x.size, dtype=np.float32) if x.ndim == 1 else x, params)
    layers = [jax.tree.map(lambda x: np.asarray(x, float), params["layers"][i]) for i in sorted(params["layers"])]
    return params, layers


def count(build) -> int:
    """The number of parameters, without drawing them."""
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: from_nnx(build()).params)))


def convolve(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """A 3x3 correlation of stride 2 that halves sizes, padded evenly and more at the end."""
    batch, height, width, _ = x.shape
    rows, columns = -(-height // 2), -(-width // 2)
    above, left = max(2 * rows + 1 - height, 0) // 2, max(2 * columns + 1 - width, 0) // 2
    padded = np.zeros((batch, height + 4, width + 4, x.shape[3]))
    padded[:, above : above + height, left : left + width] = x
    out = np.zeros((batch, rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            patch = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
            out[:, i, j] = np.einsum("bhwc,hwco->bo", patch, kernel)
    return out


# --- what they compute


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("use_bias", [True, False])
def test_mlp_by_hand(activation: str, use_bias: bool) -> None:
    module = MLP((12, 7, 6, 5), activation=activation, use_bias=use_bias, rngs=nnx.Rngs(0))
    params, layers = parameters(module)
    images = RNG.normal(size=(2, 3, 4)).astype(np.float32)
    x = images.reshape(2, 12).astype(float)
    for i, layer in enumerate(layers):
        x = x @ layer["kernel"] + layer.get("bias", 0)
        x = x if i == 2 else BY_HAND[activation](x)
    logits = jax.jit(from_nnx(module).apply)(params, images)
    np.testing.assert_allclose(logits, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 7), (5, 1)])
def test_cnn_by_hand(size: tuple[int, int]) -> None:
    module = CNN(size, (4, 3), 5, activation="tanh", rngs=nnx.Rngs(0))
    params, layers = parameters(module)
    images = RNG.normal(size=(2, *size)).astype(np.float32)
    x = images[..., None].astype(float)
    for layer in layers[:-1]:
        x = np.tanh(convolve(x, layer["kernel"]) + layer["bias"])
    x = x.reshape(2, -1) @ layers[-1]["kernel"] + layers[-1]["bias"]
    logits = jax.jit(from_nnx(module).apply)(params, images)
    np.testing.assert_allclose(logits, x, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_many_cnns_at_once_are_those_alone() -> None:
    """And all start where a convolution of flax starts."""
    build = jax.vmap(lambda key: from_nnx(CNN((5, 6), (2, 3), 4, init_law="torch", rngs=nnx.Rngs(key))))
    models, images = (
        jax.jit(build)(jax.vmap(jax.random.key)(jnp.arange(3))),
        jnp.asarray(RNG.normal(size=(2, 5, 6)), jnp.float32),
    )
    together = jax.jit(jax.vmap(lambda model: model(images)))(models)
    for place in range(3):
        alone = jax.tree.map(lambda leaf, place=place: leaf[place], models)
        np.testing.assert_allclose(together[place], alone(images), rtol=1e-5, atol=1e-6)
        conv = nnx.Conv(1, 2, (3, 3), rngs=nnx.Rngs(place), **initialisers("torch", 9))
        np.testing.assert_allclose(alone.params["layers"][0]["kernel"], conv.kernel[...], rtol=1e-6)


def test_paper_sizes() -> None:
    def mlp():
        return MLP((784, 256, 256, 13), rngs=nnx.Rngs(0))

    def cnn():
        return CNN((28, 28), (16, 32), 13, rngs=nnx.Rngs(0))

    assert count(mlp) == (784 + 1) * 256 + (256 + 1) * 256 + (256 + 1) * 13
    assert count(cnn) == (9 + 1) * 16 + (9 * 16 + 1) * 32 + (7 * 7 * 32 + 1) * 13
    for build in (mlp, cnn):
        assert jax.eval_shape(lambda x, build=build: build()(x), jnp.zeros((2, 28, 28))).shape == (2, 13)


def test_no_bias() -> None:
    assert count(lambda: MLP((784, 8, 3), use_bias=False, rngs=nnx.Rngs(0))) == 784 * 8 + 8 * 3
    assert count(lambda: CNN((4, 4), (2,), 3, use_bias=False, rngs=nnx.Rngs(0))) == 9 * 2 + 4 * 2 * 3


# --- where they start


@pytest.mark.parametrize(
    "build",
    [
        lambda: MLP((784, 64, 128, 50), rngs=nnx.Rngs(0)),
        lambda: CNN((16, 16), (32, 64), 20, rngs=nnx.Rngs(1)),
    ],
    ids=["mlp", "cnn"],
)
def test_initial_scale(build) -> None:
    layers = jax.jit(lambda: from_nnx(build()).params["layers"])()
    checked = 0
    for layer in layers.values():
        kernel = np.asarray(layer["kernel"])
        assert not layer["bias"].any()
        scaled = kernel * np.sqrt(np.prod(kernel.shape[:-1]))
        assert abs(scaled.mean()) < 5 / np.sqrt(kernel.size)
        if kernel.size > 5000:  # 5% is at least five standard errors
            assert abs(scaled.std() - 1) < 0.05
            assert np.abs(scaled).max() > 3  # not truncated at two standard deviations
            checked += 1
    assert checked >= 2


# Standard deviation and largest size of a kernel's entries from the inputs and outputs of a neuron.
LAWS: dict[str, Callable[[int, int], tuple[float, float]]] = {
    "lecun_normal": lambda a, b: (np.sqrt(1 / a), np.inf),
    "he_normal": lambda a, b: (np.sqrt(2 / a), np.inf),
    "glorot_uniform": lambda a, b: (np.sqrt(2 / (a + b)), np.sqrt(6 / (a + b))),
    "torch": lambda a, b: (np.sqrt(1 / (3 * a)), np.sqrt(1 / a)),
}


@functools.cache
def built(network: str, init_law: str):
    """Layers, and the inputs and outputs of a neuron of each: of a 3x3 convolution, 9 a channel."""

    def build() -> nnx.Module:
        rngs = nnx.Rngs(0)
        if network == "mlp":
            return MLP((300, 64, 200, 50), init_law=init_law, rngs=rngs)
        return CNN((8, 12), (32, 64), 20, init_law=init_law, rngs=rngs)

    layers = jax.jit(lambda: from_nnx(build()).params["layers"])()
    fans = {"mlp": [(300, 64), (64, 200), (200, 50)], "cnn": [(9, 9 * 32), (9 * 32, 9 * 64), (6 * 64, 20)]}[
        network
    ]
    return [(jax.tree.map(np.asarray, layers[number]), *fan) for number, fan in enumerate(fans)]


@pytest.mark.slow
@pytest.mark.parametrize("init_law", LAWS)
@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_init_laws(network: str, init_law: str) -> None:
    for layer, inputs, outputs in built(network, init_law):
        kernel, bias = layer["kernel"], layer["bias"]
        deviation, bound = LAWS[init_law](inputs, outputs)
        assert kernel.dtype == bias.dtype == np.float32
        # Five standard errors: the fourth moment is 3 for a normal and 1.8 for a uniform law.
        excess = 0.8 if np.isfinite(bound) else 2
        assert abs(np.mean(kernel.astype(float) ** 2) / deviation**2 - 1) < 5 * np.sqrt(excess / kernel.size)
        assert abs(kernel.mean()) < 5 * deviation / np.sqrt(kernel.size)
        if np.isfinite(bound):
            assert (1 - 20 / kernel.size) * bound < np.abs(kernel).max() <= bound * (1 + 1e-6)
        else:
            fewest = 2.5 if kernel.size < 1000 else 3
            assert np.abs(kernel).max() > fewest * deviation  # not truncated at two standard deviations
        if init_law == "torch":
            assert np.abs(bias).max() <= bound
            assert np.abs(bias).max() > 0.8 * bound
            assert len(np.unique(bias)) == bias.size
            assert abs(np.mean(bias.astype(float) ** 2) / deviation**2 - 1) < 5 * np.sqrt(0.8 / bias.size)
        else:
            assert not bias.any()


@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_uniform_biases_are_drawn_by_themselves(network: str) -> None:
    """Neither a kernel's draw nor another layer's."""
    layers = [layer for layer, _, _ in built(network, "torch")]
    drawn = [layer[name].reshape(-1)[:20] / np.abs(layer[name]).max() for layer in layers for name in layer]
    assert len(drawn) == 6
    for number, one in enumerate(drawn):
        assert all(np.abs(one - other).max() > 0.1 for other in drawn[:number])


@pytest.mark.parametrize("init_law", ["lecun_normal", "torch"])
def test_networks_alike_are_one_function(init_law: str) -> None:
    """Whatever the seed: what is compiled for one serves the other."""
    for build in (
        lambda seed: from_nnx(MLP((4, 3, 2), init_law=init_law, rngs=nnx.Rngs(seed))),
        lambda seed: from_nnx(CNN((4, 4), (2,), 3, init_law=init_law, rngs=nnx.Rngs(seed))),
    ):
        first, second = (jax.eval_shape(functools.partial(build, seed)).apply for seed in (0, 1))
        assert first == second
        assert hash(first) == hash(second)


@pytest.mark.slow
def test_default_law_is_that_of_the_paper() -> None:
    for build in (
        lambda **law: MLP((4, 3, 2), rngs=nnx.Rngs(0), **law),
        lambda **law: CNN((4, 4), (2,), 3, rngs=nnx.Rngs(0), **law),
    ):
        default, named, other = (
            from_nnx(build(**law)).params for law in ({}, {"init_law": "lecun_normal"}, {"init_law": "he_normal"})
        )
        jax.tree.map(np.testing.assert_array_equal, default, named)
        assert (default["layers"][0]["kernel"] != other["layers"][0]["kernel"]).all()
    assert set(INIT_LAWS) == set(LAWS)


def test_seeds_differ() -> None:
    for build in (lambda rngs: MLP((4, 3, 2), rngs=rngs), lambda rngs: CNN((4, 4), (2,), 3, rngs=rngs)):
        first, again, other = (from_nnx(build(nnx.Rngs(seed))).params for seed in (0, 0, 1))
        jax.tree.map(np.testing.assert_array_equal, first, again)
        assert (first["layers"][0]["kernel"] != other["layers"][0]["kernel"]).all()


# --- refusals


@pytest.mark.parametrize("sizes", [(), (4,), (4, 0), (4, -1, 2)])
def test_mlp_bad_sizes(sizes: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"^MLP: sizes must be at least two positive numbers, got \("):
        MLP(sizes, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("channels", "outputs"), [((), 3), ((0,), 3), ((4, -1), 3), ((4,), 0)])
def test_cnn_bad_sizes(channels: tuple[int, ...], outputs: int) -> None:
    with pytest.raises(InputError, match=r"^CNN: channels and outputs must be positive, got \("):
        CNN((4, 4), channels, outputs, rngs=nnx.Rngs(0))


def test_bad_activation() -> None:
    for call in (
        lambda: activation_named("swish"),
        lambda: MLP((4, 2), activation="swish", rngs=nnx.Rngs(0)),
        lambda: CNN((4, 4), (2,), 3, activation="swish", rngs=nnx.Rngs(0)),
    ):
        with pytest.raises(InputError, match=r"^unknown activation 'swish'; there are relu, tanh, gelu, "):
            call()


@pytest.mark.parametrize("law", ["xavier", ""])
def test_bad_init_law(law: str) -> None:
    for call in (
        lambda: initialisers(law, 4),
        lambda: MLP((4, 2), init_law=law, rngs=nnx.Rngs(0)),
        lambda: CNN((4, 4), (2,), 3, init_law=law, rngs=nnx.Rngs(0)),
    ):
        message = f"^unknown initialization {law!r}; there are lecun_normal, he_normal, glorot_uniform, torch$"
        with pytest.raises(InputError, match=message):
            call()
