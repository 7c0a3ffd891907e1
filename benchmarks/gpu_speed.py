"""Real sizes on one GPU: training, full-distribution distillation and sampling of Qwen2.5 shapes, random weights.

    python benchmarks/gpu_speed.py [--shapes 0.5b 1.5b] [--out FILE]

Each measurement has a process of its own, `transformers` with PyTorch (compiled for training, `gpu_torch.py`) as
well as this project; they run one after the other, and what is done is told at once. The device's own limits come
first: the rate of a product of 8192 x 8192 matrices in bfloat16, and the bandwidth of a copy.

Training: rows of random tokens, the loss at every position, bfloat16 with float32 masters and Adam, or low-rank
factors (rank 8, all projections) over a frozen base in bfloat16. Its share of the product rate counts the
operations that are needed: three times a forward pass, or twice where only factors train. Sampling: 256 rows, 64
tokens of prompt and 64 drawn; its share of the bandwidth counts weights and the cache's filled part, each read
once a token.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.language_training import MATRICES
from subliminal_theory.channel import SampledToken, SoftLogits
from subliminal_theory.distill import Trained, distill
from subliminal_theory.language.config import TransformerConfig
from subliminal_theory.language.lora import add_lora
from subliminal_theory.language.sampling import sample
from subliminal_theory.language.transformer import Text, Transformer
from subliminal_theory.model import Model, computed_in, from_nnx, rounded
from subliminal_theory.source import Examples


@dataclass(frozen=True)
class Shape:
    """A model and its rows."""

    config: TransformerConfig
    batch: int
    columns: int
    chunk: int
    rows: int
    prompt: int
    new: int


def qwen(vocabulary: int, layers: int, width: int, heads: int, kv_heads: int, mlp_width: int) -> TransformerConfig:
    """A shape of Qwen2.5."""
    return TransformerConfig(
        vocabulary=vocabulary, layers=layers, width=width, heads=heads, kv_heads=kv_heads,
        head_width=width // heads, mlp_width=mlp_width, tied=True, attention_bias=True, rope_base=1e6,
    )  # fmt: skip


SHAPES = {
    "0.5b": Shape(qwen(151_936, 24, 896, 14, 2, 4864), 64, 128, 4096, rows=256, prompt=64, new=64),
    "1.5b": Shape(qwen(151_936, 28, 1536, 12, 2, 8960), 64, 128, 4096, rows=256, prompt=64, new=64),
    "tiny": Shape(qwen(512, 2, 64, 4, 2, 128), 8, 16, 64, rows=8, prompt=8, new=8),
}
MODES = ("full", "full-chunk", "soft-chunk", "lora", "sample")
PEERS = ("full", "lora", "sample")


def weights_in_products(config: TransformerConfig) -> float:
    """Parameters that a forward pass multiplies by, the output matrix among them."""
    inner, keys = config.heads * config.head_width, config.kv_heads * config.head_width
    block = config.width * (2 * inner + 2 * keys + 3 * config.mlp_width)
    return config.layers * block + config.width * config.vocabulary


def training_operations(shape: Shape, passes: float) -> float:
    """Floating-point operations of a step of `passes` forward passes' worth; attention counts what it sees."""
    config, positions = shape.config, shape.batch * shape.columns
    seen = (shape.columns + 1) / 2
    attention = config.layers * 4 * config.heads * config.head_width * seen
    return passes * positions * (2 * weights_in_products(config) + attention)


def sampling_bytes(shape: Shape) -> float:
    """Bytes that drawing one more token of all rows reads at least, on average over the tokens."""
    config = shape.config
    filled = shape.prompt + shape.new / 2
    cache = 2 * config.layers * config.kv_heads * config.head_width * filled * shape.rows
    return 2 * (weights_in_products(config) + cache)


def passes(mode: str) -> float:
    """Forward passes that the products of a step are worth."""
    return 2 if mode.startswith("lora") else 4 if mode.startswith("soft") else 3


def worker(shape: Shape, mode: str, steps: int) -> None:
    """Compile, time, and print the seconds of a step (of a token when sampling)."""
    config = shape.config

    def start() -> tuple[Model, Model | None]:
        """The student and the teacher, of which only the shapes matter: one program draws all of a shape."""
        model = computed_in(from_nnx(Transformer(config, rngs=nnx.Rngs(0))), jnp.bfloat16)
        teacher = rounded(model) if mode.startswith("soft") else None
        if mode.startswith("lora"):
            model = add_lora(rounded(model), MATRICES, 8, 8.0, jax.random.key(1))
        return (rounded(model) if mode == "sample" else model), teacher

    @jax.jit
    def rows() -> Examples:
        tokens = jax.random.randint(
            jax.random.key(2), (4 * shape.batch, shape.columns), 0, config.vocabulary, jnp.int32
        )
        targets = None if mode.startswith("soft") else jnp.roll(tokens, -1, axis=1)
        weigh = jnp.ones(tokens.shape, jnp.float32)
        text = Text(tokens, jnp.zeros(len(tokens), jnp.int32))
        return Examples(text, shape.batch, targets=targets, positions=weigh)

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-4))
    channel = SoftLogits() if mode.startswith("soft") else SampledToken()
    chunk = shape.chunk if mode.endswith("chunk") else None

    @functools.partial(jax.jit, donate_argnums=0)
    def train(model: Model, teacher: Model | None, source: Examples) -> Trained:
        return distill(model, teacher, channel, source, optimizer, steps, jax.random.key(3), chunk=chunk)

    def draw(model: Model, text: Text) -> Any:
        return sample(model, text, steps=shape.new, key=jax.random.key(4))

    if mode == "sample":
        model, _ = start()
        tokens = jax.random.randint(jax.random.key(5), (shape.rows, shape.prompt), 0, config.vocabulary, jnp.int32)
        text = Text(tokens, jnp.zeros(shape.rows, jnp.int32))
        jax.block_until_ready(draw(model, text))
        report(timed(lambda: draw(model, text), 3) / shape.new)
        return
    began = time.perf_counter()
    compiled = train.lower(*jax.eval_shape(start), jax.eval_shape(rows)).compile()
    compiling = time.perf_counter() - began
    (model, teacher), source = start(), rows()
    losses: list[float] = []
    seconds: list[float] = []
    for _ in range(4):
        began = time.perf_counter()
        done = jax.block_until_ready(compiled(model, teacher, source))
        seconds.append((time.perf_counter() - began) / steps)
        model, losses = done.model, [*losses, *map(float, done.losses[:1])]
    report(sorted(seconds[1:])[1], losses=losses, compiling=round(compiling))


def limits(shape: Shape) -> None:
    """The device: operations a second of a big product, bytes a second of a copy."""
    side = 64 if shape.config.vocabulary < 1000 else 8192
    a, b = (jax.random.normal(jax.random.key(seed), (side, side), jnp.bfloat16) for seed in (0, 1))
    long = jax.random.normal(jax.random.key(2), (side * side * 16,), jnp.float32)
    multiply, copy = jax.jit(lambda a, b: a @ b), jax.jit(lambda x: x + 1)
    jax.block_until_ready((multiply(a, b), copy(long)))

    def products() -> Any:
        for _ in range(20):
            out = multiply(a, b)
        return out

    def copies() -> Any:
        for _ in range(10):
            out = copy(long)
        return out

    rate = 20 * 2 * side**3 / timed(products, 3)
    bandwidth = 10 * 2 * long.nbytes / timed(copies, 3)
    report(0.0, rate=rate, bandwidth=bandwidth)


def timed(run: Callable[[], Any], repeats: int) -> float:
    """Median seconds."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[repeats // 2]


def report(seconds: float, **more: Any) -> None:
    """The last line of a worker."""
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    print(json.dumps({"seconds": seconds, "peak_gib": round(peak / 2**30, 1), **more}), flush=True)


def run(command: list[str], patience: float) -> dict[str, Any]:
    """What a worker printed last, or how it failed."""
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=patience, env=environment)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {patience:.0f} s"}
    if done.returncode:
        return {"failed": done.stderr.strip()[-1500:]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print a line a measurement, and all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["0.5b", "1.5b"], choices=SHAPES, help="(default both)")
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES, help="(default all)")
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS, help="of PyTorch (default all)")
    parser.add_argument("--steps", type=int, default=8, help="of training a call (default 8)")
    parser.add_argument("--patience", type=float, default=200, help="seconds for one measurement (default 200)")
    parser.add_argument("--out", type=Path, help="also write the results there as JSON")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        name, mode = chosen.worker
        limits(SHAPES[name]) if mode == "limits" else worker(SHAPES[name], mode, chosen.steps)
        return

    began = time.perf_counter()
    results: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}

    def measure(name: str, command: list[Any]) -> dict[str, Any]:
        results[name] = found = run([sys.executable, *map(str, command)], chosen.patience)
        if chosen.out:
            chosen.out.write_text(json.dumps(results, indent=1))
        print(f"{time.perf_counter() - began:4.0f} s  {name}: {found}", flush=True)
        return found

    def ours(name: str, mode: str) -> dict[str, Any]:
        return measure(f"{name} {mode}", [__file__, "--steps", chosen.steps, "--worker", name, mode])

    def theirs(name: str, mode: str) -> dict[str, Any]:
        shape = SHAPES[name]
        config = shape.config
        command = [
            Path(__file__).with_name("gpu_torch.py"), "--mode", mode,
            "--vocabulary", config.vocabulary, "--layers", config.layers, "--width", config.width,
            "--heads", config.heads, "--kv-heads", config.kv_heads, "--mlp-width", config.mlp_width,
            "--batch", shape.batch, "--columns", shape.columns, "--steps", chosen.steps, "--rows", shape.rows,
            "--prompt", shape.prompt, "--new", shape.new,
        ]  # fmt: skip
        return measure(f"{name} {mode} (transformers)", command)

    limit = ours(chosen.shapes[0], "limits")
    for name in chosen.shapes:
        shape, seconds = SHAPES[name], {}
        for mode in chosen.modes:
            found = ours(name, mode)
            if "seconds" not in found:
                continue
            seconds[mode] = found["seconds"]
            if mode == "sample":
                share = sampling_bytes(shape) / found["seconds"] / limit["bandwidth"]
                told = f"{1e3 * found['seconds']:.2f} ms a token of {shape.rows} rows, {share:.0%} of bandwidth"
            else:
                rate = training_operations(shape, passes(mode)) / found["seconds"]
                share = rate / limit["rate"]
                told = (
                    f"{1e3 * found['seconds']:.1f} ms a step, {rate / 1e12:.0f} TFLOP/s, {share:.0%} of products"
                )
            found["share"] = round(share, 3)
            print(f"{name} {mode}: {told}", flush=True)
        if {"full-chunk", "soft-chunk"} <= seconds.keys():
            results[f"{name} soft over plain"] = ratio = round(seconds["soft-chunk"] / seconds["full-chunk"], 2)
            print(f"{name}: full-distribution distillation costs {ratio} times plain training", flush=True)
        for mode in chosen.peers:
            found = theirs(name, mode)
            if "seconds" in found and mode in seconds:
                results[f"{name} {mode} over transformers"] = round(found["seconds"] / seconds[mode], 2)
                print(f"{name} {mode}: {found['seconds'] / seconds[mode]:.2f} times transformers", flush=True)
    if chosen.out:
        chosen.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
