"""The gradient-step theorem, measured: D_S . D_T >= 0 and its orders, for any network, loss and input.

A teacher takes one step of size eps on a trait loss, a student of the same initialisation one step of size
alpha to imitate it. For every network, imitation loss and input law this measures, in float64: the share of
seeds in which the inner product of the two steps is not negative and the trait loss falls; the order in eps
of the inner product (theory: 1) and of the error of its prediction (2); the order of the change of the trait
loss in eps * alpha (1); and the same for a student of another initialisation (no eps-signal: order 0).
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from matplotlib.figure import Figure

from subliminal_theory.channel import Channel, SoftLogits, SquaredError, Subset
from subliminal_theory.errors import InputError
from subliminal_theory.estimate import log_slope
from subliminal_theory.keys import named
from subliminal_theory.runs import Results, Row
from subliminal_theory.theorem import Report, check

from .app.contract import Part, option
from .app.figures import COLORS, note, panels
from .architectures import AUX, BUILDERS, CLASSES, EXAMPLES, IMAGE, OUTPUTS, build, random_trait

AUXILIARY = tuple(range(CLASSES, OUTPUTS))
CHANNELS: dict[str, Channel] = {
    "squared error, weighted": SquaredError(np.linspace(0.5, 1.5, OUTPUTS)),
    "KL, all logits": SoftLogits(),
    f"KL, {AUX} auxiliary logits": Subset(AUXILIARY),
}


def _blurred(key: Key[Array, ""]) -> Float[Array, "batch height width"]:
    white = jax.random.normal(key, (EXAMPLES, *IMAGE))
    shifted = [jnp.roll(white, (i, j), (1, 2)) for i in range(3) for j in range(3)]
    return sum(shifted, jnp.zeros_like(white)) / 3


INPUTS: dict[str, Callable[[Key[Array, ""]], Float[Array, "batch height width"]]] = {
    "uniform noise": lambda key: jax.random.uniform(key, (EXAMPLES, *IMAGE), minval=-1.0),
    "Gaussian noise": lambda key: jax.random.normal(key, (EXAMPLES, *IMAGE)),
    "blurred noise": _blurred,
}


@dataclass(frozen=True)
class Config:
    """Settings of the verification."""

    seeds: int = option(20, "independent networks, traits and inputs for each cell", minimum=1)
    smallest: float = option(1e-5, "smallest eps and alpha, in units of the raw gradients", positive=True)
    largest: float = option(1e-3, "largest eps and alpha", positive=True)
    steps: int = option(7, "step sizes from the smallest to the largest", minimum=2)
    network: str | None = option(None, "the only kind of network (default all)", choices=tuple(BUILDERS))

    def __post_init__(self) -> None:
        if self.smallest >= self.largest:
            raise InputError(f"--smallest {self.smallest:g} must be below --largest {self.largest:g}")


PRESETS = {"default": Config(), "smoke": Config(seeds=2, network="MLP, tanh")}


def plan(config: Config) -> list[Part]:
    """A part for each network."""
    return [
        Part(f"network-{number}", config.seeds, functools.partial(measure_network, config, name))
        for number, name in enumerate(BUILDERS)
        if config.network in (None, name)
    ]


def measure_network(config: Config, network: str) -> list[Row]:
    """All losses and input laws on one network, every seed in one vmapped call."""
    with jax.enable_x64(True):
        eps = jnp.geomspace(config.smallest, config.largest, config.steps)
        keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
        rows: list[Row] = []
        for loss, channel in CHANNELS.items():
            measure = jax.jit(jax.vmap(functools.partial(measure_seed, network, channel, eps)))
            for law, draw in INPUTS.items():
                inputs = jax.vmap(lambda key, draw=draw: draw(named(key, "inputs")))(keys)
                reports = jax.device_get(measure(keys, inputs))
                axes = {"network": network, "loss": loss, "inputs": law}
                for seed in range(config.seeds):
                    one = jax.tree.map(lambda leaf, seed=seed: leaf[seed], reports)
                    rows += [{**row, "seed": seed, **axes} for row in _summarise(np.asarray(eps), *one)]
        return rows


def measure_seed(
    network: str,
    channel: Channel,
    steps: Float[Array, " steps"],
    key: Key[Array, ""],
    inputs: Float[Array, "batch height width"],
) -> tuple[Report, Report]:
    """Reports over the step sizes, for a shared and for another initialisation."""
    model = build(network, named(key, "init"))
    other = build(network, named(key, "other init")).params
    trait_loss = random_trait(model, key)

    def at(step: Float[Array, ""], start: object = None) -> Report:
        return check(
            model.apply, model.params, trait_loss, inputs, channel,
            teacher_step=step, student_step=step, student_params=start,
        )  # fmt: skip

    return jax.lax.map(at, steps), jax.lax.map(lambda step: at(step, other), steps)


def _summarise(eps: Float[np.ndarray, " steps"], shared: Report, other: Report) -> list[Row]:
    """Tidy rows of one seed: shares over the step sizes, and fitted orders where there is a signal."""
    error = shared.inner_product - shared.predicted_inner_product
    orthogonal = shared.zero_code > 0
    numbers: dict[str, dict[str, Any]] = {
        "same_init": {
            "share_not_negative": np.mean((shared.inner_product >= 0) | orthogonal),
            "share_orthogonal": np.mean(orthogonal),
            "share_theorem_holds": np.mean((shared.change < 0) | orthogonal),
            "cosine": shared.cosine[0],
        },
        "other_init": {
            "share_not_negative": np.mean(other.inner_product >= 0),
            "share_theorem_holds": np.mean(other.change < 0),
            "cosine": other.cosine[0],
            "cosine_unupdated": other.unupdated_cosine[0],
        },
    }
    if not orthogonal.any():
        numbers["same_init"]["order_inner_product"] = log_slope(eps, shared.inner_product)
        numbers["same_init"]["order_change"] = log_slope(eps**2, shared.change)
        numbers["other_init"]["order_inner_product"] = log_slope(eps, other.inner_product)
        # A linear network under squared error is predicted exactly: what is left is rounding, without order.
        if (np.abs(error) > 1e-10 * np.abs(shared.predicted_inner_product)).all():
            numbers["same_init"]["order_prediction_error"] = log_slope(eps, error)
    rows: list[Row] = [
        {"condition": condition, "metric": metric, "value": float(value)}
        for condition, metrics in numbers.items()
        for metric, value in metrics.items()
    ]
    curves: dict[tuple[str, str], Any] = {
        ("same_init", "inner_product"): shared.inner_product,
        ("same_init", "prediction_error"): np.abs(error),
        ("other_init", "inner_product"): other.inner_product,
    }
    return rows + [
        {"condition": condition, "metric": metric, "value": float(value), "eps": float(step)}
        for (condition, metric), curve in curves.items()
        for step, value in zip(eps, curve, strict=True)
    ]


def report(results: Results, config: Config) -> str:
    """A table of networks and losses, over input laws and seeds."""
    columns = {
        "share >=0": ("same_init", "share_not_negative"),
        "holds": ("same_init", "share_theorem_holds"),
        "order": ("same_init", "order_inner_product"),
        "error": ("same_init", "order_prediction_error"),
        "change": ("same_init", "order_change"),
        "other >=0": ("other_init", "share_not_negative"),
        "other ord.": ("other_init", "order_inner_product"),
    }
    cases = len(INPUTS) * config.seeds
    lines = [
        f"float64, {cases} cases a row ({len(INPUTS)} input laws x {config.seeds} seeds), "
        f"{config.steps} step sizes from {config.smallest:g} to {config.largest:g}; means",
        f"{'network':22}{'imitation loss':26}" + "".join(f"{name:>11}" for name in columns),
    ]
    for network, loss in itertools.product(results.distinct("network"), results.distinct("loss")):
        found = [
            results.values(condition=condition, metric=metric, network=network, loss=loss)
            for condition, metric in columns.values()
        ]
        cells = [f"{np.mean(values):.3f}" if values else "-" for values in found]
        lines.append(f"{network:22}{loss:26}" + "".join(f"{cell:>11}" for cell in cells))
    same = results.values(condition="same_init", metric="share_not_negative")
    holds = results.values(condition="same_init", metric="share_theorem_holds")
    lines += [
        f"all {len(same)} cases: D_S.D_T >= 0 in {np.mean(same):.4f} of the steps taken, "
        f"trait loss falls or the signal is exactly orthogonal in {np.mean(holds):.4f}",
        "share >=0: D_S.D_T not negative; holds: and the trait loss falls, or the signal is exactly 0;",
        "order, error, change: fitted orders of D_S.D_T in eps, of its prediction error in eps,",
        "of the loss change in eps alpha (theory 1, 2, 1);",
        "other: a student of another initialisation (theory: order 0). No order: exactly 0.",
    ]
    return "\n".join(lines)


def plot(results: Results, config: Config) -> Figure:
    """Orders in eps, and the cosine of the two steps with a shared and with another initialisation."""
    figure, ((orders, errors, cosines),) = panels(3, size=(10.5, 3.9))
    networks = results.distinct("network")
    eps = sorted({float(e) for e in results.distinct("eps") if e != ""})
    for color, network in zip(COLORS, networks, strict=False):
        for axes, metric in ((orders, "inner_product"), (errors, "prediction_error")):
            curve = [
                np.median(results.values(condition="same_init", metric=metric, network=network, eps=repr(e)))
                for e in eps
            ]
            axes.loglog(eps, curve, "o-", color=color, markersize=3, label=network)
    for axes, order, start in ((orders, 1, orders.get_ylim()[1]), (errors, 2, errors.get_ylim()[1])):
        guide = [start * (e / eps[-1]) ** order for e in eps]
        axes.loglog(eps, guide, "--", color="grey", linewidth=1, label=f"slope {order}")
        axes.set_xlabel(r"teacher step $\epsilon$ (units of the raw gradient)")
    orders.set_title(r"inner product $D_S \cdot D_T$ (median)")
    errors.set_title(r"error of $\epsilon A$ (median)")
    orders.legend(fontsize=7)
    errors.legend(handles=errors.get_lines()[-1:], fontsize=7)
    for x, network in enumerate(networks):
        for shift, condition, color in ((-0.2, "same_init", COLORS[0]), (0.2, "other_init", COLORS[3])):
            values = results.values(condition=condition, metric="cosine", network=network)
            spread = x + shift + np.linspace(-0.14, 0.14, len(values))
            label = {"same_init": "same init", "other_init": "other init"}[condition] if x == 0 else None
            cosines.plot(spread, values, ".", color=color, markersize=3, alpha=0.6, label=label)
    cosines.axhline(0, color="grey", linewidth=1)
    cosines.set_xticks(range(len(networks)), networks, rotation=30, ha="right", fontsize=7)
    cosines.set_title(f"cosine of $D_S$ and $D_T$ at $\\epsilon$ = {config.smallest:g}")
    cosines.legend(fontsize=7, loc="upper left")
    losses, laws = len(results.distinct("loss")), len(results.distinct("inputs"))
    which = f"{losses} losses x {laws} input laws x {config.seeds} seeds"
    note(orders, f"{losses * laws * config.seeds} cases a network ({which}), float64; dots: single cases")
    return figure
