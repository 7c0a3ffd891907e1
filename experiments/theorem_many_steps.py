"""Many steps of a student: no rise of the trait loss while rate times sharpness is at most 2, and rises beyond it.

The teachers are random networks that take one small step eps. Their students train on minibatches with `distill`.
Each step has a rate in units of 1 / sharpness, where sharpness is the largest eigenvalue of the Gauss-Newton
matrix of the batch. In theory, to leading order in eps and for rates of any size, the trait loss changes by -eps
g^T (I - product of (I - a_t G_t)) g. This is not positive while all a_t lambda_max(G_t) <= 2. The experiment
measures this change in units of eps |g|^2 against the rate, and its ratio to the prediction against eps.

In the figure: each dot is one network. Left: no dot should be above 0 up to rate x sharpness = 2. Right: the ratio
should approach 1 as eps becomes smaller.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key
from matplotlib.figure import Figure

from subliminal_theory.channel import SoftLogits
from subliminal_theory.distill import distill
from subliminal_theory.keys import named
from subliminal_theory.runs import Results, Row
from subliminal_theory.source import Examples
from subliminal_theory.theorem import contraction, displacement

from .app.contract import Part, option
from .app.figures import COLORS, note, panels
from .architectures import BUILDERS, EXAMPLES, IMAGE, build, random_trait

LIMIT = 2.0
RATES = (0.5, 1.0, 1.5, 1.9, 2.1, 2.2, 2.3)
STEEP = 1.9
SIZES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
SMALL = SIZES[-1]
ALL, MINIBATCHES, SWEEP = "all images", "minibatches", "sizes of eps"
METRICS = ("change", "predicted", "largest_product")


@dataclass(frozen=True)
class Config:
    """Settings of the survey."""

    seeds: int = option(20, "random networks, traits and inputs for each rate and size", minimum=1)
    steps: int = option(40, "steps of a student", minimum=1)
    batch: int = option(4, f"images in a minibatch, at most {EXAMPLES}", minimum=1)
    network: str = option("MLP, tanh", "kind of network", choices=tuple(BUILDERS))


PRESETS = {"default": Config(), "smoke": Config(seeds=3, steps=5)}


def plan(config: Config) -> list[Part]:
    """Three parts: rates at a small eps, on all images and on minibatches, and sizes of eps on minibatches."""
    rates, sizes = [(rate, SMALL) for rate in RATES], [(STEEP, eps) for eps in SIZES]
    settings = {ALL: (EXAMPLES, rates), MINIBATCHES: (config.batch, rates), SWEEP: (config.batch, sizes)}
    return [
        Part(
            name.replace(" ", "-"),
            len(cells) * config.seeds,
            functools.partial(measure, config, name, batch, cells),
        )
        for name, (batch, cells) in settings.items()
    ]


def measure(config: Config, condition: str, batch: int, cells: Sequence[tuple[float, float]]) -> list[Row]:
    """Rows for all random networks at each rate and each eps."""
    with jax.enable_x64(True):
        keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
        one = jax.jit(jax.vmap(functools.partial(run, config, batch), (0, None, None)))
        rows: list[Row] = []
        for rate, eps in cells:
            found = jax.device_get(one(keys, rate, eps))
            axes = {"condition": condition, "rate": rate, "eps": eps}
            rows += [
                {**axes, "seed": seed, "metric": metric, "value": float(value)}
                for metric, values in zip(METRICS, found, strict=True)
                for seed, value in enumerate(values)
            ]
        return rows


def run(
    config: Config, batch: int, key: Key[Array, ""], rate: Float[Array, ""], eps: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """The change of the trait loss and its prediction over eps |g|^2, and a bound on all a_t lambda_max(G_t)."""
    model = build(config.network, named(key, "init"))
    inputs = jax.random.uniform(named(key, "inputs"), (EXAMPLES, *IMAGE), minval=-1.0)
    trait_loss, channel = random_trait(model, key), SoftLogits()
    source, run_key = Examples(inputs, min(batch, EXAMPLES)), named(key, "student")
    where = (model.apply, model.params)
    bounds = contraction(
        *where, trait_loss, source, channel, teacher_step=eps, rates=jnp.ones(config.steps), key=run_key
    ).sharpness
    rates = rate / bounds.value
    downhill = jax.tree.map(jnp.negative, jax.grad(trait_loss)(model.params))
    moved = displacement(*where, downhill, source, channel, rates=rates, key=run_key)
    teacher = model.with_params(optax.tree.add_scale(model.params, eps, downhill))
    student = distill(
        model, teacher, channel, source, optax.sgd(lambda step: rates[step]), config.steps, key=run_key
    )
    change = trait_loss(student.model.params) - trait_loss(model.params)
    size = optax.tree.vdot(downhill, downhill)
    return change / (eps * size), -optax.tree.vdot(downhill, moved) / size, jnp.max(rates * bounds.above)


def headline(results: Results, config: Config) -> str:
    """In how many runs the trait loss rises."""
    rises: dict[bool, list[bool]] = {True: [], False: []}
    for cell in _cells(results):
        rises[float(cell[1]) <= LIMIT] += (_values(results, cell, "change") > 0).tolist()
    within, beyond = (f"{sum(found)} of {len(found)}" for found in rises.values())
    return f"The trait loss rises in {within} runs up to rate x sharpness = {LIMIT:g}, and in {beyond} beyond"


def report(results: Results, config: Config) -> str:
    """One line for each rate, and one for each size of the teacher's step."""
    lines = [
        f"{config.seeds} networks ({config.network}), {config.steps} steps, minibatches of {config.batch} of "
        f"{EXAMPLES} images, float64; change of the trait loss in units of eps |g|^2",
        f"{'batch':14}{'rate x sharpness':18}{'eps':>8}{'rises':>9}{'lowest':>11}{'highest':>11}"
        "   measured / predicted",
    ]
    for cell in _cells(results):
        change, predicted = (_values(results, cell, metric) for metric in METRICS[:2])
        ratio = change / predicted
        lines.append(
            f"{cell[0]:14}{cell[1]:<18}{float(cell[2]):8.0e}{np.sum(change > 0):5} of {len(change):<3}"
            f"{change.min():9.3g}{change.max():11.3g}   {ratio.min():.4f} to {ratio.max():.4f}"
        )
    lines.append(f"theory: no rise up to {LIMIT:g}, whatever the network, the batches and the number of steps")
    return "\n".join(lines)


def _cells(results: Results) -> list[tuple[str, str, str]]:
    return list(dict.fromkeys((row["condition"], row["rate"], row["eps"]) for row in results.rows))


def _values(results: Results, cell: tuple[str, str, str], metric: str) -> np.ndarray:
    condition, rate, eps = cell
    return np.array(results.values(condition=condition, rate=rate, eps=eps, metric=metric))


def plot(results: Results, config: Config) -> Figure:
    """The change against the rate with the limit, and its ratio to the prediction against eps."""
    figure, ((left, right),) = panels(columns=2, size=(9.5, 3.9))
    rises = {True: 0, False: 0}
    for cell in _cells(results):
        change = _values(results, cell, "change")
        if cell[0] == SWEEP:
            ratio = change / _values(results, cell, "predicted")
            right.plot(np.full(ratio.shape, float(cell[2])), ratio, ".", color=COLORS[0], markersize=4, alpha=0.5)
            continue
        rises[float(cell[1]) <= LIMIT] += int(np.sum(change > 0))
        side, color = (-0.03, COLORS[3]) if cell[0] == ALL else (0.03, COLORS[0])
        label = cell[0] if float(cell[1]) == RATES[0] else None
        spread = float(cell[1]) + side + np.linspace(-0.02, 0.02, len(change))
        left.plot(spread, change, ".", color=color, markersize=4, alpha=0.6, label=label)
    left.legend(fontsize=7, loc="upper left")
    left.axvline(LIMIT, color="grey", linestyle=":", linewidth=1)
    left.annotate("limit", (LIMIT, 0.98), (3, -4), xycoords=("data", "axes fraction"), textcoords="offset points",
                  fontsize=7, color="grey")  # fmt: skip
    left.axhline(0, color="grey", linewidth=1)
    left.set_yscale("symlog", linthresh=1)
    left.set_ylim(bottom=-1)  # -1 is all of |g|^2
    left.set_xlabel("rate x sharpness, at each step")
    left.set_ylabel(r"change of the trait loss / $\epsilon |g|^2$")
    left.set_title(f"rises: {rises[True]} up to {LIMIT:g}, {rises[False]} beyond")
    right.axhline(1, color="grey", linestyle=":", linewidth=1)
    right.set_xscale("log")
    right.set_xlabel(r"teacher step $\epsilon$ (units of the raw gradient)")
    right.set_ylabel("change, measured / predicted")
    right.set_title(f"prediction at rate x sharpness = {STEEP:g}")
    text = f"{config.network}, {config.steps} steps, minibatches of {config.batch} of {EXAMPLES}, KL, float64"
    note(left, f"n = {config.seeds} networks a rate or size, each a dot; {text}; right: minibatches")
    return figure
