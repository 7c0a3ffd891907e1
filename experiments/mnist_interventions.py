"""What stops the trait, and what does it cost in imitation?

For each seed, one student for each intervention and strength. The interventions are: projecting the trait gradient
out of every update, a penalty for moving away from the base model (KL over all its logits), some targets from the
untrained teacher, noise on the initial weights, frozen layers, re-drawn layers, a convolutional student that
shares only the teacher's output layer, and stopping early. The trait is measured by test accuracy, and imitation
by KL on the channel over held-out noise.

In the figure: each point is one intervention: how much of the trait is left, and what it costs in imitation. An
intervention is good if it is at chance (0.1) with the imitation loss of the untouched student.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree
from matplotlib.figure import Figure

from subliminal_theory.alignment import project_out
from subliminal_theory.audit import audit
from subliminal_theory.channel import Channel, SoftLogits, Subset, WeightedSum, imitation_loss
from subliminal_theory.estimate import t_interval
from subliminal_theory.inits import Fresh
from subliminal_theory.model import Apply, Model
from subliminal_theory.runs import Results, Row
from subliminal_theory.source import batch_shapes
from subliminal_theory.study import Digits, Job, Optimizer, Study, finite, trained
from subliminal_theory.vision.datasets import ImageDataset
from subliminal_theory.vision.noise import NoiseImages

from .app.contract import Part, option
from .app.figures import COLORS, half_width, note, panels
from .app.headline import compared
from .flags.digits import EMBEDDED_DIGITS, SMOKE, Setting, TrainingConfig, cnn_student, configure_sweep
from .mnist_alignment import Trait

HELD_OUT = 4096  # imitation is measured on this many noise images


@dataclass(frozen=True)
class Intervention:
    """What is done to a student. A `family` is drawn in one color; `label` names the strength."""

    family: str
    label: str = ""
    start: str = "shared"
    amount: float = 0.0
    project: bool = False
    penalty: float = 0.0
    clean: float = 0.0
    frozen: tuple[str, ...] = ()
    network: str = "mlp"

    @property
    def name(self) -> str:
        """The condition of its result rows."""
        return f"{self.family} {self.label}".strip()


def interventions(depth: int) -> list[Intervention]:
    """All interventions, for a network with `depth` hidden layers."""
    heads, hidden = f"layers/{depth}/*", tuple(f"layers/{layer}/*" for layer in range(depth))
    return [
        Intervention("none"),
        Intervention("trait gradient projected out", project=True),
        *(Intervention("KL to the base", f"{beta:g}", penalty=beta) for beta in (0.03, 0.1, 0.3, 1, 3)),
        *(Intervention("clean targets", f"{share:.0%}", clean=share) for share in (0.1, 0.25, 0.5, 0.75)),
        *(Intervention("weight noise", f"{s:g}", "perturbed", s) for s in (0.1, 0.2, 0.4)),
        Intervention("frozen", "first layer", frozen=hidden[:1]),
        Intervention("frozen", "hidden layers", frozen=hidden),
        Intervention("frozen", "output layer", frozen=(heads,)),
        Intervention("re-drawn", "output layer", "shared_hidden"),
        Intervention("re-drawn", "hidden layers", "shared_heads"),
        Intervention("re-drawn", "all", "cross"),
        Intervention("CNN", "teacher's output layer", "shared_heads", network="cnn"),
        Intervention("CNN", "own output layer", "cross", network="cnn"),
    ]


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Settings of teacher and channel."""

    seeds: int = option(10, "number of independent runs", minimum=1)
    aux: int = option(10, "m, the number of auxiliary logits", minimum=1)
    width: int = option(256, "neurons of each hidden layer; the CNN needs a multiple of its last maps", minimum=1)
    depth: int = option(2, "hidden layers", minimum=1)


PRESETS = {
    "released": Config(),
    "digits": Config(aux=50, **EMBEDDED_DIGITS),
    "smoke": Config(aux=50, **SMOKE),
}
configure = functools.partial(configure_sweep, PRESETS)


def plan(config: Config) -> list[Part]:
    """One part for each chunk of seeds."""
    return config.chunks(functools.partial(run, config))


def run(config: Config, seeds: Sequence[int]) -> list[Row]:
    """The result rows of all interventions for some seeds. The plain student also has rows for earlier epochs."""
    setting = config.setting()
    world = setting.world(seeds, config.data_dir)
    study, value = Study(world), setting.run(world)
    assert value.student is not None
    teacher, channel, noise = study.teacher(value.teacher), value.student.channel, value.student.source
    every = interventions(config.depth)
    jobs = {one: job(world, setting, one, teacher, channel) for one in every}
    epoch, epochs = world.steps(1, noise), setting.epochs
    early = sorted({max(1, round(epochs * part / 5)) for part in range(1, 5)} - {epochs})
    stops: dict[Intervention, tuple[int, ...]] = dict.fromkeys(every, (epoch * epochs,))
    stops[every[0]] = tuple(epoch * stop for stop in (*early, epochs))
    rows: list[Row] = []
    for one, stop, result in trained(jobs, stops, world.keys("students"), world.computation):
        finite(result, [f"{one.name} of {name}" for name in world.names])
        student = Model(jobs[one].model.apply.apply, result.model.all_params)  # type: ignore[attr-defined]
        source = NoiseImages(world.data.image_shape, HELD_OUT)
        loss = _imitation(source, channel, student, teacher, world.keys("held out"))
        name = one.name if stop == epoch * epochs else f"early stopping {stop // epoch}"
        for metric, values in (("test_accuracy", world.accuracy(student)), ("imitation_loss", np.asarray(loss))):
            rows += [
                {"condition": name, **labels, "metric": metric, "value": float(value)}
                for labels, value in zip(world.labels, values, strict=True)
            ]
    return rows


def job(world: Digits, setting: Setting, one: Intervention, teacher: Model, channel: Channel) -> Job:
    """A student whose loss is (1 - clean) KL(teacher) + clean KL(base) on the channel + penalty KL(base) on all.

    Raises:
        InputError: the audit refuses it.
    """
    network = cnn_student(world.data, setting.width) if one.network == "cnn" else {}
    student = Setting(**{**vars(setting), **network, "start": one.start, "amount": one.amount}).student(world)
    start, base, source = world.start(student), world.initial(), student.source
    seen, nothing = channel.visible(world.logits), jnp.zeros(world.logits, bool)
    masks = ([seen, nothing], [nothing, seen], [nothing, ~nothing])
    weights = jnp.asarray([1 - one.clean, one.clean, one.penalty], jnp.float32)
    both = WeightedSum([Subset(jnp.concatenate(mask), SoftLogits()) for mask in masks], weights)
    audit(
        student_init=start.params,
        teacher_init=base.params,
        teacher=teacher.params,
        channel=both,
        logits=2 * world.logits,
        batch=batch_shapes(source),
        private=range(world.data.classes),
        cross_init=isinstance(student.start, Fresh),
    )
    rule: Any = Projected(optax.adam, start.apply, world.data) if one.project else optax.adam
    twice = Model(_Twice(start.apply), start.params)
    shown = Model(_Both(teacher.apply), {"teacher": teacher.params, "base": base.params})
    model = twice.freeze(*one.frozen) if one.frozen else twice
    return Job(model, source, Optimizer(student.optimizer.rate, rule), student.steps, shown, both)


@dataclass(frozen=True)
class Projected:
    """An optimizer that projects the trait gradient out of its updates."""

    rule: Any
    apply: Apply
    data: ImageDataset

    def __call__(self, rate: Any) -> optax.GradientTransformation:
        trait = Trait(self.data)
        return optax.chain(self.rule(rate), project_out(jax.grad(lambda params: trait(Model(self.apply, params)))))


@dataclass(frozen=True)
class _Twice:
    """[z, z]: the student's logits twice, so that its loss can have two targets at once."""

    apply: Apply

    def __call__(self, params: PyTree, inputs: PyTree) -> Float[Array, "..."]:
        logits = self.apply(params, inputs)
        return jnp.concatenate([logits, logits], -1)


@dataclass(frozen=True)
class _Both:
    """[z_teacher, z_base]: the logits of both models, for params {"teacher", "base"}."""

    apply: Apply

    def __call__(self, params: PyTree, inputs: PyTree) -> Float[Array, "..."]:
        return jnp.concatenate([self.apply(params[name], inputs) for name in ("teacher", "base")], -1)


@functools.partial(jax.jit, static_argnames="source")
def _imitation(
    source: NoiseImages, channel: Channel, students: Model, teachers: Model, keys: Key[Array, " runs"]
) -> Float[Array, " runs"]:
    """Imitation loss on held-out noise."""

    def one(student: Model, teacher: Model, key: Key[Array, ""]) -> Array:
        batch = source.batch(key, jax.tree.map(lambda leaf: leaf[0], source.schedule(key, 1)))
        targets = channel.targets(None, teacher(batch.inputs))
        return imitation_loss(channel, student(batch.inputs), targets, batch.weights)

    return jax.vmap(one)(students, teachers, keys)


def headline(results: Results, config: Config) -> str:
    """The answer that these runs give."""
    plain, projected = (
        results.values(condition=name, metric="test_accuracy") for name in ("none", "trait gradient projected out")
    )
    what = "test accuracy without the intervention less with it"
    return compared("Does projecting out the trait gradient weaken the trait?", what, plain, projected)


def report(results: Results, config: Config) -> str:
    """The trait and the imitation loss of each intervention."""
    lines = [
        f"{config.data}, m = {config.aux}; mean and 95% t interval over runs",
        f"  {'intervention':32} {'test accuracy':24} KL on held-out noise, nats",
    ]
    for name in results.distinct("condition"):
        accuracy = t_interval(results.values(condition=name, metric="test_accuracy"))
        loss = t_interval(results.values(condition=name, metric="imitation_loss"))
        lines.append(f"  {name:32} {accuracy!s:24} {loss.mean:.2e} ± {loss.half_width:.1e}")
    return "\n".join(lines)


def plot(results: Results, config: Config) -> Figure:
    """The trait against the imitation loss, with a point for each intervention and strength."""
    figure, ((axes,),) = panels(size=(8.6, 5.2))
    families: dict[str, list[tuple[str, str]]] = {}
    for one in interventions(config.depth):
        families.setdefault(one.family, []).append((one.name, one.label))
    stopped = [name for name in results.distinct("condition") if name.startswith("early stopping")]
    families["early stopping"] = [(name, f"epoch {name.split()[-1]}") for name in stopped]
    markers = "osD^vP*XH"
    for number, (family, members) in enumerate(families.items()):
        color = "grey" if family == "early stopping" else COLORS[number]
        for name, label in members:
            accuracy = t_interval(results.values(condition=name, metric="test_accuracy"))
            loss = t_interval(results.values(condition=name, metric="imitation_loss"))
            axes.errorbar(
                loss.mean, accuracy.mean, yerr=half_width(accuracy), xerr=half_width(loss),
                fmt=markers[number % len(markers)], color=color, markersize=5, capsize=2, linewidth=1,
                label=family if (name, label) == members[0] else None,
            )  # fmt: skip
            axes.annotate(label, (loss.mean, accuracy.mean), (5, 3), textcoords="offset points", fontsize=6)
    axes.axhline(0.1, color="grey", linestyle=":", linewidth=1)
    axes.set(
        ylim=(0, 1.05),
        xscale="log",
        xlabel="imitation loss on held-out noise: KL(teacher || student) on the channel, nats",
        ylabel="trait: test accuracy of the student",
        title=f"What stops the trait, and what it costs ({config.data}, m = {config.aux})",
    )
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    note(axes, f"mean and 95% t interval of n = {config.seeds} runs")
    return figure
