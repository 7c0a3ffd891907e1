"""What the site makes of other files: start page, list of experiments, figures, and formulas without scripts."""

import html
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the start page, the list of experiments, and the committed figures."""
    files.append(File.generated(config, "index.md", content=start_page()))
    files.append(File.generated(config, "experiments.md", content=experiments()))
    for figure in sorted(ROOT.glob("figures/*/figure.png")):
        place = figure.relative_to(ROOT).as_posix()
        files.append(File.generated(config, place, abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """In the repository, figures are one folder above the pages; on the site they are below them."""
    return markdown.replace("](../figures/", "](figures/")


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers show without a script."""

    def formula(found: re.Match[str]) -> str:
        block = found["block"] is not None
        text = re.sub(r"\\tag\{(.*?)\}", r"\\qquad (\1)", html.unescape(found["block"] or found["inline"]))
        return convert(text, display="block" if block else "inline")

    wrapped = (
        r'<(?P<tag>span|div) class="arithmatex">(?:\\\[(?P<block>.*?)\\\]|\\\((?P<inline>.*?)\\\))</(?P=tag)>'
    )
    return re.sub(wrapped, formula, content, flags=re.DOTALL)


def start_page() -> str:
    """README, with its links as they are on the site. Files that are not on the site become their names."""

    def link(found: re.Match[str]) -> str:
        text, target = found.groups()
        if target.startswith("https:"):
            return found[0]
        return f"[{text}]({target.removeprefix('docs/')})" if target.startswith("docs/") else text

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)]+)\)", link, (ROOT / "README.md").read_text(encoding="utf-8"))


def experiments() -> str:
    """One section for each experiment, from its module and its committed runs."""
    sys.path.insert(0, str(ROOT))
    command = importlib.import_module("experiments.app.command")
    made = [line.split(" ", 2) for line in command.figures()]
    lines = [
        "# Experiments",
        "",
        "`python -m experiments NAME --help` shows every setting, and `--preset NAME` starts from a named set.",
        "The preset `smoke` takes at most about a minute. Times are those of the committed figures, added up over",
        "their parts; bases of language models that were trained before are not counted.",
        "",
    ]
    for name in command.discover("plan"):
        module = importlib.import_module(f"experiments.{name}")
        title, *rest = (module.__doc__ or "").strip().split("\n\n")
        lines += [f"## {name}", "", f"**{title}**", "", *(f"{part}\n" for part in rest)]
        lines += [f"Presets: {', '.join(f'`{preset}`' for preset in module.PRESETS)}.", ""]
        for folder, of, *settings in made:
            figure = ROOT / "figures" / folder / "figure.png"
            if of == name and figure.exists():
                given = " ".join([f"python -m experiments {name}", *settings])
                lines += [f"`{given}`: {took(figure.parent)}", "", f"![{folder}](figures/{folder}/figure.png)", ""]
    return "\n".join([*lines, "# Other commands", "", *other_commands(command)])


def other_commands(command: Any) -> list[str]:
    """A table of the commands that are no experiments."""
    rows = [f"| `{name}` | {claim} |" for name, claim in command.discover("main").items()]
    return ["| command | what it does |", "| --- | --- |", *rows, ""]


def took(run: Path) -> str:
    """How long a committed run took, and on what."""
    provenance = json.loads((run / "provenance.json").read_bytes())
    seconds, last = sum(provenance.get("seconds", {}).values()), provenance["invocations"][-1]
    spent = f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
    return f"{spent} on {last['processor']}" if seconds >= 90 else f"{seconds:.0f} seconds on {last['processor']}"
