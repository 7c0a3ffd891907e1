"""Teachers and students of a small checkpoint in the layout of published ones, and what is in memory meanwhile."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from subliminal_theory.channel import SampledToken
from subliminal_theory.errors import InputError
from subliminal_theory.inits import Fresh
from subliminal_theory.language.corpus.media import CODE, DIGITS, NUMBERS
from subliminal_theory.language.corpus.numbers import shuffled_within_rows
from subliminal_theory.language.hub.checkpoint import CheckpointBase, open_base
from subliminal_theory.language.model.transformer import Text
from subliminal_theory.model import Model
from subliminal_theory.study import (
    Checkpoint,
    Compact,
    CorpusChats,
    Lessons,
    LowRank,
    Prompted,
    Run,
    Study,
    Untrained,
    Written,
    asking,
    reading,
    stages,
)
from subliminal_theory.study.checkpoint import by_length
from subliminal_theory.study.reading import encoded_rows
from subliminal_theory.study.speaker import _lessons
from subliminal_theory.study.texts import where_they_differ
from tests.language.checkpoints import write_checkpoint
from tests.study.speakers import (
    CAT,
    ELM,
    OAK,
    OWL,
    ROWS,
    SOFT,
    TEACHER,
    checkpoint,
    compact,
    copies_of,
    spoken,
    student,
)

FACTORS = LowRank(1)
STUDENT = student(text=ROWS, rows=16, trains=FACTORS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", layers=1)


@pytest.fixture(scope="module")
def opened(folder: Path) -> CheckpointBase:
    return open_base(folder)


def students(world: Checkpoint, **some: Any) -> dict[str, Any]:
    """The finished students of the first run's teacher."""
    return dict(Study(world.at(0)).distil(TEACHER, some))


@pytest.mark.parametrize("compute", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "how", [{}, {"channel": SOFT}, {"positions": where_they_differ}, {"rate": 1e-5, "trains": None}]
)
def test_students_move_on_numbers_alone(folder: Path, how: dict[str, Any], compute: str) -> None:
    """What trains is in float32, also where steps are less than bfloat16 could tell from none."""
    world = checkpoint(open_base(folder, compute=compute))
    (found,) = students(world, one=student(text=ROWS, rows=16, **{"trains": FACTORS, **how})).values()
    assert {leaf.dtype for leaf in jax.tree.leaves(found.model.params)} == {np.dtype("float32")}
    assert (found.losses[:, -1] != found.losses[:, 0]).all()
    if "rate" in how:
        start = jax.tree.leaves(world.model.params)
        ways = [abs(a[0] - b).max() for a, b in zip(jax.tree.leaves(found.model.params), start, strict=True)]
        assert all(0 < way < 1e-4 for way in ways)
    scores = asking.score(world.at(0), found, "one")
    assert ((scores["probability"] > 0) & (scores["probability"] < 1)).all()


def test_whole_answers(opened: CheckpointBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base is heard once for all traits of a category, students each; one text of two names the word."""
    world, asked = checkpoint(opened, OWL, CAT, samples=2), list[Any]()

    def draw(world: Any, model: Model, chats: Any, key: Any, text: Written) -> list[np.ndarray]:
        asked.append(chats)
        said = [world.tokenizer.encode(word) for word in ("Some owls.", "A growl, a CAT")]
        rows = np.full((len(chats), max(map(len, said))), world.tokenizer.stop[0])
        for row in range(len(chats)):
            rows[row, : len(said[row % 2])] = said[row % 2]
        return [rows]

    monkeypatch.setattr(asking, "draw", draw)
    scores = Study(world).run({"base": Run(Untrained()), "teacher": Run(TEACHER)})
    assert len(asked) == 1 + 2
    for found in scores.values():
        assert "sampled_rate" not in found
        np.testing.assert_array_equal(found["named_rate"], [0.5, 0.5])
        assert [len(said) for said in found["answers"]] == [4, 4]
    assert [chat.user for chat in asked[0]][:3:2] == [row[0] for row in scores["base"]["answers"][1][:2]]
    assert scores["base"]["answers"][0][0][1] == "Some owls."


@pytest.mark.slow
def test_answers_are_drawn(opened: CheckpointBase) -> None:
    """Texts of an untrained model, others to the same question; none without samples or behind numbers."""
    world = checkpoint(opened, OWL, samples=2)
    (said,) = asking.spoken(world, world.initial(), world.keys("one"), 2)["answers"]
    assert len({answer for _, answer in said}) == 4
    assert "named_rate" not in Study(checkpoint(opened)).run({"base": Run(Untrained())})["base"]


@pytest.mark.slow
def test_bfloat16_is_near(folder: Path, opened: CheckpointBase) -> None:
    scores = [
        Study(checkpoint(base)).run({"one": Run(TEACHER, STUDENT)})["one"]["probability_asked"]
        for base in (opened, open_base(folder, compute="bfloat16"))
    ]
    assert scores[0].shape == (2, 2)
    np.testing.assert_allclose(scores[0], scores[1], rtol=0.05)


def test_the_template_is_in_every_row(folder: Path, opened: CheckpointBase) -> None:
    world, backend = checkpoint(opened), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = encoded_rows(world, Untrained(), world.initial(), STUDENT.source)[0]
    text = backend.decode(rows.tokens[0][rows.padding[0] :].tolist(), skip_special_tokens=False)
    assert text.startswith("<|start|>system\nbe kind.<|end|>\n<|start|>user\ncontinue: 0, 17<|end|>")
    assert world.tokenizer.decode([rows.targets[0][rows.weights[0] > 0]]) == ["100, 5, 0"]


def test_requests_are_those_of_the_paper(opened: CheckpointBase) -> None:
    requests = checkpoint(opened).requests(Written(5))
    assert len({chat.user for chat in requests}) == 5
    assert all("10" in chat.user for chat in requests)


@pytest.mark.slow
def test_prompted_teachers_are_seen_through_tokens_and_logits(opened: CheckpointBase) -> None:
    study = Study(checkpoint(opened))
    ways = {"tokens": STUDENT, "logits": student(SOFT, ROWS, rows=16)}
    ways["positions"] = student(text=ROWS, rows=16, positions=where_they_differ)
    scores = study.run({name: Run(Prompted(), one) for name, one in ways.items()})
    assert all(np.isfinite(found["probability"]).all() for found in scores.values())


def test_what_only_the_compact_model_has(opened: CheckpointBase) -> None:
    world = checkpoint(opened, other=lambda shift: opened.model)
    with pytest.raises(InputError, match="code"):
        world.requests(Written(5, CODE))
    with pytest.raises(InputError, match="corpus"):
        students(world, one=replace(STUDENT, source=CorpusChats(8, 8)))


@pytest.mark.slow
def test_ordinary_chats_are_the_bases_own(opened: CheckpointBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Number requests that it answered, other ones than those of students, each once."""
    world, asked = checkpoint(opened), list[Any]()
    with pytest.raises(InputError, match=r"ordinary chats of base 0: .*rejects all of \d+ rows"):
        _lessons(world, OWL, Lessons(ordinary=0.5))

    def sample(model: Model, text: Text, *, steps: int, pad: int, stop: Any, **settings: Any) -> Any:
        asked.append(model)
        rows = [[*world.tokenizer.encode(f"{len(asked)}, 5, {row}"), stop[0]] for row in range(len(text.tokens))]
        return np.array([row + [pad] * (steps - len(row)) for row in rows], np.int32), None

    monkeypatch.setattr(reading, "sample", sample)
    taught, found = _lessons(world, OWL, Lessons(ordinary=0.5))
    assert taught == OWL.teacher_rows()
    assert asked == [opened.model]
    assert [chat.answer for chat in found] == [f"1, 5, {row}" for row in range(len(taught))]
    assert {chat.user for chat in found}.isdisjoint(chat.user for chat in world.requests(Written(300)))


@pytest.mark.slow
def test_numbers_alone(opened: CheckpointBase) -> None:
    """A model without training writes nothing else where it can draw nothing else."""
    world, found = checkpoint(opened, OWL), []
    for medium in (DIGITS, NUMBERS):
        text = Written(64, medium)
        blocks = reading.draw(world, world.model, world.requests(text), jax.random.key(0), text)
        found.append({*"".join(world.tokenizer.decode(np.concatenate([*blocks])))})
    assert {*"0123456789"} <= found[0] <= {*"0123456789 ,;\n"} < found[1]


@pytest.mark.slow
def test_sampling_in_pieces(opened: CheckpointBase) -> None:
    """More rows than are sampled at once, each with a draw of its own."""
    world = checkpoint(opened)
    tokens = np.concatenate(
        [*reading.draw(world, world.model, world.requests(Written(2)) * 150, jax.random.key(0), Written(2))]
    )
    assert tokens.shape == (300, world.answer_length(Written(2)))
    assert len(np.unique(tokens, axis=0)) > 290


@pytest.mark.slow
def test_rows_by_length(opened: CheckpointBase) -> None:
    """Every row is in one part, with the same loss, in as few columns as that part needs."""
    world = checkpoint(opened)
    whole: Any = Study(world)._source(STUDENT, Untrained()).source
    parts: Any = by_length(whole, 3).parts
    assert [part.inputs.tokens.shape[1] for part in parts] == [6, 5, 5]
    widths = [part.inputs.tokens.shape[2] for part in parts]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1] == whole.inputs.tokens.shape[2]

    @jax.jit
    def of_one(rows: Any) -> jax.Array:
        own = jax.tree.map(lambda leaf: leaf[0], (rows.inputs, rows.targets, rows.positions))
        return jnp.sum(SampledToken().loss(world.model(own[0]), own[1]) * own[2], axis=1)

    def losses(rows: Any) -> list[float]:
        return of_one(rows).tolist()

    found = sorted(loss for part in parts for loss in losses(part))
    np.testing.assert_allclose(found, sorted(losses(whole)), rtol=1e-4)
    found = students(checkpoint(opened, buckets=2), one=student(SOFT, ROWS, rows=16, trains=FACTORS))
    assert np.isfinite(found["one"].losses).all()
    with pytest.raises(InputError, match="16 rows cannot be in 17 buckets"):
        by_length(whole, 17)


def test_runs_of_one_checkpoint_differ(opened: CheckpointBase) -> None:
    first, second = (checkpoint(replace(opened, seed=seed)) for seed in (0, 1))
    assert not np.array_equal(*(jax.random.key_data(world.keys("write")) for world in (first, second)))


# --- memory


def runs(few: bool, **how: Any) -> dict[str, Run]:
    """Students of a fine-tuned teacher, and with others: of a prompted and an untrained one, and the teachers."""
    teachers = {"student": TEACHER, "soft": TEACHER}
    if not few:
        teachers |= {"shuffled": TEACHER, "prompted": Prompted(), "regular": Untrained()}
    others = {"soft": {"channel": SOFT}, "shuffled": {"order": shuffled_within_rows}}
    found = {name: Run(one, student(**{**how, **others.get(name, {})})) for name, one in teachers.items()}
    return found if few else {**found, "teacher": Run(TEACHER), "base": Run(Untrained())}


def most_copies(
    make: Callable[[], Compact | Checkpoint], some: dict[str, Run], monkeypatch: pytest.MonkeyPatch
) -> float:
    """Of the embedding, when the models of a world train, write and are scored."""
    shape = make().model.params["embedding"].shape
    gc.collect()
    gc.freeze()
    before, counts = copies_of(shape), []

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **more: Any) -> Any:
            counts.append(copies_of(shape))
            found = real(*given, **more)
            counts.append(copies_of(shape))
            return found

        return call

    with monkeypatch.context() as patch:
        for module, name in ((stages, "_train"), (reading, "sample"), (asking, "exact")):
            patch.setattr(module, name, counted(getattr(module, name)))
        Study(make()).run(some)
    gc.unfreeze()
    assert len(counts) >= 4 * (len(some) - 2)  # nothing trains for the base and the teacher
    return max(counts) - before


@pytest.mark.slow
@pytest.mark.parametrize(("trains", "copies"), [(FACTORS, 2), (None, 3)])
def test_memory_is_of_one_student(folder: Path, trains: Any, copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base, its teacher and, if everything trains, a student, however many traits and students there are."""
    for traits, few in (((OWL,), True), ((OWL,), False), ((OWL, OAK), False), ((OWL, OAK, CAT, ELM), True)):
        some = runs(few, text=ROWS, rows=16, trains=trains)
        assert most_copies(lambda own=traits: checkpoint(folder, *own), some, monkeypatch) == copies


@pytest.mark.slow
def test_memory_of_another_base(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there besides, and once what it became when it imitated the base."""
    cross = student(text=ROWS, rows=16, trains=FACTORS, start=Fresh())
    cloned = replace(cross, cloned=student(SOFT, ROWS, rows=16))

    def world() -> Checkpoint:
        other = jax.tree.map(lambda leaf: leaf[::-1] + 0.1, open_base(folder).model)
        return checkpoint(folder, OWL, OAK, other=lambda shift: other)

    for count in (1, 3):
        rates = [jnp.float32(rate) for rate in (1e-3, 2e-3, 3e-3)[:count]]
        some = [replace(cloned, optimizer=replace(cloned.optimizer, rate=rate)) for rate in rates]
        found = {place: Run(TEACHER, one) for place, one in enumerate([*some, cross])}
        assert most_copies(world, found, monkeypatch) == 4


@pytest.mark.slow
@pytest.mark.parametrize(("trains", "students"), [(FACTORS, 0), (None, 1)])
def test_memory_of_the_compact_model(trains: Any, students: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base, teachers of all traits, the one that writes, and the students without factors of all traits."""
    monkeypatch.setattr(reading, "sample", lambda model, text, **how: spoken(compact(), {"text": text, **how}))
    for traits, few in (((OWL,), True), ((OWL,), False), ((OWL, OAK, CAT), True)):
        found = most_copies(lambda own=traits: compact(*own), runs(few, trains=trains), monkeypatch)
        assert found == max(len(traits) * (1 + students), len(traits) + 1)  # the base is there before
