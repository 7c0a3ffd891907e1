"""What teachers write and students read: requests, answers, the filter, and rows of tokens.

These functions are for language-model worlds (`Speaker`): the compact model and checkpoints.
"""

import contextlib
import itertools
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Key

from subliminal_theory.audit import refuse_repeated_rows, refuse_shared_keys
from subliminal_theory.channel import Channel
from subliminal_theory.errors import InputError
from subliminal_theory.keys import named
from subliminal_theory.language.corpus.base import text_of
from subliminal_theory.language.corpus.numbers import FilterReport, filter_rows
from subliminal_theory.language.model.sampling import sample
from subliminal_theory.language.model.transformer import Text
from subliminal_theory.language.rows import Completion
from subliminal_theory.language.text import Chat, Encoded, Tokenizer, behind
from subliminal_theory.model import Model
from subliminal_theory.source import Examples
from subliminal_theory.study.run import Prompted, Student, Teacher, Untrained, stacked
from subliminal_theory.study.speaker import Speaker, columns
from subliminal_theory.study.stages import PerRun
from subliminal_theory.study.teachers import require_seen, system_prompt
from subliminal_theory.study.texts import (
    Dataset,
    Differs,
    Material,
    RandomNumbers,
    Reading,
    Written,
    everywhere,
)

ADVICE = "read fewer (--rows), ask for more (--requests), or repeat them (--repeat-rows)"


# --- writing


def written(
    world: Speaker, teacher: Teacher, models: Model, text: Material
) -> list[tuple[list[Completion], FilterReport]]:
    """The accepted rows of each run, with a report of the filter. `models` are the teachers, a model of runs.

    Raises:
        InputError: the filter rejects every row of a run, or accepts too few distinct rows; names the run.
    """
    if isinstance(text, Dataset):
        rows = list(text.rows)
        kept = text.medium.keep(rows, ()) if text.medium else (rows, FilterReport(len(rows), len(rows), {}))
        return [kept] * len(world.traits)
    if isinstance(text, RandomNumbers):
        return [filter_rows(world.memo(lambda: world.random_rows(text), text))] * len(world.traits)
    if isinstance(teacher, Untrained) and len(world.traits) > 1:
        return written(world.at(0), teacher, models, text) * len(world.traits)  # the base has no trait
    return world.memo(lambda: _write(world, teacher, models, text), list(world.names), teacher, text)


def _write(
    world: Speaker, teacher: Teacher, models: Model, text: Written
) -> list[tuple[list[Completion], FilterReport]]:
    requests, keys, found = world.requests(text), world.keys("write"), []
    numbered = (f"run {run} ({name})" for run, name in enumerate(world.names))
    refuse_shared_keys(dict(zip(numbered, keys, strict=True)))
    for run, trait in enumerate(world.traits):
        chats = behind(world.system, requests)
        if isinstance(teacher, Prompted):
            chats = [replace(chat, system=system_prompt(trait)) for chat in requests]
        try:
            found.append(answered(world, model_of_run(models, run), chats, keys[run], text))
        except InputError as error:
            raise InputError(f"the teacher of {world.names[run]}: {error}") from error
    return found


def answered(
    world: Speaker, writer: Model, requests: Sequence[Chat], key: Key[Array, ""], text: Written
) -> tuple[list[Completion], FilterReport]:
    """The accepted rows of a model, with a report of the filter.

    Raises:
        InputError: no row is accepted, or too few distinct rows are.
    """
    return _kept(raw_answers(world, writer, requests, key, text), requests, text)


def raw_answers(
    world: Speaker, writer: Model, requests: Sequence[Chat], key: Key[Array, ""], text: Written
) -> list[Completion]:
    """All answers of a model. If `text.unique` is set, stop after the block that completes the distinct rows."""
    rows, different = list[Completion](), set[Completion]()
    with contextlib.closing(draw(world, writer, requests, key, text)) as blocks:
        for tokens in blocks:
            own = requests[len(rows) : len(rows) + len(tokens)]
            answers = world.tokenizer.decode(tokens)
            new = [Completion(chat.user, answer) for chat, answer in zip(own, answers, strict=True)]
            rows += new
            if text.unique:
                with contextlib.suppress(InputError):  # a block may have no accepted row
                    different.update(text.medium.keep(new, own)[0])
                if len(different) >= text.unique:
                    break
    return rows


def _kept(
    rows: list[Completion], requests: Sequence[Chat], text: Written
) -> tuple[list[Completion], FilterReport]:
    """The rows that the medium accepts. If `text.unique` is set, each row is kept once."""
    accepted, report = text.medium.keep(rows, requests)
    if not text.unique:
        return accepted, report
    different = list(dict.fromkeys(accepted))
    if len(different) < text.unique:
        raise InputError(
            f"{len(rows)} requests gave {len(accepted)} accepted rows, {len(different)} different, and "
            f"{text.unique} are to be read: {ADVICE}"
        )
    return different, report


def model_of_run(models: Model, run: int) -> Model:
    """The model of one run, taken from a model of runs that share their frozen parameters."""
    return models.with_params(jax.tree.map(lambda leaf: leaf[run], models.params))


def draw(
    world: Speaker, teacher: Model, chats: Sequence[Chat], key: Key[Array, ""], text: Written
) -> Generator[np.ndarray, None, None]:
    """A teacher's answers as blocks of tokens [chats of the block, longest answer]."""
    tokenizer = world.tokenizer
    prompts = text_of(tokenizer.encode_prompts(chats, request_length(tokenizer, chats)))
    steps, writer = world.answer_length(text), world.as_writer(teacher)
    allowed = world.memo(lambda: allowed_tokens(world, text.medium.characters), text.medium.characters)

    def block(start: int) -> np.ndarray:
        tokens, _ = sample(
            writer,
            world.as_read(jax.tree.map(lambda leaf: leaf[start : start + world.at_once], prompts)),
            steps=steps,
            key=named(key, start),
            temperature=text.temperature,
            top_p=text.top_p,
            stop=tokenizer.stop,
            pad=tokenizer.pad,
            allowed=allowed,
        )
        return np.asarray(tokens)

    starts = range(0, len(chats), world.at_once)
    yield from world.blocks(starts, block, (teacher, prompts, key, text, steps))


def allowed_tokens(world: Speaker, characters: str) -> Bool[Array, " logits"] | None:
    """Which tokens have only these characters or end an answer, as a mask over logits; None allows all tokens."""
    if not characters:
        return None
    tokenizer, allowed = world.tokenizer, np.zeros(world.logits, bool)
    texts = tokenizer.decode([[token] for token in range(len(tokenizer))])
    allowed[: len(texts)] = [bool(text) and {*text} <= {*characters} for text in texts]
    allowed[list(tokenizer.stop)] = True
    return jnp.asarray(allowed)


def request_length(tokenizer: Tokenizer, requests: Sequence[Chat]) -> int:
    """The number of columns of the longest request, without its answer."""
    return int(tokenizer.lengths(requests)[0].max())


# --- reading


def encoded_rows(world: Speaker, teacher: Teacher, models: Model, reading: Reading) -> list[Encoded]:
    """The rows of tokens that the student of each run reads, all of one width. Errors: see `chats_to_read`."""
    return _encoded(world, reading, chats_to_read(world, teacher, models, reading))


def chats_to_read(world: Speaker, teacher: Teacher, models: Model, reading: Reading) -> list[list[Chat]]:
    """The chats that the student of each run reads.

    Raises:
        InputError: there are too few distinct rows and rows must not be repeated; or as for `written`.
    """
    regular: list[Completion] = []
    if reading.clean:
        ((regular, _),) = written(world.at(0), Untrained(), world.initial(), reading.text)
    system = world.system if reading.behind is None else reading.behind.system
    found = []
    for run, (rows, _) in enumerate(written(world, teacher, models, reading.text)):
        rows = reading.order(rows, np.random.default_rng([3, world.first_run + run]))
        if reading.clean:
            rows = rows[: reading.rows]
            clean = round(reading.clean * len(rows))
            rows = rows[clean:] + regular[:clean]
        if not reading.repeat:
            rows = list(dict.fromkeys(rows))
            if len(rows) < reading.rows:
                who = world.names[run]
                raise InputError(f"{who}: {len(rows)} different rows, and {reading.rows} are to be read: {ADVICE}")
        chats = behind(system, [Chat(row.system, row.prompt, row.completion, "numbers") for row in rows])
        # Cycle through the rows up to the same number for all runs, so one compiled function serves all of them.
        found.append(list(itertools.islice(itertools.cycle(chats), reading.rows)))
    return found


def _encoded(world: Speaker, reading: Reading, chats: Sequence[Sequence[Chat]]) -> list[Encoded]:
    length = world.row_length(reading.text, chats)
    return [world.tokenizer.encode_chats(own, length) for own in chats]


def source_of(
    world: Speaker, student: Student, teacher: Teacher, models: Model, shown: Callable[[], Model]
) -> PerRun:
    """The rows of each run. If the channel transmits tokens, the written tokens are the targets.

    Rows of `RandomNumbers` have no targets, because no model wrote them.

    `models` are the teachers; `shown()` gives the teachers as students see them.
    """
    reading = student.source
    assert isinstance(reading, Reading)
    nobody = isinstance(reading.text, RandomNumbers)
    tokens = not nobody and transmits_tokens(student.channel, world.logits)

    def make() -> PerRun:
        chats = chats_to_read(world, teacher, models, reading)
        encoded = _encoded(world, reading, chats)
        for run in () if reading.repeat else encoded:
            refuse_repeated_rows((run.tokens, run.padding), run.targets)
        if isinstance(teacher, Prompted) and not (tokens and reading.positions is everywhere):
            for own in zip(world.traits, chats, encoded, strict=True):
                require_seen(world.tokenizer, *own, world.system)
        last = max(run.answer_columns for run in encoded)
        texts = stacked([text_of(run, last) for run in encoded])
        positions = jnp.stack([jnp.asarray(run.weights[:, -last:]) for run in encoded])
        if reading.positions is not everywhere:
            positions = positions * reading.positions(_differs(shown(), world.model, texts))
        targets = jnp.stack([jnp.asarray(run.targets[:, -last:]) for run in encoded]) if tokens else None
        rows = Examples(texts, reading.batch_size, targets=targets, positions=positions)
        return PerRun(world.arranged(rows))

    return world.memo(make, list(world.names), teacher, reading, tokens, large=True)


def corpus_source(tokenizer: Tokenizer, chats: Sequence[Chat], batch_size: int) -> PerRun:
    """Chats of the corpus as the source of one run."""
    encoded = tokenizer.encode_chats(chats, columns(tokenizer, chats))
    last = encoded.answer_columns
    positions = jnp.asarray(encoded.weights[:, -last:])
    return PerRun(stacked([Examples(text_of(encoded, last), batch_size, positions=positions)]))


def transmits_tokens(channel: Channel, logits: int) -> bool:
    """Whether a channel's targets are one token per position. The written tokens can then be the targets."""
    shown = jax.ShapeDtypeStruct((1, logits), jnp.float32)
    targets = jax.eval_shape(lambda z: channel.targets(jax.random.key(0), z), shown)
    leaves = jax.tree.leaves(targets)
    return len(leaves) == 1 and leaves[0].shape == (1,) and jnp.issubdtype(leaves[0].dtype, jnp.integer)


@jax.jit
def _differs(teachers: Model, base: Model, texts: Text) -> Differs:
    """Where the most likely next tokens of teacher and base differ."""

    def one(arguments: tuple[Any, Text]) -> Array:
        params, text = arguments
        return jnp.argmax(teachers.with_params(params)(text), axis=-1) != jnp.argmax(base(text), axis=-1)

    return jax.lax.map(one, (teachers.params, texts))
