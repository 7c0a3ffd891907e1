"""Six small networks of different kinds on 8 x 8 images, to test statements about all differentiable networks."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, PyTree

from subliminal_theory.keys import named
from subliminal_theory.model import Model, from_nnx
from subliminal_theory.vision.cnn import CNN
from subliminal_theory.vision.mlp import MLP

IMAGE = (8, 8)
EXAMPLES = 16  # images of a trait, and inputs of a step
CLASSES = 4
AUX = 3
OUTPUTS = CLASSES + AUX
WIDTH = 16


class ResidualNet(nnx.Module):
    """Two residual blocks, x + W2 gelu(W1 norm(x)), with layer norms."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Linear(IMAGE[0] * IMAGE[1], WIDTH, rngs=rngs)
        self.norms = nnx.List(nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(3))
        self.up = nnx.List(nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs) for _ in range(2))
        self.down = nnx.List(nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs) for _ in range(2))
        self.head = nnx.Linear(WIDTH, OUTPUTS, rngs=rngs)

    def __call__(self, images: Float[Array, "batch height width"]) -> Float[Array, "batch n"]:
        """Logits of images."""
        x = self.embed(images.reshape(images.shape[0], -1))
        for norm, up, down in zip(self.norms[:2], self.up, self.down, strict=True):
            x = x + down(nnx.gelu(up(norm(x))))
        return self.head(self.norms[2](x))


class Transformer(nnx.Module):
    """One pre-norm attention block and one MLP. The rows of an image are the tokens; the output is mean pooled."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Linear(IMAGE[1], WIDTH, rngs=rngs)
        self.position = nnx.Param(0.1 * jax.random.normal(rngs.params(), (1, IMAGE[0], WIDTH)))
        self.norms = nnx.List(nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2))
        self.queries_keys_values = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.mix = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, OUTPUTS, rngs=rngs)

    def __call__(self, images: Float[Array, "batch height width"]) -> Float[Array, "batch n"]:
        """Logits of images."""
        x = self.embed(images)
        x = x + jnp.broadcast_to(self.position[...], x.shape)
        projected = self.queries_keys_values(self.norms[0](x))
        query, key, value = jnp.split(projected, 3, axis=-1)
        # jax.nn.dot_product_attention would compute its softmax in float32 even for float64 inputs.
        scores = jnp.einsum("bqd,bkd->bqk", query, key) / WIDTH**0.5
        x = x + self.mix(jnp.einsum("bqk,bkd->bqd", jax.nn.softmax(scores), value))
        x = x + self.down(nnx.gelu(self.up(self.norms[1](x))))
        return self.head(jnp.mean(x, axis=1))


def _mlp(depth: int, activation: str) -> Callable[[nnx.Rngs], nnx.Module]:
    sizes = (IMAGE[0] * IMAGE[1], *[WIDTH] * depth, OUTPUTS)
    return lambda rngs: MLP(sizes, activation=activation, rngs=rngs)


BUILDERS: dict[str, Callable[[nnx.Rngs], nnx.Module]] = {
    "linear": _mlp(0, "identity"),
    "MLP, ReLU": _mlp(2, "relu"),
    "MLP, tanh": _mlp(2, "tanh"),
    "CNN, ReLU": lambda rngs: CNN(IMAGE, (4, 4), OUTPUTS, rngs=rngs),
    "residual, layer norm": lambda rngs: ResidualNet(rngs=rngs),
    "transformer": lambda rngs: Transformer(rngs=rngs),
}


def random_trait(model: Model, key: Key[Array, ""]) -> Callable[[PyTree], Float[Array, ""]]:
    """A trait loss as a function of parameters: cross-entropy on random labels of random images, in nats."""
    images = jax.random.normal(named(key, "trait images"), (EXAMPLES, *IMAGE))
    labels = jax.random.randint(named(key, "trait labels"), (EXAMPLES,), 0, CLASSES)

    def loss(params: PyTree) -> Float[Array, ""]:
        logits = model.apply(params, images)[:, :CLASSES]
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(EXAMPLES), labels])

    return loss


def build(name: str, key: Key[Array, ""]) -> Model:
    """A newly initialized network, with float64 parameters if 64-bit numbers are enabled."""
    model = from_nnx(BUILDERS[name](nnx.Rngs(key)))
    return model.with_params(jax.tree.map(lambda leaf: leaf.astype(float), model.params))
