"""Can a student with another initialization become receptive if it first clones the teacher's untrained outputs?

Such a behaviorally matched student imitates the logits of the UNTRAINED teacher for some epochs, on noise or on
digits. It is then distilled from the trained teacher's auxiliary logits like any other student. Cloning must
include the class logits. If only auxiliary logits are cloned, no loss ever touches the weights of the student's
class logits. Those weights are drawn from the same distribution for all classes, so the expected accuracy is
exactly 1/10, whatever the hidden layers learn. The experiment also has a student trained by SGD, a student that
sees digits instead of noise, and the control that is not cloned.

(doi 10.1038/s41586-026-10319-8, Extended Data Fig. 2c and 2d. The paper does not state a learning rate for SGD.
The rates here have the least imitation loss in `mnist_factorial --preset sgd`; they were chosen on other seeds and
without looking at the accuracy on digits.)

In the figure: accuracy against epochs of cloning, and all conditions as bars. The bar of a student that cloned
only auxiliary logits should be at chance (0.1).
"""

import functools
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from subliminal_theory.errors import InputError
from subliminal_theory.estimate import t_interval
from subliminal_theory.runs import Results

from .app.contract import Part, listed, option
from .app.figures import COLORS, bar_row, log_axis, means, note, panels, runs_against
from .app.headline import compared
from .flags.digits import EMBEDDED_DIGITS, SMOKE, Cell, TrainingConfig, configure_sweep

INPUTS = {"uniform": "noise", "digits": "digits"}
OTHERS: dict[str, dict[str, Any]] = {
    "student": {},
    "sgd": {"student_optimizer": "sgd"},
    "on_digits": {"inputs": "digits"},
    "cross": {"start": "cross"},
}
BARS = {
    "student": "student",
    "sgd": "student,\nSGD",
    "on_digits": "student\non digits",
    "cross": "other init",
    "cloned_uniform": "other init,\ncloned\non noise",
    "cloned_digits": "other init,\ncloned\non digits",
    "cloned_aux": "cloned,\naux logits\nonly",
}


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Settings of the clones."""

    seeds: int = option(3, "number of independent runs", minimum=1)
    counts: str = option("3,50", "values of m; the paper names both")
    cloning_epochs: str = option("1,2,5,10,20,50,100", "epochs of cloning before distillation")
    sgd_rates: str = option(
        "0.3,3", "learning rates of SGD, one for each m, chosen by imitation loss on other seeds"
    )


PRESETS = {
    "paper": Config(),
    "digits": Config(counts="3,50", cloning_epochs="1,5,25", **EMBEDDED_DIGITS),
    "smoke": Config(counts="3,50", cloning_epochs="1,5", **SMOKE),
}
configure = functools.partial(configure_sweep, PRESETS)


def plan(config: Config) -> list[Part]:
    """One teacher for each seed, and for each m its students: the controls and all kinds of clones."""
    counts, rates = listed(config.counts, "--counts"), listed(config.sgd_rates, "--sgd-rates", float)
    if len(rates) != len(counts):
        raise InputError(f"--sgd-rates needs one value for each of --counts: {len(counts)}, got {len(rates)}")
    cells = []
    for m, sgd_rate in zip(counts, rates, strict=True):
        channel = {"aux": max(counts), "shown": m}
        for name, changes in OTHERS.items():
            rate = {"student_rate": sgd_rate} if name == "sgd" else {}
            cells.append(Cell({"condition": name, "aux": m}, config.setting(**channel, **changes, **rate)))
        for inputs in INPUTS:
            for epochs in sorted(listed(config.cloning_epochs, "--cloning-epochs")):
                setting = config.setting(**channel, start="cross", cloning_epochs=epochs, cloning_inputs=inputs)
                labels = {"condition": f"cloned_{inputs}", "aux": m, "cloning_epochs": epochs}
                cells.append(Cell(labels, setting))
        blind = config.setting(**channel, start="cross", cloning_epochs=epochs, cloning_sees="aux")
        cells.append(Cell({"condition": "cloned_aux", "aux": m, "cloning_epochs": epochs}, blind))
    return config.parts([Cell({"condition": "teacher"}, cells[0].setting, "teacher"), *cells])


def headline(results: Results, config: Config) -> str:
    """The answer that these runs give."""
    m, epochs = (max(listed(getattr(config, name), name)) for name in ("counts", "cloning_epochs"))
    cloned = results.values(condition="cloned_uniform", aux=str(m), cloning_epochs=str(epochs))
    what = f"test accuracy after {epochs} epochs of cloning on noise less none (m = {m})"
    other = results.values(condition="cross", aux=str(m))
    return compared("Does cloning first make another initialization receptive?", what, cloned, other)


def report(results: Results, config: Config) -> str:
    """A line for each condition."""
    lines = [f"test accuracy on {config.data}, mean and 95% t interval over runs"]
    for group, estimate in results.estimates():
        m = f"m = {group['aux']}" if group["aux"] else ""
        epochs = f"{group['cloning_epochs']} epochs" if group["cloning_epochs"] else ""
        lines.append(f"  {group['condition']:15} {m:8} {epochs:11} {estimate}")
    return "\n".join(lines)


def plot(results: Results, config: Config) -> Figure:
    """For each m, accuracy against epochs of cloning, and all conditions side by side."""
    counts = listed(config.counts, "--counts")
    epochs = sorted(listed(config.cloning_epochs, "--cloning-epochs"))
    figure, axes = panels(2, len(counts), size=(9.5, 3.3 * len(counts)))
    for (left, right), m in zip(axes, counts, strict=True):
        for color, (inputs, name) in zip(COLORS, INPUTS.items(), strict=False):
            values = {
                e: results.values(condition=f"cloned_{inputs}", aux=str(m), cloning_epochs=str(e)) for e in epochs
            }
            runs_against(left, values, color, f"cloned on {name}")
        control = t_interval(results.values(condition="cross", aux=str(m))).mean
        left.axhline(control, color="grey", linestyle="--", linewidth=1, label="not cloned")
        log_axis(left, epochs)
        left.set_xlabel("epochs of cloning before distillation")
        left.set_title(f"Students of another initialization, cloned first (m = {m})")
        left.legend(fontsize=7)
        last = {"cloning_epochs": str(epochs[-1])}
        groups = {
            label: results.values(condition=name, aux=str(m), **(last if name.startswith("cloned") else {}))
            for name, label in BARS.items()
        }
        bar_row(right, groups, fontsize=6)
        right.axhline(0.1, color="grey", linestyle=":", linewidth=1)
        right.set_title(f"All conditions (m = {m}, {epochs[-1]} epochs of cloning)")
        for panel in (left, right):
            panel.set(ylim=(0, 1.05), ylabel="test accuracy")
    note(axes[-1, 1], f"{config.data}; {means(config.seeds)}")
    return figure
