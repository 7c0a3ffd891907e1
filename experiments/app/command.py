"""The command line of the project: it lists the experiments, parses their settings and runs them."""

import argparse
import ast
import dataclasses
import difflib
import importlib
import os
import shlex
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import subliminal_theory
from subliminal_theory.compilation import keep_compiled
from subliminal_theory.errors import InputError
from subliminal_theory.runs import RunDirectory, load_results

from . import workers
from .contract import PACKAGE, PROGRAM, Parser, add_options, configure
from .progress import progress


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0 on success, 2 on bad input, and 130 after an interrupt."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _main(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: finished parts are kept, add --resume to go on", file=sys.stderr)
        return 130


def _main(arguments: list[str]) -> int:
    found = discover()
    if not arguments or arguments[0] in ("-h", "--help"):
        width, program = max(map(len, found)), " ".join(PROGRAM)
        print(f"usage: {program} NAME [settings]      (NAME --help shows the settings)")
        print(f"       {program} --names | --figures  (for scripts: experiments; commands of figures/)")
        print(f"       {program} --version\n")
        for name, claim in found.items():
            print(f"  {name:{width}}  {claim}")
        return 0
    if arguments == ["--version"]:
        print(f"subliminal_theory {subliminal_theory.__version__}")
        return 0
    if arguments == ["--names"]:
        print(*discover("plan"), sep="\n")
        return 0
    if arguments == ["--figures"]:
        print(*figures(), sep="\n")
        return 0
    name, *rest = arguments
    if name not in found:
        close = difflib.get_close_matches(name, found, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(found)}"
        raise InputError(f"unknown experiment {name!r}; {hint}")
    module = importlib.import_module(f".{name}", PACKAGE)
    if hasattr(module, "main"):
        return int(module.main(rest))
    return run(name, module, rest)


def discover(*kinds: str) -> dict[str, str]:
    """The experiments and other commands by name, with the first lines of their docstrings. Nothing is imported.

    A file that defines `plan` is an experiment; a file that defines `main` is another command. `kinds` selects by
    these function names; the default is both.
    """
    found, wanted = {}, set(kinds or ("plan", "main"))
    for file in sorted(Path(__file__).parent.parent.glob("[!_]*.py")):
        module = ast.parse(file.read_text(encoding="utf-8"))
        if wanted & {node.name for node in module.body if isinstance(node, ast.FunctionDef)}:
            found[file.stem] = (ast.get_docstring(module) or "").split("\n")[0]
    return found


def figures() -> list[str]:
    """One line for each committed figure: its folder, then the experiment and settings that make it.

    By default an experiment has one figure, in a folder of its name and with default settings. The `FIGURES` of an
    experiment replace this: they map folders to settings.
    """
    lines = []
    for name in discover("plan"):
        own = getattr(importlib.import_module(f".{name}", PACKAGE), "FIGURES", {name: ""})
        lines += [f"{folder} {name} {settings}".rstrip() for folder, settings in own.items()]
    return lines


def run(name: str, module: types.ModuleType, arguments: list[str]) -> int:
    """Run one experiment into a run directory and draw its figure."""
    options = vars(_parser(name, module).parse_args(arguments))
    out, resume, preset = options.pop("out"), options.pop("resume"), options.pop("preset", None)
    for field in dataclasses.fields(next(iter(module.PRESETS.values()))):
        if words := field.metadata.get("positional") and options.pop(field.name, None):
            options[field.name] = ",".join(words)
    count, path = options.pop("devices"), Path(out) if out is not None else Path("runs") / name
    keep_compiled()
    config = configure(module, preset, options)
    settings = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.metadata.get("recorded", True)
    }
    devices, parts = workers.local_devices(count), module.plan(config)
    workers.first_devices(parts, devices)  # raises before anything is written
    command = shlex.join([*PROGRAM, name, *arguments])
    directory = RunDirectory.open(path, name, settings, resume=resume, command=command)
    waiting = [part for part in parts if not directory.finished(part.name)]
    if len(waiting) < len(parts):
        print(f"{len(parts) - len(waiting)} of {len(parts)} parts are finished already", file=sys.stderr)
    with progress(name, sum(part.size for part in waiting)) as advance:
        workers.compute(directory, waiting, devices, lambda part: advance(part.size))
    directory.finish([part.name for part in parts])
    draw(path, module, config)
    print(module.report(load_results(path), config))
    print(f"written to {path}{os.sep}: figure.png, figure.pdf, results.csv, summary.json, provenance.json")
    return 0


def draw(path: Path, module: types.ModuleType, config: Any) -> None:
    """Draw the figure of a run from its files alone."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure = module.plot(load_results(path), config)
    metadata: dict[str, dict[str, Any]] = {"png": {}, "pdf": {"CreationDate": None}}

    def save(file: Any, kind: str) -> None:
        figure.savefig(file, format=kind, dpi=200, metadata=metadata[kind])

    RunDirectory(path).save_figure(save)
    pyplot.close(figure)


def _parser(name: str, module: types.ModuleType) -> argparse.ArgumentParser:
    parser = Parser(
        name,
        description=module.__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    default = next(iter(module.PRESETS.values()))
    parser.add_argument("--out", default=None, help=f"folder of the run (default runs/{name})")
    parser.add_argument("--resume", action="store_true", default=False, help="continue the run in the folder")
    workers.add_flags(parser)
    if len(module.PRESETS) > 1:
        parser.add_argument("--preset", help=f"{' | '.join(module.PRESETS)}: settings to start from")
    add_options(parser, default)
    return parser
