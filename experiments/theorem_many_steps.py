"""Many steps of a student: no rise of the trait loss while rate times sharpness is at most 2, and rises beyond it.

Teachers of random networks take one small step eps; their students take minibatches through `distill`, each
step at a rate in units of 1 / sharpness, the largest eigenvalue of the Gauss-Newton matrix of that batch. The
theory, to leading order in eps and for rates of any size: the trait loss changes by
-eps g^T (I - product of (I - a_t G_t)) g, which is not positive while all a_t lambda_max(G_t) <= 2. Measured are
that change, in units of eps |g|^2, against the rate, and its ratio to the prediction against eps.
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
from subliminal_theory.theorem import contraction

from .app.contract import Part, option
from .app.figures import COLORS, note, panels
from .architectures import BUILDERS, EXAMPLES, IMAGE, build, random_trait

LIMIT = 2.0
RATES = (0.5, 1.0, 1.5, 1.9, 2.1, 2.2, 2.3)
STEEP = 1.9
SIZES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
SMALL = SIZES[-1]
METRICS = ("change", "predicted", "largest_product")


@dataclass(frozen=True)
class Config:
    """Settings of the survey."""

    seeds: int = option(40, "random networks, traits and inputs for each rate and size", minimum=1)
    steps: int = option(40, "steps of a student", minimum=1)
    batch: int = option(4, f"images of a step, of {EXAMPLES}", minimum=1)
    network: str = option("MLP, tanh", "kind of network", choices=tuple(BUILDERS))


PRESETS = {"default": Config(), "smoke": Config(seeds=3, steps=5)}


def plan(config: Config) -> list[Part]:
    """A part for the rates at a small eps, and one for sizes of eps at a steep rate that is allowed."""
    settings = {"rates": [(rate, SMALL) for rate in RATES], "sizes": [(STEEP, eps) for eps in SIZES]}
    return [
        Part(name, len(cells) * config.seeds, functools.partial(measure, config, name, cells))
        for name, cells in settings.items()
    ]


def measure(config: Config, condition: str, cells: Sequence[tuple[float, float]]) -> list[Row]:
    """What random networks do at each rate and size."""
    with jax.enable_x64(True):
        keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
        one = jax.jit(jax.vmap(functools.partial(run, config), (0, None, None)))
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
    config: Config, key: Key[Array, ""], rate: Float[Array, ""], eps: Float[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Change and predicted change of the trait loss over eps |g|^2, and a bound of all a_t lambda_max(G_t)."""
    model = build(config.network, named(key, "init"))
    inputs = jax.random.uniform(named(key, "inputs"), (EXAMPLES, *IMAGE), minval=-1.0)
    trait_loss, channel = random_trait(model, key), SoftLogits()
    source, run_key = Examples(inputs, min(config.batch, EXAMPLES)), named(key, "student")
    predict = functools.partial(
        contraction, model.apply, model.params, trait_loss, source, channel, teacher_step=eps, key=run_key
    )
    rates = rate / predict(rates=jnp.ones(config.steps)).sharpness.value
    predicted = predict(rates=rates)
    gradient = jax.grad(trait_loss)(model.params)
    teacher = model.with_params(optax.tree.add_scale(model.params, -eps, gradient))
    student = distill(
        model, teacher, channel, source, optax.sgd(lambda step: rates[step]), config.steps, key=run_key
    )
    change = trait_loss(student.model.params) - trait_loss(model.params)
    size = eps * optax.tree.vdot(gradient, gradient)
    return change / size, predicted.predicted_change / size, jnp.max(rates * predicted.sharpness.above)


def report(results: Results, config: Config) -> str:
    """A line for each rate, and one for each size of the teacher's step."""
    lines = [
        f"{config.seeds} networks ({config.network}), {config.steps} steps of {config.batch} of {EXAMPLES} "
        "images, float64; change of the trait loss in units of eps |g|^2",
        f"{'rate x sharpness':18}{'eps':>8}{'rises':>9}{'lowest':>11}{'highest':>11}   measured / predicted",
    ]
    for cell in _cells(results):
        change, predicted = (_values(results, cell, metric) for metric in METRICS[:2])
        ratio = change / predicted
        lines.append(
            f"{cell[1]:<18}{float(cell[2]):8.0e}{np.sum(change > 0):5} of {len(change):<3}"
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
    """The change against the rate, with the limit; and its ratio to the prediction against eps."""
    figure, ((left, right),) = panels(columns=2, size=(9.5, 3.9))
    allowed, beyond = 0, 0
    for cell in _cells(results):
        if cell[0] == "sizes":
            ratio = _values(results, cell, "change") / _values(results, cell, "predicted")
            right.plot(np.full(ratio.shape, float(cell[2])), ratio, ".", color=COLORS[0], markersize=4, alpha=0.5)
            continue
        change = _values(results, cell, "change")
        rises = int(np.sum(change > 0))
        within = float(cell[1]) <= LIMIT
        allowed, beyond = allowed + rises * within, beyond + rises * (not within)
        spread = float(cell[1]) + np.linspace(-0.03, 0.03, len(change))
        left.plot(spread, change, ".", color=COLORS[2 if within else 3], markersize=4, alpha=0.6)
    left.axvline(LIMIT, color="grey", linestyle=":", linewidth=1)
    left.annotate("limit", (LIMIT, 0.98), (3, -4), xycoords=("data", "axes fraction"), textcoords="offset points",
                  fontsize=7, color="grey")  # fmt: skip
    left.axhline(0, color="grey", linewidth=1)
    left.set_yscale("symlog", linthresh=1)
    left.set_xlabel("rate x sharpness, at each step")
    left.set_ylabel(r"change of the trait loss / $\epsilon |g|^2$")
    left.set_title(f"rises: {allowed} up to 2, {beyond} beyond")
    right.axhline(1, color="grey", linestyle=":", linewidth=1)
    right.set_xscale("log")
    right.set_xlabel(r"teacher step $\epsilon$ (units of the raw gradient)")
    right.set_ylabel("change, measured / predicted")
    right.set_title(f"prediction at rate x sharpness = {STEEP:g}")
    text = f"{config.network}, {config.steps} minibatches of {config.batch} images, KL on all logits, float64"
    note(left, f"n = {config.seeds} networks a rate or size, each a dot; {text}")
    return figure
