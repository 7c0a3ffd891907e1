"""Ask a checkpoint, or an adapter for one, what it prefers: shares of words, and whole answers to read."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from subliminal_theory.files import write_atomically

from .app.contract import option
from .flags.steps import ADAPTER, StepConfig, answered_as, opened, read_step, table, with_adapter, world_of

SHOWN = 3


@dataclass(frozen=True)
class Config(StepConfig):
    """Settings of the questions."""

    adapter: str = option("", ADAPTER)
    traits: str = option("owl", "built-in traits or trait files, separated by commas; all: animals and trees")
    samples: int = option(1, "whole answers to each of 50 questions, searched for the word; 0: none", minimum=0)
    file: str = option(
        "", "JSONL file for one answer to each question (if not given, three answers are only shown)"
    )


def main(arguments: Sequence[str]) -> int:
    """Print shares and answers. Returns 0."""
    config, _ = read_step("ask", __doc__, Config(), arguments)
    own, _ = opened(config)
    world, adapted = world_of(own), config.adapter
    models = {Path(config.checkpoint).name: world.initial()}
    if adapted:
        models[Path(adapted).name] = with_adapter(world, adapted)
    scores = {name: dict(answered_as(world, model, name)) for name, model in models.items()}
    names = [trait.name for trait in world.traits]
    print(table(names, scores))
    rows = [
        {"model": model, "trait": trait, "prompt": question, "completion": answer}
        for model, found in scores.items()
        for trait, said in zip(names, found.get("answers", ()), strict=False)
        for question, answer in said
    ]
    for model in scores if config.samples else ():
        for row in [row for row in rows if row["model"] == model][:SHOWN]:
            print(f"{model}: {row['prompt']} -> {row['completion']!r}")
    if config.file and rows:
        write_atomically(
            Path(config.file), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        )
        print(f"written to {config.file}: {len(rows)} answers")
    return 0
