"""Sampled tokens, filtered answers and prompted teachers: what remains of the theorem, on small networks.

There are three questions. How often does a student's step have the right sign after n sampled tokens? Theory:
Phi(sqrt(2 n KL)). What is the step of a student of filtered answers, with and without a control that reads the
base's answers under the same filter? Other ways of sampling are tested in the same way. Does cos_M(delta, J D_T)
predict where the student of a prompted teacher goes? All is computed in float64. docs/theory.md has the
derivations.

In the figure: dots are single networks (left and right), lines single networks (middle). Expect the dots on the
curve, lines less their control above 0, and prompts in the lower left or the upper right quarter.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from subliminal_theory.alignment import cosine
from subliminal_theory.channel import Subset, imitation_value_and_grad
from subliminal_theory.estimate import t_interval
from subliminal_theory.keys import named
from subliminal_theory.runs import Results, Row
from subliminal_theory.theorem import (
    answer_log_law,
    drawn_answers,
    every_answer,
    filtered_answers,
    prompt_alignment,
    prompt_shift,
    sign_probability,
    step_tokens,
    tokens_needed,
)
from subliminal_theory.theorem.tokens import Z

from .app.contract import Part, listed, option
from .app.figures import COLORS, note, panels
from .architectures import BUILDERS, CLASSES, EXAMPLES, IMAGE, OUTPUTS, build, random_trait

AUXILIARY = Subset(tuple(range(CLASSES, OUTPUTS)))
VOCABULARY, LENGTH, END = 4, 4, 0
REQUESTS = 1000  # answers before duplicates are dropped
ROWS = 256  # inputs after a prompt; with only a few, the parameters could express any effect of it
SMALL = 1e-4  # the teacher's step in the counterexamples
WITH, WITHOUT = "filtered, less its control", "filtered, without control"
PROMPTS = ("aligned prompt", "random prompt")


@dataclass(frozen=True)
class Config:
    """Settings of the networks."""

    seeds: int = option(100, "random networks and traits for each panel", minimum=1)
    network: str = option("MLP, tanh", "kind of network", choices=tuple(BUILDERS))
    teacher_size: float = option(
        0.1, "teacher's step before its tokens are sampled, in units of the raw gradient", positive=True
    )
    tokens: str = option(
        "0.01,0.03,0.1,0.3,1,3", "numbers of sampled tokens, in units of the number needed, separated by commas"
    )
    students: int = option(2000, "students for each network and number of tokens", minimum=1)
    teacher_sizes: str = option(
        "1e-4,1e-3,1e-2,1e-1", "teacher's steps before its answers are filtered, separated by commas"
    )
    prompt: float = option(0.3, "norm of a prompt, in the units of the inputs", positive=True)


PRESETS = {"default": Config(), "smoke": Config(seeds=4, students=200)}


def plan(config: Config) -> list[Part]:
    """One part for each panel."""
    listed(config.tokens, "--tokens", float)
    listed(config.teacher_sizes, "--teacher-sizes", float)
    parts = {"sampled": sampled, "filtered": filtered, "prompted": prompted}
    return [Part(name, config.seeds, functools.partial(compute, config)) for name, compute in parts.items()]


def _row(condition: str, seed: int, metric: str, value: Any, **axes: Any) -> Row:
    return {"condition": condition, "seed": seed, "metric": metric, "value": float(value), **axes}


# --- sampled tokens


def sampled(config: Config) -> list[Row]:
    """The share of students with the right sign of D_S . D_T. Each reads n tokens at random positions."""
    rows = list[Row]()
    with jax.enable_x64(True):
        for seed in range(config.seeds):
            table, law, kl, predicted = map(np.asarray, _tokens_of(config.network, seed, config.teacher_size))
            needed, rng = float(tokens_needed(kl)), np.random.default_rng(seed)
            rows.append(_row("sampled", seed, "tokens_needed", needed))
            rows.append(_row("sampled", seed, "kl_over_predicted", kl / predicted))
            for share in listed(config.tokens, "--tokens", float):
                n = max(1, round(share * needed))
                steps = rng.multinomial(n, law.ravel() / law.sum(), size=config.students) @ table.ravel()
                axes = {"tokens": share}
                rows.append(_row("sampled", seed, "share_right", np.mean(steps > 0), **axes))
                rows.append(_row("sampled", seed, "predicted_share", sign_probability(n, kl), **axes))
    return rows


@functools.partial(jax.jit, static_argnums=0)
def _tokens_of(network: str, seed: Array, eps: Array) -> tuple[Array, ...]:
    """D_S . D_T and the probability of each token, [positions, tokens]; KL and eps^2 A / 2 per token."""
    key = jax.random.key(seed)
    model = build(network, named(key, "init"))
    inputs = jax.random.uniform(named(key, "inputs"), (EXAMPLES, *IMAGE), minval=-1.0)
    direction = optax.tree.scale(-1, jax.grad(random_trait(model, key))(model.params))
    logits, moves = jax.jvp(lambda p: model.apply(p, inputs), (model.params,), (direction,))
    taught = model.apply(optax.tree.add_scale(model.params, eps, direction), inputs)
    table = moves - jnp.sum(jax.nn.softmax(logits) * moves, axis=-1, keepdims=True)
    found = step_tokens(model.apply, model.params, direction, inputs, teacher_step=eps)
    return table, jax.nn.softmax(taught), found.measured.kl, found.predicted_kl


# --- filtered answers


def _speak(params: Any, before: Array) -> Array:
    """Logits after every prefix, from the sum of its embeddings: a small language model."""
    state = jnp.cumsum(params["embedding"][before], axis=1)
    return jnp.tanh(state) @ params["out"] + params["bias"][None, None]


def _likeliest(logits: Array) -> Array:
    return jnp.where(logits >= jax.lax.top_k(logits, 2)[0][..., -1:], logits, -jnp.inf)


def _nucleus(logits: Array) -> Array:
    """The fewest likeliest tokens whose probabilities add up to 0.8."""
    probabilities = jax.nn.softmax(logits)
    above = jnp.sum(
        jnp.where(probabilities[..., None, :] > probabilities[..., None], probabilities[..., None, :], 0), axis=-1
    )
    return jnp.where(above < 0.8, logits, -jnp.inf)


# How a teacher draws each token if it changes the distribution.
TOKEN_BY_TOKEN: dict[str, Callable[[Array], Array]] = {
    "tokens from the 2 likeliest": _likeliest,
    "tokens from a nucleus of 0.8": _nucleus,
    "tokens at temperature 0.2": lambda logits: logits / 0.2,
}
PER_TOKEN, ONCE = "filtered, mean over tokens", "filtered, different answers alone"
DRAWN = (WITH, WITHOUT, PER_TOKEN, ONCE, *TOKEN_BY_TOKEN)


def filtered(config: Config) -> list[Row]:
    """Rows with D_S . D_T, with and without the control, over the leading order eps Var(s) of a filter.

    For other ways of sampling, the control reads the base's answers, sampled in the same way.
    """
    sizes, rows = listed(config.teacher_sizes, "--teacher-sizes", float), list[Row]()
    with jax.enable_x64(True):
        for seed in range(config.seeds):
            for size in sizes:
                found = {name: np.asarray(leaf) for name, leaf in _filtered(seed, size).items()}
                rows += [_row(name, seed, "over_predicted", found[name], teacher_size=size) for name in DRAWN]
        rows += [_row(name, 0, "counterexample", value) for name, value in counterexamples().items()]
    return rows


@jax.jit
def _filtered(seed: Array, eps: Array) -> dict[str, Array]:
    key = jax.random.key(seed)
    tokens, weights = map(jnp.asarray, every_answer(VOCABULARY, LENGTH, END))
    before = jnp.concatenate([jnp.full((len(tokens), 1), VOCABULARY), tokens[:, :-1]], axis=1)
    shapes = {"embedding": (VOCABULARY + 1, LENGTH), "out": (LENGTH, VOCABULARY), "bias": (VOCABULARY,)}
    params, direction = (
        {name: jax.random.normal(named(key, of, name), shape) for name, shape in shapes.items()}
        for of in ("params", "direction")
    )
    accepted = jax.random.bernoulli(named(key, "filter"), 0.5, (len(tokens),))

    def law(p: Any) -> Array:
        return answer_log_law(_speak, p, before, tokens, weights)

    def one_by_one(warp: Callable[[Array], Array], p: Any) -> Array:
        laws = jax.nn.log_softmax(warp(_speak(p, before)))
        drawn = jnp.take_along_axis(laws, tokens[..., None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(weights > 0, drawn, 0), axis=-1)

    plain = filtered_answers(law, params, direction, accepted, teacher_step=eps)
    lengths = jnp.sum(weights, axis=-1)
    per_token = filtered_answers(law, params, direction, accepted, teacher_step=eps, lengths=lengths)
    found = {WITH: plain.difference, WITHOUT: plain.student, PER_TOKEN: per_token.difference}
    once = functools.partial(_once, law, accepted)
    found[ONCE] = drawn_answers(law, once, params, direction, teacher_step=eps).difference
    for name, warp in TOKEN_BY_TOKEN.items():
        drawn = functools.partial(one_by_one, warp)
        found[name] = drawn_answers(law, drawn, params, direction, teacher_step=eps).difference
    return {name: value / plain.predicted for name, value in found.items()}


def counterexamples() -> dict[str, Array]:
    """(D_S . D_T minus its control) / eps, which is negative, for each way of sampling that is not a filter.

    The first two examples have three answers with E[s] = 0, and the filter rejects the last. In the others, two
    tokens are drawn. The first is nearly a coin flip, with s = -1 or 1. After it, the two likely tokens have s = 2
    or s = -2, and only an unlikely third token makes up for this.
    """
    accepted, found = jnp.array([True, True, False]), {}
    first, scores = jnp.log(jnp.array([0.1, 0.1, 0.8])), jnp.array([1.0, 3.0, -0.5])
    lengths = jnp.array([1.0, 9.0, 1.0])
    law = jax.nn.log_softmax
    found[PER_TOKEN] = filtered_answers(law, first, scores, accepted, teacher_step=SMALL, lengths=lengths)

    rare, moves = jnp.log(jnp.array([0.001, 0.499, 0.5])), jnp.array([1.0, 2.0, -1.998])
    once = functools.partial(_once, law, accepted)
    found[ONCE] = drawn_answers(law, once, rare, moves, teacher_step=SMALL)

    params = jnp.log(jnp.array([[0.45, 0.45, 0.1], *[[0.5, 0.42, 0.08]] * 3]))
    direction = jnp.array([[-1.0, 1.0, 0.0], [25.0, 25.0, 0.0], [-25.0, -25.0, 0.0], [0.0] * 3])

    def pairs(warp: Callable[[Array], Array], p: Array) -> Array:
        laws = jax.nn.log_softmax(warp(p))
        return jnp.ravel(laws[0][:, None] + laws[1:])

    whole = functools.partial(pairs, lambda logits: logits)
    for name, warp in TOKEN_BY_TOKEN.items():
        drawn = functools.partial(pairs, warp)
        found[name] = drawn_answers(whole, drawn, params, direction, teacher_step=SMALL)
    return {name: signal.difference / SMALL for name, signal in found.items()}


def _once(law: Callable[[Any], Array], accepted: Array, params: Any) -> Array:
    """The log probability of each answer in a row if duplicates are dropped, to leading order in many requests."""
    kept = jnp.where(accepted, -jnp.expm1(REQUESTS * jnp.log1p(-jnp.exp(law(params)))), 0)
    return jnp.log(kept) - jnp.log(jnp.sum(kept))


# --- prompted teachers


def prompted(config: Config) -> list[Row]:
    """Rows with cos_M(delta, J D_T) and the cosine of the student's first step, for aligned and random prompts."""
    rows = list[Row]()
    with jax.enable_x64(True):
        for seed in range(config.seeds):
            for condition, found in _prompted(config.network, seed, config.prompt).items():
                rows += [_row(condition, seed, metric, value) for metric, value in found.items()]
    return rows


@functools.partial(jax.jit, static_argnums=0)
def _prompted(network: str, seed: Array, length: Array) -> dict[str, dict[str, Array]]:
    """The metrics of each kind of prompt.

    A prompt is the last row of an image, which is 0 without a prompt. The aligned prompt descends the trait loss.
    """
    key = jax.random.key(seed)
    model = build(network, named(key, "init"))
    trait_images = jax.random.normal(named(key, "trait images"), (EXAMPLES, *IMAGE))
    labels = jax.random.randint(named(key, "trait labels"), (EXAMPLES,), 0, CLASSES)
    inputs = jax.random.uniform(named(key, "inputs"), (ROWS, *IMAGE), minval=-1.0)

    def behind(prompt: Array, images: Array) -> Array:
        return images.at[:, -1].set(jnp.broadcast_to(prompt, (len(images), IMAGE[1])))

    def trait_loss(params: Any, prompt: Array) -> Array:
        logits = model.apply(params, behind(prompt, trait_images))[:, :CLASSES]
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(EXAMPLES), labels])

    nothing = jnp.zeros(IMAGE[1])
    descent, descended = jax.grad(trait_loss, argnums=(0, 1))(model.params, nothing)
    direction = optax.tree.scale(-1, descent)
    prompts = dict(zip(PROMPTS, (-descended, jax.random.normal(named(key, "prompt"), nothing.shape)), strict=True))
    plain = behind(nothing, inputs)
    found = {}
    for name, prompt in prompts.items():
        seen = model.apply(model.params, behind(length * prompt / jnp.linalg.norm(prompt), inputs))
        aligned = prompt_alignment(model.apply, model.params, direction, plain, seen, AUXILIARY)
        shift = prompt_shift(model.apply, model.params, plain, seen, AUXILIARY)
        targets, weights = AUXILIARY.targets(None, seen), jnp.ones(ROWS)
        logits = lambda p: model.apply(p, plain)  # noqa: E731
        _, gradient = imitation_value_and_grad(AUXILIARY, logits, model.params, targets, weights)
        found[name] = {
            "cosine_metric": aligned.cosine,
            "cosine_step": cosine(optax.tree.scale(-1, gradient), direction),
            "cosine_shift": shift.cosine,
            "residual": shift.residual,
        }
    return found


# --- reports and figures


def headline(results: Results, config: Config) -> str:
    """The answer that these runs give."""
    right, predicted = (
        np.mean(_against(results, "tokens", metric=metric)[1.0]) for metric in ("share_right", "predicted_share")
    )
    filtered = np.concatenate(list(_against(results, "teacher_size", condition=WITH).values()))
    signs = [(_cosines(results, n, "step") > 0) == (_cosines(results, n, "metric") > 0) for n in PROMPTS]
    told = f"{right:.3f} of students after n* tokens (predicted {predicted:.3f})"
    shares = f"{_share(filtered > 0)} of filtered answers less their control, {_share(np.ravel(signs))} of prompts"
    return f"Right sign in {told}, {shares}"


def report(results: Results, config: Config) -> str:
    """Predicted and measured values, and the share of networks with the right sign."""
    lines = [f"sampled tokens: share of {config.students} students with D_S . D_T > 0, mean over networks"]
    ratio = t_interval(results.values(condition="sampled", metric="kl_over_predicted"))
    needed = np.median(results.values(condition="sampled", metric="tokens_needed"))
    lines.append(f"  eps {config.teacher_size:g}: KL / (eps^2 A / 2) {ratio}; tokens needed {needed:.3g} (median)")
    measured, predicted = (_against(results, "tokens", metric=of) for of in ("share_right", "predicted_share"))
    for share, values in measured.items():
        lines.append(
            f"  n = {share:5.2f} n*  measured {t_interval(values)}  "
            f"Phi(sqrt(2 n KL)) {np.mean(predicted[share]):.3f}"
        )
    lines.append("answers: D_S . D_T minus its control (unless named otherwise), over eps Var(s) of the filter")
    for name in DRAWN:
        of_sizes = list(_against(results, "teacher_size", condition=name).items())
        for size, values in of_sizes if name in (WITH, WITHOUT) else of_sizes[:1]:
            lines.append(
                f"  {name:35} eps {size:5.0e}  median {np.median(values):9.3g}  above 0: {_share(values > 0)}"
            )
        for value in results.values(condition=name, metric="counterexample"):
            lines.append(f"  {'':35} counterexample: {value:+.3g} eps")
    lines.append("prompted teachers, means over networks")
    for name in PROMPTS:
        aligned, step, shift = (_cosines(results, name, of) for of in ("metric", "step", "shift"))
        lines += [
            f"  {name:15} cos_M(delta, J D_T) {t_interval(aligned)}, cos_M(delta, J v) {t_interval(shift)}",
            f"  {name:15} student toward the trait {_share(step > 0)}, with the same sign as cos_M "
            f"{_share((step > 0) == (aligned > 0))}",
        ]
    return "\n".join(lines)


def _against(results: Results, axis: str, **wanted: Any) -> dict[float, np.ndarray]:
    """The values at each entry of an axis, in ascending order."""
    entries = sorted((float(entry), entry) for entry in results.distinct(axis) if entry not in (None, ""))
    return {number: np.array(results.values(**{axis: entry}, **wanted)) for number, entry in entries}


def _cosines(results: Results, condition: str, of: str) -> np.ndarray:
    return np.array(results.values(condition=condition, metric=f"cosine_{of}"))


def _share(right: np.ndarray) -> str:
    interval = stats.binomtest(int(right.sum()), len(right)).proportion_ci()
    return f"{right.mean():.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def plot(results: Results, config: Config) -> Figure:
    """Three panels: sampled, filtered, prompted."""
    figure, ((left, middle, right),) = panels(columns=3, size=(12.0, 3.9))
    _plot_sampled(left, results)
    _plot_filtered(middle, results)
    _plot_prompted(right, results)
    note(left, f"n = {config.seeds} random networks in each panel; dots and thin lines: single networks")
    return figure


def _plot_sampled(axes: Axes, results: Results) -> None:
    measured = _against(results, "tokens", metric="share_right")
    grid = np.geomspace(min(measured) / 2, 2 * max(measured), 200)
    predicted = stats.norm.cdf(Z * np.sqrt(grid))
    axes.plot(grid, predicted, color=COLORS[6], label=r"$\Phi(\sqrt{2 n\,\mathrm{KL}})$")
    for place, (share, values) in enumerate(measured.items()):
        label = None if place else "measured"
        axes.plot([share] * len(values), values, ".", color=COLORS[0], alpha=0.35, label=label)
    axes.axhline(0.5, color="grey", linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel(r"sampled tokens, in units of $n^* = 1.96^2 / (2\,\mathrm{KL})$")
    axes.set_ylabel(r"share of students with $D_S \cdot D_T > 0$")
    axes.set_title("Sampled tokens: how many it takes")
    axes.legend(loc="upper left")


def _plot_filtered(axes: Axes, results: Results) -> None:
    for name, color in ((WITHOUT, COLORS[3]), (WITH, COLORS[2])):
        lines = _against(results, "teacher_size", condition=name)
        axes.plot(list(lines), np.array(list(lines.values())), color=color, alpha=0.3, linewidth=0.8)
        axes.plot([], [], color=color, label=name)
    axes.axhline(0, color="grey", linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=2)
    axes.set_xlabel(r"teacher's step $\varepsilon$")
    axes.set_ylabel(r"$D_S \cdot D_T \;/\; \varepsilon\,\mathrm{Var}_{0|F}(s)$")
    axes.set_title("Filtered answers: less the control")
    axes.legend(fontsize=7)


def _plot_prompted(axes: Axes, results: Results) -> None:
    for name, color in zip(PROMPTS, (COLORS[2], COLORS[3]), strict=True):
        aligned, step = (_cosines(results, name, of) for of in ("metric", "step"))
        axes.plot(aligned, step, ".", color=color, alpha=0.6, label=name)
    axes.axhline(0, color="grey", linestyle=":", linewidth=1)
    axes.axvline(0, color="grey", linestyle=":", linewidth=1)
    axes.set_xlabel(r"$\cos_M(\delta, J D_T)$, before any training")
    axes.set_ylabel("cosine of the student's step and the trait's")
    axes.set_title("Prompted teachers: as far as aligned")
    axes.legend()
