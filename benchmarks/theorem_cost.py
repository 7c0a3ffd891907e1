"""What the statements of the theorem cost on a published model of 135 million parameters, without its Jacobian.

    python -m benchmarks.theorem_cost [--checkpoint smollm2] [--rows 2]

All parameters of the model train, in float32. The teacher's direction D_T is minus the gradient of a preference
for an animal, over lessons of the project; the student reads rows of random numbers and sees the whole
distribution of each token of their answers. The network's function counts what is computed as it runs: forward
passes, Jacobian-vector products and their transposes. A gradient is a pass and a transpose, a product with the
Gauss-Newton matrix a Jacobian-vector product and a transpose. Every piece has a process of its own, whose peak
memory is told; its seconds are those after compilation, and those of its threads. The error of `sharpness` is
measured on the small networks of `theorem`, whose Gauss-Newton matrices are built.
"""

import argparse
import functools
import json
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.custom_derivatives import linear_call
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from experiments.architectures import BUILDERS, EXAMPLES, IMAGE, build
from experiments.flags.names import checkpoint_path
from subliminal_theory.channel import SoftLogits, weighted_mean
from subliminal_theory.compilation import keep_compiled
from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus.base import text_of, token_loss
from subliminal_theory.language.corpus.numbers import random_rows
from subliminal_theory.language.corpus.traits import Preference
from subliminal_theory.language.corpus.wording import english
from subliminal_theory.language.hub.checkpoint import CheckpointBase, open_base
from subliminal_theory.language.model.transformer import Text
from subliminal_theory.language.text import Chat, Encoded
from subliminal_theory.model import Apply
from subliminal_theory.study.reading import model_of_run
from subliminal_theory.study.speaker import columns
from subliminal_theory.study.teachers import prompted_teachers
from subliminal_theory.theorem import (
    Alignment,
    Shift,
    check,
    prompt_alignment,
    prompt_shift,
    sharpness,
    step_tokens,
)
from subliminal_theory.theorem.contraction import gauss_newton

ANIMALS = ("owl", "wolf", "cat", "fox")
LESSONS = 8  # of the wording's 24
STEP = 1e-5  # of the teacher and of the student, in units of the raw gradients
PRODUCTS = 30
SHIFT_STEPS = 8  # of conjugate gradients
SEEDS = 20  # of each small network
KINDS = ("passes", "products", "transposes")


@dataclass(frozen=True)
class Counted:
    """A network's function that counts what is computed of it."""

    apply: Apply
    counts: Counter[str] = field(default_factory=Counter, hash=False, compare=False)

    def __call__(self, params: PyTree, inputs: PyTree) -> Array:
        """The logits."""
        return self._mark(self.apply(params, inputs))

    def _mark(self, logits: Array) -> Array:
        @jax.custom_jvp
        def mark(z: Array) -> Array:
            return self._count("passes", z)

        @mark.defjvp
        def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
            there, back = (functools.partial(self._linear, kind) for kind in KINDS[1:])
            return mark(*primals), linear_call(there, back, (), *tangents)

        return mark(logits)

    def _linear(self, kind: str, _: tuple[()], z: Array) -> Array:
        return self._count(kind, z)

    def _count(self, kind: str, z: Array) -> Array:
        """The same numbers. The count depends on one of them, so that it is taken whenever they are computed."""

        def add(number: Any) -> np.ndarray:
            self.counts[kind] += 1
            return np.zeros_like(number)

        one = z.reshape(-1)[0]
        return z + jax.pure_callback(add, jax.ShapeDtypeStruct((), z.dtype), one)

    def measured(self, function: Callable[..., PyTree], *arguments: PyTree) -> tuple[PyTree, dict[str, float]]:
        """The result of a function, and what it cost after its compilation."""
        run = jax.jit(function).lower(*arguments).compile()
        self.counts.clear()
        start, own = time.perf_counter(), time.process_time()
        found = jax.block_until_ready(run(*arguments))
        seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - own}
        costs = {name: round(value, 1) for name, value in seconds.items()}
        return found, costs | {kind: self.counts[kind] for kind in KINDS}


@dataclass(frozen=True)
class Rows:
    """Rows of tokens, of which a model computes the logits of the answers alone."""

    text: Text
    targets: Array
    weights: Array

    @classmethod
    def of(cls, base: CheckpointBase, chats: Sequence[Chat]) -> "Rows":
        """The rows of some chats."""
        encoded: Encoded = base.tokenizer.encode_chats(chats, columns(base.tokenizer, chats))
        last = int(encoded.weights.shape[1] - encoded.weights.any(0).argmax())
        shown = [jnp.asarray(values[:, -last:]) for values in (encoded.targets, encoded.weights)]
        return cls(text_of(encoded, last), *shown)


@dataclass(frozen=True)
class Bench:
    """The model and its rows. Each method is one piece: it measures and returns what to print."""

    base: CheckpointBase
    rows: int

    @property
    def params(self) -> PyTree:
        """The model's parameters."""
        return self.base.model.params

    @functools.cached_property
    def network(self) -> Counted:
        """The model's function."""
        return Counted(self.base.model.apply)

    def trait(self, animal: str) -> Preference:
        """The preference for an animal."""
        return Preference(animal, "animal", animal, wording=english())

    def lessons(self, animal: str) -> Callable[[PyTree], Array]:
        """The trait loss: of lessons that are answered with the animal."""
        return self.cross_entropy(Rows.of(self.base, self.trait(animal).teacher_rows()[:LESSONS]))

    def cross_entropy(self, rows: Rows) -> Callable[[PyTree], Array]:
        """The mean loss of the answers of some rows, in nats per token."""
        return lambda params: weighted_mean(
            token_loss(self.network(params, rows.text), rows.targets), rows.weights
        )

    def numbers(self, batches: int = 1) -> list[Rows]:
        """Batches of rows of numbers."""
        drawn = random_rows(batches * self.rows, np.random.default_rng(0))
        chats = [Chat(None, row.prompt, row.completion, "numbers") for row in drawn]
        return [Rows.of(self.base, chats[first::batches]) for first in range(batches)]

    def direction(self, animal: str) -> PyTree:
        """D_T, minus the gradient of the trait loss."""
        return jax.jit(lambda params: optax.tree.scale(-1, jax.grad(self.lessons(animal))(params)))(self.params)

    def gradient(self) -> dict[str, Any]:
        """One gradient of the cross-entropy of rows of numbers, to compare with."""
        (read,) = self.numbers()
        loss = self.cross_entropy(read)
        _, costs = self.network.measured(lambda params: optax.tree.norm(jax.grad(loss)(params)), self.params)
        return {**costs, "positions": read.weights.size}

    def check(self) -> dict[str, Any]:
        """Lemma 1 and Theorem 1."""
        (read,), network, trait = self.numbers(), self.network, self.lessons(ANIMALS[0])
        found, costs = network.measured(
            lambda params: check(
                network, params, trait, read.text, SoftLogits(), teacher_step=STEP, student_step=STEP,
                weights=read.weights,
            ),
            self.params,
        )  # fmt: skip
        ratio = float(found.inner_product / found.predicted_inner_product)
        return {**costs, "verdict": found.verdict, "measured_over_predicted": round(ratio, 4)}

    def tokens_needed(self) -> dict[str, Any]:
        """n*, of two batches."""
        direction, network, needed = self.direction(ANIMALS[0]), self.network, []
        for read in self.numbers(batches=2):
            found, costs = network.measured(
                lambda params, direction, rows: step_tokens(
                    network, params, direction, rows.text, teacher_step=STEP, weights=rows.weights
                ),
                self.params,
                direction,
                read,
            )
            needed.append(float(f"{float(found.needed()):.3g}"))
        ratio = float(found.measured.kl / found.predicted_kl)
        return {**costs, "tokens_needed": needed, "kl_over_predicted": round(ratio, 4)}

    def sharpness(self) -> dict[str, Any]:
        """The largest eigenvalue of the Gauss-Newton matrix."""
        (read,), network = self.numbers(), self.network
        found, costs = network.measured(
            lambda params: sharpness(
                network, params, read.text, SoftLogits(), weights=read.weights, products=PRODUCTS
            ),
            self.params,
        )
        value = float(found.value)
        return {
            **costs,
            "value": round(value, 4),
            "residual_over_value": float(f"{float(found.residual) / value:.2g}"),
            "bound_over_value": round(float(found.above) / value, 4),
        }

    def prompts(self) -> dict[str, Any]:
        """Where students of prompted teachers go, for each animal; the best shift on its rows and on others."""
        (read, other), network, params = self.numbers(batches=2), self.network, self.params
        model, channel = replace(self.base.model, apply=network), SoftLogits()

        def align(params: PyTree, direction: PyTree, rows: Rows, seen: Array) -> Alignment:
            return prompt_alignment(network, params, direction, rows.text, seen, channel, weights=rows.weights)

        def best(params: PyTree, rows: Rows, seen: Array) -> Shift:
            return prompt_shift(network, params, rows.text, seen, channel, steps=SHIFT_STEPS, weights=rows.weights)

        behind = jax.jit(lambda prompt, text: prompt(text))
        told: dict[str, Any] = {}
        for animal in ANIMALS:
            prompt = model_of_run(prompted_teachers(model, self.base.tokenizer, [self.trait(animal)]), 0)
            seen, elsewhere = (behind(prompt, rows.text) for rows in (read, other))
            found, aligned = network.measured(align, params, self.direction(animal), read, seen)
            shift, shifted = network.measured(best, params, read, seen)
            beyond, _ = network.measured(align, params, shift.direction, other, elsewhere)
            told[animal] = {
                "cosine": round(float(found.cosine), 4),
                "shift": round(float(shift.cosine), 4),
                "shift_residual": round(float(shift.residual), 3),
                "shift_on_other_rows": round(float(beyond.cosine), 4),
                "alignment": aligned,
                "shift_costs": shifted,
            }
        return told


jax.tree_util.register_dataclass(Rows, ["text", "targets", "weights"], [])


def known() -> dict[str, Any]:
    """The error of `sharpness` where the matrix is small enough to be built, in float64: relative, the largest."""
    jax.config.update("jax_enable_x64", True)
    told = {}
    for name in BUILDERS:
        errors, bounds, residuals = [], [], []
        for seed in range(SEEDS):
            key = jax.random.key(seed)
            model = build(name, key)
            inputs = jax.random.uniform(key, (EXAMPLES, *IMAGE), minval=-1.0)
            found = sharpness(model.apply, model.params, inputs, SoftLogits(), key=key, products=PRODUCTS)
            true = largest(model.apply, model.params, inputs)
            errors.append(1 - float(found.value) / true)
            bounds.append(float(found.above) / true - 1)
            residuals.append(float(found.residual) / true)
        told[name] = {
            what: float(f"{max(values):.2g}")
            for what, values in (("error", errors), ("bound", bounds), ("residual", residuals))
        } | {"parameters": sum(leaf.size for leaf in jax.tree.leaves(model.params))}
    return told


def largest(apply: Apply, params: PyTree, inputs: Array) -> float:
    """The largest eigenvalue of G, from all its columns."""
    flat, unravel = ravel_pytree(params)
    product = gauss_newton(apply, params, inputs, SoftLogits())
    columns = jax.lax.map(lambda v: ravel_pytree(product(unravel(v)))[0], jnp.eye(flat.size))
    return float(np.linalg.eigvalsh(np.asarray(columns))[-1])


def main() -> None:
    """Print one line of JSON for every piece."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="smollm2", help="folder or GGUF file (default smollm2)")
    parser.add_argument("--rows", type=int, default=2, help="rows of numbers (default 2)")
    pieces = ("gradient", "check", "tokens_needed", "sharpness", "prompts", "known")
    parser.add_argument("--only", choices=pieces, help="one piece, in this process")
    chosen = parser.parse_args()
    if chosen.only is None:
        for piece in pieces:
            command = [sys.executable, "-m", "benchmarks.theorem_cost", "--checkpoint", chosen.checkpoint]
            done = subprocess.run([*command, "--rows", str(chosen.rows), "--only", piece], check=False)
            if done.returncode:
                raise SystemExit(done.returncode)
        return
    keep_compiled()
    try:
        told = measure(chosen.only, chosen.checkpoint, chosen.rows)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"piece": chosen.only, **told, "peak_gib": round(peak, 2)}), flush=True)


def measure(piece: str, checkpoint: str, rows: int) -> dict[str, Any]:
    """What to print of one piece.

    Raises:
        InputError: there is no such checkpoint, or there are no rows.
    """
    if rows < 1:
        raise InputError(f"--rows must be at least 1, got {rows}")
    if piece == "known":
        return known()
    return getattr(Bench(open_base(checkpoint_path(checkpoint), remat=False), rows), piece)()


if __name__ == "__main__":
    main()
