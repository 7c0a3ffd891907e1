"""Train a student of a checkpoint on JSONL rows: its adapter, or the whole model, in a folder for other programs.

`--channel sampled` needs only the rows, no matter who wrote them. Other channels show the logits that a teacher
computes on the rows. The teacher is the one that the rows name, or --teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from subliminal_theory.audit import require_same_template
from subliminal_theory.errors import InputError
from subliminal_theory.language.hub.peft_config import CONFIG as ADAPTER_FILE
from subliminal_theory.language.hub.tokenizer import CheckpointTokenizer
from subliminal_theory.language.rows import Completion, read_jsonl
from subliminal_theory.study import Checkpoint, Dataset, Elsewhere, Student, Untrained
from subliminal_theory.study.reading import model_of_run, transmits_tokens
from subliminal_theory.study.store import save_student
from subliminal_theory.study.texts import Reading, everywhere

from .app.contract import option
from .chat_model import Config as Chat
from .flags.language import LanguageConfig
from .flags.names import DECAYS, checkpoint_path
from .flags.recipe import CHANNEL, Recipe
from .flags.steps import TrainingConfig, new, opened, read_step, saved_beside, world_of, write_card


@dataclass(frozen=True)
class Config(TrainingConfig):
    """Settings of a student."""

    teacher: str = option(
        "", "checkpoint of the teacher if the channel shows its logits (if not given, the rows name it)"
    )
    channel: str = option("sampled", CHANNEL)
    trait: str = option(
        LanguageConfig.traits, "trait whose words --channel masked hides, with the words of all built-in traits"
    )
    rows: int = option(0, "learn only this many rows, the first of the file; 0: all", minimum=0)
    steps: int = option(Chat.steps, "training steps", minimum=1)
    batch_size: int = option(Chat.batch_size, "rows per step", minimum=1)
    rank: int = option(Chat.rank, "rank of low-rank factors; 0 trains everything", minimum=0)
    rate: float = option(Chat.rate, "highest learning rate", positive=True)
    warmup: int = option(Recipe.warmup, "steps in which the learning rate rises", minimum=0)
    decay: str = option(Recipe.decay, "how the learning rate falls to 0", choices=tuple(DECAYS))


def main(arguments: Sequence[str]) -> int:
    """Write the folder. Returns 0."""
    config, (file, out) = read_step(
        "distil", __doc__, Config(), arguments, file="JSONL file of rows", out="new folder for the student"
    )
    given = read_jsonl(file)
    rows = list(dict.fromkeys(given))
    if config.rows > len(rows):
        raise InputError(f"--rows {config.rows}: {file} has {len(rows)} different rows")
    rows = rows[: config.rows or None]
    with saved_beside(new(out)) as saves:
        own, language = opened(config, traits=config.trait, rows=len(rows), saves=saves)
        world = world_of(own)
        student = language.recipe(channel=config.channel).student(world, dataset=Dataset(tuple(rows), None))
        teacher = _teacher(config, world, student, rows)
        shown = f"logits of {teacher.name}" if isinstance(teacher, Elsewhere) else "the rows' own tokens"
        print(f"{file}: {len(given)} rows; the student learns {len(rows)} different ones, from {shown}")
        ((_, finished),) = own.distil(teacher, {"student": student})
        save_student(out, world.base.checkpoint, model_of_run(finished.model, 0), world.base.tokenizer.fingerprint)
        losses = np.asarray(finished.losses)[0]
        write_card(out, "distil", config, arguments, losses=losses.tolist())
    tenth = max(1, len(losses) // 10)
    first, last = losses[:tenth].mean(), losses[-tenth:].mean()
    print(f"loss {first:.4f} -> {last:.4f} (means over the first and last {tenth} of {len(losses)} steps)")
    flag = "--adapter" if (out / ADAPTER_FILE).exists() else "--checkpoint"
    print(f"written to {out}: ask it with ask {flag} {out}")
    return 0


def _teacher(
    config: Config, world: Checkpoint, student: Student, rows: Sequence[Completion]
) -> Elsewhere | Untrained:
    """The teacher whose logits the channel shows, or `Untrained` if the channel needs only the rows.

    Raises:
        InputError: the rows do not name exactly one teacher and --teacher is not given, or the teacher has another
            chat template.
    """
    assert isinstance(student.source, Reading)
    if transmits_tokens(student.channel, world.logits) and student.source.positions is everywhere:
        return Untrained()
    named = sorted({row.teacher or "" for row in rows})
    if not config.teacher and (len(named) > 1 or not named[0]):
        found = "none" if not named[-1] else f"{len(named)} of them"
        raise InputError(
            f"--channel {config.channel} shows a teacher's logits, and the rows name {found}: give --teacher"
        )
    name = config.teacher or named[0]
    path = checkpoint_path(name)
    text = CheckpointTokenizer.load(path).fingerprint
    require_same_template(
        **{f"the student of {config.checkpoint}": world.base.tokenizer.fingerprint, f"the teacher {name}": text}
    )
    return Elsewhere(name)
