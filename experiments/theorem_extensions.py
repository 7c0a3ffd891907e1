"""Beyond one small gradient step: where the theorem still holds, and a counterexample where it does not.

The theorem covers one small gradient step of the teacher and one of the student, from a shared initialization.
Each row changes one thing. "Holds" is a statement to leading order, with its reason. "Fails" has a counterexample
with one to three parameters, trained by the same `distill`, in which the trait loss rises. The experiment also
measures the share of random networks in which the trait loss fell. Rows about many student steps give rates in
units of 1 / sharpness, where sharpness is the largest eigenvalue of the Gauss-Newton matrix G of a step's
imitation loss.

In the figure, a diamond near 1 is no contradiction: a random network is seldom the counterexample.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree
from matplotlib.figure import Figure
from scipy import stats

from subliminal_theory.channel import Channel, SampledToken, SquaredError, Subset
from subliminal_theory.distill import distill
from subliminal_theory.divergence import JensenShannon, ReverseKL
from subliminal_theory.inits import Perturbed, initialise
from subliminal_theory.keys import named
from subliminal_theory.model import Model
from subliminal_theory.runs import Results, Row
from subliminal_theory.source import Examples
from subliminal_theory.theorem import contraction

from .app.contract import Part, option
from .app.figures import COLORS, note, panels
from .architectures import BUILDERS, CLASSES, EXAMPLES, IMAGE, OUTPUTS, build, random_trait

SMALL_STEP = optax.sgd(1e-3)
AUXILIARY = Subset(tuple(range(CLASSES, OUTPUTS)))
SQUARED_ERROR = SquaredError()
Loss = Callable[[PyTree], Float[Array, ""]]


def preconditioned(strength: PyTree | float, learning_rate: float) -> optax.GradientTransformation:
    """Gradient descent in another metric: each entry of the gradient is multiplied by a positive number.

    `strength` is an array of these numbers, or a limit for fixed, irregular numbers between 1/strength and
    strength.
    """

    def update(gradient: PyTree, params: PyTree | None) -> PyTree:
        del params
        scales = strength
        if not isinstance(strength, np.ndarray):
            scales = jax.tree.map(
                lambda g: jnp.exp(jnp.log(strength) * jnp.sin(1.0 + jnp.arange(g.size))).reshape(g.shape), gradient
            )
        return jax.tree.map(jnp.multiply, scales, gradient)

    return optax.chain(optax.stateless(update), optax.sgd(learning_rate))


def _one_logit(theta: Array, inputs: Array) -> Array:
    return inputs @ theta[:, None]


@dataclass(frozen=True)
class Counterexample:
    """A small model in which the trait loss rises. It has one linear logit, unless `apply` says otherwise.

    Attributes:
        seen: the inputs of the student.
        start: the initial parameters.
        trait_loss: the trait loss, a function of the parameters.
        student_start: the student's initial parameters, if they differ.
        teacher, student: optimizers, if they are not those of the extension.
        apply: the model.
        channel: the channel.
    """

    seen: Sequence[Sequence[float]]
    start: Sequence[float]
    trait_loss: Loss
    student_start: Sequence[float] | None = None
    teacher: optax.GradientTransformation | None = None
    student: optax.GradientTransformation | None = None
    apply: Callable[[Array, Array], Array] = _one_logit
    channel: Channel = SQUARED_ERROR


@dataclass(frozen=True)
class Extension:
    """One change to the setting of the theorem.

    Attributes:
        name: the name in tables and figures.
        holds: whether the theorem still holds, to leading order.
        why: the reason.
        teacher, student: the optimizers.
        teacher_steps, student_steps: the numbers of steps.
        channel: what the student sees.
        sigma: the relative perturbation of the student's initialization.
        rate: the rate of the student's steps, in units of 1 / (largest eigenvalue of each step's G). It replaces
            `student`.
        momentum: the momentum of these steps.
        batch: the number of images in a step; None for all.
        then: channels for further runs of `student_steps` steps. Each run starts where the previous one ended.
        counterexample: an example in which the trait loss rises.
    """

    name: str
    holds: bool
    why: str
    teacher: optax.GradientTransformation = SMALL_STEP
    student: optax.GradientTransformation = SMALL_STEP
    teacher_steps: int = 1
    student_steps: int = 1
    channel: Channel = AUXILIARY
    sigma: float = 0.0
    rate: float | None = None
    momentum: float | None = None
    batch: int | None = None
    then: tuple[Channel, ...] = ()
    counterexample: Counterexample | None = None


def _quadratic(curvature: Sequence[float]) -> Loss:
    return lambda theta: 0.5 * jnp.sum(jnp.asarray(curvature) * theta**2)


def _slope(direction: Sequence[float]) -> Loss:
    """A trait loss whose gradient step is `direction`."""
    return lambda theta: -jnp.sum(jnp.asarray(direction) * theta)


_SIGN = Counterexample([[3.0, -1.0, -1.0]], [0.0, 0.0, 0.0], _slope([1.0, 1.0, 1.0]))
_CONVERGED = Counterexample([[2.0, -1.0]], [1.0, 1.0], _quadratic([1.0, 10.0]))
EXTENSIONS = (
    Extension("the theorem: one gradient step each", True, "Theorem 1"),
    Extension(
        "20 student steps at 1.9 / sharpness",
        True,
        "every step contracts theta - theta_T while its rate is at most 2 / (largest eigenvalue of its G)",
        rate=1.9,
        student_steps=20,
    ),
    Extension(
        "20 minibatches at 1.9 / their sharpness",
        True,
        "as above: any sequence of batches",
        rate=1.9,
        student_steps=20,
        batch=4,
    ),
    Extension(
        "changing channels at 1.9 / sharpness",
        True,
        "as above: any sequence of losses, temperatures and visible logits",
        rate=1.9,
        student_steps=5,
        batch=8,
        then=(Subset(AUXILIARY.where[:2], ReverseKL(3.0)), SquaredError(), JensenShannon(0.5)),
    ),
    Extension(
        "20 student steps at 2.1 / sharpness",
        False,
        "the error in the steepest direction grows by a tenth in every step, and finally the trait loss does too",
        rate=2.1,
        student_steps=20,
        # One logit of slope 1 under squared error: G = 2, and the change is -eps (1 - (1 - 2.1)^20) = 5.73 eps.
        counterexample=Counterexample([[1.0]], [0.0], _slope([1.0])),
    ),
    Extension(
        "2 student steps, momentum 0.9, at 3.6 / sharpness",
        False,
        "stable below 3.8, but it overshoots: by 2.52 eps in the example, where G = 2",
        rate=3.6,
        momentum=0.9,
        student_steps=2,
        counterexample=Counterexample([[1.0]], [0.0], _slope([1.0])),
    ),
    Extension(
        "weight decay of the student",
        False,
        "it pulls toward 0, whatever the teacher did",
        student=optax.chain(optax.add_decayed_weights(0.01), SMALL_STEP),
        counterexample=Counterexample([[1.0]], [1.0], _slope([1.0])),
    ),
    Extension(
        "many teacher steps",
        False,
        "the teacher's displacement is no longer its first gradient; D_S.(theta_T - theta_0) >= 0 still holds",
        teacher=optax.sgd(0.1),
        teacher_steps=200,
        counterexample=_CONVERGED,
    ),
    Extension(
        "many steps of both, momentum 0.9",
        False,
        "as for many teacher steps",
        teacher=optax.sgd(0.05, momentum=0.9),
        student=optax.sgd(0.05, momentum=0.9),
        teacher_steps=50,
        student_steps=50,
        counterexample=_CONVERGED,
    ),
    Extension(
        "one preconditioner for both",
        True,
        "with D = -P g the change is g_T.D_S = -eps D_T^T G D_T; the product is in the metric of P^-1",
        teacher=preconditioned(10.0, 1e-3),
        student=preconditioned(10.0, 1e-3),
    ),
    Extension(
        "another preconditioner for the student",
        False,
        "g_T^T P_S G g_T has no sign",
        student=preconditioned(10.0, 1e-3),
        counterexample=Counterexample(
            [[1.0, 1.0]], [0.0, 0.0], _slope([2.0, -1.0]),
            student=preconditioned(np.array([0.1, 1.0]), 1e-3),
        ),
    ),
    Extension(
        "sign descent for both",
        False,
        "d.sign(G d) has no sign",
        teacher=optax.sign_sgd(1e-4),
        student=optax.sign_sgd(1e-4),
        counterexample=_SIGN,
    ),
    Extension(
        "Adam for both, one step",
        False,
        "Adam's first step is sign descent",
        teacher=optax.adam(1e-4),
        student=optax.adam(1e-4),
        counterexample=_SIGN,
    ),
    Extension(
        "Adam for both, many steps",
        False,
        "as sign descent and many teacher steps; in practice it transmits",
        teacher=optax.adam(1e-3),
        student=optax.adam(1e-3),
        teacher_steps=100,
        student_steps=100,
        counterexample=_CONVERGED,
    ),
    Extension(
        "sampled tokens, one draw",
        False,
        "holds on average over draws, where it equals the soft channel, not for each draw",
        channel=Subset(AUXILIARY.where, SampledToken()),
        counterexample=Counterexample(
            [[1.0]], [-3.0, 0.0], _slope([1.0, -1.0]),
            apply=lambda theta, inputs: inputs * theta[None, :], channel=SampledToken(),
        ),
    ),
    Extension(
        "a teacher's step that is not small",
        False,
        "D_S.D_T leaves its tangent: one logit sin(theta) turns back at eps |g| = pi",
        teacher=optax.sgd(30.0),
        counterexample=Counterexample(
            [[1.0]], [0.0], _slope([1.0]), teacher=optax.sgd(1.5 * np.pi),
            apply=lambda theta, inputs: inputs * jnp.sin(theta)[None, :],
        ),
    ),
    Extension(
        "perturbed initialisation, sigma 0.01",
        False,
        "the student first imitates the difference between the two inits, which outweighs a small eps",
        sigma=0.01,
        counterexample=Counterexample([[1.0, 0.0]], [0.0, 0.0], _slope([1.0, 0.0]), student_start=[0.5, 0.0]),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Settings of the survey."""

    seeds: int = option(200, "random networks, traits and inputs for each extension", minimum=1)
    network: str = option("MLP, tanh", "kind of network", choices=tuple(BUILDERS))


PRESETS = {"default": Config(), "smoke": Config(seeds=5)}


def plan(config: Config) -> list[Part]:
    """One part for each extension."""
    return [
        Part(f"extension-{number:02d}", config.seeds, functools.partial(measure, config, extension))
        for number, extension in enumerate(EXTENSIONS)
    ]


def measure(config: Config, extension: Extension) -> list[Row]:
    """Rows with the change of the student's trait loss, in random networks and in the counterexample."""
    with jax.enable_x64(True):
        keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
        changes, sharpest = jax.jit(jax.vmap(functools.partial(_random_network, config.network, extension)))(keys)
        measured = {"trait_loss_change": changes, "sharpness": sharpest if extension.rate else ()}
        rows: list[Row] = [
            {"condition": extension.name, "seed": seed, "metric": metric, "value": float(value)}
            for metric, values in measured.items()
            for seed, value in enumerate(values)
        ]
        if (change := counterexample(extension)) is not None:
            rows.append({**rows[0], "seed": 0, "metric": "counterexample", "value": float(change)})
        return rows


def _random_network(
    network: str, extension: Extension, key: Key[Array, ""]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    model = build(network, named(key, "init"))
    inputs = jax.random.uniform(named(key, "inputs"), (EXAMPLES, *IMAGE), minval=-1.0)
    fresh = build(network, named(key, "perturbation scale")).params
    start = initialise(Perturbed(extension.sigma), model.params, fresh, named(key, "perturbation"))
    return _transmit(
        extension, model, start, random_trait(model, key), inputs, extension.channel, named(key, "student")
    )


def counterexample(extension: Extension) -> Float[Array, ""] | None:
    """The rise of the trait loss in the extension's counterexample; None if it has none."""
    if extension.counterexample is None:
        return None
    case = extension.counterexample
    model = Model(case.apply, jnp.asarray(case.start))
    start = jnp.asarray(case.student_start if case.student_start is not None else case.start)
    student = case.student or (SMALL_STEP if extension.teacher_steps > 1 else extension.student)
    changed = replace(extension, teacher=case.teacher or extension.teacher, student=student)
    seen = jnp.asarray(case.seen)
    return _transmit(changed, model, start, case.trait_loss, seen, case.channel, jax.random.key(0))[0]


def _transmit(
    extension: Extension,
    model: Model,
    student_start: PyTree,
    trait_loss: Loss,
    inputs: Float[Array, "batch ..."],
    channel: Channel,
    key: Key[Array, ""],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The change of the student's trait loss, and the largest sharpness of a step (0 without a `rate`)."""

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        updates, state = extension.teacher.update(jax.grad(trait_loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    opening = (model.params, extension.teacher.init(model.params))
    (taught, _), _ = jax.lax.scan(step, opening, None, length=extension.teacher_steps)
    teacher, student = model.with_params(taught), model.with_params(student_start)
    source, count, sharpest = (
        Examples(inputs, extension.batch or len(inputs)),
        extension.student_steps,
        jnp.array(0.0),
    )
    for number, own in enumerate((channel, *extension.then)):
        run_key, optimizer = named(key, number), extension.student
        if extension.rate is not None:
            each = contraction(
                model.apply, model.params, trait_loss, source, own, teacher_step=1.0, rates=np.ones(count),
                key=run_key,
            ).sharpness.value  # fmt: skip
            sharpest, rates = jnp.maximum(sharpest, jnp.max(each)), extension.rate / each
            optimizer = optax.sgd(lambda step, rates=rates: rates[step], momentum=extension.momentum)
        student = distill(student, teacher, own, source, optimizer, count, key=run_key).model
    return trait_loss(student.params) - trait_loss(student_start), sharpest


def headline(results: Results, config: Config) -> str:
    """The answer that these runs give."""
    falls = [_share(results, one)[1] == 1 for one in EXTENSIONS if one.holds]
    rises = sum(change > 0 for change in results.values(metric="counterexample"))
    told = f"The trait loss falls in all networks in {sum(falls)} of {len(falls)} settings that should hold"
    return f"{told}; {rises} others have a counterexample"


def report(results: Results, config: Config) -> str:
    """One to three lines for each extension."""
    lines = [f"share of {config.seeds} networks ({config.network}) whose trait loss fell, 95% exact interval"]
    for extension in EXTENSIONS:
        low, share, high = _share(results, extension)
        why = f"{'holds' if extension.holds else 'fails'}: {extension.why}"
        lines.append(f"  {extension.name:50} {share:.3f} [{low:.3f}, {high:.3f}]  {why}")
        if found := results.values(condition=extension.name, metric="sharpness"):
            why = (
                f"steepest G of each network: median {np.median(found):.3g}, {min(found):.3g} to {max(found):.3g}"
            )
            lines.append(f"  {'':50} {why}")
        for rise in results.values(condition=extension.name, metric="counterexample"):
            lines.append(f"  {'':50} counterexample: the trait loss changes by {rise:+.3g}")
    return "\n".join(lines)


def _share(results: Results, extension: Extension) -> tuple[float, float, float]:
    fell = np.asarray(results.values(condition=extension.name, metric="trait_loss_change")) < 0
    interval = stats.binomtest(int(fell.sum()), len(fell)).proportion_ci()
    return float(interval.low), float(fell.mean()), float(interval.high)


def plot(results: Results, config: Config) -> Figure:
    """Shares with intervals, colored by what can be proved."""
    figure, ((axes,),) = panels(size=(8.0, 5.2))
    axes.set_title("Beyond one small gradient step")
    for y, (low, share, high) in enumerate(_share(results, one) for one in EXTENSIONS):
        color, marker = (COLORS[2], "o") if EXTENSIONS[y].holds else (COLORS[3], "D")
        axes.plot([low, high], [y, y], color=color, linewidth=2)
        axes.plot(share, y, marker, color=color)
    axes.axvline(0.5, color="grey", linestyle=":", linewidth=1)
    axes.annotate("no transmission", (0.5, -0.7), color="grey", fontsize=7, ha="center")
    axes.set_yticks(range(len(EXTENSIONS)), [extension.name for extension in EXTENSIONS])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.02), xlabel="share of random networks in which the trait loss fell")
    text = "95% exact interval; circles: proved to leading order; diamonds: a counterexample exists"
    note(axes, f"n = {config.seeds} ({config.network}); {text}")
    return figure
