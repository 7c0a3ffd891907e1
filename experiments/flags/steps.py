"""The steps of an experiment with a checkpoint, as separate commands: their settings and the files they write."""

import contextlib
import functools
import json
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from subliminal_theory.compilation import keep_compiled
from subliminal_theory.errors import InputError
from subliminal_theory.files import write_atomically
from subliminal_theory.language.hub.adapter import load_adapter
from subliminal_theory.language.model.lora import merge_lora
from subliminal_theory.model import Model
from subliminal_theory.runs import environment
from subliminal_theory.study import Checkpoint, Finished, Study, Untrained

from ..app.contract import PROGRAM, Parser, add_options, option, validate
from .language import COMPUTE, LanguageConfig, configure_language
from .worlds import study

ADAPTER = "folder of an adapter for the checkpoint, such as distil writes"
CARD = "made_by.json"
METRICS = {"probability": ".2e", "share": ".3f", "log_odds": "+.2f", "named_rate": ".3f"}
EXACT = ("probability", "share", "log_odds")


@dataclass(frozen=True)
class StepConfig:
    """The settings that every step has."""

    checkpoint: str = option(
        "smollm2",
        "folder or GGUF file, smollm2 (see weights), or OWNER/NAME[@REVISION] on the Hub",
        alias="--base",
    )
    seed: int = option(0, "seed of all random numbers", minimum=0)
    compute: str = option("float32", "dtype in which the model computes", choices=COMPUTE)


@dataclass(frozen=True)
class TrainingConfig(StepConfig):
    """The settings of steps that train."""

    gradient_checkpointing: bool = option(
        False, "recompute activations for gradients: a quarter more work, less memory"
    )
    save_every: int = option(50, "steps between saves; the same command resumes from the last save", minimum=1)


S = TypeVar("S")


def read_step(
    name: str, about: str | None, default: S, arguments: Sequence[str], **paths: str
) -> tuple[S, list[Path]]:
    """Parse the command line of a step: its positional paths, each with a help text, and its settings.

    Raises:
        InputError: the command line is wrong, or a setting is out of range.
    """
    parser = Parser(name, description=about)
    for path, told in paths.items():
        parser.add_argument(path, type=Path, metavar=path.upper(), help=told)
    add_options(parser, default)
    given = {key: value for key, value in vars(parser.parse_args(arguments)).items() if value is not None}
    places = [given.pop(path) for path in paths]
    config: S = replace(default, **given)  # type: ignore[type-var]
    validate(config)
    keep_compiled()
    return config, places


def new(path: Path) -> Path:
    """The path itself, if nothing exists there. Call this before hours are spent on what will be written.

    Raises:
        InputError: the path exists.
    """
    if path.exists():
        raise InputError(f"{path} is there already: give another name, or remove it")
    return path


@contextlib.contextmanager
def saved_beside(path: Path) -> Iterator[str]:
    """A folder for saves next to the output. The same command resumes from it; it is removed at the end."""
    saves = path.with_name(path.name + ".saves")
    yield str(saves)
    shutil.rmtree(saves, ignore_errors=True)


def opened(config: StepConfig, **settings: Any) -> tuple[Study, LanguageConfig]:
    """The study of a checkpoint, and its full configuration. `settings` are those of the language experiments.

    Raises:
        InputError: as for `configure_language`.
    """
    own = {name: value for name, value in asdict(config).items() if name in LanguageConfig.__dataclass_fields__}
    language = configure_language({"": LanguageConfig()}, None, {**own, **settings})
    return study(language, config.seed), language


def world_of(own: Study) -> Checkpoint:
    """The world of a step."""
    assert isinstance(own.world, Checkpoint)
    return own.world


def with_adapter(world: Checkpoint, folder: str) -> Model:
    """The checkpoint's model, with the adapter in `folder` merged into it if that is not "".

    Raises:
        InputError: as for `load_adapter`.
    """
    if not folder:
        return world.initial()
    template = world.base.tokenizer.fingerprint
    return merge_lora(load_adapter(Path(folder), world.base.checkpoint, template=template)).freeze("*")


def answered_as(world: Checkpoint, model: Model, name: str) -> Mapping[str, np.ndarray]:
    """How a model answers the questions about the world's traits, [traits]."""
    return world.score(Finished(Untrained(), world.initial(), model), name)


def table(names: Sequence[str], scores: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """A table with a line for each trait and model: means over held-out questions."""
    shown = [metric for metric in METRICS if all(metric in own for own in scores.values())]
    wide = max(map(len, [*names, "word"])), max(map(len, scores))
    lines = [f"{'word':{wide[0]}}  {'model':{wide[1]}}" + "".join(f"  {metric:>11}" for metric in shown)]
    for place, trait in enumerate(names):
        for model, own in scores.items():
            values = "".join(f"  {format(own[metric][place], METRICS[metric]):>11}" for metric in shown)
            lines.append(f"{trait:{wide[0]}}  {model:{wide[1]}}{values}")
    return "\n".join(lines)


def write_card(folder: Path, name: str, config: StepConfig, arguments: Sequence[str], **found: Any) -> None:
    """Write how a folder was made: command, settings, versions, and results."""
    command = shlex.join([*PROGRAM, name, *arguments])
    content = {"command": command, "settings": asdict(config), **found, "provenance": environment()}
    write_atomically(folder / CARD, (json.dumps(content, indent=2) + "\n").encode())


@functools.cache
def base_of(folder: str) -> str | None:
    """The checkpoint that the teacher in a folder was trained from, if its card says so; else None."""
    try:
        base = json.loads((Path(folder) / CARD).read_bytes())["settings"]["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return base if isinstance(base, str) else None
