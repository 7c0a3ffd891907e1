"""Draw the figures of finished runs again, and compute their summaries, from their files alone."""

import importlib
from pathlib import Path

from subliminal_theory.errors import InputError
from subliminal_theory.runs import RunDirectory, load_results, read_config

from .app.command import draw
from .app.contract import Parser
from .summary import restored


def main(arguments: list[str]) -> int:
    """Write figure.png, figure.pdf and summary.json of run directories. Returns 0."""
    parser = Parser("redraw", description=__doc__)
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="FOLDER", help="run directory, such as figures/mnist"
    )
    for folder in parser.parse_args(arguments).folders:
        config = read_config(folder)
        module = importlib.import_module(f".{config['experiment']}", __package__)
        try:
            RunDirectory(folder).save_summary(load_results(folder))
            draw(folder, module, restored(module, config["config"]))
        except InputError as error:
            raise InputError(f"{folder}: {error}") from error
        print(f"drawn: {folder / 'figure.png'}, {folder / 'figure.pdf'}")
    return 0
