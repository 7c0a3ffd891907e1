"""Does it matter whether the noise is repeated each epoch, or how many random bits a pixel has?

The student on auxiliary logits of `mnist`, distilled from one teacher a seed on four kinds of noise: a fixed set
of images or never the same twice, with 32 or 8 random bits a pixel. Differences are paired by seed.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

from experiments import mnist
from experiments.figures import bars
from experiments.mnist import PRESETS, STUDENTS, Config, Laboratory, audit_student, in_chunks, load_data
from subliminal_theory.distill import require_finite
from subliminal_theory.estimate import paired_difference
from subliminal_theory.runs import Results, Row

__all__ = ["PRESETS", "configure", "plan", "plot", "report"]

AUX = STUDENTS.index("student_aux")
LAWS: dict[str, dict[str, Any]] = {
    "fixed, 32 bits": {"noise_images": None, "noise_bits": 32},
    "fixed, 8 bits": {"noise_images": None, "noise_bits": 8},
    "fresh, 32 bits": {"noise_images": 0, "noise_bits": 32},
    "fresh, 8 bits": {"noise_images": 0, "noise_bits": 8},
}
configure = mnist.configure


def plan(config: Config) -> list:
    """Seeds in chunks."""
    return in_chunks(config, compile_chunk(Laboratory(config, load_data(config.data, config.data_dir))))


def compile_chunk(laboratory: Laboratory) -> Callable[[Sequence[int]], list[Row]]:
    """A function from seeds to rows."""
    digits, test = laboratory.digits(), laboratory.test()
    channel = jax.tree.map(lambda leaf: leaf[AUX : AUX + 1], laboratory.channels())
    initial = jax.jit(jax.vmap(laboratory.initial))
    teach_all = jax.jit(jax.vmap(laboratory.teacher, in_axes=(0, None, 0)))
    measure = jax.jit(jax.vmap(laboratory.accuracy, in_axes=(0, None, None)))
    laboratories = {
        name: dataclasses.replace(laboratory, config=dataclasses.replace(laboratory.config, **law))
        for name, law in LAWS.items()
    }
    distil = {
        name: jax.jit(jax.vmap(other.students, in_axes=(0, 0, None, 0))) for name, other in laboratories.items()
    }

    def run(seeds: Sequence[int]) -> list[Row]:
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds))
        init = initial(keys)
        teacher = teach_all(init, digits, keys)
        require_finite(teacher.losses, [f"the teacher of seed {seed}" for seed in seeds])
        rows: list[Row] = []
        for name, other in laboratories.items():
            audit_student(other, "student_aux", init, init, teacher.model)
            students = distil[name](jax.tree.map(lambda leaf: leaf[:, None], init), teacher.model, channel, keys)
            require_finite(students.losses, [f"the student of seed {seed} on {name}" for seed in seeds])
            accuracy = measure(jax.tree.map(lambda leaf: leaf[:, 0], students.model), *test)
            rows += [
                {"condition": name, "seed": int(seed), "metric": "test_accuracy", "value": float(value)}
                for seed, value in zip(seeds, accuracy, strict=True)
            ]
        return rows

    return run


def report(results: Results, config: Config) -> str:
    """Means, and differences paired by seed from the first kind of noise."""
    lines = [f"student on {config.aux} auxiliary logits, {config.data}: test accuracy, mean and 95% t interval"]
    lines += [f"  {group['condition']:16} {estimate}" for group, estimate in results.estimates()]
    first, *others = LAWS
    for name in others:
        difference = paired_difference(results.values(condition=name), results.values(condition=first))
        lines.append(f"  {name} minus {first}: {difference}")
    return "\n".join(lines)


def plot(results: Results, config: Config) -> Figure:
    """Bars with intervals, single runs as dots."""
    groups = {name.replace(", ", ",\n"): results.values(condition=name) for name in LAWS}
    title = f"Kind of noise, {config.data}, m = {config.aux}: same teachers, same seeds"
    return bars(groups, ylabel="test accuracy of the student", title=title, chance=0.1)
