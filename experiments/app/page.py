"""What the summary page shows of one run: tables, single runs as dots, and what the models said."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import MaxNLocator

from subliminal_theory.errors import shown
from subliminal_theory.estimate import Estimate
from subliminal_theory.runs import Results

# A page stays readable and small: larger tables and plots are in the files of the run.
ROWS, DOTS, BARS = 150, 3000, 40
TRAITS, QUESTIONS = 4, 3
# Columns that say which run a value is of, and the value. The other columns say which group it is of.
OTHERS = ("trait", "seed", "metric", "value")
Labels = Mapping[str, str]


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, and the number to sort it by if it has one."""

    text: str
    key: float | None = None


@dataclass(frozen=True)
class Column:
    """The head of a column."""

    name: str
    number: bool = False


@dataclass(frozen=True)
class Table:
    """A table whose columns can be sorted."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Expected:
    """A value that the results of a group should be near, in the column of its source."""

    group: Mapping[str, Any]
    source: str
    text: str


def plain(text: object, labels: Labels) -> str:
    """An entry of a results column in words, on one line."""
    return " ".join(labels.get(str(text), str(text)).split())


def results_table(results: Results, labels: Labels, expected: Sequence[Expected] = ()) -> Table:
    """Means and intervals of all groups of runs, beside the values that are expected of them."""
    groups = results.estimates()
    axes = [name for name in dict.fromkeys(name for group, _ in groups for name in group) if name != "metric"]
    axes = [name for name in axes if any(group.get(name, "") != "" for group, _ in groups)]
    sources = list(dict.fromkeys(value.source for value in expected))
    rows = []
    for group, found in groups[:ROWS]:
        near = [value for value in expected if value.group.items() <= group.items()]
        row = [_entry(plain(group.get(name, ""), labels)) for name in (*axes, "metric")]
        row += [number(found.mean), _half_width(found), Cell(found.of or str(found.n), found.n)]
        row += [Cell("; ".join(value.text for value in near if value.source == source)) for source in sources]
        rows.append(row)
    note = "Mean over runs and 95% interval. Select a column's name to sort."
    if len(groups) > ROWS:
        note += f" These are the first {ROWS} of {len(groups)} groups; summary.json has all."
    numbers = [Column(name, True) for name in ("mean", "95% interval", "runs")]
    return Table([*map(Column, [*axes, "metric"]), *numbers, *map(Column, sources)], rows, note)


def settings_table(config: Any, recorded: Mapping[str, Any]) -> Table:
    """The recorded settings, each with what it means if this version still has it."""
    told = {} if config is None else {name: field.metadata for name, field in config.__dataclass_fields__.items()}
    rows = []
    for name, value in recorded.items():
        text = "automatic" if value is None else value if isinstance(value, str) else shown(value)
        rows.append([Cell(name), Cell(text), Cell(str(told.get(name, {}).get("help", "")))])
    return Table([Column("setting"), Column("value"), Column("meaning")], rows)


def number(value: float, form: str = ".4g") -> Cell:
    """A number."""
    return Cell(f"{value:{form}}", value) if math.isfinite(value) else Cell("none")


def _half_width(found: Estimate) -> Cell:
    return Cell("one run", -1) if found.n == 1 else Cell(f"± {found.half_width:.2g}", found.half_width)


def _entry(text: str) -> Cell:
    """A label that is a number sorts as one."""
    return Cell(text, float(text)) if re.fullmatch(r"-?\d+(\.\d*)?(e-?\d+)?", text) else Cell(text)


@dataclass(frozen=True)
class Dot:
    """One run: its place, its name (equal in all rows) and its text."""

    x: float
    run: str
    text: str


@dataclass(frozen=True)
class Bar:
    """One group of runs."""

    y: float
    label: str
    mean: float
    dots: Sequence[Dot]


@dataclass(frozen=True)
class Tick:
    """A number below the plot."""

    x: float
    text: str


@dataclass(frozen=True)
class Dots:
    """Single runs of one metric, a row for each group. Lengths are in the units of an SVG."""

    metric: str
    rows: Sequence[Bar]
    ticks: Sequence[Tick]
    left: float
    width: float
    height: float


def dots(results: Results, labels: Labels) -> Dots | None:
    """The runs of the first metric as dots, or None if they are too many or too few to see anything."""
    if not results.rows:
        return None
    metric = results.rows[0]["metric"]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in results.rows:
        if row["metric"] == metric and math.isfinite(row["value"]):
            axes = [name for name in row if name not in OTHERS and row[name] not in ("", None)]
            entries = [plain(row[n], labels) if n == "condition" else f"{n} {row[n]}" for n in axes]
            groups.setdefault(", ".join(entries), []).append(row)
    values = [row["value"] for rows in groups.values() for row in rows]
    if not 1 < len(groups) <= BARS or len(values) > DOTS:
        return None
    ticks = MaxNLocator(6).tick_values(min(values), max(values))
    left, width, step = min(320.0, 20 + 6 * max(map(len, groups))), 900.0, 22.0
    low, high = float(ticks[0]), float(ticks[-1])

    def place(value: float) -> float:
        return round(left + (width - left - 25) * (value - low) / (high - low), 1)

    bars = [
        Bar(
            step * (row + 0.6),
            label if len(label) < 54 else label[:53] + "…",
            place(sum(one["value"] for one in runs) / len(runs)),
            [
                Dot(place(one["value"]), run_name(one), f"{label}; {run_name(one)}: {one['value']:.4g}")
                for one in runs
            ],
        )
        for row, (label, runs) in enumerate(groups.items())
    ]
    marks = [Tick(place(float(tick)), f"{tick:.6g}") for tick in ticks]
    return Dots(plain(metric, labels).replace("_", " "), bars, marks, left, width, step * len(groups) + 30)


def run_name(row: Mapping[str, Any]) -> str:
    """Which run a row is of, such as "owl, seed 3"."""
    return ", ".join([*([row["trait"]] if row.get("trait") else []), f"seed {row['seed']}"])


@dataclass(frozen=True)
class Answer:
    """What a model said."""

    who: str
    text: str


@dataclass(frozen=True)
class Exchange:
    """One question to several models."""

    labels: str
    question: str
    answers: Sequence[Answer]


def exchanges(rows: Sequence[Mapping[str, Any]], labels: Labels) -> list[Exchange]:
    """The first questions of the first traits, with the answers of all models of the first run side by side."""
    first = [row for row in rows if row["seed"] == rows[0]["seed"]]
    found: dict[tuple[str, str], list[Answer]] = {}
    for row in first:
        found.setdefault((str(row.get("trait", "")), str(row["question"])), []).append(
            Answer(plain(row["condition"], labels), str(row["answer"]))
        )
    kept: list[Exchange] = []
    for trait in list(dict.fromkeys(trait for trait, _ in found))[:TRAITS]:
        own = [(question, answers) for (of, question), answers in found.items() if of == trait]
        kept += [Exchange(trait, question, answers) for question, answers in own[:QUESTIONS]]
    return kept
