"""The gradient-step theorem on a trained chat model: one step toward a trait, one step of imitation on numbers.

The trait loss is the loss on a teacher's lessons. The channel is the full distribution on answers to number
requests. For each size of the teacher's step, the experiment compares the inner product of the two steps with its
prediction, and counts the runs whose trait loss falls. It does the same for a student of another base. It uses the
model, rows and channel of the `language` experiment, in float64. With --prompts, it also measures the cosine of
each system prompt's effect and the trait's gradient in the metric of the channel. The sign of this cosine says
where the student of a prompted teacher goes first.

In the figure: one dot per run. Expect a ratio of 1 and positive products on the teacher's base while eps is small,
and both signs on another base.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from matplotlib.figure import Figure

from subliminal_theory.alignment import cosine
from subliminal_theory.channel import SoftLogits, imitation_value_and_grad, weighted_mean
from subliminal_theory.errors import InputError
from subliminal_theory.estimate import interval, method
from subliminal_theory.language.corpus.base import text_of, token_loss
from subliminal_theory.language.corpus.traits import Trait
from subliminal_theory.language.model.transformer import Text
from subliminal_theory.language.text import behind
from subliminal_theory.model import Model
from subliminal_theory.runs import Results, Row
from subliminal_theory.study import Checkpoint, Compact, Reading, Untrained, Written
from subliminal_theory.study.reading import encoded_rows, model_of_run
from subliminal_theory.study.speaker import Speaker, columns
from subliminal_theory.study.teachers import prompted_teachers
from subliminal_theory.theorem import Report, check, prompt_alignment, prompt_shift

from .app.contract import Part, listed, option
from .app.figures import COLORS, drawn, note, panels, runs_against
from .flags.language import SMOKE, LanguageConfig, configure_language
from .flags.worlds import study

STUDENTS = {"same": "the teacher's base", "other": "another base"}
PROMPTED = {
    "cosine_metric": "cos_M(delta, J D_T)",
    "cosine_step": "cosine of the student's first step with D_T",
    "cosine_shift": "cos_M(delta, J v), a lower bound of the best",
    "residual": "residual of v",
}
SHIFT_STEPS = 50  # steps of conjugate gradients


@dataclass(frozen=True)
class Config(LanguageConfig):
    """Settings of bases and steps."""

    traits: str = option("owl,wolf,oak,maple", "built-in traits or trait files, separated by commas")
    seeds: int = option(3, "base models, each pre-trained from a seed of its own", minimum=1)
    rows: int = option(64, "rows of numbers", minimum=1)
    teacher_sizes: str = option(
        "1e-5,1e-4,1e-3,1e-2,1e-1", "teacher's steps, in units of the raw gradient, separated by commas"
    )
    student_size: float = option(1e-3, "student's step, in units of the raw gradient", positive=True)
    prompts: bool = option(False, "whether to measure prompted teachers too")


PRESETS = {
    "three": Config(repeat_rows=True),
    "smoke": Config(**{**SMOKE, "traits": "owl", "seeds": 1, "rows": 16}),
}


def configure(preset: str | None, changes: dict[str, Any]) -> LanguageConfig:
    """The configuration, as in the other language experiments. The dtype is always float64, on one device.

    Raises:
        InputError: as in `configure_language`; --compute or --shards is given.
    """
    config = configure_language(PRESETS, preset, changes)
    if config.compute != "float32":
        raise InputError("--compute: the theorem is measured in float64, leave it out")
    if config.shards != 1:
        raise InputError("--shards: the theorem is measured on one device, leave it out")
    return config


def plan(config: Config) -> list[Part]:
    """One part for each base."""
    sizes = listed(config.teacher_sizes, "--teacher-sizes", float)
    size = len(sizes) * len(STUDENTS) * len(config.trait_names())
    return [Part(f"base-{seed:05d}", size, functools.partial(run, config, seed)) for seed in config.base_seeds]


def run(config: Config, seed: int) -> list[Row]:
    """Rows for one base: all traits, students and sizes of the teacher's step."""
    own = study(config, seed)
    world = own.world
    assert isinstance(world, Compact | Checkpoint)
    numbers = numbers_of(world, config.rows)
    starts = {"same": None, "other": world.other(1).params}
    sizes, found = listed(config.teacher_sizes, "--teacher-sizes", float), list[Row]()
    with jax.enable_x64(True):
        base, students = world.model.with_params(_wide(world.model.params)), _wide(starts)
        read = _wide(numbers)
        for trait, labels in zip(world.traits, world.labels, strict=True):
            taught = _wide(lessons_of(world, trait))
            for condition, size in itertools.product(STUDENTS, sizes):
                told = _measure(base, students[condition], taught, read, size, config.student_size)
                found += _rows(told, {"condition": condition, "teacher_size": size, **labels})
            if config.prompts:
                prompt = model_of_run(_wide(prompted_teachers(world.model, world.tokenizer, [trait])), 0)
                measured = prompt_measures(base, prompt, taught, read)
                found += [
                    {"condition": "prompted", **labels, "metric": metric, "value": float(value)}
                    for metric, value in measured.items()
                ]
    return found


def numbers_of(world: Speaker, rows: int) -> tuple[Text, Array]:
    """Rows of numbers that the world's base wrote, and the weights of their positions."""
    text = Reading(Written(rows), rows, rows, repeat=True)
    encoded = encoded_rows(world.at(0), Untrained(), world.initial(), text)[0]
    return text_of(encoded), jnp.asarray(encoded.weights)


def lessons_of(world: Speaker, trait: Trait) -> tuple[Text, Array, Array]:
    """A teacher's lessons, their next tokens, and the weights of their positions."""
    chats = behind(world.system, trait.teacher_rows())
    encoded = world.tokenizer.encode_chats(chats, columns(world.tokenizer, chats))
    return text_of(encoded), jnp.asarray(encoded.targets), jnp.asarray(encoded.weights)


def _wide(tree: Any) -> Any:
    """The tree with floating-point leaves in float64. Other leaves keep their dtype."""

    def one(leaf: Any) -> Array:
        values = np.asarray(leaf)
        return jnp.asarray(values, jnp.float64 if np.issubdtype(values.dtype, np.floating) else values.dtype)

    return jax.tree.map(one, tree)


def _taught_loss(base: Model, taught: tuple[Text, Array, Array], params: Any) -> Array:
    """The trait loss: the mean loss on a teacher's lessons, in nats per token."""
    text, labels, weights = taught
    return weighted_mean(token_loss(base.apply(params, text), labels), weights)


@jax.jit
def _measure(
    base: Model, student: Any, taught: tuple[Text, Array, Array], read: tuple[Text, Array], *sizes: float
) -> Report:
    """The report of the theorem for a teacher's lessons, rows of numbers, and the sizes of both steps."""
    return check(
        base.apply, base.params, functools.partial(_taught_loss, base, taught), read[0], SoftLogits(),
        teacher_step=sizes[0], student_step=sizes[1], weights=read[1], student_params=student,
    )  # fmt: skip


@jax.jit
def prompt_measures(
    base: Model, prompt: Model, taught: tuple[Text, Array, Array], read: tuple[Text, Array]
) -> dict[str, Array]:
    """cos_M(delta, J D_T), the cosine of the student's step and D_T, and cos_M(delta, J v) of the best shift v."""
    text, weights = read
    seen, channel = prompt(text), SoftLogits()
    gradient = jax.grad(functools.partial(_taught_loss, base, taught))(base.params)
    direction = optax.tree.scale(-1, gradient)
    aligned = prompt_alignment(base.apply, base.params, direction, text, seen, channel, weights=weights)
    shift = prompt_shift(base.apply, base.params, text, seen, channel, steps=SHIFT_STEPS, weights=weights)
    logits = lambda params: base.apply(params, text)  # noqa: E731
    _, step = imitation_value_and_grad(channel, logits, base.params, channel.targets(None, seen), weights)
    return {
        "cosine_metric": aligned.cosine,
        "cosine_step": cosine(optax.tree.scale(-1, step), direction),
        "cosine_shift": shift.cosine,
        "residual": shift.residual,
    }


def _rows(report: Report, labels: dict) -> list[Row]:
    values = {
        "inner_product": report.inner_product,
        "over_predicted": report.inner_product / report.predicted_inner_product,
        "cosine": report.cosine,
        "change": report.change,
        "change_over_predicted": report.change / report.predicted_change,
    }
    return [{**labels, "metric": metric, "value": float(value)} for metric, value in values.items()]


def headline(results: Results, config: Config) -> str:
    """The answer that these runs give."""
    told = []
    for size in _sizes(results):
        steps = np.array(results.values(condition="same", teacher_size=size, metric="inner_product"))
        told.append(f"{np.sum(steps > 0)} of {len(steps)} at eps {float(size):g}")
    return f"On the teacher's base, D_S . D_T is positive in {', '.join(told)}"


def report(results: Results, config: Config) -> str:
    """One line for each student and each size of the teacher's step."""
    lines = [
        f"D_S . D_T measured / predicted ({method(results.values(metric='over_predicted'))}), "
        "share of runs in which it is positive, in which the trait loss falls"
    ]
    for condition, label in STUDENTS.items():
        for size in _sizes(results):
            wanted = {"condition": condition, "teacher_size": size}
            ratio = interval(results.values(**wanted, metric="over_predicted"))
            positive = np.mean(np.array(results.values(**wanted, metric="inner_product")) > 0)
            falls = np.mean(np.array(results.values(**wanted, metric="change")) < 0)
            lines.append(f"  {label:18} eps {float(size):7.0e}  {ratio}  {positive:5.0%}  {falls:5.0%}")
    if config.prompts:
        told = method(results.values(condition="prompted", metric="residual"))
        lines.append(f"prompted teachers on the same rows ({told})")
        for metric, label in PROMPTED.items():
            values = results.values(condition="prompted", metric=metric)
            above = f", above 0 in {np.mean(np.array(values) > 0):.0%}" if metric != "residual" else ""
            lines.append(f"  {label:50} {interval(values)}{above}")
    return "\n".join(lines)


def _sizes(results: Results) -> list[Any]:
    return [size for size in results.distinct("teacher_size") if size not in (None, "")]  # prompts have none


def plot(results: Results, config: Config) -> Figure:
    """The inner product against the size of the teacher's step, and its ratio to the prediction."""
    figure, ((left, right),) = panels(columns=2, size=(9.5, 3.6))
    sizes = sorted(_sizes(results), key=float)
    for place, (condition, label) in enumerate(STUDENTS.items()):
        found = {
            metric: {
                float(size): results.values(condition=condition, teacher_size=size, metric=metric)
                for size in sizes
            }
            for metric in ("cosine", "over_predicted")
        }
        runs_against(left, found["cosine"], COLORS[2 * place], label)
        if condition == "same":
            runs_against(right, found["over_predicted"], COLORS[0], label)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("teacher's step, in units of its gradient")
    left.axhline(0, color="grey", linewidth=1)
    left.set_ylabel("cosine of the two steps")
    left.legend(fontsize=7)
    right.axhline(1, color="grey", linestyle=":", linewidth=1)
    right.set_ylabel("inner product, measured / predicted")
    figure.suptitle("The theorem on a trained chat model and its numbers", fontsize=10)
    note(left, drawn(results.values(metric="cosine")))
    return figure
