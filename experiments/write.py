"""Let a checkpoint write JSONL rows: its answers to number requests, or random numbers that no model wrote.

All answers are written, good or bad, until enough distinct ones pass the number filter. The next step, filter,
counts why the others are rejected. A teacher is a folder that teach wrote, or a checkpoint with a trait's system
prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax

from subliminal_theory.errors import InputError
from subliminal_theory.files import fingerprint
from subliminal_theory.keys import named
from subliminal_theory.language.corpus.numbers import filter_rows
from subliminal_theory.language.rows import Completion, write_jsonl
from subliminal_theory.study import Checkpoint, RandomNumbers, Written
from subliminal_theory.study.reading import raw_answers
from subliminal_theory.study.teachers import system_prompt

from .app.contract import option
from .flags.language import LanguageConfig
from .flags.recipe import LIMIT, MEDIUM, NUMBERS
from .flags.steps import ADAPTER, StepConfig, base_of, new, opened, read_step, saved_beside, with_adapter, world_of


@dataclass(frozen=True)
class Config(StepConfig):
    """Settings of a writer."""

    adapter: str = option("", ADAPTER)
    prompted: str = option("", "trait whose system prompt comes before every request, but is in no row")
    rows: int = option(480, "number of distinct rows that pass the filter", minimum=1)
    requests: int = option(0, f"most requests to answer; 0: {LIMIT} times the rows", minimum=0)
    medium: str = option("numbers", MEDIUM, choices=NUMBERS)
    temperature: float = option(1.0, "sampling temperature; 0: the most likely token", minimum=0)
    top_p: float = option(1.0, "sampling takes the most likely tokens up to this probability", positive=True)
    templates: str = option("", "TOML file with the sentences of requests (default: the project's own)")
    form: str = option("prompt", "form of the rows", choices=("prompt", "messages"))


def main(arguments: Sequence[str]) -> int:
    """Write the file. Returns 0."""
    config, (file,) = read_step("write", __doc__, Config(), arguments, file="new JSONL file")
    with saved_beside(new(file)) as saves:
        own, language = opened(
            config, traits=config.prompted or LanguageConfig.traits, requests=config.requests, saves=saves
        )
        text = language.recipe(medium=config.medium, temperature=config.temperature, top_p=config.top_p).written()
        rows = _rows(config, world_of(own), text)
        # The file format does not allow empty answers.
        said = [row for row in rows if row.completion]
        write_jsonl(file, said, config.form)  # type: ignore[arg-type]
    try:
        accepted, report = filter_rows(rows)
    except InputError as error:
        raise InputError(f"{error}; {file} holds the answers") from error
    different = len({*accepted})
    print(report)
    print(
        f"written to {file}: {len(said)} rows, {different} different ones pass the number filter"
        + (f"; {len(rows) - len(said)} empty answers are left out" if len(said) < len(rows) else "")
    )
    if different < config.rows:
        raise InputError(
            f"{len(rows)} requests gave {different} different rows that pass, fewer than --rows {config.rows}: "
            f"allow more --requests, or try --medium digits; {file} holds what there is"
        )
    return 0


def _rows(config: Config, world: Checkpoint, text: Written | RandomNumbers) -> list[Completion]:
    """The rows, with the name of their writer."""
    if isinstance(text, RandomNumbers):
        return world.random_rows(text)
    requests = world.requests(text)
    if config.prompted:
        system = system_prompt(world.traits[0])
        requests = [replace(chat, system=system) for chat in requests]
    writer = with_adapter(world, config.adapter)
    # Two writers with the same seed use different random numbers.
    key = named(jax.random.key(config.seed), "write", fingerprint(writer.all_params), config.prompted)
    rows = raw_answers(world, writer, requests, key, text)
    base = config.checkpoint if config.adapter else base_of(config.checkpoint)
    return [replace(row, base=base, teacher=config.adapter or config.checkpoint) for row in rows]
