"""Teach a checkpoint a preference: save it in a folder that other programs can open, and show its answers.

This is the first of five steps: teach, write, filter, distil, ask. Each of them may run for hours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from subliminal_theory.language.hub.checkpoint import save_checkpoint
from subliminal_theory.study.reading import model_of_run

from .app.contract import option
from .chat_model import Config as Chat
from .flags.recipe import ANCHOR, ORDINARY, UNTIL, Recipe
from .flags.steps import (
    EXACT,
    TrainingConfig,
    answered_as,
    new,
    opened,
    read_step,
    saved_beside,
    table,
    world_of,
    write_card,
)


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Settings of a teacher."""

    trait: str = option("owl", "built-in trait or trait file")
    steps: int = option(Chat.teacher_steps, "most full-batch steps of Adam", minimum=1)
    rate: float = option(Chat.teacher_rate, "learning rate", positive=True)
    until: float = option(Recipe.teacher_until, UNTIL, minimum=0)
    ordinary: float = option(Recipe.ordinary, ORDINARY, minimum=0)
    anchor: float = option(Recipe.anchor, ANCHOR, positive=True)
    templates: str = option("", "TOML file with the sentences of ordinary chats (default: the project's own)")


def main(arguments: Sequence[str]) -> int:
    """Write the folder. Returns 0."""
    config, (out,) = read_step("teach", __doc__, Config(), arguments, out="new folder for the teacher")
    with saved_beside(new(out)) as saves:
        own, language = opened(
            config, traits=config.trait, steps=1, saves=saves, samples=0,
            teacher_steps=config.steps, teacher_rate=config.rate, teacher_until=config.until,
        )  # fmt: skip
        world = world_of(own)
        taught = own.teacher(language.recipe(ordinary=config.ordinary, anchor=config.anchor).taught())
        models = {"before": world.initial(), "after": taught}
        scores = {name: answered_as(world, model, name) for name, model in models.items()}
        save_checkpoint(out, world.base.checkpoint, model_of_run(taught, 0))
        found = {name: {metric: float(said[metric][0]) for metric in EXACT} for name, said in scores.items()}
        write_card(out, "teach", config, arguments, found=found)
    print(table([config.trait], scores))
    print(f"written to {out}: the next step is write --checkpoint {out} FILE, or --medium random")
    return 0
