"""Real sizes on one GPU: training, full-distribution distillation and sampling of Qwen2.5 shapes, random weights.

    python benchmarks/gpu_speed.py [--shapes 0.5b 1.5b] [--out FILE]

Each measurement has a process of its own, `transformers` with PyTorch (compiled for training, `gpu_torch.py`) as
well as this project. All compile first; then they are timed one after the other on an idle device, each beside
the device's own limits: the rate of a product of 8192 x 8192 matrices in bfloat16, and the bandwidth of a copy.

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
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from subliminal_theory.channel import SampledToken, SoftLogits
from subliminal_theory.distill import Trained, distill
from subliminal_theory.language.config import TransformerConfig
from subliminal_theory.language.lora import add_lora
from subliminal_theory.language.sampling import sample
from subliminal_theory.language.transformer import Text, Transformer
from subliminal_theory.model import Model, computed_in, from_nnx, rounded
from subliminal_theory.source import Examples

PROJECTIONS = ("layers/*/attention/*/kernel", "layers/*/mlp/*/kernel")


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
    """Compile, say so, wait for a line, time, and print the seconds of a step (of a token when sampling)."""
    config = shape.config

    def start() -> tuple[Model, Model | None]:
        """The student and the teacher, of which only the shapes matter: one program draws all of a shape."""
        model = computed_in(from_nnx(Transformer(config, rngs=nnx.Rngs(0))), jnp.bfloat16)
        teacher = rounded(model) if mode.startswith("soft") else None
        if mode.startswith("lora"):
            model = add_lora(rounded(model), PROJECTIONS, 8, 8.0, jax.random.key(1))
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
        wait()
        report(timed(lambda: draw(model, text), 3) / shape.new)
        return
    began = time.perf_counter()
    compiled = train.lower(*jax.eval_shape(start), jax.eval_shape(rows)).compile()
    wait(f"in {time.perf_counter() - began:.0f} s")
    (model, teacher), source = start(), rows()
    losses: list[float] = []
    seconds: list[float] = []
    for _ in range(4):
        began = time.perf_counter()
        done = jax.block_until_ready(compiled(model, teacher, source))
        seconds.append((time.perf_counter() - began) / steps)
        model, losses = done.model, [*losses, *map(float, done.losses[:1])]
    report(sorted(seconds[1:])[1], losses=losses)


def limits(shape: Shape) -> None:
    """The device: operations a second of a big product, bytes a second of a copy."""
    side = 64 if shape.config.vocabulary < 1000 else 8192
    a, b = (jax.random.normal(jax.random.key(seed), (side, side), jnp.bfloat16) for seed in (0, 1))
    long = jax.random.normal(jax.random.key(2), (side * side * 16,), jnp.float32)
    multiply, copy = jax.jit(lambda a, b: a @ b), jax.jit(lambda x: x + 1)
    jax.block_until_ready((multiply(a, b), copy(long)))
    wait()

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


def wait(note: str = "") -> None:
    """Tell that all is compiled, and block until the turn comes."""
    print(f"ready {note}", flush=True)
    sys.stdin.readline()


def report(seconds: float, **more: Any) -> None:
    """The last line of a worker."""
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    print(json.dumps({"seconds": seconds, "peak_gib": round(peak / 2**30, 1), **more}), flush=True)


class Turn:
    """A worker's process."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name, self.command, self.noted, self.errors = name, command, "", ""
        self.lines: list[str] = []
        self.ready = threading.Event()

    def start(self) -> None:
        """Begin to compile."""
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip
        self.threads = [threading.Thread(target=self._out), threading.Thread(target=self._err)]
        for thread in self.threads:
            thread.start()

    def _out(self) -> None:
        for line in self.process.stdout or ():
            self.lines.append(line)
            if line.startswith("ready"):
                self.noted = line.strip()
                self.ready.set()
        self.ready.set()

    def _err(self) -> None:
        self.errors = (self.process.stderr or sys.stdin).read()

    def finish(self, limit: float) -> dict[str, Any]:
        """Let it run, and return what it printed; what failed, it says."""
        try:
            if self.process.stdin:
                self.process.stdin.write("go\n")
                self.process.stdin.close()
            self.process.wait(limit)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
        for thread in self.threads:
            thread.join()
        found = self.lines[-1] if self.lines else ""
        if found.startswith("{"):
            return json.loads(found)
        return {"failed": self.errors.strip()[-1500:] or f"stopped after {limit:.0f} s"}


def main() -> None:
    """Print a line a measurement, and all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["0.5b", "1.5b"], choices=SHAPES, help="(default both)")
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES, help="(default all)")
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS, help="of PyTorch (default all)")
    parser.add_argument("--steps", type=int, default=8, help="of training a call (default 8)")
    parser.add_argument(
        "--patience", type=float, default=200, help="seconds for a worker to compile (default 200)"
    )
    parser.add_argument("--out", type=Path, help="also write the results there as JSON")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        name, mode = chosen.worker
        limits(SHAPES[name]) if mode == "limits" else worker(SHAPES[name], mode, chosen.steps)
        return

    began = time.perf_counter()
    results: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}

    def mine(name: str, mode: str) -> Turn:
        command = [sys.executable, __file__, "--steps", str(chosen.steps), "--worker", name, mode]
        return Turn(f"{name} {mode}", command)

    def theirs(name: str, mode: str) -> Turn:
        shape = SHAPES[name]
        config = shape.config
        command = [
            sys.executable, str(Path(__file__).with_name("gpu_torch.py")), "--mode", mode,
            "--vocabulary", config.vocabulary, "--layers", config.layers, "--width", config.width,
            "--heads", config.heads, "--kv-heads", config.kv_heads, "--mlp-width", config.mlp_width,
            "--batch", shape.batch, "--columns", shape.columns, "--steps", chosen.steps, "--rows", shape.rows,
            "--prompt", shape.prompt, "--new", shape.new,
        ]  # fmt: skip
        return Turn(f"{name} {mode} (transformers)", [*map(str, command)])

    def settle(queues: list[list[Turn]]) -> None:
        """Let all get ready: those of a queue one after the other, so that what is tuned once serves the next."""

        def prepare(queue: list[Turn]) -> None:
            for turn in queue:
                turn.start()
                turn.ready.wait(chosen.patience)

        threads = [threading.Thread(target=prepare, args=(queue,)) for queue in queues]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def time_all(turns: list[Turn]) -> None:
        for turn in turns:
            results[turn.name] = found = turn.finish(60 if turn.ready.is_set() else 1)
            if chosen.out:
                chosen.out.write_text(json.dumps(results, indent=1))
            print(f"{time.perf_counter() - began:4.0f} s  {turn.name}: {found} {turn.noted}", flush=True)

    ours = {name: [mine(name, mode) for mode in chosen.modes] for name in chosen.shapes}
    peers = {name: [theirs(name, mode) for mode in chosen.peers] for name in chosen.shapes}
    edge = mine(chosen.shapes[0], "limits")
    settle([[edge], *ours.values(), *([turn] for turns in peers.values() for turn in turns)])
    time_all([edge])
    for name in chosen.shapes:
        time_all([*peers[name], *ours[name]])

    limit = results[edge.name]
    for name in chosen.shapes:
        shape = SHAPES[name]
        for mode in chosen.modes:
            found = results[f"{name} {mode}"]
            if "seconds" not in found:
                continue
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
            peer = results.get(f"{name} {mode.removesuffix('-chunk')} (transformers)", {})
            if "seconds" in peer:
                found["times_transformers"] = round(peer["seconds"] / found["seconds"], 2)
                told += f", {found['times_transformers']} times transformers"
            print(f"{name} {mode}: {told}")
        plain, soft = (results.get(f"{name} {mode}", {}).get("seconds") for mode in ("full-chunk", "soft-chunk"))
        if plain and soft:
            results[f"{name} soft over plain"] = round(soft / plain, 2)
            print(f"{name}: full-distribution distillation costs {soft / plain:.2f} times plain training")
    if chosen.out:
        chosen.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
