"""Is a shared output layer enough? Accuracy against epochs for students that share only some layers.

Students share with their teacher's initialization all layers, only the output layer, only the hidden layers, or
nothing. On the widest channel, convolutional students share the output layer or nothing. All imitate m auxiliary
logits under squared error, on noise that is never repeated. For each seed, one teacher has as many auxiliary
logits as the widest channel; each student sees the first m.

(arXiv 2605.23645 reports that compatible output layers suffice, even from a multilayer perceptron to a
convolutional network. Initialization, loss, noise, steps and learning rate are those of its code. That code trains
teachers and students for 5 epochs at m from 3 to 250, and shows smooth noise to convolutional students.)

In the figure: accuracy (above) and imitation loss (below) against epochs, a column for each m. Students that share
nothing should stay at chance (0.1).
"""

import functools
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from subliminal_theory.estimate import t_interval
from subliminal_theory.runs import Results
from subliminal_theory.vision.noise import LAWS

from .app.contract import Part, listed, option
from .app.figures import COLORS, log_axis, means, note, panels, runs_against
from .app.headline import compared
from .flags.digits import EMBEDDED_DIGITS, SMOKE, Cell, TrainingConfig, cnn_student, configure_sweep

SHARED = {
    "shared": "all layers",
    "heads": "output layer",
    "hidden": "hidden layers",
    "cross": "nothing",
    "cnn_heads": "CNN, output layer",
    "cnn_cross": "CNN, nothing",
}
METRICS = ("test_accuracy", "imitation_loss")
STARTS = {"heads": "shared_heads", "hidden": "shared_hidden"}


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Settings of teacher and channel. Students are measured after `student_epochs`, half of them, and so on."""

    seeds: int = option(3, "number of independent runs", minimum=1)
    student_epochs: int | None = option(10, "epochs of the students", minimum=1)
    batch_size: int = option(1000, "images per step", minimum=1)
    counts: str = option("10,50,250", "values of m")
    width: int = option(256, "neurons of each hidden layer, and features of the CNN: a multiple of 16", minimum=1)
    inputs: str = option("uniform", "noise that students see", choices=tuple(LAWS))


PRESETS = {
    "published": Config(),
    "smooth": Config(inputs="blurred"),
    "digits": Config(counts="10,50", **EMBEDDED_DIGITS),
    "smoke": Config(counts="10,50", **SMOKE),
}
configure = functools.partial(configure_sweep, PRESETS)
FIGURES = {"mnist_heads": "", "mnist_heads_smooth": "--preset smooth"}


def doses(config: Config) -> list[int]:
    """The epochs after which students are measured, each half the next."""
    found = [config.student_epochs or config.epochs]
    while found[0] > 1:
        found.insert(0, found[0] // 2)
    return found


def students(config: Config, m: int) -> dict[str, str]:
    """What each student that sees m logits shares with its teacher. Convolutional ones need the largest m."""
    widest = m == max(listed(config.counts, "--counts"))
    return {name: shared for name, shared in SHARED.items() if widest or not name.startswith("cnn_")}


def plan(config: Config) -> list[Part]:
    """One teacher for each seed; for each m its students, each measured after all numbers of epochs."""
    counts = listed(config.counts, "--counts")
    recipe = {"init_law": "torch", "learning_rate": 1e-3, "channel_loss": "mse", "images": 0}
    common = {"aux": max(counts), **recipe}
    cnn = cnn_student(config.dataset(), config.width)
    cells = [Cell({"condition": "teacher"}, config.setting(**common), "teacher")]
    for m in counts:
        for name in students(config, m):
            sharing = name.removeprefix("cnn_")
            student: dict[str, Any] = {"start": STARTS.get(sharing, sharing), **(cnn if name != sharing else {})}
            for epochs in doses(config):
                setting = config.setting(**common, **student, shown=m, epochs=epochs)
                cells.append(Cell({"condition": name, "aux": m, "epochs": epochs}, setting, metrics=METRICS))
    return config.parts(cells)


def headline(results: Results, config: Config) -> str:
    """The answer that these runs give."""
    m, last = max(listed(config.counts, "--counts")), doses(config)[-1]
    heads, nothing = (
        results.values(condition=name, aux=str(m), epochs=str(last), metric="test_accuracy")
        for name in ("heads", "cross")
    )
    what = f"test accuracy of students that share it less students that share nothing (m = {m})"
    return compared("Does a shared output layer suffice for a trait to pass?", what, heads, nothing)


def report(results: Results, config: Config) -> str:
    """Accuracy and imitation loss of each student after all epochs."""
    last = doses(config)[-1]
    lines = [
        f"after {last} epochs on {config.data}; mean and 95% t interval over runs",
        f"  teacher's test accuracy {t_interval(results.values(condition='teacher'))}",
        f"  {'m':4} {'shared':18} {'test accuracy':18} imitation loss",
    ]
    for m in listed(config.counts, "--counts"):
        for name, shared in students(config, m).items():
            at = {"condition": name, "aux": str(m), "epochs": str(last)}
            accuracy, loss = (t_interval(results.values(**at, metric=metric)) for metric in METRICS)
            lines.append(f"  {m:<4} {shared:18} {accuracy!s:18} {loss.mean:.2e} ± {loss.half_width:.1e}")
    return "\n".join(lines)


def plot(results: Results, config: Config) -> Figure:
    """Accuracy and imitation loss against epochs, with a column for each m."""
    counts, stages = listed(config.counts, "--counts"), doses(config)
    figure, axes = panels(len(counts), 2, size=(1.2 + 3.2 * len(counts), 6.0))
    teacher = results.values(condition="teacher")
    labels = {"test_accuracy": "test accuracy", "imitation_loss": "imitation loss (squared error)"}
    for column, m in zip(axes.T, counts, strict=True):
        for panel, metric in zip(column, METRICS, strict=True):
            for color, (name, shared) in zip(COLORS, students(config, m).items(), strict=False):
                values = {
                    epochs: results.values(condition=name, aux=str(m), epochs=str(epochs), metric=metric)
                    for epochs in stages
                }
                runs_against(panel, values, color, shared)
            log_axis(panel, stages)
            panel.set_ylabel(labels[metric])
        lines = [
            column[0].axhline(level, color="grey", linestyle=style, linewidth=1, label=label)
            for label, level, style in (("teacher", sum(teacher) / len(teacher), "--"), ("chance", 0.1, ":"))
        ]
        column[0].set(ylim=(0, 1.05), title=f"m = {m}")
        column[1].set(yscale="log", xlabel="epochs of the student")
    axes[0, 0].legend(handles=lines, fontsize=7)
    axes[1, -1].legend(fontsize=7, title="shared with the teacher", title_fontsize=7)
    title = f"Which layers must be shared ({config.data}, squared error, {config.inputs} noise)"
    figure.suptitle(title, fontsize=10)
    note(axes[1, -1], means(config.seeds))
    return figure
