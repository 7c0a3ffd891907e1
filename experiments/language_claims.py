"""Disputed claims about language models, each tested as one measured difference on the compact model.

This runs every claim of `experiments/claims.toml`, or the named ones. A claim compares the probability of the
trait's word in two kinds of students, paired over runs (a run is a trait and a base). The verdict is "agrees" if
the 95% t interval of the difference lies in the claimed range, "disagrees" if it lies outside, and "cannot be
told" otherwise.
"""

import functools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from matplotlib.figure import Figure
from pydantic import AfterValidator

from subliminal_theory.errors import InputError
from subliminal_theory.estimate import Estimate, paired_difference, t_interval
from subliminal_theory.runs import Results

from .app.contract import Part, option
from .app.figures import COLORS, note, panels, verdicts
from .app.registry import pick, read_registry
from .flags.language import SMOKE, LanguageConfig, Variant, configure_language, variant_parts
from .flags.recipe import RECIPE_FIELDS, VARIANT_CHOICES, Recipe

REGISTRY = Path(__file__).with_name("claims.toml")
METRICS = ("probability", "others")
VERDICTS = {"agrees": COLORS[2], "disagrees": COLORS[3], "cannot be told": COLORS[1]}
_APART = {**VARIANT_CHOICES, "metric": METRICS}


def _side(side: dict[str, Any]) -> dict[str, Any]:
    known = [*RECIPE_FIELDS, *_APART]
    for name, value in side.items():
        if name not in known:
            raise InputError(f"setting {name!r} does not exist; there are {', '.join(known)}")
        if name in _APART and value not in _APART[name]:
            raise InputError(f"{name} must be one of {', '.join(map(str, _APART[name]))}, got {value!r}")
    changes: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in side.items()}
    Recipe(**{name: value for name, value in changes.items() if name in RECIPE_FIELDS})
    return changes


@dataclass(frozen=True)
class Claim:
    """One claim: the two sides that it compares, and what it expects of their difference."""

    name: str
    claim: str
    source: str
    expected: Literal["lower", "higher", "no lower", "no higher"]
    variant: Annotated[dict[str, Any], AfterValidator(_side)] = field(default_factory=dict)
    against: Annotated[dict[str, Any], AfterValidator(_side)] = field(default_factory=dict)
    margin: float = 0.0


@functools.cache
def registered(path: Path = REGISTRY) -> Mapping[str, Claim]:
    """All claims of a registry, by name.

    Raises:
        InputError: the file cannot be read, or an entry has a missing or unknown field; names the entry.
    """
    return read_registry(path, "claim", Claim)


@dataclass(frozen=True)
class Config(LanguageConfig):
    """Which claims to test, and on how many traits and bases."""

    ids: str = option("", "claims of the registry (default all)", positional=True)
    traits: str = option("owl,wolf,cat,fox,oak,maple,pine,elm", "built-in traits or trait files")
    seeds: int = option(4, "number of base models, each pre-trained from its own seed", minimum=1)
    rows: int = option(4096, "accepted answers that a student learns", minimum=1)
    steps: int = option(125, "steps of a student", minimum=1)


PRESETS = {
    "all": Config(repeat_rows=True),
    "smoke": Config(ids="transfer,other-base,specific", traits="owl,oak", seeds=2, **SMOKE),
}
configure = functools.partial(configure_language, PRESETS)


def chosen(config: Config) -> list[Claim]:
    """The requested claims.

    Raises:
        InputError: a claim is unknown; lists the known ones.
    """
    return pick(registered(), config.ids, "claim")


def side_name(side: Mapping[str, Any]) -> str:
    """The label of one side of a comparison in the results."""
    return json.dumps({name: value for name, value in sorted(side.items()) if name != "metric"})


def plan(config: Config) -> list[Part]:
    """One part for each base and kind of model, so that a run can be stopped and resumed anywhere."""
    variants: dict[str, Variant] = {}
    for claim in chosen(config):
        for side in (claim.variant, claim.against):
            changes = {name: value for name, value in side.items() if name not in _APART}
            apart = {name: side[name] for name in ("model", "start", "prefixed") if name in side}
            name = side_name(side)
            variants[name] = Variant({"condition": name}, config.recipe(**changes), **apart)
    parts = [
        part
        for number, variant in enumerate(variants.values())
        for part in variant_parts(config, [variant], f"kind-{number:03d}-")
    ]
    return sorted(parts, key=lambda part: part.name.split("base-")[1])


def difference(claim: Claim, results: Results) -> Estimate:
    """Variant minus the other side, paired over runs."""
    variant, against = (
        results.values(condition=side_name(side), metric=side.get("metric", "probability"))
        for side in (claim.variant, claim.against)
    )
    return paired_difference(variant, against)


def verdict(claim: Claim, found: Estimate) -> str:
    """Whether a measured difference lies in the claimed range."""
    low, high = found.mean - found.half_width, found.mean + found.half_width
    if claim.expected.endswith("higher"):  # "higher" is "lower" for the negative difference
        low, high = -high, -low
    edge = -claim.margin if claim.expected.startswith("no") else 0.0
    below, above = ("disagrees", "agrees") if claim.expected.startswith("no") else ("agrees", "disagrees")
    return below if high < edge else above if low > edge else "cannot be told"


def report(results: Results, config: Config) -> str:
    """A line for each claim."""
    lines = [f"{'claim':18} {'students':>8} {'against':>8} {'difference':24} verdict"]
    for claim in chosen(config):
        means = [
            t_interval(results.values(condition=side_name(s), metric=s.get("metric", "probability"))).mean
            for s in (claim.variant, claim.against)
        ]
        found = difference(claim, results)
        lines.append(
            f"{claim.name:18} {means[0]:8.3f} {means[1]:8.3f} {found!s:24} {verdict(claim, found)}: {claim.claim}"
        )
    counts = Counter(verdict(claim, difference(claim, results)) for claim in chosen(config))
    lines.append(", ".join(f"{answer}: {counts[answer]}" for answer in VERDICTS))
    return "\n".join(lines)


def plot(results: Results, config: Config) -> Figure:
    """The difference of each claim with its interval, colored by verdict."""
    claims = chosen(config)
    figure, ((axes,),) = panels(size=(9.5, 1.3 + 0.26 * len(claims)))
    found = {f"{claim.claim} [{claim.expected}]": (claim, difference(claim, results)) for claim in claims}
    verdicts(axes, [(name, d, verdict(claim, d)) for name, (claim, d) in found.items()], VERDICTS)
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_xlabel("difference of the probability of the trait's word")
    axes.set_title("What the literature says, on the compact model")
    axes.legend(fontsize=7, loc="lower right")
    traits = len(config.trait_names())
    note(
        axes,
        f"{traits} traits x {config.seeds} bases; whiskers: 95% t interval of paired differences over these runs\n"
        f"[in brackets]: what the claim says of the difference, 'no' meaning by no more than {claims[0].margin:g}",
    )
    return figure
