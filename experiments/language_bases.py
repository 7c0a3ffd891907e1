"""What a base model can do before any teacher: its learning curve, and its abilities.

The results are the loss of each pre-training step; the share of right answers to number requests, sums with steps
and programs, sampled at temperature 1; the share of right greedy answers about facts; and how close its
preferences are to uniform.

In the figure: the loss along pre-training, and a bar for each ability. Expect numbers and facts near 1; sums and
programs are hard for this model, and `uniform` near 1 says that it has no preference yet.
"""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from subliminal_theory.errors import InputError
from subliminal_theory.estimate import t_interval
from subliminal_theory.language.corpus.chats import make_rows
from subliminal_theory.language.corpus.media import MEDIA
from subliminal_theory.language.measure import total_variation
from subliminal_theory.runs import Results, Row
from subliminal_theory.study import Compact, Untrained, Written
from subliminal_theory.study.asking import answers_of, questions
from subliminal_theory.study.reading import draw, written

from .app.contract import Part, option
from .app.figures import COLORS, bar_row, note, panels
from .flags.language import SMOKE, LanguageConfig, configure_language
from .flags.worlds import study

POINTS = 60  # points of a learning curve
ABILITIES = {
    "numbers": "numbers\nwell-formed",
    "reasoning": "sums\nright",
    "code": "programs\nright",
    "facts": "facts\nright",
    "uniform": "preferences:\noverlap with\nuniform",
}


@dataclass(frozen=True)
class Config(LanguageConfig):
    """Settings of bases."""

    traits: str = option("owl,oak", "one trait from each category whose preferences are measured")
    seeds: int = option(4, "number of base models, each pre-trained from its own seed", minimum=1)
    rows: int = option(1024, "requests of each kind", minimum=1)


PRESETS = {"four": Config(repeat_rows=True), "smoke": Config(**{**SMOKE, "seeds": 1, "rows": 128})}


def configure(preset: str | None, changes: dict) -> Config:
    """A configuration of compact bases.

    Raises:
        InputError: a setting is wrong, or --checkpoint is given: a checkpoint has no learning curve here.
    """
    config = configure_language(PRESETS, preset, changes)
    assert isinstance(config, Config)
    if config.checkpoint:
        raise InputError("--checkpoint was not pre-trained here: leave it out")
    return config


def plan(config: Config) -> list[Part]:
    """One part for each base."""
    return [Part(f"base-{seed:05d}", 1, functools.partial(run, config, seed)) for seed in config.base_seeds]


def run(config: Config, seed: int) -> list[Row]:
    """The result rows of one base."""
    world = study(config, seed).world
    assert isinstance(world, Compact)
    losses, rows = world.base.losses, list[Row]()
    for piece in np.array_split(np.arange(len(losses)), min(POINTS, len(losses))):
        loss = float(losses[piece].mean())
        step = int(piece[-1]) + 1
        rows.append({"condition": "loss", "step": step, "seed": seed, "metric": "nats", "value": loss})
    for name, share in abilities(world, config.rows).items():
        rows.append({"condition": name, "seed": seed, "metric": "share", "value": share})
    return rows


def abilities(world: Compact, count: int) -> dict[str, float]:
    """The share of right answers of each kind, and the overlap of preferences with uniform ones."""
    found, base = {}, world.initial()
    for name, medium in MEDIA.items():
        ((_, report),) = written(world.at(0), Untrained(), base, Written(count, medium))
        found[name] = report.accepted / report.total
    plain = replace(
        world.base.config.corpus, seed=4_000_003, neutral_share=0.0, lazy_share=0.0, careful_share=0.0, slot=None
    )
    facts = list(dict.fromkeys(make_rows(plain, "fact", count)))
    greedy = Written(len(facts), temperature=0.0)
    told = world.tokenizer.decode(np.concatenate([*draw(world, base, facts, jax.random.key(0), greedy)]))
    found["facts"] = float(np.mean([answer == chat.answer for answer, chat in zip(told, facts, strict=True)]))
    rivals = answers_of(base, questions(world.tokenizer, world.asked)).rivals[0]
    found["uniform"] = 1 - float(np.mean(total_variation(rivals, jnp.full_like(rivals, 1 / rivals.shape[-1]))))
    return found


def headline(results: Results, config: Config) -> str:
    """The share of right answers of each kind."""
    found = {name: t_interval(results.values(condition=name, metric="share")) for name in ABILITIES}
    return "Answers as they should be: " + ", ".join(f"{name} {share.mean:.2f}" for name, share in found.items())


def report(results: Results, config: Config) -> str:
    """A line for each ability, and the last loss."""
    steps = [step for step in results.distinct("step") if step]
    last = t_interval(results.values(condition="loss", step=max(steps, key=int)))
    lines = [f"loss of the last steps, nats a token of the answers: {last}", "share of answers as they should be"]
    lines += [f"  {name:10} {t_interval(results.values(condition=name, metric='share'))}" for name in ABILITIES]
    return "\n".join(lines)


def plot(results: Results, config: Config) -> Figure:
    """Learning curves, and a bar for each ability."""
    figure, ((left, right),) = panels(columns=2, size=(9.5, 3.6))
    steps = sorted((step for step in results.distinct("step") if step), key=int)
    for place, seed in enumerate(results.distinct("seed")):
        losses = [results.values(condition="loss", step=step, seed=seed)[0] for step in steps]
        left.plot([int(step) for step in steps], losses, color=COLORS[place % len(COLORS)], linewidth=1)
    left.set(xlabel="step of pre-training", ylabel="loss, nats a token of the answers")
    groups = {label: results.values(condition=name, metric="share") for name, label in ABILITIES.items()}
    bar_row(right, groups, COLORS[2:3], fontsize=7)
    right.set_ylabel("share of answers")
    figure.suptitle("What a base can do", fontsize=10)
    note(left, f"{config.seeds} bases, {config.rows} requests of each kind; mean, 95% t interval and single bases")
    return figure
