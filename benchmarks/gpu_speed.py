"""Training, full-distribution distillation and sampling at real sizes on one GPU: Qwen2.5 shapes, random weights.

    python benchmarks/gpu_speed.py [--shapes 0.5b 1.5b] [--out FILE]

Each measurement has its own process, for this project or for `transformers` with PyTorch (`gpu_torch.py`; its
training is compiled). The processes of a shape compile at the same time (`--beside`). They are measured one at a
time, while nothing compiles; a file lock, shared or exclusive, ensures this. Results are printed as soon as they
are there. The limits of the device come first: the rate of a product of 8192 x 8192 matrices in bfloat16, and the
bandwidth of a copy.

Training: rows of random tokens with the loss at every position, in bfloat16 with float32 master weights and Adam;
or low-rank factors (rank 8, all projections) on a frozen base in bfloat16. The share of the product rate counts
only necessary operations: three times a forward pass, or twice if only factors train. Sampling: 256 rows with 64
prompt tokens and 64 sampled tokens, compared as a whole with `generate`. The share of the bandwidth is for the
tokens after the first. It counts the weights and the filled part of the cache, each read once per token.
"""

import argparse
import contextlib
import fcntl
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from subliminal_theory.channel import SampledToken, SoftLogits
from subliminal_theory.distill import Trained, distill
from subliminal_theory.language.model.config import TransformerConfig
from subliminal_theory.language.model.lora import add_lora
from subliminal_theory.language.model.sampling import sample
from subliminal_theory.language.model.transformer import Text, Transformer
from subliminal_theory.model import Model, computed_in, from_nnx, rounded
from subliminal_theory.source import Examples
from subliminal_theory.study.run import MATRICES


@dataclass(frozen=True)
class Shape:
    """A model and its batch sizes."""

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
SIDE = 8192  # side of the matrices whose product measures the limit
MODES = ("full", "soft", "lora", "sample")
PEERS = ("full", "lora", "sample")


def weights_in_products(config: TransformerConfig) -> float:
    """The number of parameters in matrix products of a forward pass, including the output matrix."""
    inner, keys = config.heads * config.head_width, config.kv_heads * config.head_width
    block = config.width * (2 * inner + 2 * keys + 3 * config.mlp_width)
    return config.layers * block + config.width * config.vocabulary


def training_operations(shape: Shape, passes: float) -> float:
    """The operations of a step that costs `passes` forward passes. Attention counts only visible columns."""
    config, positions = shape.config, shape.batch * shape.columns
    seen = (shape.columns + 1) / 2
    attention = config.layers * 4 * config.heads * config.head_width * seen
    return passes * positions * (2 * weights_in_products(config) + attention)


def sampling_bytes(shape: Shape) -> float:
    """The fewest bytes that must be read to sample one more token for all rows, averaged over the tokens."""
    config = shape.config
    filled = shape.prompt + shape.new / 2
    cache = 2 * config.layers * config.kv_heads * config.head_width * filled * shape.rows
    return 2 * (weights_in_products(config) + cache)


def passes(mode: str) -> float:
    """The cost of a step's matrix products, in forward passes."""
    return 2 if mode == "lora" else 4 if mode == "soft" else 3


def worker(shape: Shape, mode: str, steps: int) -> None:
    """Compile, measure, and print the seconds per step (or per token for sampling)."""
    config = shape.config

    def start() -> tuple[Model, Model | None]:
        """The student and the teacher. Only their shapes matter, so one program draws all the parameters."""
        model = computed_in(from_nnx(Transformer(config, rngs=nnx.Rngs(0))), jnp.bfloat16)
        teacher = rounded(model) if mode == "soft" else None
        if mode == "lora":
            model = add_lora(rounded(model), MATRICES, 8, 8.0, jax.random.key(1))
        return (rounded(model) if mode == "sample" else model), teacher

    @jax.jit
    def rows() -> Examples:
        tokens = jax.random.randint(
            jax.random.key(2), (4 * shape.batch, shape.columns), 0, config.vocabulary, jnp.int32
        )
        targets = None if mode == "soft" else jnp.roll(tokens, -1, axis=1)
        weigh = jnp.ones(tokens.shape, jnp.float32)
        text = Text(tokens, jnp.zeros(len(tokens), jnp.int32))
        return Examples(text, shape.batch, targets=targets, positions=weigh)

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-4))
    channel = SoftLogits() if mode == "soft" else SampledToken()

    @functools.partial(jax.jit, donate_argnums=0)
    def train(model: Model, teacher: Model | None, source: Examples) -> Trained:
        return distill(model, teacher, channel, source, optimizer, steps, key=jax.random.key(3), chunk=shape.chunk)

    def draw(count: int) -> Any:
        return sample(model, text, steps=count, key=jax.random.key(4))

    if mode == "sample":
        with device(fcntl.LOCK_SH):
            model, _ = start()
            tokens = jax.random.randint(
                jax.random.key(5), (shape.rows, shape.prompt), 0, config.vocabulary, jnp.int32
            )
            text = Text(tokens, jnp.zeros(shape.rows, jnp.int32))
            jax.block_until_ready([draw(count) for count in (1, shape.new)])
        with device(fcntl.LOCK_EX):
            first, whole = (timed(functools.partial(draw, count), 5) for count in (1, shape.new))
        report(whole / shape.new, after_first=(whole - first) / (shape.new - 1), first=first)
        return
    with device(fcntl.LOCK_SH):
        began = time.perf_counter()
        compiled = train.lower(*jax.eval_shape(start), jax.eval_shape(rows)).compile()
        compiling = time.perf_counter() - began
        (model, teacher), source = jax.block_until_ready((start(), rows()))
    losses: list[float] = []
    seconds: list[float] = []
    with device(fcntl.LOCK_EX):
        for _ in range(4):
            began = time.perf_counter()
            done = jax.block_until_ready(compiled(model, teacher, source))
            seconds.append((time.perf_counter() - began) / steps)
            model, losses = done.model, [*losses, *map(float, done.losses[:1])]
    report(sorted(seconds[1:])[1], losses=losses, compiling=round(compiling))


@contextlib.contextmanager
def device(kind: int) -> Iterator[None]:
    """Use the device together with other processes that compile (LOCK_SH), or alone (LOCK_EX)."""
    with open(os.environ["GPU_TURN"], "w") as lock:
        fcntl.flock(lock, kind)
        yield


def square_rate(side: int) -> float:
    """The operations per second of a product of square matrices in bfloat16."""
    a, b = (jax.random.normal(jax.random.key(seed), (side, side), jnp.bfloat16) for seed in (0, 1))
    multiply = jax.jit(lambda a, b: a @ b)
    jax.block_until_ready(multiply(a, b))

    def products() -> Any:
        for _ in range(20):
            out = multiply(a, b)
        return out

    return 20 * 2 * side**3 / timed(products, 3)


def limits(shape: Shape) -> None:
    """The limits of the device: operations per second of a large product, and bytes per second of a copy."""
    side = 64 if shape.config.vocabulary < 1000 else SIDE
    long = jax.random.normal(jax.random.key(2), (side * side * 16,), jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    jax.block_until_ready(copy(long))

    def copies() -> Any:
        for _ in range(10):
            out = copy(long)
        return out

    bandwidth = 10 * 2 * long.nbytes / timed(copies, 3)
    report(0.0, rate=square_rate(side), bandwidth=bandwidth)


def timed(run: Callable[[], Any], repeats: int) -> float:
    """The median seconds of a call."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - began)
    return sorted(seconds)[repeats // 2]


def report(seconds: float, **more: Any) -> None:
    """Print the last line of a worker."""
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    print(json.dumps({"seconds": seconds, "peak_gib": round(peak / 2**30, 1), **more}), flush=True)


def run(command: list[str], patience: float) -> dict[str, Any]:
    """Run a worker. Returns what it printed last, or how it failed."""
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=patience, env=environment)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {patience:.0f} s"}
    if done.returncode:
        return {"failed": done.stderr.strip()[-1500:]}
    return json.loads(done.stdout.splitlines()[-1])


def told(shape: Shape, mode: str, found: dict[str, Any], limit: dict[str, Any]) -> str:
    """A description of a measurement. This also adds the share of the limit to `found`."""
    seconds = found["seconds"]
    if mode == "sample":
        found["share"] = round(sampling_bytes(shape) / found["after_first"] / limit["bandwidth"], 3)
        return (
            f"{1e3 * seconds:.2f} ms a token of {shape.rows} rows, the first {1e3 * found['first']:.1f}, "
            f"others {1e3 * found['after_first']:.2f}, {found['share']:.0%} of bandwidth"
        )
    rate = training_operations(shape, passes(mode)) / seconds
    found["share"] = round(rate / limit["rate"], 3)
    return f"{1e3 * seconds:.1f} ms a step, {rate / 1e12:.0f} TFLOP/s, {found['share']:.0%} of products"


def main() -> None:
    """Print one line for each measurement, and all results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["0.5b", "1.5b"], choices=SHAPES, help="(default both)")
    parser.add_argument("--modes", nargs="*", default=MODES, choices=MODES, help="(default all)")
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS, help="modes of PyTorch (default all)")
    parser.add_argument("--steps", type=int, default=8, help="training steps per call (default 8)")
    parser.add_argument("--beside", type=int, default=7, help="processes that compile at once (default 7)")
    parser.add_argument(
        "--patience",
        type=float,
        default=300,
        help="most seconds for one measurement, including its wait for others (default 300)",
    )
    parser.add_argument("--out", type=Path, help="also write the results there as JSON")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        name, mode = chosen.worker
        limits(SHAPES[name]) if mode == "limits" else worker(SHAPES[name], mode, chosen.steps)
        return
    with tempfile.NamedTemporaryFile() as lock:
        os.environ["GPU_TURN"] = lock.name
        measure_all(chosen)


def measure_all(chosen: argparse.Namespace) -> None:
    """Every requested measurement."""
    began = time.perf_counter()
    results: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}

    telling = threading.Lock()

    def tell(key: str, found: Any, line: str) -> None:
        with telling:
            results[key] = found
            print(f"{time.perf_counter() - began:4.0f} s  {line}", flush=True)
            if chosen.out:
                chosen.out.write_text(json.dumps(results, indent=1))

    def ours(name: str, mode: str) -> list[Any]:
        return [__file__, "--steps", chosen.steps, "--worker", name, mode]

    def theirs(name: str, mode: str) -> list[Any]:
        shape = SHAPES[name]
        config = shape.config
        return [
            Path(__file__).with_name("gpu_torch.py"), "--mode", mode,
            "--vocabulary", config.vocabulary, "--layers", config.layers, "--width", config.width,
            "--heads", config.heads, "--kv-heads", config.kv_heads, "--mlp-width", config.mlp_width,
            "--batch", shape.batch, "--columns", shape.columns, "--steps", chosen.steps, "--rows", shape.rows,
            "--prompt", shape.prompt, "--new", shape.new,
        ]  # fmt: skip

    def measured(name: str, mode: str, command: list[Any], own: bool) -> None:
        found = run([sys.executable, *map(str, command)], chosen.patience)
        key = f"{name} {mode}" + ("" if own else " (transformers)")
        if "failed" in found or mode == "limits":
            line = ""
        else:
            line = told(SHAPES[name], mode, found, limit) if own else f"{1e3 * found['seconds']:.2f} ms"
        tell(key, found, f"{key}: {line} {found}")

    first = chosen.shapes[0]
    measured(first, "limits", ours(first, "limits"), True)
    limit = results[f"{first} limits"]
    for name in chosen.shapes:
        # PyTorch first: it compiles for longer.
        jobs = [(name, mode, theirs(name, mode), False) for mode in chosen.peers]
        jobs += [(name, mode, ours(name, mode), True) for mode in chosen.modes]
        with ThreadPoolExecutor(chosen.beside) as pool:
            list(pool.map(lambda job: measured(*job), jobs))

    def ratio(label: str, over: str, under: str) -> None:
        pair = [results.get(key, {}).get("seconds") for key in (over, under)]
        if None not in pair:
            found = round(pair[0] / pair[1], 2)
            tell(label, found, f"{label}: {found}")

    for name in chosen.shapes:
        ratio(f"{name} cost of full distributions over plain", f"{name} soft", f"{name} full")
        for mode in PEERS:
            ratio(f"{name} {mode}: times transformers", f"{name} {mode} (transformers)", f"{name} {mode}")


if __name__ == "__main__":
    main()
