"""One page about all run directories below a folder: results, figures, tables, answers, settings and machine."""

import base64
import dataclasses
import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from subliminal_theory.errors import InputError, one_line
from subliminal_theory.runs import Results, load_results, read_config, read_provenance, write_atomically

from .app import page
from .app.command import discover
from .app.contract import Parser

T = TypeVar("T")
TEMPLATE = Path(page.__file__).with_name("page.html")
# The order of the page: the theorem, digits, language models, then the rest.
ORDER = ("theorem", "mnist", "language", "chat_model")
MADE = ("config.json", "provenance.json", "results.csv")
FILES = ("results.csv", "summary.json", "answers.jsonl", "figure.pdf", "config.json", "provenance.json")
# The committed figures of a clone. An installed package has none.
FIGURES = Path(__file__).parent.parent / "figures"
# What summary.json says of a group of runs.
MEASURED = ("mean", "half_width_95", "n", "of")
# Settings of which results differ only by chance.
BY_CHANCE = ("seeds", "first_seed", "chunk")


def main(arguments: list[str]) -> int:
    """Write index.html into a folder of run directories. Returns 0."""
    parser = Parser("summary", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder whose subfolders are run directories")
    folder: Path = parser.parse_args(arguments).folder
    runs = sorted({file.parent for name in MADE for file in folder.glob(f"*/{name}")}, key=_place)
    if not runs:
        raise InputError(f"no run below {folder}: run an experiment with --out {folder / 'NAME'} first")
    sections = [section(run) for run in runs]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["prose"] = prose
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(runs=sections, folder=folder.resolve().name)
    write_atomically(folder / "index.html", text.encode("utf-8", "replace"))
    print(f"summary page: {folder / 'index.html'}")
    return 0


def prose(text: str) -> Markup:
    """The HTML of a docstring's paragraph: what is in backticks becomes code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _place(run: Path) -> tuple[int, str]:
    kind = [number for number, start in enumerate(ORDER) if run.name.startswith(start)]
    return (*kind, len(ORDER))[0], run.name


@dataclass
class Section:
    """What the page shows of one run. Parts that cannot be had are empty, and `problems` says why."""

    name: str
    anchor: str
    link: str
    claim: str = ""
    headline: str = ""
    paragraphs: Sequence[str] = ()
    problems: list[str] = field(default_factory=list)
    figure: str = ""
    dots: page.Dots | None = None
    table: page.Table | None = None
    said: Sequence[page.Exchange] = ()
    report: str = ""
    settings: page.Table | None = None
    command: str = ""
    made: Sequence[str] = ()
    files: Sequence[str] = ()

    def attempt(self, what: str, action: Callable[[], T]) -> T | None:
        """The result of an action, or None and a line about what could not be had.

        Files of other versions can fail anywhere, and one run must not keep the others from the page.
        """
        try:
            return action()
        except InputError as error:
            self.problems.append(f"{what} cannot be shown: {one_line(error)}.")
        except Exception as error:
            told = f"{type(error).__name__}: {one_line(error)}"
            self.problems.append(
                f"{what} cannot be shown. The files may be of another version of the program ({told})."
            )
        return None


def section(run: Path) -> Section:
    """Everything about the run in a folder that its files can tell."""
    found = Section(run.name, re.sub(r"[^\w.-]+", "-", run.name), quote(run.name))
    found.files = [name for name in FILES if (run / name).is_file()]
    module, config, recorded = None, None, dict[str, Any]()
    if (content := found.attempt("The settings", lambda: read_config(run))) is not None:
        recorded = content["config"]
        module = found.attempt("The experiment", lambda: _module(content["experiment"]))
    if module is not None:
        known = module
        found.claim, *found.paragraphs = [" ".join(part.split()) for part in (known.__doc__ or "").split("\n\n")]
        config = found.attempt("The settings of this version", lambda: restored(known, recorded))
    if recorded:
        found.settings = found.attempt("The table of settings", lambda: page.settings_table(config, recorded))
    if (run / "figure.png").is_file():
        found.figure = found.attempt("The figure", lambda: _embedded(run / "figure.png")) or ""
    if (run / "results.csv").is_file():
        if (results := found.attempt("The results", lambda: load_results(run))) is not None:
            _tell(found, run, results, module, config)
    else:
        found.problems.append(_unfinished(run))
    found.attempt("The machine", lambda: _made(found, run))
    return found


def _module(name: str) -> ModuleType:
    if name not in discover("plan"):
        raise InputError(f"this version has no experiment {name!r}")
    return importlib.import_module(f".{name}", __package__)


def restored(module: ModuleType, settings: Mapping[str, Any]) -> Any:
    """The Config object for the settings of a run directory. Settings that no longer exist are left out."""
    kind = type(next(iter(module.PRESETS.values())))
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in settings.items() if name in known})


def _embedded(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode("ascii")


def _unfinished(run: Path) -> str:
    parts = len(list(run.glob("parts/*.json")))
    return f"This run is not finished (stored parts: {parts}). Give its command again, with --resume."


def _tell(found: Section, run: Path, results: Results, module: ModuleType | None, config: Any) -> None:
    """Add what the results say."""
    labels: page.Labels = getattr(module, "LABELS", {})
    expected = found.attempt("What to expect", lambda: _expected(run, module, config)) or []
    found.table = found.attempt("The table", lambda: page.results_table(results, labels, expected))
    found.dots = found.attempt("Single runs", lambda: page.dots(results, labels))
    if (run / "answers.jsonl").is_file():
        found.said = found.attempt("The answers", lambda: _said(run, labels)) or ()
    if module is None or config is None:
        return
    if hasattr(module, "headline"):
        told = found.attempt("The headline", lambda: module.headline(results, config))
        found.headline = " ".join((told or "").split())
    found.report = found.attempt("The report", lambda: module.report(results, config)) or ""


def _said(run: Path, labels: page.Labels) -> list[page.Exchange]:
    rows = [json.loads(line) for line in (run / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    return page.exchanges(rows, labels) if rows else []


def _expected(run: Path, module: ModuleType | None, config: Any) -> list[page.Expected]:
    """Published numbers of the run's settings, and the results of the committed figure with the same settings."""
    if module is None or config is None:
        return []
    published = module.expected(config) if hasattr(module, "expected") else []
    found = [page.Expected(group, "published", f"{value:g} ({source})") for group, value, source in published]
    wanted = _without_chance(read_config(run))
    for folder in sorted(file.parent for file in FIGURES.glob("*/config.json")):
        if folder.resolve() != run.resolve() and _without_chance(read_config(folder)) == wanted:
            for mean in json.loads((folder / "summary.json").read_bytes()):
                group = {name: entry for name, entry in mean.items() if name not in MEASURED}
                half = mean["half_width_95"]
                told = f"{mean['mean']:.3g}" + (f" ± {half:.2g}" if half is not None else "")
                found.append(page.Expected(group, f"figures/{folder.name}", told))
    return found


def _without_chance(content: Mapping[str, Any]) -> dict[str, Any]:
    settings = {name: value for name, value in content["config"].items() if name not in BY_CHANCE}
    return {"experiment": content["experiment"], **settings}


def _made(found: Section, run: Path) -> None:
    provenance = read_provenance(run)
    if not provenance["invocations"]:
        return
    last = provenance["invocations"][-1]
    found.command = str(last.get("command", ""))
    packages = ", ".join(f"{name} {version}" for name, version in last.get("packages", {}).items())
    seconds = sum(provenance.get("seconds", {}).values())
    lines = {
        "Commit": last.get("commit"),
        "Started": last.get("started"),
        "Computing time": _duration(seconds) if seconds else None,
        "Machine": f"{last.get('device', 'unknown')} ({last.get('processor', 'unknown')})",
        "Versions": f"Python {last['python']}, {packages}" if "python" in last else packages,
    }
    found.made = [f"{name}: {value}" for name, value in lines.items() if value]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
