"""Tokens per second of the compact language model against `transformers` on PyTorch, and the machine's limit.

    python benchmarks/language_speed.py --torch-python PATH_OF_A_PYTHON_WITH_TORCH_AND_TRANSFORMERS

Rounds alternate between the matrix products of a training step, this project and `language_torch.py`, so that a
shared machine's moods hit all three; ratios are medians over rounds. Training is a student's step on sampled
tokens at the default size, on both sides with logits of the answer's columns alone; sampling draws whole batches
at temperature 1, without a stop. Compilation is not counted.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.language_sweep import LanguageConfig
from subliminal_theory.channel import SampledToken
from subliminal_theory.distill import Trained, distill
from subliminal_theory.language.config import TransformerConfig
from subliminal_theory.language.sampling import sample
from subliminal_theory.language.tokenizer import ChatTokenizer
from subliminal_theory.language.transformer import Text, Transformer
from subliminal_theory.model import Model, from_nnx
from subliminal_theory.source import Examples

PROMPT, NEW = 15, 11
COLUMNS = PROMPT + NEW  # of a student's rows; the loss is on the NEW last ones


def products(config: TransformerConfig, batch: int) -> list[tuple[int, int, int]]:
    """The matrix products (rows, inner, columns) of a forward pass, but those of attention, which are small.

    Only keys and values of the last layer are computed at all positions, as in `Transformer`.
    """
    inner = config.heads * config.head_width
    shared = [(config.width, inner)] * 2
    alone = [(config.width, inner), (inner, config.width)]
    alone += [(config.width, config.mlp_width)] * 2 + [(config.mlp_width, config.width)]
    everywhere = [*(shared + alone) * (config.layers - 1), *shared]
    answers = [*alone, (config.width, config.vocabulary)]
    return [(batch * COLUMNS, a, b) for a, b in everywhere] + [(batch * NEW, a, b) for a, b in answers]


def operations(config: TransformerConfig, batch: int) -> float:
    """Floating-point operations of a training step: matrix products with their gradients, and attention's."""
    weights = sum(2 * n * a * b for n, a, b in products(config, batch))
    queries = (config.layers - 1) * COLUMNS + NEW
    attention = 2 * 2 * batch * queries * COLUMNS * config.heads * config.head_width
    return 3 * (weights + attention)


def product_rate(config: TransformerConfig, batch: int) -> float:
    """Operations a second of exactly these products and their two gradients, one after the other."""
    shapes = products(config, batch)
    sides = [(jnp.ones((n, a)), jnp.ones((a, b)), jnp.ones((n, b))) for n, a, b in shapes]

    @jax.jit
    def all_products(sides: list[tuple[jax.Array, jax.Array, jax.Array]]) -> list[jax.Array]:
        return [p for x, w, g in sides for p in (x @ w, g @ w.T, x.T @ g)]

    jax.block_until_ready(all_products(sides))
    start = time.perf_counter()
    for _ in range(20):
        done = all_products(sides)
    jax.block_until_ready(done)
    return 20 * sum(6 * n * a * b for n, a, b in shapes) / (time.perf_counter() - start)


def main() -> None:
    """Print one line a round and the medians as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with PyTorch (default: this)")
    parser.add_argument("--rounds", type=int, default=5, help="alternations (default 5)")
    parser.add_argument("--steps", type=int, default=60, help="training steps a round (default 60)")
    parser.add_argument("--rows", type=int, default=2048, help="rows sampled at once (default 2048)")
    chosen = parser.parse_args()

    settings = LanguageConfig()
    base = settings.base(0)
    config = base.transformer(len(ChatTokenizer.of_corpus(base.corpus)))
    model = from_nnx(Transformer(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(6, config.vocabulary, (16 * settings.batch_size, COLUMNS)), jnp.int32)
    padding = jnp.zeros(len(tokens), jnp.int32)
    source = Examples(
        Text(tokens, padding, NEW),
        settings.batch_size,
        targets=tokens[:, -NEW:],
        positions=jnp.ones((len(tokens), NEW), jnp.float32),
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))

    @jax.jit
    def train(model: Model, source: Examples) -> Trained:
        return distill(model, None, SampledToken(), source, optimizer, chosen.steps, jax.random.key(0))

    prompts = Text(tokens[: chosen.rows, :PROMPT], padding[: chosen.rows])

    def seconds(run: object) -> float:
        start = time.perf_counter()
        jax.block_until_ready(run())  # type: ignore[operator]
        return time.perf_counter() - start

    def training() -> float:
        return seconds(lambda: train(model, source))

    def sampling() -> float:
        return seconds(lambda: sample(model, prompts, steps=NEW, key=jax.random.key(1)))

    training(), sampling()
    step = settings.batch_size * COLUMNS
    work = operations(config, settings.batch_size)
    shares, trained, sampled = [], [], []
    for number in range(chosen.rounds):
        limit = product_rate(config, settings.batch_size)
        mine, drawn = training() / chosen.steps, sampling()
        limit = (limit + product_rate(config, settings.batch_size)) / 2
        command = [
            chosen.torch_python, str(Path(__file__).with_name("language_torch.py")),
            "--vocabulary", config.vocabulary, "--layers", config.layers, "--width", config.width,
            "--heads", config.heads, "--mlp-width", config.mlp_width, "--batch", settings.batch_size,
            "--columns", COLUMNS, "--steps", chosen.steps, "--rows", chosen.rows, "--prompt", PROMPT, "--new", NEW,
        ]  # fmt: skip
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
        theirs = json.loads(done.stdout.splitlines()[-1])
        shares.append(work / mine / limit)
        trained.append(step / mine / theirs["training"])
        sampled.append(chosen.rows * NEW / drawn / theirs["sampling"])
        print(
            f"round {number}: products {limit / 1e9:.0f} GFLOP/s; training {step / mine:,.0f} tokens/s "
            f"({work / mine / 1e9:.0f} GFLOP/s), PyTorch {theirs['training']:,.0f}; sampling "
            f"{chosen.rows * NEW / drawn:,.0f} tokens/s, PyTorch {theirs['sampling']:,.0f}",
            flush=True,
        )
    medians = {
        "device": jax.devices()[0].device_kind,
        "operations_per_step": work,
        "share_of_products": round(float(np.median(shares)), 3),
        "training_ratio": round(float(np.median(trained)), 2),
        "sampling_ratio": round(float(np.median(sampled)), 2),
    }
    print(json.dumps(medians))


if __name__ == "__main__":
    main()
