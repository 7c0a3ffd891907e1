"""Training, prefill, sampling and scoring with SmolLM2-135M-Instruct, compared with `transformers`.

    python -m benchmarks.checkpoint_speed [--rounds 5]

Both sides have the same weights. They run in this process, with the same number of threads, in float32 on a CPU
and in bfloat16 on a GPU. The first call compiles. Rounds then alternate between this project and PyTorch
(`checkpoint_torch.py`: training is compiled on a GPU, everything else is eager). Ratios are PyTorch's seconds
divided by this project's, as medians and ranges over rounds. Results are compared too: the first training loss,
the logits of prefill, and the scored shares. `difference` is the largest difference between two numbers.

Training: 8 rows of 64 random tokens, with the loss at every position. All parameters train, or low-rank factors of
all matrices of the blocks, with and without gradient checkpointing. Logits are computed in chunks, as in the
experiments. The share of the product rate counts only necessary operations: three times a forward pass, or twice
if only factors train. The rate is measured in the same rounds. On a CPU it is the rate of the step's own matrix
products, on a GPU the rate of large square products.

Prefill: the logits of the last of 256 columns and the cache, for 8 rows. Sampling: 32 tokens for each of 64 rows
after 64 tokens, at temperature 1. Scoring: the exact probability of every animal, in all its spellings, as the
answer to 10 questions. PyTorch makes one pass over all questions for each spelling.

Nothing else may run on the machine, because PyTorch's threads wait for each other after every operation.
"""

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.gpu_speed import SIDE, square_rate
from benchmarks.language_speed import Shape, operations, product_rate
from experiments.flags.names import checkpoint_path
from subliminal_theory.channel import SampledToken
from subliminal_theory.compilation import keep_compiled
from subliminal_theory.distill import distill
from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus.traits import Preference
from subliminal_theory.language.corpus.wording import english
from subliminal_theory.language.hub.checkpoint import CheckpointBase, open_base, skeleton
from subliminal_theory.language.measure import Questions, answers
from subliminal_theory.language.model.attention import empty_cache
from subliminal_theory.language.model.lora import add_lora
from subliminal_theory.language.model.sampling import sample
from subliminal_theory.language.model.transformer import Text, extend
from subliminal_theory.model import Model, computed_in, rounded
from subliminal_theory.source import Examples
from subliminal_theory.study.asking import questions
from subliminal_theory.study.checkpoint import CHUNK, MANY
from subliminal_theory.study.run import MATRICES

BATCH, COLUMNS, RANK = 8, 64, 8
PREFILL_COLUMNS = 256
ROWS, PROMPT, NEW = 64, 64, 32
QUESTIONS = 10


@dataclass(frozen=True)
class Pair:
    """The same work for this project and for PyTorch. If PyTorch returns a result, the two results are compared.

    `work` is the number of necessary floating-point operations, or 0 if no share of the product rate is reported.
    """

    ours: Callable[[], Any]
    theirs: Callable[[], np.ndarray | None]
    work: float = 0.0


@dataclass(frozen=True)
class Bench:
    """The weights on both sides. Its methods make the pairs; only one is in memory at a time."""

    base: CheckpointBase
    peer: Any
    steps: int

    @property
    def shape(self) -> Shape:
        """The model and its batch sizes."""
        config = self.base.checkpoint.family.config
        return Shape(config, BATCH, COLUMNS, COLUMNS, ROWS, PROMPT, NEW, self.steps)

    def model(self, remat: bool = False) -> Model:
        """The model, computed in the dtype of the device."""
        model = skeleton(self.base.checkpoint.family, remat).with_params(self.base.model.params)
        return computed_in(model, jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32)

    def tokens(self, rows: int, columns: int) -> np.ndarray:
        """Random tokens."""
        return np.random.default_rng(0).integers(0, self.shape.config.vocabulary, (rows, columns), np.int32)

    def training(self, rank: int, remat: bool) -> Pair:
        """Training steps of all parameters, or of factors if `rank` is positive. The first loss is compared."""
        model, tokens = self.model(remat), self.tokens(BATCH, COLUMNS + 1)
        if rank:
            model = add_lora(rounded(model), MATRICES, rank, rank, jax.random.key(0))
        targets, weigh = jnp.asarray(tokens[:, 1:]), jnp.ones((BATCH, COLUMNS))
        source = Examples(text_of(tokens[:, :-1]), BATCH, targets=targets, positions=weigh)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-5))
        chunk = CHUNK if self.shape.config.vocabulary > MANY else None

        @jax.jit
        def train(model: Model, source: Examples) -> tuple[jax.Array, Model]:
            done = distill(
                model, None, SampledToken(), source, optimizer, self.steps, key=jax.random.key(1), chunk=chunk
            )
            return done.losses[:1], done.model

        work = self.steps * operations(self.shape) * (2 / 3 if rank else 1)
        return Pair(lambda: train(model, source)[0], self.peer.training(tokens, self.steps, rank, remat), work)

    def prefill(self) -> Pair:
        """Compute the logits of the last column, and the cache."""
        model, tokens = rounded(self.model()), self.tokens(BATCH, PREFILL_COLUMNS)
        text = replace(text_of(tokens), last=1)

        @jax.jit
        def read(model: Model, text: Text) -> Any:
            dtype = model.params["embedding"].dtype
            return extend(model, text, empty_cache(self.shape.config, BATCH, PREFILL_COLUMNS, dtype))

        return Pair(lambda: read(model, text)[0], self.peer.prefill(tokens))

    def sampling(self) -> Pair:
        """Sample full rows of tokens, without a stop token."""
        model, tokens = rounded(self.model()), self.tokens(ROWS, PROMPT)
        text = text_of(tokens)
        return Pair(
            lambda: sample(model, text, steps=NEW, key=jax.random.key(2))[0], self.peer.sampling(tokens, NEW)
        )

    def scoring(self) -> Pair:
        """Each animal's share, averaged over questions."""
        wording = english()
        wording = replace(wording, questions=wording.questions[:QUESTIONS])
        asked = questions(self.base.tokenizer, [Preference("owl", "animal", "owl", wording=wording)])
        model = self.model()
        read = jax.jit(lambda model, asked: answers(model, asked).rivals[0])
        return Pair(lambda: read(model, asked), self.peer.scoring(*prompts_and_words(asked)))


def text_of(tokens: np.ndarray) -> Text:
    """Rows without padding."""
    return Text(jnp.asarray(tokens), jnp.zeros(len(tokens), jnp.int32))


def prompts_and_words(asked: Questions) -> tuple[np.ndarray, np.ndarray, list[list[list[int]]]]:
    """The tokens and padding of the prompts, and the tokens of each word's spellings, equal for all prompts."""
    table = np.asarray(asked.words.tokens)[0]
    words = [[[int(token) for token in spelling if token >= 0] for spelling in word] for word in table]
    filled = [[spelling for spelling in word if spelling] for word in words]
    return np.asarray(asked.text.tokens), np.asarray(asked.text.padding), filled


def seconds(run: Callable[[], Any]) -> float:
    """The seconds of one call."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def limit(shape: Shape) -> float:
    """The product rate of the device, in operations per second."""
    return square_rate(SIDE) if jax.default_backend() == "gpu" else product_rate(shape, 1)


def measured(name: str, pair: Pair, shape: Shape, rounds: int) -> dict[str, Any]:
    """Compile, then alternate. Prints one line for each round."""
    ours, theirs = np.asarray(pair.ours(), np.float32), pair.theirs()
    both, shares = [], []
    for number in range(rounds):
        before = limit(shape) if pair.work else 0.0
        mine, other = seconds(pair.ours), seconds(pair.theirs)
        both.append((mine, other))
        line = f"{name}, round {number}: {mine:.3f} and {other:.3f} s, ratio {other / mine:.2f}"
        if pair.work:
            rate = (before + limit(shape)) / 2
            shares.append(pair.work / mine / rate)
            line += f"; products {rate / 1e9:,.0f} GFLOP/s, ours {pair.work / mine / 1e9:,.0f}"
        print(line, flush=True)
    times = np.array(both)
    ratios = times[:, 1] / times[:, 0]
    found: dict[str, Any] = {
        "seconds": middle(times[:, 0]),
        "peer_seconds": middle(times[:, 1]),
        "ratio": middle(ratios),
        "range": [round(float(end), 3) for end in (ratios.min(), ratios.max())],
    }
    if shares:
        found["share_of_products"] = middle(shares)
    if theirs is not None:
        found["difference"] = float(np.abs(ours - theirs).max())
    return found


def middle(values: Sequence[float] | np.ndarray) -> float:
    """The median, to three decimals."""
    return round(float(np.median(values)), 3)


def processor() -> str:
    """The model of the CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


def main() -> None:
    """Print one line for each round, and all results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", default="smollm2", help="folder or GGUF file that both sides read (default smollm2)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="alternations (default 5)")
    parser.add_argument("--steps", type=int, default=2, help="training steps per call (default 2)")
    chosen = parser.parse_args()
    try:
        measure_all(checkpoint_path(chosen.checkpoint), chosen.rounds, chosen.steps)
    except InputError as error:
        parser.exit(2, f"error: {error}\n")


def measure_all(path: Path, rounds: int, steps: int) -> None:
    """Every measurement of a checkpoint.

    Raises:
        InputError: PyTorch, transformers or peft is not installed, or PyTorch does not support the device; or as
            for `open_base`.
    """
    try:
        from benchmarks.checkpoint_torch import Peer
    except ImportError as error:
        command = "pip install -c constraints.txt -e '.[parity]'"
        raise InputError(f"{error.name} is not installed, to compare with: {command}") from error
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory of the GPU too
    keep_compiled()
    threads = len(os.sched_getaffinity(0))
    peer = Peer(path, "cuda" if jax.default_backend() == "gpu" else "cpu", threads)
    bench = Bench(open_base(path, remat=False), peer, steps)
    pairs: dict[str, Callable[[], Pair]] = {
        "training": lambda: bench.training(0, remat=False),
        "training, gradient checkpointing": lambda: bench.training(0, remat=True),
        f"rank {RANK}": lambda: bench.training(RANK, remat=False),
        f"rank {RANK}, gradient checkpointing": lambda: bench.training(RANK, remat=True),
        "prefill": bench.prefill,
        "sampling": bench.sampling,
        "scoring": bench.scoring,
    }
    found: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        "threads": threads,
        **{name: version(name) for name in ("jax", "torch", "transformers", "peft")},
        "rounds": rounds,
        "training_steps": steps,
    }
    for name, make in pairs.items():
        found[name] = measured(name, make(), bench.shape, rounds)
    found["peak_gib"] = round(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30, 1)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
