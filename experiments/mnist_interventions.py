"""What stops the trait, and what does it cost in imitation?

One student a seed for each intervention and strength: the trait gradient projected out of every update, a penalty
for leaving the base model (KL over all its logits), part of the targets from the untrained teacher, noise on the
initial weights, frozen layers, re-drawn layers, a convolutional student that has the teacher's output layer and
nothing else of it, and stopping early. Trait: test accuracy; imitation: KL on the channel over held-out noise.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree
from matplotlib.figure import Figure

from subliminal_theory.alignment import project_out
from subliminal_theory.channel import SoftLogits, Subset, WeightedSum, imitation_loss, weighted_mean
from subliminal_theory.distill import Trained, distill, require_finite
from subliminal_theory.estimate import Estimate, t_interval
from subliminal_theory.model import Apply, Model
from subliminal_theory.runs import Results, Row
from subliminal_theory.vision.noise import NoiseImages

from .app.contract import Part, option
from .app.figures import COLOURS, note, panels
from .laboratory import Laboratory, cnn_student
from .sweep import EMBEDDED_DIGITS, Classroom, TrainingConfig, chunks, classroom, configure_sweep

# Digits on which the trait's gradient is measured, and noise images on which imitation is.
TRAIT_IMAGES, HELD_OUT = 1000, 4096


@dataclass(frozen=True)
class Intervention:
    """What is done to a student: `family` groups those drawn in one colour, `label` tells the strength."""

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
        """The condition of its rows."""
        return f"{self.family} {self.label}".strip()


def interventions(depth: int) -> list[Intervention]:
    """All of them, for a network with so many hidden layers."""
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

    seeds: int = option(10, "independent runs", minimum=1)
    aux: int = option(10, "m, the number of auxiliary logits", minimum=1)
    width: int = option(256, "neurons of each hidden layer; the CNN needs a multiple of its last maps", minimum=1)
    depth: int = option(2, "hidden layers", minimum=1)


PRESETS = {"released": Config(), "digits": Config(aux=50, **EMBEDDED_DIGITS)}
configure = functools.partial(configure_sweep, PRESETS)


def plan(config: Config) -> list[Part]:
    """Seeds in chunks."""
    setting = config.setting(aux=config.aux, width=config.width, depth=config.depth)

    def run(seeds: Sequence[int]) -> list[Row]:
        room = classroom(setting, seeds, config.data_dir)
        rows: list[Row] = []
        for group in grouped(interventions(config.depth)):
            rows += measured(room, room.laboratory.at(setting), group)
        return rows

    return chunks(range(config.first_seed, config.first_seed + config.seeds), config.chunk or 1, run)


def grouped(every: Sequence[Intervention]) -> list[list[Intervention]]:
    """Those that differ in values only, so that they train as one stack."""
    groups: dict[tuple, list[Intervention]] = {}
    for one in every:
        groups.setdefault((one.project, one.frozen, one.network), []).append(one)
    return list(groups.values())


def measured(room: Classroom, laboratory: Laboratory, group: Sequence[Intervention]) -> list[Row]:
    """Rows of a group of interventions; those of the student without any also at some epochs before the end."""
    starts = [start(room, laboratory, one) for one in group]
    models = jax.tree.map(lambda *leaves: jnp.stack(leaves, 1), *starts)
    weights = jnp.asarray([[1 - one.clean, one.clean, one.penalty] for one in group], jnp.float32)
    epoch, epochs = laboratory.steps(1, laboratory.source()), laboratory.setting.epochs
    early = group[0].family == "none"
    stops = sorted({max(1, round(epochs * part / 5)) for part in range(1, 5)} - {epochs}) if early else []
    marks = tuple(epoch * stop for stop in stops)
    recipe = (laboratory, group[0].project, group[0].frozen, marks)
    trained = _imitate(*recipe, models, room.teacher, room.init, weights, room.stream("students"))
    losses = trained.losses.reshape(-1, trained.losses.shape[-1])
    require_finite(losses, [f"{one.name} of seed {seed}" for seed in room.seeds for one in group])
    stages = [(one.name, trained.model, place) for place, one in enumerate(group)]
    if early:
        stages += [(f"early stopping {n}", model, 0) for n, model in zip(stops, trained.snapshots, strict=True)]
    rows: list[Row] = []
    for name, models, place in stages:
        model = jax.tree.map(lambda leaf, place=place: leaf[:, place], models)
        values = _measure(laboratory, model, room.teacher, room.stream("held out"))
        for metric, of_runs in zip(("test_accuracy", "imitation_loss"), values, strict=True):
            rows += [
                {"condition": name, "seed": int(seed), "metric": metric, "value": float(value)}
                for seed, value in zip(room.seeds, np.asarray(of_runs), strict=True)
            ]
    return rows


def start(room: Classroom, laboratory: Laboratory, one: Intervention) -> Model:
    """Where a student starts, once the audit has let it pass."""
    network = cnn_student(laboratory.data, laboratory.setting.width) if one.network == "cnn" else {}
    setting = dataclasses.replace(laboratory.setting, start=one.start, amount=one.amount, **network)
    model = room.start(setting)
    laboratory.at(setting).audit(model, room.init, room.teacher)
    return model


@dataclass(frozen=True)
class _Twice:
    """[z, z]: a student that is charged for two targets at once."""

    apply: Apply

    def __call__(self, params: PyTree, inputs: PyTree) -> Float[Array, "..."]:
        logits = self.apply(params, inputs)
        return jnp.concatenate([logits, logits], -1)


@dataclass(frozen=True)
class _Both:
    """[z_teacher, z_base] of params {"teacher", "base"}."""

    apply: Apply

    def __call__(self, params: PyTree, inputs: PyTree) -> Float[Array, "..."]:
        return jnp.concatenate([self.apply(params[name], inputs) for name in ("teacher", "base")], -1)


@functools.partial(jax.jit, static_argnames=("laboratory", "project", "frozen", "marks"))
def _imitate(
    laboratory: Laboratory,
    project: bool,
    frozen: tuple[str, ...],
    marks: tuple[int, ...],
    models: Model,
    teacher: Model,
    base: Model,
    weights: Float[Array, "stack 3"],
    keys: Key[Array, " runs"],
) -> Trained:
    """Students of (1 - clean) KL(teacher) + clean KL(base) on the channel, + penalty KL(base) on all logits."""
    source, n = laboratory.source(), laboratory.outputs
    images = laboratory.scale(jnp.asarray(laboratory.data.train_images[:TRAIT_IMAGES]))
    labels = jnp.asarray(laboratory.data.train_labels[:TRAIT_IMAGES].astype(np.int32))
    seen, nothing = laboratory.channel().visible(n), jnp.zeros(n, bool)
    masks = ([seen, nothing], [nothing, seen], [nothing, ~nothing])
    channels = [Subset(jnp.concatenate(mask), SoftLogits()) for mask in masks]
    steps = laboratory.steps(laboratory.setting.epochs, source)

    def one(
        student: Model, weight: Float[Array, " 3"], teacher: Model, base: Model, key: Key[Array, ""]
    ) -> Trained:
        def trait_gradient(params: PyTree) -> PyTree:
            def loss(params: PyTree) -> Array:
                losses = laboratory.trait_loss(student.apply(params, images), labels)
                return weighted_mean(losses, jnp.ones(len(labels)))

            return jax.grad(loss)(params)

        optimizer = laboratory.student_optimizer(laboratory.setting.rate)
        if project:
            optimizer = optax.chain(optimizer, project_out(trait_gradient))
        twice = Model(_Twice(student.apply), student.params)
        both = Model(_Both(teacher.apply), {"teacher": teacher.params, "base": base.params})
        run = distill(
            twice.freeze(*frozen) if frozen else twice,
            both, WeightedSum(channels, weight), source, optimizer, steps, key, snapshots=marks,
        )  # fmt: skip
        once = [student.with_params(model.all_params) for model in (run.model, *run.snapshots)]
        return Trained(once[0], run.losses, None, tuple(once[1:]))

    per_run = jax.vmap(one, in_axes=(0, 0, None, None, None))
    return jax.vmap(per_run, in_axes=(0, None, 0, 0, 0))(models, weights, teacher, base, keys)


@functools.partial(jax.jit, static_argnames="laboratory")
def _measure(
    laboratory: Laboratory, students: Model, teachers: Model, keys: Key[Array, " runs"]
) -> tuple[Array, Array]:
    """Test accuracy, and imitation loss on held-out noise."""
    source = NoiseImages(laboratory.data.image_shape, HELD_OUT)
    channel, test = laboratory.channel(), laboratory.test()

    def one(student: Model, teacher: Model, key: Key[Array, ""]) -> tuple[Array, Array]:
        batch = source.batch(key, jax.tree.map(lambda leaf: leaf[0], source.schedule(key, 1)))
        targets = channel.targets(None, teacher(batch.inputs))
        loss = imitation_loss(channel, student(batch.inputs), targets, batch.weights)
        return laboratory.accuracy(student, *test), loss

    return jax.vmap(one)(students, teachers, keys)


def report(results: Results, config: Config) -> str:
    """Trait and imitation of each intervention."""
    lines = [
        f"{config.data}, m = {config.aux}; mean and 95% t interval over runs",
        f"  {'intervention':32} {'test accuracy':24} KL on held-out noise, nats",
    ]
    for name in results.distinct("condition"):
        accuracy = t_interval(results.values(condition=name, metric="test_accuracy"))
        loss = t_interval(results.values(condition=name, metric="imitation_loss"))
        lines.append(f"  {name:32} {accuracy!s:24} {loss.mean:.2e} ± {loss.half_width:.1e}")
    return "\n".join(lines)


def half(estimate: Estimate) -> float | None:
    """The half-width to draw, if there is one."""
    return None if estimate.n == 1 else estimate.half_width


def plot(results: Results, config: Config) -> Figure:
    """The frontier: trait against imitation loss, a point for each intervention and strength."""
    figure, ((axes,),) = panels(size=(8.6, 5.2))
    families: dict[str, list[tuple[str, str]]] = {}
    for one in interventions(config.depth):
        families.setdefault(one.family, []).append((one.name, one.label))
    stopped = [name for name in results.distinct("condition") if name.startswith("early stopping")]
    families["early stopping"] = [(name, f"epoch {name.split()[-1]}") for name in stopped]
    markers = "osD^vP*XH"
    for number, (family, members) in enumerate(families.items()):
        colour = "grey" if family == "early stopping" else COLOURS[number]
        for name, label in members:
            accuracy = t_interval(results.values(condition=name, metric="test_accuracy"))
            loss = t_interval(results.values(condition=name, metric="imitation_loss"))
            axes.errorbar(
                loss.mean, accuracy.mean, yerr=half(accuracy), xerr=half(loss),
                fmt=markers[number % len(markers)], color=colour, markersize=5, capsize=2, linewidth=1,
                label=family if (name, label) == members[0] else None,
            )  # fmt: skip
            axes.annotate(label, (loss.mean, accuracy.mean), (5, 3), textcoords="offset points", fontsize=6)
    axes.axhline(0.1, color="grey", linestyle=":", linewidth=1)
    axes.set_ylim(0, 1.05)
    axes.set_xscale("log")
    axes.set_xlabel("imitation loss on held-out noise: KL(teacher || student) on the channel, nats")
    axes.set_ylabel("trait: test accuracy of the student")
    axes.set_title(f"What stops the trait, and what it costs ({config.data}, m = {config.aux})")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    note(axes, f"mean and 95% t interval of n = {config.seeds} runs")
    return figure
