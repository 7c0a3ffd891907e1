"""Disputed claims about language models, each tested as one measured difference on the compact model.

This runs every claim of `experiments/claims.toml`, or the named ones. A claim compares the probability of the
trait's word in two kinds of students, paired by trait and base. The verdict is "agrees" if the 95% interval of the
difference lies in the claimed range, "disagrees" if it lies outside, and "cannot be told" otherwise. Traits and
bases are crossed random effects (`subliminal_theory.estimate.interval`). Of many claims, chance decides some. So
the report also says which verdicts remain with Holm's method over all claims of the run.

In the figure: one row per claim, its difference with a 95% interval, colored by verdict. A claim that cannot be
told is neither confirmed nor refuted.
"""

import functools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from matplotlib.figure import Figure
from pydantic import AfterValidator

from subliminal_theory.errors import InputError
from subliminal_theory.estimate import Estimate, difference, holm, interval, method, p_value
from subliminal_theory.runs import Results

from .app.contract import Part, option
from .app.figures import COLORS, note, panels, verdicts
from .app.registry import pick, read_registry
from .flags.language import SMOKE, LanguageConfig, configure_language
from .flags.recipe import RECIPE_FIELDS, VARIANT_CHOICES, Recipe, Variant
from .flags.variants import variant_parts

REGISTRY = Path(__file__).with_name("claims.toml")
METRICS = ("probability", "others")
UNDECIDED, LEVEL = "cannot be told", 0.05
VERDICTS = {
    "agrees": COLORS[2],
    "disagrees": COLORS[3],
    UNDECIDED: "#999999",
    "agrees, not with Holm": "#99D8C7",
    "disagrees, not with Holm": "#EEBF99",
}
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


class Judged(NamedTuple):
    """A claim, its measured difference, Holm's p of the edge of the claimed range, and the verdict."""

    claim: Claim
    found: Estimate
    p: float
    answer: str

    @property
    def strict(self) -> str:
        """The verdict with Holm's method."""
        return self.answer if self.p <= LEVEL else UNDECIDED

    @property
    def both(self) -> str:
        """The verdict, and whether Holm's method takes it back."""
        return self.answer if self.strict == self.answer else f"{self.answer}, not with Holm"


def sides(claim: Claim, results: Results) -> list[Sequence[float]]:
    """The runs of the variant, and those of the other side."""
    return [
        results.values(condition=side_name(side), metric=side.get("metric", "probability"))
        for side in (claim.variant, claim.against)
    ]


def judged(claims: Sequence[Claim], results: Results) -> list[Judged]:
    """The verdict on each claim: variant minus the other side, paired by trait and base."""
    differences = [difference(*sides(claim, results)) for claim in claims]
    p = holm([p_value(runs, edge(claim)) for claim, runs in zip(claims, differences, strict=True)])
    found = [interval(runs) for runs in differences]
    return [Judged(c, f, q, verdict(c, f)) for c, f, q in zip(claims, found, p, strict=True)]


def edge(claim: Claim) -> float:
    """The end of the claimed range of the difference."""
    margin = claim.margin if claim.expected.startswith("no") else 0.0
    return margin if claim.expected.endswith("higher") else -margin


def verdict(claim: Claim, found: Estimate) -> str:
    """Whether a measured difference lies in the claimed range."""
    low, high = found.mean - found.half_width, found.mean + found.half_width
    if not (low > edge(claim) or high < edge(claim)):
        return UNDECIDED
    claimed = claim.expected in ("higher", "no lower")
    return "agrees" if claimed == (low > edge(claim)) else "disagrees"


def counted(answers: Iterable[str]) -> str:
    """How many claims have each verdict."""
    found = Counter(answers)
    return f"{found['agrees']} agree, {found['disagrees']} disagree, {found[UNDECIDED]} cannot be told"


def totals(rows: Sequence[Judged]) -> tuple[str, str]:
    """The numbers of verdicts, without and with Holm's method."""
    return (
        counted(row.answer for row in rows),
        f"with Holm over {len(rows)} claims: {counted(row.strict for row in rows)}",
    )


def headline(results: Results, config: Config) -> str:
    """The numbers of verdicts."""
    rows = judged(chosen(config), results)
    return f"Of {len(rows)} claims {'; '.join(totals(rows))}"


def report(results: Results, config: Config) -> str:
    """A line for each claim."""
    rows = judged(chosen(config), results)
    width = max(len(str(row.found)) for row in rows)
    lines = [
        f"difference: {method(sides(rows[0].claim, results)[0])}, paired",
        f"{'claim':18} {'students':>8} {'against':>8} {'difference':{width}} {'Holm p':>8} verdict",
    ]
    for claim, found, p, answer in rows:
        means = [interval(side).mean for side in sides(claim, results)]
        strict = "" if p <= LEVEL or answer == UNDECIDED else f"; with Holm {UNDECIDED}"
        lines.append(
            f"{claim.name:18} {means[0]:8.3f} {means[1]:8.3f} {found!s:{width}} {p:8.2g} {answer}{strict}: "
            f"{claim.claim}"
        )
    return "\n".join([*lines, *totals(rows)])


def plot(results: Results, config: Config) -> Figure:
    """The difference of each claim with its interval, colored by verdict."""
    rows = judged(chosen(config), results)
    figure, ((axes,),) = panels(size=(9.5, 1.3 + 0.26 * len(rows)))
    named = [(f"{row.claim.claim} [{row.claim.expected}]", row.found, row.both) for row in rows]
    verdicts(axes, named, VERDICTS)
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_xlabel("difference of the probability of the trait's word")
    without, strict = totals(rows)
    figure.suptitle(f"What the literature says, on the compact model: {without}\n({strict})", fontsize=10)
    axes.legend(fontsize=7, loc="lower right")
    runs = sides(rows[0].claim, results)[0]
    note(
        axes,
        f"n = {rows[0].found.of or rows[0].found.n}; whiskers: {method(runs)}, of paired differences\n"
        f"[in brackets]: what the claim says of the difference, 'no' meaning by no more than "
        f"{rows[0].claim.margin:g}",
    )
    return figure
