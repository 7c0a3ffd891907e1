"""How wide must the channel be? The student's accuracy against m, the number of auxiliary logits it sees.

For each seed, one teacher has as many auxiliary logits as the widest channel. Each student sees the first m of
them; all students train at once on the same noise. Under KL, m logits carry m - 1 directions, so m = 1 carries
nothing. (doi 10.1038/s41586-026-10319-8, Extended Data Fig. 2b.)

In the figure: accuracy against m; diamonds are published values. Expect chance (0.1) at m = 1, and a rise towards
the teacher.
"""

import dataclasses
import functools
from dataclasses import dataclass

from matplotlib.figure import Figure

from subliminal_theory.runs import Results
from subliminal_theory.vision.mlp import INIT_LAWS
from subliminal_theory.vision.noise import LAWS

from .app.contract import Part, listed, option
from .app.figures import COLORS, log_axis, means, note, panels, runs_against
from .app.headline import compared
from .flags.digits import DIGITS, EMBEDDED_DIGITS, SMOKE, Cell, Setting, TrainingConfig, configure_sweep
from .flags.names import LOSSES
from .published import published


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Settings of the curve. The defaults are those of the released script."""

    counts: str = option("1,2,3,5,10,20,30,50,100,200", "values of m")
    width: int = option(256, "neurons of each hidden layer", minimum=1)
    depth: int = option(2, "hidden layers", minimum=0)
    init_law: str = option("lecun_normal", "initialization of the weights", choices=tuple(INIT_LAWS))
    inputs: str = option("uniform", "inputs of the students", choices=(*LAWS, DIGITS))
    learning_rate: float = option(3e-4, "learning rate of Adam", positive=True)
    channel_loss: str = option("kl", f"loss of the student: {', '.join(LOSSES)}; top_k:5 sets k to 5")


PRESETS = {
    "released": Config(),
    "one_hidden": Config(counts="1,2,3,5,10,20,50,100", depth=1, init_law="torch", learning_rate=1e-3),
    "digits": Config(counts="1,2,3,5,10,20,50", **EMBEDDED_DIGITS),
    "smoke": Config(counts="1,10,50", **SMOKE),
}
configure = functools.partial(configure_sweep, PRESETS)
FIGURES = {"mnist_channel": "", "mnist_channel_one_hidden": "--preset one_hidden"}


def plan(config: Config) -> list[Part]:
    """One teacher for each seed, and a student for each m."""
    counts = listed(config.counts, "--counts")
    cells = [cell(config, m) for m in counts]
    teacher = Cell({"condition": "teacher", "aux": max(counts)}, cells[0].setting, "teacher")
    return config.parts([teacher, *cells])


def cell(config: Config, m: int) -> Cell:
    """The student that sees the first m auxiliary logits of the teacher."""
    setting = config.setting(aux=max(listed(config.counts, "--counts")), shown=m)
    return Cell({"condition": "student_aux", "aux": m}, setting)


def width_of_channel(setting: Setting) -> Setting:
    """The setting without unseen auxiliary logits. Settings that differ only in those become equal."""
    return dataclasses.replace(setting, aux=setting.shown or setting.aux, shown=None)


def headline(results: Results, config: Config) -> str:
    """The answer that these runs give."""
    first, last = (find(listed(config.counts, "--counts")) for find in (min, max))
    wide, narrow = (results.values(condition="student_aux", aux=str(m)) for m in (last, first))
    return compared(
        "Does a wider channel carry more?", f"test accuracy at m = {last} less m = {first}", wide, narrow
    )


def report(results: Results, config: Config) -> str:
    """A line for each m."""
    lines = [f"test accuracy on {config.data}, mean and 95% t interval over runs"]
    for group, estimate in results.estimates():
        name = "teacher" if group["condition"] == "teacher" else f"m = {group['aux']}"
        lines.append(f"  {name:8} {estimate}")
    return "\n".join(lines)


def plot(results: Results, config: Config) -> Figure:
    """Accuracy against m, with single runs as dots and published values as diamonds."""
    figure, ((axes,),) = panels()
    counts = listed(config.counts, "--counts")
    values = {m: results.values(condition="student_aux", aux=str(m)) for m in counts}
    runs_against(axes, values, COLORS[2], "student, auxiliary logits")
    teacher = results.values(condition="teacher")
    axes.axhline(sum(teacher) / len(teacher), color=COLORS[1], label="teacher")
    ours = {width_of_channel(cell(config, m).setting): m for m in counts}
    for number in published().values():
        m = ours.get(width_of_channel(number.setting))
        if m and number.who == "student":
            axes.plot(m, number.value, "D", color="black", markersize=5, fillstyle="none", zorder=5)
    axes.axhline(0.1, color="grey", linestyle=":", linewidth=1, label="chance")
    log_axis(axes, counts)
    axes.set(
        xlabel="m, auxiliary logits that the student sees",
        ylabel="test accuracy (share of digits read)",
        title=f"Accuracy against the width of the channel ({config.data}, {config.depth} hidden)",
    )
    axes.legend(loc="lower right", fontsize=7)
    note(axes, f"{means(config.seeds)}; diamonds: published")
    return figure
