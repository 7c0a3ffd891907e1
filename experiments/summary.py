"""One page about all run directories below a folder: figures, tables, data, commands and machine."""

import dataclasses
import html
import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from subliminal_theory.errors import InputError
from subliminal_theory.runs import load_results, read_config, read_provenance, write_atomically

from .app.contract import Parser

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>subliminal_theory: summary</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
img {{ max-width: 100%; }} pre {{ overflow-x: auto; background: #f4f4f4; padding: .7rem; font-size: 13px; }}
footer {{ color: #666; font-size: 13px; }}
</style></head><body>
<h1>Subliminal learning: what was run here</h1>
{sections}
</body></html>
"""
SECTION = """<h2>{name}</h2><p>{claim}</p>
<img src="{folder}/figure.png" alt="figure of {name}">
<pre>{report}</pre>
<footer><code>{command}</code><br>{machine}; data and settings in <a href="{folder}/">{folder}/</a></footer>
"""


def main(arguments: list[str]) -> int:
    """Write index.html into a folder of run directories. Returns 0."""
    parser = Parser("summary", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder whose subfolders are run directories")
    folder: Path = parser.parse_args(arguments).folder
    runs = sorted(path.parent for path in folder.glob("*/provenance.json"))
    if not runs:
        raise InputError(f"no finished run below {folder}: run an experiment with --out {folder / 'NAME'} first")
    page = PAGE.format(sections="\n".join(_section(folder, run) for run in runs))
    write_atomically(folder / "index.html", page.encode())
    print(f"summary page: {folder / 'index.html'}")
    return 0


def _section(folder: Path, run: Path) -> str:
    config = read_config(run)
    module = importlib.import_module(f".{config['experiment']}", __package__)
    made = read_provenance(run)["invocations"][-1]
    packages = ", ".join(f"{name} {version}" for name, version in made["packages"].items())
    fields = {
        "name": os.fspath(run.relative_to(folder)),
        "claim": (module.__doc__ or "").splitlines()[0],
        "folder": os.fspath(run.relative_to(folder)),
        "report": module.report(load_results(run), restored(module, config["config"])),
        "command": made["command"],
        "machine": f"{made['device']} ({made['processor']}), {packages}, {made['started']}",
    }
    return SECTION.format(**{name: html.escape(text) for name, text in fields.items()})


def restored(module: ModuleType, settings: dict[str, Any]) -> Any:
    """The Config object for the settings of a run directory. Settings that no longer exist are left out."""
    kind = type(next(iter(module.PRESETS.values())))
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in settings.items() if name in known})
