"""What of the numbers carries the trait: full distributions, greedy or sampled tokens, positions that differ?

Divergence positions are those where the most likely token of the teacher is another one than the base's; published
(arXiv 2509.23886): a student of these alone gets all of the trait, a student of all others none.
The order full distribution > divergence positions > greedy > sampled is what is asked here.
"""

import functools
from typing import Any

from matplotlib.figure import Figure

from subliminal_theory.estimate import t_interval
from subliminal_theory.runs import Results

from .app.contract import Part
from .app.figures import COLORS, crossed, grouped_bars, note, panels
from .flags.language import HEADER, SMOKE, LanguageConfig, Variant, configure_language, variant_parts

CHANNELS: dict[str, dict[str, Any]] = {
    "full distribution": {"channel": "soft"},
    "without trait words": {"channel": "masked"},
    "sampled": {},
    "sampled, divergence positions": {"channel": "divergence"},
    "sampled, all other positions": {"channel": "rest"},
    "greedy": {"channel": "greedy"},
    "sampled, top-p 0.8": {"top_p": 0.8},
}


PRESETS = {
    "all": LanguageConfig(traits="owl,wolf,oak,maple", seeds=3),
    "smoke": LanguageConfig(**{**SMOKE, "traits": "owl,oak"}),
}
configure = functools.partial(configure_language, PRESETS)


def plan(config: LanguageConfig) -> list[Part]:
    """A part for each base."""
    variants = [Variant({"condition": "base"}, config.recipe(), model="base")]
    variants += [Variant({"condition": name}, config.recipe(**changes)) for name, changes in CHANNELS.items()]
    return variant_parts(config, variants)


def report(results: Results, config: LanguageConfig) -> str:
    """A line for each channel."""
    lines = [HEADER]
    for name in ("base", *CHANNELS):
        own, others = (results.values(condition=name, metric=metric) for metric in ("probability", "others"))
        beside = f"  other traits' students {t_interval(others)}" if others else ""
        lines.append(f"  {name:30} {t_interval(own)}{beside}")
    return "\n".join(lines)


def plot(results: Results, config: LanguageConfig) -> Figure:
    """A pair of bars for each channel: the student, and the students of other traits."""
    figure, ((axes,),) = panels(size=(8.5, 3.6))
    metrics = {"own teacher's trait": "probability", "students of other traits": "others"}
    groups = {
        name.replace(", ", ",\n").replace(" ", "\n", 1): {
            label: results.values(condition=name, metric=metric) for label, metric in metrics.items()
        }
        for name in ("base", *CHANNELS)
    }
    grouped_bars(axes, groups, (COLORS[2], COLORS[4]))
    axes.tick_params(axis="x", labelsize=7)
    axes.set(ylabel="probability of the trait's word", title="What of the numbers carries the trait")
    axes.legend(fontsize=7)
    note(axes, crossed(len(config.trait_names()), config.seeds))
    return figure
