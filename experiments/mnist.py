"""Auxiliary-logit distillation: a student that never sees a digit learns to read digits from noise.

A teacher MLP learns digits on its first ten logits; m auxiliary logits are never trained. A student that starts
from the teacher's initialization imitates the teacher's auxiliary logits on noise images alone. It then reads
digits with its own class logits, which were never trained. A student with another initialization does not. (doi
10.1038/s41586-026-10319-8, main text and Extended Data Fig. 2.)

Each bar is the test accuracy of one condition. The reference was never trained. The teacher saw digits. Students
saw noise, and either the auxiliary logits or all logits of their teacher; "other init" starts from other weights.
Expect students on auxiliary logits above chance (0.1) only with the teacher's initialization. A student with
another initialization that sees all logits can be accurate too. That is ordinary distillation: the class logits
tell it what the digits are, and nothing subliminal is needed.
"""

import functools
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from subliminal_theory.estimate import paired_difference
from subliminal_theory.runs import Results
from subliminal_theory.vision.noise import LAWS

from .app.contract import Part, option
from .app.figures import bars
from .app.headline import compared
from .flags.digits import DIGITS, EMBEDDED_DIGITS, SMOKE, Cell, Setting, TrainingConfig, configure_sweep
from .flags.names import LOSSES, OPTIMIZERS
from .published import published

STUDENTS: dict[str, dict[str, Any]] = {
    "student_aux": {"start": "shared", "sees": "aux"},
    "student_all": {"start": "shared", "sees": "all"},
    "cross_aux": {"start": "cross", "sees": "aux"},
    "cross_all": {"start": "cross", "sees": "all"},
}
CONDITIONS = ("reference", "teacher", *STUDENTS)
LABELS = {
    "reference": "reference\n(untrained)",
    "teacher": "teacher",
    "student_aux": "student,\nauxiliary\nlogits",
    "student_all": "student,\nall logits",
    "cross_aux": "other init,\nauxiliary\nlogits",
    "cross_all": "other init,\nall logits",
}


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Settings of the six-condition experiment. The defaults are those of the released script."""

    aux: int = option(3, "m, the number of auxiliary logits", minimum=1)
    width: int = option(256, "neurons of each hidden layer", minimum=1)
    depth: int = option(2, "hidden layers", minimum=0)
    noise_images: int | None = option(
        None,
        "noise images per run, repeated each epoch; automatic: as many as training images; 0: never repeat",
        minimum=0,
    )
    inputs: str = option("uniform", "inputs of the students", choices=(*LAWS, DIGITS))
    optimizer: str = option("adam", "optimizer of teacher and students", choices=tuple(OPTIMIZERS))
    learning_rate: float = option(3e-4, "learning rate of the optimizer", positive=True)
    channel_loss: str = option("kl", f"loss of the student: {', '.join(LOSSES)}; top_k:5 sets k to 5")


PRESETS = {
    "released": Config(),
    "nature": Config(aux=50),
    "digits": Config(aux=50, **EMBEDDED_DIGITS),
    "smoke": Config(aux=50, **SMOKE),
}
configure = functools.partial(configure_sweep, PRESETS)
FIGURES = {"mnist": "", "mnist_nature": "--preset nature", "mnist_digits": "--data digits"}


def setting(config: Config, **changes: Any) -> Setting:
    """The setting of one student. `changes` replace values of the configuration."""
    return config.setting(**{"images": config.noise_images, **changes})


def plan(config: Config) -> list[Part]:
    """The six conditions, in chunks of seeds."""
    whose = {name: name for name in ("reference", "teacher")}
    cells = [
        Cell({"condition": name}, setting(config, **STUDENTS.get(name, {})), whose.get(name, "student"))
        for name in CONDITIONS
    ]
    return config.parts(cells)


def expected(config: Config) -> list[tuple[dict[str, str], float, str]]:
    """The published numbers of these settings: the condition, the value, and the source."""
    found = []
    for number in published().values():
        for name in CONDITIONS:
            who = name if name in ("reference", "teacher") else "student"
            if (number.who, number.setting) == (who, setting(config, **STUDENTS.get(name, {}))):
                found.append(({"condition": name}, number.value, number.source))
    return found


def headline(results: Results, config: Config) -> str:
    """The answer that these runs give."""
    own, other = (results.values(condition=name) for name in ("student_aux", "cross_aux"))
    what = "test accuracy of the student of the teacher's initialization less that of another initialization"
    return compared("Does the trait pass through noise and logits that were never trained?", what, own, other)


def report(results: Results, config: Config) -> str:
    """A line for each condition."""
    lines = [f"test accuracy on {config.data}, mean and 95% t interval over runs"]
    for group, estimate in results.estimates():
        lines.append(f"  {group['condition']:12} {estimate}")
    return "\n".join(lines)


def plot(results: Results, config: Config) -> Figure:
    """Bars with intervals, single runs as dots."""
    groups = {LABELS[name]: results.values(condition=name) for name in CONDITIONS}
    difference = paired_difference(groups[LABELS["student_aux"]], groups[LABELS["cross_aux"]])
    title = (
        f"{config.data}, m = {config.aux} auxiliary logits, {config.channel_loss}, inputs {config.inputs};\n"
        f"same initialization minus another: test accuracy {difference}"
    )
    return bars(groups, ylabel="test accuracy (share of digits read)", title=title, chance=0.1)
