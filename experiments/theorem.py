"""The gradient-step theorem, measured: D_S . D_T >= 0 and its orders, for any network, loss, trait and input.

A teacher takes one step of size eps on a trait loss. A student with the same initialization takes one step of size
alpha to imitate it. The experiment varies the network, the imitation loss, the kind of trait and the distribution
of inputs, in float64. It counts the steps in which the inner product of the two steps is negative or the trait
loss rises (theory: none), and the cases whose signal is exactly 0. It fits orders in eps: of the inner product
(theory: 1), of the error of its prediction (2), and of the change of the trait loss, in eps * alpha (1). For a
student with another initialization it fits the order of the inner product (0). Fits use only values clearly above
rounding.

In the figure: the inner product of the two steps and the error of its prediction against eps (medians, one line
per network; dashed lines have the slope that the theory says), and the cosine of the two steps for a shared and
for another initialization. Expect slopes 1 and 2, cosines above 0 for the shared initialization, and cosines of
both signs for the other.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree
from matplotlib.figure import Figure

from subliminal_theory.channel import Channel, SoftLogits, SquaredError, Subset, WeightedSum
from subliminal_theory.divergence import JensenShannon, ReverseKL
from subliminal_theory.errors import InputError
from subliminal_theory.estimate import Estimate, log_slope, t_interval
from subliminal_theory.keys import named
from subliminal_theory.model import Model
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
    "reverse KL, all logits": ReverseKL(),
    f"Jensen-Shannon, {AUX} auxiliary": Subset(AUXILIARY, JensenShannon()),
}
# The weights of the parts of a trait loss: cross-entropy, |theta|^2, a preference between classes, and
# -(random direction) . theta.
TRAITS = {
    "class labels": (1.0, 0.0, 0.0, 0.0),
    "class labels, weight decay": (1.0, 0.01, 0.0, 0.0),
    "preference": (0.0, 0.0, 1.0, 0.0),
    "any direction": (0.0, 0.0, 0.0, 1.0),
}
# A fit of an order uses values above CLEAR times their rounding error, and needs at least POINTS of them.
CLEAR, POINTS = 100, 3


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

    seeds: int = option(8, "random networks, traits and inputs for each combination", minimum=1)
    smallest: float = option(1e-5, "smallest eps and alpha, in units of the raw gradients", positive=True)
    largest: float = option(1e-3, "largest eps and alpha", positive=True)
    steps: int = option(7, "step sizes from the smallest to the largest", minimum=2)
    network: str | None = option(None, "the only kind of network (default all)", choices=tuple(BUILDERS))

    def __post_init__(self) -> None:
        if self.smallest >= self.largest:
            raise InputError(f"--smallest {self.smallest:g} must be below --largest {self.largest:g}")


PRESETS = {"default": Config(), "smoke": Config(seeds=2, network="MLP, tanh")}


def plan(config: Config) -> list[Part]:
    """One part for each network."""
    return [
        Part(f"network-{number}", config.seeds, functools.partial(measure_network, config, name))
        for number, name in enumerate(BUILDERS)
        if config.network in (None, name)
    ]


def measure_network(config: Config, network: str) -> list[Row]:
    """Rows for all losses, traits and input distributions on one network.

    One compiled program serves all of them, because loss and trait are data.
    """
    with jax.enable_x64(True):
        eps = jnp.geomspace(config.smallest, config.largest, config.steps)
        cells = list(itertools.product(range(config.seeds), CHANNELS, TRAITS))
        keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
        seeds = np.array([seed for seed, _, _ in cells])
        chosen = jnp.asarray(np.array([[name == loss for name in CHANNELS] for _, loss, _ in cells], float))
        parts = jnp.asarray(np.array([TRAITS[trait] for _, _, trait in cells]))
        measure = jax.jit(jax.vmap(functools.partial(measure_case, network, eps)))
        rows: list[Row] = []
        for law, draw in INPUTS.items():
            inputs = jax.vmap(lambda key, draw=draw: draw(named(key, "inputs")))(keys)
            reports = jax.device_get(measure(keys[seeds], inputs[seeds], chosen, parts))
            for number, (seed, loss, trait) in enumerate(cells):
                one = jax.tree.map(lambda leaf, number=number: leaf[number], reports)
                axes = {"seed": seed, "network": network, "loss": loss, "teacher": trait, "inputs": law}
                rows += [{**row, **axes} for row in summarise(np.asarray(eps), *one)]
            rows += [
                {**row, "network": network, "inputs": law} for row in _curves(np.asarray(eps), seeds, reports[0])
            ]
        return rows


def measure_case(
    network: str,
    steps: Float[Array, " steps"],
    key: Key[Array, ""],
    inputs: Float[Array, "batch height width"],
    chosen: Float[Array, " channels"],
    parts: Float[Array, " parts"],
) -> tuple[Report, Report]:
    """Reports for a shared and for another initialization; their leaves are [steps]."""
    model = build(network, named(key, "init"))
    other = build(network, named(key, "other init")).params
    # A weighted sum with one weight of 1 is that channel. Weights are data, so all channels share one program.
    channel = WeightedSum(tuple(CHANNELS.values()), chosen)
    trait_loss = mixed_trait(model, key, parts)

    def at(step: Float[Array, ""], start: object = None) -> Report:
        return check(
            model.apply, model.params, trait_loss, inputs, channel,
            teacher_step=step, student_step=step, student_params=start,
        )  # fmt: skip

    return jax.lax.map(at, steps), jax.lax.map(lambda step: at(step, other), steps)


def mixed_trait(
    model: Model, key: Key[Array, ""], parts: Float[Array, " parts"]
) -> Callable[[PyTree], Float[Array, ""]]:
    """A trait loss of the four parts of `TRAITS`, on random images, labels and directions."""
    labelled = random_trait(model, key)
    images = jax.random.normal(named(key, "preference images"), (EXAMPLES, *IMAGE))
    pairs = jax.random.randint(named(key, "pairs"), (EXAMPLES,), 0, CLASSES)
    leaves, structure = jax.tree.flatten(model.params)
    keys = jax.random.split(named(key, "direction"), len(leaves))
    size = sum(leaf.size for leaf in leaves) ** 0.5
    drawn = [jax.random.normal(k, leaf.shape, leaf.dtype) / size for k, leaf in zip(keys, leaves, strict=True)]
    direction = jax.tree.unflatten(structure, drawn)

    def loss(params: PyTree) -> Float[Array, ""]:
        logits = jax.nn.log_softmax(model.apply(params, images)[:, :CLASSES])
        better, worse = (logits[jnp.arange(EXAMPLES), which] for which in (pairs, (pairs + 1) % CLASSES))
        preference = -jnp.mean(jax.nn.log_sigmoid(better - worse))
        each = (labelled(params), optax.tree.vdot(params, params), preference, -optax.tree.vdot(direction, params))
        return jnp.sum(parts * jnp.stack(each))

    return loss


def summarise(eps: Float[np.ndarray, " steps"], shared: Report, other: Report) -> list[Row]:
    """Tidy rows of one case: the steps that contradict the theorem, and fitted orders if there is a signal."""
    orthogonal = bool((shared.zero_code > 0).any())
    negative = shared.inner_product < -shared.inner_product_rounding
    rises = shared.change > shared.change_rounding
    numbers: dict[str, dict[str, Any]] = {
        "same_init": {
            "orthogonal": orthogonal,
            "negative": 0 if orthogonal else np.sum(negative),
            "rises": 0 if orthogonal else np.sum(rises),
            "undecided": 0 if orthogonal else np.sum(np.abs(shared.change) <= shared.change_rounding),
            "cosine": shared.cosine[0],
        },
        "other_init": {
            "share_not_negative": np.mean(other.inner_product >= 0),
            "cosine": other.cosine[0],
            "cosine_unupdated": other.unupdated_cosine[0],
        },
    }
    if not orthogonal:
        noise = shared.inner_product_rounding
        error = shared.inner_product - shared.predicted_inner_product
        fits = {
            ("same_init", "order_inner_product"): _order(eps, shared.inner_product, noise),
            ("same_init", "order_prediction_error"): _order(eps, error, noise),
            ("same_init", "order_change"): _order(eps**2, shared.change, shared.change_rounding),
            ("other_init", "order_inner_product"): _order(eps, other.inner_product, other.inner_product_rounding),
        }
        for (condition, metric), order in fits.items():
            if order is not None:
                numbers[condition][metric] = order
    return [
        {"condition": condition, "metric": metric, "value": float(value)}
        for condition, metrics in numbers.items()
        for metric, value in metrics.items()
    ]


def _order(steps: np.ndarray, values: np.ndarray, noise: np.ndarray) -> float | None:
    """The fitted order of the values clearly above rounding; None if there are too few."""
    clear = np.abs(values) > CLEAR * noise
    return log_slope(steps[clear], values[clear]) if clear.sum() >= POINTS else None


def _curves(eps: np.ndarray, seeds: np.ndarray, shared: Report) -> list[Row]:
    """The median over the cases with a signal, for each seed and step, for the figure."""
    error = np.abs(shared.inner_product - shared.predicted_inner_product)
    signal = ~(shared.zero_code > 0).any(axis=-1)
    rows: list[Row] = []
    for seed in np.unique(seeds):
        own = (seeds == seed) & signal
        for metric, values in (("inner_product", shared.inner_product), ("prediction_error", error)):
            for step, value in zip(eps, np.median(values[own], axis=0), strict=True):
                row = {"condition": "same_init", "seed": int(seed), "metric": metric, "eps": float(step)}
                rows.append({**row, "value": float(value)})
    return rows


def headline(results: Results, config: Config) -> str:
    """The number of cases that contradict the theorem."""
    cases, zero, wrong, _ = _counts(results)
    return f"{cases} cases, {zero} of them with a signal of exactly 0: {wrong} contradict the theorem"


def report(results: Results, config: Config) -> str:
    """A table by network and loss, a table by trait, and the counts of all cases."""
    lines = [
        f"float64, {config.steps} step sizes from {config.smallest:g} to {config.largest:g}, {len(INPUTS)} "
        f"input laws, {config.seeds} seeds; orders are means over the cases with a signal",
        f"{'network':22}{'imitation loss':28}{_HEADER}",
    ]
    for network, loss in itertools.product(results.distinct("network"), CHANNELS):
        lines.append(f"{network:22}{loss:28}{_line(results, network=network, loss=loss)}")
    lines.append(f"{'trait':50}{_HEADER}")
    lines += [f"{trait:50}{_line(results, teacher=trait)}" for trait in TRAITS]
    lines.append(f"{'all':50}{_line(results)}")
    cases, zero, wrong, undecided = _counts(results)
    steps = (cases - zero) * config.steps
    lines += [
        f"{cases} cases: in {zero} the signal is exactly 0; in the other {cases - zero}, {wrong} of {steps} steps "
        f"contradict the theorem, {undecided} are too small for float64 to tell",
        "zero: A = 0; wrong: steps in which D_S.D_T < 0 or the trait loss rises, beyond rounding;",
        "order, error, change: orders of D_S.D_T in eps, of its prediction error in eps, of the loss change in",
        "eps alpha (theory: 1, 2, 1), fitted to values above rounding; - if there are none (an exact prediction).",
        *_spreads(results),
        "a student with another initialization, over seeds (theory: order 0, no sign):",
    ]
    for network in results.distinct("network"):
        share = _by_seed(results, config, network, "share_not_negative")
        order = _by_seed(results, config, network, "order_inner_product")
        lines.append(f"  {network:22}D_S.D_T >= 0 in {share}, order {order}")
    return "\n".join(lines)


_HEADER = f"{'cases':>7}{'zero':>6}{'wrong':>7}{'order':>9}{'error':>9}{'change':>9}"
_ORDERS = ("order_inner_product", "order_prediction_error", "order_change")


def _spreads(results: Results) -> list[str]:
    """The spread of the fitted orders over cases."""
    lines = []
    for metric in _ORDERS:
        if values := results.values(condition="same_init", metric=metric):
            low, middle, high = np.percentile(values, [1, 50, 99])
            lines.append(
                f"  {metric}: median {middle:.4f}, 98% of {len(values)} cases from {low:.4f} to {high:.4f}"
            )
    return lines


def _counts(results: Results, **of: str) -> tuple[int, int, int, int]:
    """How many cases there are, cases without a signal, steps that contradict the theorem, and undecided steps."""
    found = {
        metric: results.values(condition="same_init", metric=metric, **of)
        for metric in ("orthogonal", "negative", "rises", "undecided")
    }
    wrong = np.sum(found["negative"]) + np.sum(found["rises"])
    return len(found["orthogonal"]), int(np.sum(found["orthogonal"])), int(wrong), int(np.sum(found["undecided"]))


def _line(results: Results, **of: str) -> str:
    cases, zero, wrong, _ = _counts(results, **of)
    orders = [results.values(condition="same_init", metric=metric, **of) for metric in _ORDERS]
    return f"{cases:7}{zero:6}{wrong:7}" + "".join(f"{np.mean(v):9.3f}" if v else f"{'-':>9}" for v in orders)


def _by_seed(results: Results, config: Config, network: str, metric: str) -> Estimate | str:
    """The mean over a seed's cases, and its interval over seeds. Cases of one seed share their network."""
    found = [
        results.values(condition="other_init", metric=metric, network=network, seed=seed)
        for seed in range(config.seeds)
    ]
    means = [float(np.mean(values)) for values in found if values]
    return t_interval(means) if means else "-"


def plot(results: Results, config: Config) -> Figure:
    """Orders in eps, and the cosine of the two steps with a shared and with another initialization."""
    figure, ((orders, errors, cosines),) = panels(3, size=(10.5, 4.2))
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
    low, high = orders.get_ylim()
    orders.set_ylim(low, high * (high / low) ** 0.6)  # room for the names
    orders.legend(fontsize=6, loc="upper left", ncols=2)
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
    figure.suptitle(headline(results, config))
    which = f"{len(CHANNELS)} losses x {len(TRAITS)} traits x {len(INPUTS)} input laws x {config.seeds} seeds"
    note(orders, f"a network: {which}; float64; curves: medians over cases with a signal; dots: single cases")
    return figure
