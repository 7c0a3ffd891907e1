"""Tokens per second of the language model, compared with `transformers` on PyTorch and with the machine's limit.

    python -m benchmarks.language_speed --torch-python PATH_OF_A_PYTHON_WITH_TORCH_AND_TRANSFORMERS [--shape 25m]

There are two shapes: the compact model with a student's rows, and a Llama with 26 million parameters. Rounds
alternate between the matrix products of a training step, this project, and `language_torch.py`, so that load on a
shared machine affects all three. Ratios are medians over rounds. Training takes steps on sampled tokens; both
sides compute logits only for the columns of the loss. Prefill computes the logits of the last column of the
prompts. Sampling draws whole batches at temperature 1, without a stop token. Compilation is not counted.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.flags.language import LanguageConfig
from subliminal_theory.channel import SampledToken
from subliminal_theory.distill import Trained, distill
from subliminal_theory.language.corpus.word_tokenizer import WordTokenizer
from subliminal_theory.language.model.attention import empty_cache
from subliminal_theory.language.model.config import TransformerConfig
from subliminal_theory.language.model.sampling import sample
from subliminal_theory.language.model.transformer import Text, Transformer, extend
from subliminal_theory.model import Model, from_nnx
from subliminal_theory.source import Examples


@dataclass(frozen=True)
class Shape:
    """A model, the rows that train it, and the prompts that it continues."""

    config: TransformerConfig
    batch: int
    columns: int
    answer: int
    rows: int
    prompt: int
    new: int
    steps: int


def shapes() -> dict[str, Shape]:
    """The shapes by name."""
    settings = LanguageConfig()
    base = settings.base(0)
    compact = base.transformer(len(WordTokenizer.of_corpus(base.corpus)))
    llama = TransformerConfig(
        vocabulary=32_000, layers=8, width=384, heads=6, kv_heads=6, head_width=64, mlp_width=1024, tied=True
    )
    return {
        "compact": Shape(compact, settings.batch_size, 26, 11, rows=2048, prompt=15, new=11, steps=60),
        "25m": Shape(llama, 8, 128, 128, rows=32, prompt=64, new=64, steps=3),
    }


def products(shape: Shape) -> list[tuple[int, int, int]]:
    """The matrix products (rows, inner, columns) of a forward pass, except those of attention, which are small.

    In the last layer, only keys and values are computed at all positions, as in `Transformer`.
    """
    config = shape.config
    inner = config.heads * config.head_width
    shared = [(config.width, config.kv_heads * config.head_width)] * 2
    alone = [(config.width, inner), (inner, config.width)]
    alone += [(config.width, config.mlp_width)] * 2 + [(config.mlp_width, config.width)]
    everywhere = [*(shared + alone) * (config.layers - 1), *shared]
    answers = [*alone, (config.width, config.vocabulary)]
    found = [(shape.batch * shape.columns, a, b) for a, b in everywhere]
    return found + [(shape.batch * shape.answer, a, b) for a, b in answers]


def operations(shape: Shape) -> float:
    """The floating-point operations of a training step: matrix products and attention, with their gradients."""
    config = shape.config
    weights = sum(2 * n * a * b for n, a, b in products(shape))
    queries = (config.layers - 1) * shape.columns + shape.answer
    attention = 2 * 2 * shape.batch * queries * shape.columns * config.heads * config.head_width
    return 3 * (weights + attention)


def product_rate(shape: Shape, repeats: int) -> float:
    """The operations per second of exactly these products and their two gradients, one after another."""
    sizes = products(shape)
    distinct = sorted(set(sizes))
    sides = {(n, a, b): (jnp.ones((n, a)), jnp.ones((a, b)), jnp.ones((n, b))) for n, a, b in distinct}

    @jax.jit
    def once(x: jax.Array, w: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return x @ w, g @ w.T, x.T @ g

    jax.block_until_ready([once(*sides[size]) for size in distinct])
    start = time.perf_counter()
    for _ in range(repeats):
        for size in sizes:
            jax.block_until_ready(once(*sides[size]))
    return repeats * sum(6 * n * a * b for n, a, b in sizes) / (time.perf_counter() - start)


def main() -> None:
    """Print one line for each round, and the medians as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with PyTorch (default: this)")
    parser.add_argument("--rounds", type=int, default=5, help="alternations (default 5)")
    parser.add_argument("--shape", default="compact", choices=shapes(), help="(default compact)")
    chosen = parser.parse_args()

    shape = shapes()[chosen.shape]
    config, repeats = shape.config, max(1, shape.steps // 3)
    model = from_nnx(Transformer(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(6, config.vocabulary, (16 * shape.batch, shape.columns)), jnp.int32)
    padding, weigh = jnp.zeros(len(tokens), jnp.int32), jnp.ones((len(tokens), shape.answer), jnp.float32)
    text = Text(tokens, padding, shape.answer)
    source = Examples(text, shape.batch, targets=tokens[:, -shape.answer :], positions=weigh)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))

    @jax.jit
    def train(model: Model, source: Examples) -> Trained:
        return distill(model, None, SampledToken(), source, optimizer, shape.steps, key=jax.random.key(0))

    wide = jnp.asarray(rng.integers(6, config.vocabulary, (shape.rows, shape.prompt)), jnp.int32)
    prompts = Text(wide, jnp.zeros(shape.rows, jnp.int32))

    @jax.jit
    def prefill(model: Model, text: Text) -> jax.Array:
        cache = empty_cache(config, shape.rows, shape.prompt, jnp.float32)
        return extend(model, replace(text, last=1), cache)[0]

    def seconds(run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - start

    def mine() -> dict[str, float]:
        """The tokens per second of each task."""
        drawn = seconds(lambda: sample(model, prompts, steps=shape.new, key=jax.random.key(1)))
        return {
            "training": shape.steps * shape.batch * shape.columns / seconds(lambda: train(model, source)),
            "prefill": shape.rows * shape.prompt / seconds(lambda: prefill(model, prompts)),
            "sampling": shape.rows * shape.new / drawn,
        }

    mine()
    work, shares = operations(shape), []
    ratios: dict[str, list[float]] = {"training": [], "prefill": [], "sampling": []}
    for number in range(chosen.rounds):
        limit = product_rate(shape, repeats)
        ours = mine()
        limit = (limit + product_rate(shape, repeats)) / 2
        command = [
            chosen.torch_python, str(Path(__file__).with_name("language_torch.py")),
            "--vocabulary", config.vocabulary, "--layers", config.layers, "--width", config.width,
            "--heads", config.heads, "--mlp-width", config.mlp_width, "--batch", shape.batch,
            "--columns", shape.columns, "--answer", shape.answer, "--steps", shape.steps, "--rows", shape.rows,
            "--prompt", shape.prompt, "--new", shape.new,
        ]  # fmt: skip
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
        theirs = json.loads(done.stdout.splitlines()[-1])
        rate = work * ours["training"] / (shape.batch * shape.columns)
        shares.append(rate / limit)
        for name in ratios:
            ratios[name].append(ours[name] / theirs[name])
        told = ", ".join(f"{name} {ours[name]:,.0f} and {theirs[name]:,.0f} tokens/s" for name in ratios)
        print(f"round {number}: products {limit / 1e9:.0f} GFLOP/s, ours {rate / 1e9:.0f}; {told}", flush=True)
    medians = {name: round(float(np.median(values)), 2) for name, values in ratios.items()}
    share = round(float(np.median(shares)), 3)
    device = jax.devices()[0].device_kind
    print(json.dumps({"device": device, "operations_per_step": work, "share_of_products": share, **medians}))


if __name__ == "__main__":
    main()
