"""Time and memory ratios of loading a 1 GiB checkpoint, and of checking the theorem on 110 million parameters.

    python benchmarks/checkpoint_scale.py [--rounds 3]

Loading is compared with reading the same file. Both read from the page cache and alternate. Each load has its own
process. Its peak memory includes the mapped pages of the file; the anonymous part is reported separately.
`theorem.check` is compared with one gradient of the imitation loss at the same parameters and rows, each in its
own process.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from subliminal_theory import theorem
from subliminal_theory.channel import SoftLogits, imitation_loss, weighted_mean
from subliminal_theory.language.hub.checkpoint import load_checkpoint, skeleton
from subliminal_theory.language.hub.families import entries, read_family
from subliminal_theory.language.hub.tensors import write_tensors
from subliminal_theory.language.model.config import TransformerConfig
from subliminal_theory.language.model.transformer import Text, Transformer
from subliminal_theory.model import from_nnx, shapes_of

GIB = 2**30
SHAPE = TransformerConfig(
    vocabulary=32_000, layers=12, width=768, heads=12, kv_heads=12, head_width=64, mlp_width=2048, tied=True
)


def write(folder: Path) -> None:
    """Write a Llama of about a gigabyte in float32, with random weights."""
    settings = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 32_000, "hidden_size": 1024,
        "intermediate_size": 2816, "num_hidden_layers": 18, "num_attention_heads": 16, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    family = read_family(folder)
    shell = skeleton(family).params
    shapes = shapes_of(shell)
    rng = np.random.default_rng(0)
    wanted = {entry.theirs: entry.shape([shapes[name] for name in entry.ours]) for entry in entries(family)}
    write_tensors(folder, {name: rng.random(shape, np.float32) for name, shape in wanted.items()})


def anonymous() -> int:
    """The bytes of this process's memory that do not belong to a file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    return 0


def load(folder: Path) -> dict[str, float]:
    """Load once. Returns the time and the peak memory."""
    highest, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            highest[0] = max(highest[0], anonymous())

    jnp.zeros(1).block_until_ready()
    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    jax.block_until_ready(load_checkpoint(folder).model)
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "anonymous": highest[0], "peak": peak}


def read(folder: Path) -> float:
    """The seconds to read the file into memory."""
    start = time.perf_counter()
    data = (folder / "model.safetensors").read_bytes()
    assert data
    return time.perf_counter() - start


def measure(kind: str) -> dict[str, float]:
    """The seconds and peak memory of a gradient, or of the whole check, on two rows of 32 tokens."""
    model = from_nnx(Transformer(SHAPE, rngs=nnx.Rngs(0)))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, SHAPE.vocabulary, (2, 32)), jnp.int32)
    text, weights = Text(tokens, jnp.zeros(2, jnp.int32)), jnp.ones((2, 32))
    channel, labels = SoftLogits(), jnp.roll(tokens, -1, axis=1)

    def trait(params: Any) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(model.apply(params, text), labels)
        return weighted_mean(losses, weights)

    def imitation(params: Any, targets: jax.Array) -> jax.Array:
        return imitation_loss(channel, model.apply(params, text), targets, weights)

    run: Callable[[], Any]
    if kind == "gradient":
        targets = jax.jit(lambda params: channel.targets(None, model.apply(params, text)))(model.params)
        gradient = jax.jit(jax.grad(imitation))
        run = lambda: gradient(model.params, targets)  # noqa: E731
    else:
        check = jax.jit(
            lambda params: theorem.check(
                model.apply, params, trait, text, channel, teacher_step=1e-4, student_step=1e-4
            )
        )
        run = lambda: check(model.params)  # noqa: E731
    found = jax.block_until_ready(run())
    start = time.perf_counter()
    found = jax.block_until_ready(run())
    result = {
        "seconds": time.perf_counter() - start,
        "peak": float(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss),
        "parameters": float(sum(leaf.size for leaf in jax.tree.leaves(model.params))),
    }
    if kind == "check":
        result["measured_over_predicted"] = float(found.inner_product / found.predicted_inner_product)
    return result


def child(*arguments: object) -> dict[str, float]:
    """Run this file in its own process, and return the JSON that it prints."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the ratios as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="alternations (default 3)")
    parser.add_argument("--only", choices=("load", "gradient", "check"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.only:
        print(json.dumps(load(chosen.folder) if chosen.only == "load" else measure(chosen.only)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        size = (folder / "model.safetensors").stat().st_size
        read(folder)
        pairs = [(read(folder), child("--only", "load", "--folder", folder)) for _ in range(chosen.rounds)]
    rounds = [(child("--only", "gradient"), child("--only", "check")) for _ in range(chosen.rounds)]
    print(
        json.dumps(
            {
                "checkpoint_gib": round(size / GIB, 3),
                "load_over_read": round(float(np.median([loaded["seconds"] / took for took, loaded in pairs])), 2),
                "load_anonymous_gib": round(max(loaded["anonymous"] for _, loaded in pairs) / GIB, 2),
                "load_peak_gib": round(max(loaded["peak"] for _, loaded in pairs) / GIB, 2),
                "theorem_parameters": int(rounds[0][0]["parameters"]),
                "check_over_gradient": round(
                    float(np.median([whole["seconds"] / one["seconds"] for one, whole in rounds])), 2
                ),
                "check_peak_over_gradient": round(
                    float(np.median([whole["peak"] / one["peak"] for one, whole in rounds])), 2
                ),
                "check_measured_over_predicted": round(rounds[0][1]["measured_over_predicted"], 4),
            }
        )
    )


if __name__ == "__main__":
    main()
