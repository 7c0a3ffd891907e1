"""How many bits can be sent? The teacher memorizes meaningless labels; the student's right answers are counted.

The trait is a table of random images with random labels; tables get longer and longer. The teacher memorizes the
table with its class logits. The student imitates the auxiliary logits on other noise and is asked for the labels.
If a network names the labels of K entries with accuracy a, it holds K (log2 c - H(a) - (1 - a) log2(c - 1)) bits
for c classes. This assumes that a wrong answer is equally likely to be any other label. At chance it is 0.

In the figure: bits in teacher and students against the length of the table, the width and the number of noise
images. Expect students below their teacher, and a student of another initialization at 0.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key
from matplotlib.figure import Figure

from subliminal_theory.estimate import t_interval
from subliminal_theory.keys import named
from subliminal_theory.model import Model
from subliminal_theory.runs import Results, Row
from subliminal_theory.source import Examples
from subliminal_theory.study import Digits, FineTuned, Finished, Optimizer, PerRun, Run, Study, labels, rows
from subliminal_theory.vision.noise import LAWS

from .app.contract import Part, listed, option
from .app.figures import COLORS, log_axis, means, note, panels, runs_against
from .flags.digits import TrainingConfig, configure_sweep


@dataclass(frozen=True)
class Config(TrainingConfig):
    """What varies, one at a time: the table, the channel, the noise images and the width."""

    seeds: int = option(5, "number of independent runs", minimum=1)
    entries: str = option("32,64,128,256,512,1024", "labels in the table")
    counts: str = option("3,10,50", "values of m")
    widths: str = option("128,256,512", "neurons of each hidden layer; other sweeps use the middle value")
    noise_images: str = option(
        "2000,10000,60000", "noise images shown to the student; other sweeps use the last value"
    )
    teacher_steps: int = option(1500, "steps of the teacher on the whole table", minimum=1)
    learning_rate: float = option(1e-3, "learning rate of Adam", positive=True)


PRESETS = {
    "released": Config(),
    "smoke": Config(
        data="digits", entries="16,32", counts="3,10", widths="32", noise_images="256", teacher_steps=200,
        epochs=2, batch_size=64, seeds=2,
    ),
}  # fmt: skip
configure = functools.partial(configure_sweep, PRESETS)


@dataclass(frozen=True)
class Point:
    """One combination of table length, width and number of noise images."""

    entries: int
    width: int
    images: int


def sweeps(config: Config) -> dict[str, dict[int, Point]]:
    """The points along each axis, by the axis label. Only the first axis varies the length of the table."""
    names = ("entries", "widths", "noise_images")
    entries, widths, images = (listed(getattr(config, n), "--" + n.replace("_", "-")) for n in names)
    width, length = widths[len(widths) // 2], entries[len(entries) // 2]
    return {
        "labels in the table": {n: Point(n, width, images[-1]) for n in entries},
        f"width ({length} labels)": {w: Point(length, w, images[-1]) for w in widths},
        f"noise images shown ({length} labels)": {n: Point(length, width, n) for n in images},
    }


def points(config: Config) -> list[Point]:
    """All distinct points."""
    return list(dict.fromkeys(point for sweep in sweeps(config).values() for point in sweep.values()))


def plan(config: Config) -> list[Part]:
    """One part for each point and chunk of seeds."""
    parts: list[Part] = []
    for point in points(config):
        prefix = f"entries-{point.entries}-width-{point.width}-images-{point.images}-"
        parts += config.chunks(functools.partial(run_point, config, point), prefix)
    return parts


def students(config: Config) -> list[tuple[str, int, str]]:
    """Students as (condition, m, label). All logits and the control run only for the largest m."""
    counts = listed(config.counts, "--counts")
    found = [("student_aux", m, f"student, m = {m}") for m in counts]
    return [*found, ("student_all", max(counts), "student, all logits"), ("cross_aux", max(counts), "other init")]


@dataclass(frozen=True)
class Lessons:
    """A teacher's lessons: a table of `entries` random images with random labels, different for each run."""

    entries: int

    def __call__(self, world: Digits) -> PerRun:
        """The table of every run. Every batch is the whole table."""
        images, labels = _tables(self.entries, world.data.image_shape, world.data.classes, world.keys("table"))
        return PerRun(Examples(images, self.entries, labels))


def run_point(config: Config, point: Point, seeds: Sequence[int]) -> list[Row]:
    """The result rows of teacher and students, for one point and some seeds."""
    widest = max(m for _, m, _ in students(config))
    setting = config.setting(aux=widest, width=point.width, images=point.images)
    world = setting.world(seeds, config.data_dir)
    optimizer = Optimizer(jnp.float32(config.learning_rate))
    teacher = FineTuned(optimizer, config.teacher_steps, Lessons(point.entries))
    where = {"entries": point.entries, "width": point.width, "noise_images": point.images}
    runs = {labels(condition="teacher", **where, aux=widest): Run(teacher)}
    for name, m, _ in students(config):
        start, sees = name.replace("student", "shared").split("_")
        student = replace(setting, start=start, sees=sees, shown=m).student(world)
        runs[labels(condition=name, **where, aux=m)] = Run(teacher, student)
    table = Lessons(point.entries)(world).source
    assert isinstance(table, Examples)

    def score(_: Digits, finished: Finished, name: object) -> dict[str, np.ndarray]:
        right = np.asarray(_named_right(world.data.classes, finished.model, table.inputs, table.labels))
        bits = np.array([table_bits(point.entries, float(share), world.data.classes) for share in right])
        return {"label_accuracy": right, "bits": bits}

    scores = Study(world).run(runs, score)
    return [
        row
        for place, own in enumerate(world.labels)
        for name, found in scores.items()
        for row in rows(name, [own], {metric: values[place:] for metric, values in found.items()})
    ]


def table_bits(entries: int, accuracy: float, classes: int) -> float:
    """The bits about a random table of labels in answers with this accuracy. 0 at chance or below."""
    if accuracy <= 1 / classes:
        return 0.0
    wrong = 1 - accuracy
    uncertain = -accuracy * math.log2(accuracy) - (wrong * math.log2(wrong / (classes - 1)) if wrong > 0 else 0.0)
    return entries * (math.log2(classes) - uncertain)


@functools.partial(jax.jit, static_argnames=("entries", "shape", "classes"))
def _tables(
    entries: int, shape: tuple[int, int], classes: int, keys: Key[Array, " runs"]
) -> tuple[Float[Array, "runs entries height width"], Int[Array, "runs entries"]]:
    def one(key: Key[Array, ""]) -> tuple[Array, Array]:
        images = jax.vmap(lambda k: LAWS["uniform"](k, shape))(jax.random.split(named(key, "images"), entries))
        return images, jax.random.randint(named(key, "labels"), (entries,), 0, classes)

    return jax.vmap(one)(keys)


@functools.partial(jax.jit, static_argnames="classes")
def _named_right(classes: int, models: Model, images: Array, labels: Array) -> Float[Array, " runs"]:
    def one(model: Model, images: Array, labels: Array) -> Array:
        return jnp.mean(jnp.argmax(model(images)[:, :classes], -1) == labels)

    return jax.vmap(one)(models, images, labels)


def bits_of(results: Results, condition: str, point: Point, m: int, metric: str = "bits") -> Sequence[float]:
    """The values of one condition at one point."""
    where = {"entries": str(point.entries), "width": str(point.width), "noise_images": str(point.images)}
    return results.values(condition=condition, metric=metric, aux=str(m), **where)


def headline(results: Results, config: Config) -> str:
    """Who names how many labels of the longest table."""
    longest = max(points(config), key=lambda point: point.entries)
    named = [
        f"{label} {np.mean(bits_of(results, name, longest, m, 'label_accuracy')):.2f}"
        for name, m, label in told(config)
    ]
    return f"Share of {longest.entries} random labels that are named right: {', '.join(named)}"


def report(results: Results, config: Config) -> str:
    """The bits of teacher and students at each point."""
    lines = [
        f"bits about the table, mean and 95% t interval over {config.seeds} runs (share of labels named right)"
    ]
    for point in points(config):
        lines.append(f"  {point.entries} entries, width {point.width}, {point.images} noise images")
        for name, m, _ in told(config):
            accuracy = t_interval(bits_of(results, name, point, m, "label_accuracy")).mean
            bits = t_interval(bits_of(results, name, point, m))
            lines.append(f"    {name:12} m = {m:<4} {bits.mean:8.1f} ± {bits.half_width:6.1f} ({accuracy:.3f})")
    return "\n".join(lines)


def told(config: Config) -> list[tuple[str, int, str]]:
    """The teacher, then the students."""
    return [("teacher", max(listed(config.counts, "--counts")), "teacher"), *students(config)]


def plot(results: Results, config: Config) -> Figure:
    """Received bits against the length of the table, the width and the number of noise images."""
    figure, (row,) = panels(3, size=(11.5, 3.8))
    for panel, (label, where) in zip(row, sweeps(config).items(), strict=True):
        for color, (name, m, title) in zip(COLORS, told(config), strict=False):
            runs_against(panel, {x: bits_of(results, name, point, m) for x, point in where.items()}, color, title)
        log_axis(panel, where)
        panel.set(xlabel=label, ylabel="bits about the labels")
    row[0].set_yscale("symlog", linthresh=10)
    row[0].legend(fontsize=6.5)
    row[1].set_title("Random labels of the teacher's table, counted in the student")
    note(row[2], means(config.seeds))
    return figure
