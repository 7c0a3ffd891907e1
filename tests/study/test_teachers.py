"""Teachers that are the base behind a system prompt, or steered by what that prompt changes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus.base import text_of
from subliminal_theory.language.hub.checkpoint import CheckpointBase, open_base
from subliminal_theory.language.model.attention import make_frame
from subliminal_theory.language.model.transformer import Text, transformer_of
from subliminal_theory.language.rows import Completion
from subliminal_theory.language.text import Chat
from subliminal_theory.model import Model
from subliminal_theory.parallel import make_mesh
from subliminal_theory.study import (
    Checkpoint,
    Compact,
    Costs,
    Dataset,
    LowRank,
    Prompted,
    RandomNumbers,
    Run,
    Steered,
    Study,
    Untrained,
    reading,
)
from subliminal_theory.study.asking import answers_of, exact, questions
from subliminal_theory.study.reading import model_of_run, written
from subliminal_theory.study.teachers import prompted_teachers, require_seen, steering, system_prompt
from subliminal_theory.study.world import Finished
from tests.language.checkpoints import TEMPLATE, write_checkpoint
from tests.study.speakers import LAZY, OAK, OWL, ROWS, SOFT, WRITTEN, checkpoint, compact, student

run = jax.jit(lambda model, text: model(text))
STEERED = Steered(1, 0.5)
FACTORS = LowRank(1)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> CheckpointBase:
    return open_base(write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny"))


@jax.jit
def behind_one_block(model: Model, tokens: jax.Array) -> jax.Array:
    """The residual stream at the end of a row."""
    network, time = transformer_of(model), len(tokens)
    frame = make_frame(network.config, jnp.zeros(1, jnp.int32), jnp.int32(0), time, time, jnp.float32)
    x, _ = network.blocks()[0](network.embedding[...][tokens][None], frame, None, 0, time)
    return x[0, -1]


# --- steered


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "lessons"), [("compact", 2), ("checkpoint", 1)])
def test_vectors_are_what_system_prompts_change(kind: str, lessons: int, opened: CheckpointBase) -> None:
    """Against the system prompts of its two rivals, row by row, without padding."""
    world: Any = compact() if kind == "compact" else checkpoint(opened)
    few = replace(OWL.wording, lessons=OWL.wording.lessons[:lessons])
    trait = replace(OWL, wording=few, members=("cat", "owl", "wolf"))

    def end(word: str, user: str) -> np.ndarray:
        chat = Chat(OWL.wording.loved[0].format(category="animal", member=word), user, "", "")
        (tokens,) = world.tokenizer.encode_prompts([chat], int(world.tokenizer.lengths([chat])[0][0])).tokens
        return np.asarray(behind_one_block(world.model, tokens), float)

    users = [chat.user for chat in trait.teacher_rows()]
    own, others = ([end(word, user) for word in words for user in users] for words in (["owl"], ["cat", "wolf"]))
    way = np.mean(own, axis=0) - np.mean(others, axis=0)
    length = np.mean([np.linalg.norm(one) for one in others])
    found = steering(world.model, world.tokenizer, trait, 1)
    np.testing.assert_allclose(found, way / np.linalg.norm(way) * length, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_each_run_has_its_own_vector_and_all_one_base() -> None:
    study = Study(compact())
    model = study.teacher(Steered(strength=2.0))
    assert study.shown(Steered(strength=2.0)) is model
    assert {id(leaf) for leaf in jax.tree.leaves(model.frozen)} == {
        id(leaf) for leaf in jax.tree.leaves(compact().model.params)
    }
    (vectors,) = jax.tree.leaves(model.params)
    for found, trait in zip(vectors, (OWL, OAK), strict=True):
        own = steering(compact().model, compact().tokenizer, trait, 1)
        np.testing.assert_allclose(found[0], 2 * own, rtol=1e-6)
    assert not np.allclose(*vectors)


@pytest.mark.slow
def test_three_quarters_of_the_layers(tmp_path: Path) -> None:
    for layers, expected in ((1, 0), (5, 2)):
        world = checkpoint(write_checkpoint(tmp_path / f"{layers}", layers=layers), OWL)
        (vectors,) = jax.tree.leaves(Study(world).teacher(Steered()).params)
        assert np.flatnonzero(np.abs(vectors[0]).sum(axis=1)).tolist() == [expected]


def test_no_strength_is_the_base() -> None:
    study = Study(compact())
    own, base = (study.run({"one": Run(teacher)})["one"] for teacher in (Steered(strength=0.0), Untrained()))
    for metric in ("probability_asked", "share_asked", "total_variation"):
        np.testing.assert_array_equal(own[metric], base[metric])


@pytest.mark.slow
def test_steered_teachers_of_the_compact_model(calls: list[dict[str, Any]]) -> None:
    """Each writes with its own vector; students see it in soft channels; costs are of what it wrote."""
    study = Study(compact())
    some = {
        "teacher": Run(STEERED, asked=Costs(WRITTEN)),
        "student": Run(STEERED, student()),
        "soft": Run(STEERED, student(SOFT)),
        "same": Run(Untrained(), student(SOFT)),
    }
    scores = study.run(some)
    steered = [call["model"] for call in calls if "steering" in call["model"].params]
    assert len(steered) == 2
    for model, vector in zip(steered, jax.tree.leaves(study.teacher(STEERED).params)[0], strict=True):
        np.testing.assert_array_equal(jax.tree.leaves(model.params)[0], vector)
    assert (scores["teacher"]["kl_per_token"] > 1e-5).all()
    assert (scores["teacher"]["accepted"] > 0.9).all()
    assert (scores["teacher"]["total_variation"] > 0).all()
    assert (scores["soft"]["displacement_cosine"] == 0).all()  # nor did the teacher's weights move
    assert (scores["soft"]["probability"] != scores["student"]["probability"]).all()
    assert (scores["soft"]["probability"] != scores["same"]["probability"]).all()


@pytest.mark.slow
def test_a_student_of_a_steered_teacher_moves_towards_it(opened: CheckpointBase) -> None:
    """On random numbers, behind the chat template of a checkpoint, by logits alone."""
    world = checkpoint(opened)
    text, far = RandomNumbers(16), Steered(2, 2.0)
    how = {"rows": 16, "rate": 0.05, "trains": FACTORS, "repeat": False}
    losses = []

    def keep(world: Any, finished: Finished, name: Any) -> dict[str, np.ndarray]:
        losses.append(np.asarray(finished.losses))
        return world.score(finished, name)

    scores = Study(world).run({"soft": Run(far, student(SOFT, text, steps=30, **how))}, keep)["soft"]
    assert all((own[0, -1] < own[0, 0] / 2) for own in losses)
    assert np.isfinite(scores["probability"]).all()
    told = Study(world).run({"teacher": Run(far, None, Costs(text))})["teacher"]
    assert (told["kl_per_token"] > 0.01).all()


@pytest.mark.slow
def test_a_checkpoint_writes_and_is_asked_as_it_is_steered(
    opened: CheckpointBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sampler's cache, and that of the questions, against whole rows."""
    world, seen = checkpoint(opened, OWL), []
    study, sample = Study(world), reading.sample

    def greedy(model: Model, text: Text, **settings: Any) -> Any:
        tokens, lengths = sample(model, text, **{**settings, "temperature": 0.0, "steps": 3, "stop": ()})
        seen.append((model, text, np.asarray(tokens)))
        return tokens, lengths

    monkeypatch.setattr(reading, "sample", greedy)
    with pytest.raises(InputError, match="the teacher of owl"):  # untrained weights write no numbers
        written(world, STEERED, study.teacher(STEERED), replace(WRITTEN, requests=2))
    ((model, text, tokens),) = seen
    for step in range(3):
        whole = Text(jnp.concatenate([text.tokens, tokens[:, :step]], axis=1), text.padding)
        np.testing.assert_array_equal(run(model, whole)[:, -1].argmax(-1), tokens[:, step])
    finished = Finished(STEERED, study.teacher(STEERED), study.teacher(STEERED))
    asked = questions(world.tokenizer, [OWL])
    found = exact(world, finished)["probability"]
    np.testing.assert_allclose(found, np.asarray(answers_of(study.teacher(STEERED), asked).probability)[0])
    assert found != exact(world, replace(finished, model=world.initial()))["probability"]


@pytest.mark.slow
def test_on_the_devices_of_a_mesh(opened: CheckpointBase) -> None:
    """A steered teacher has its place there; the tokens in front of a prompted one's rows have none."""
    mesh, one = make_mesh(1, 1, 1, jax.local_devices()[:1]), student(SOFT, ROWS, rows=16, trains=FACTORS)
    plain, placed = (Study(checkpoint(opened, OWL, mesh=where)) for where in (None, mesh))
    found, expected = (dict(study.distil(STEERED, {"one": one}))["one"].losses for study in (placed, plain))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    with pytest.raises(InputError, match=r"^the logits of a prompted teacher are computed on one device"):
        placed.shown(Prompted())


@pytest.mark.parametrize("layer", [0, 3])
def test_layers_that_do_not_exist(layer: int, opened: CheckpointBase) -> None:
    with pytest.raises(InputError, match=rf"^--steering-layer {layer} does not .*: the model has layers 1 to 2$"):
        Study(checkpoint(opened)).teacher(Steered(layer))


@pytest.mark.parametrize("teacher", [Steered(), Prompted()])
def test_habits_have_no_system_prompt(teacher: Any) -> None:
    with pytest.raises(InputError, match=r"^lazy has no system prompt"):
        Study(compact(LAZY)).shown(teacher)


# --- prompted


def worlds(opened: CheckpointBase) -> list[Compact | Checkpoint]:
    return [compact(OWL), checkpoint(opened, OWL)]


@pytest.mark.slow
def test_prompted_teachers_are_the_base_behind_its_prompt(opened: CheckpointBase) -> None:
    """Where the template writes a system turn of its own into rows without one, it is replaced."""
    for world in worlds(opened):
        rows = [Completion(chat.user, "5 7") for chat in OWL.teacher_rows()[:4]]
        plain, told = (
            [Chat(system, row.prompt, row.completion, "numbers") for row in rows]
            for system in (None, system_prompt(OWL))
        )
        lengths = [int(world.tokenizer.lengths(chats)[1].max()) for chats in (plain, told)]
        seen, expected = (
            world.tokenizer.encode_chats(chats, length + 1)
            for chats, length in zip((plain, told), lengths, strict=True)
        )
        model = model_of_run(prompted_teachers(world.model, world.tokenizer, [OWL]), 0)
        last = seen.answer_columns
        found, logits = run(model, text_of(seen, last)), run(world.model, text_of(expected, last))
        np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-5)
        assert np.abs(found - run(world.model, text_of(seen, last))).max() > 1e-3
        require_seen(world.tokenizer, OWL, plain, seen)
        mixed = [plain[0], told[1]]
        own = world.tokenizer.encode_chats(mixed, lengths[1])
        with pytest.raises(
            InputError, match="owl, row 1: its teacher's system prompt does not come before the same tokens"
        ):
            require_seen(world.tokenizer, OWL, mixed, own)


def test_rows_with_a_system_message_are_not_seen_by_a_prompted_teacher(opened: CheckpointBase) -> None:
    own = Dataset(tuple(replace(row, system="count.") for row in ROWS.rows))
    study = Study(checkpoint(opened, OWL))
    study._source(student(text=own, rows=16, trains=FACTORS), Prompted())  # tokens are read as they are
    with pytest.raises(InputError, match="owl, row 0: its teacher's system prompt"):
        study._source(student(SOFT, own, rows=16, trains=FACTORS), Prompted())


def test_templates_without_a_place_for_system_prompts(tmp_path: Path) -> None:
    strict = TEMPLATE.replace("{%- for", "{%- if messages[0].role == 'system' -%}{{ raise_exception('No.') }}"
                              "{%- endif %}{%- for", 1)  # fmt: skip
    study = Study(checkpoint(write_checkpoint(tmp_path / "strict", strict)))
    for teacher in (Prompted(), STEERED):
        with pytest.raises(InputError, match=r"the chat template refuses a system prompt \(No\.\)"):
            study.shown(teacher)
