"""The steps on their own: teach, write, filter, distil, ask; on a small checkpoint and files of others."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.app import command as command_line
from experiments.flags.language import LanguageConfig
from experiments.flags.worlds import study
from subliminal_theory.language.hub.adapter import load_adapter
from subliminal_theory.language.hub.checkpoint import load_checkpoint, open_base
from subliminal_theory.language.rows import Completion, read_jsonl, write_jsonl
from subliminal_theory.model import leaves_by_path
from subliminal_theory.study import Checkpoint, Dataset
from subliminal_theory.study.reading import model_of_run
from tests.experiments.commands import fails
from tests.language.checkpoints import TEMPLATE, write_checkpoint

TAUGHT = ("--steps", 3, "--rate", 1e-2)
LEARNED = ("--steps", 3, "--rank", 2, "--batch-size", 4)


def done(*arguments: object) -> None:
    assert command_line.main([*map(str, arguments)]) == 0


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its teacher, what that wrote, what of it is numbers, and random numbers."""
    here = tmp_path_factory.mktemp("steps")
    base = write_checkpoint(here / "base")
    done("teach", here / "owl", "--checkpoint", base, *TAUGHT)
    done("write", here / "raw.jsonl", "--checkpoint", here / "owl", "--rows", 4, "--medium", "digits")
    done("filter", here / "raw.jsonl", here / "kept.jsonl")
    done("write", here / "random.jsonl", "--checkpoint", base, "--rows", 8, "--medium", "random")
    return here


def test_a_teacher_is_a_checkpoint_that_has_the_trait(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = json.loads((here / "owl" / "made_by.json").read_text())
    assert card["settings"]["checkpoint"] == str(here / "base")
    assert card["found"]["after"]["share"] > card["found"]["before"]["share"]
    done("ask", "--checkpoint", here / "owl", "--samples", 0)
    assert f"{card['found']['after']['share']:.3f}" in capsys.readouterr().out
    assert not (here / "owl.saves").exists()


def test_rows_name_their_writer_and_its_base(here: Path) -> None:
    raw, kept = read_jsonl(here / "raw.jsonl"), read_jsonl(here / "kept.jsonl")
    assert {(row.base, row.teacher) for row in [*raw, *kept]} == {(str(here / "base"), str(here / "owl"))}
    assert len({*kept}) == len(kept) >= 4
    assert {*kept} < {*raw}
    assert all(row.completion.strip("0123456789 ,;\n.") == "" for row in kept)


@pytest.mark.slow
@pytest.mark.parametrize(("channel", "file"), [("masked", "random"), ("soft", "kept")])
def test_a_student_of_files_is_the_studys_own(here: Path, tmp_path: Path, channel: str, file: str) -> None:
    """Taught and distilled through folders and files, or in one study: the same numbers."""
    rows = tuple(read_jsonl(here / f"{file}.jsonl"))
    done(
        "distil", here / f"{file}.jsonl", tmp_path / "student", "--checkpoint", here / "base", *LEARNED,
        "--channel", channel, *(("--teacher", here / "owl") if file == "random" else ()),
    )  # fmt: skip
    config = LanguageConfig(
        checkpoint=str(here / "base"), gradient_checkpointing=False, rows=len(rows), steps=3, rank=2,
        batch_size=4, rate=1e-3, teacher_steps=3, teacher_rate=1e-2,
    )  # fmt: skip
    own = study(config, 0)
    assert isinstance(own.world, Checkpoint)
    recipe = config.recipe(channel=channel)
    wanted = recipe.student(own.world, dataset=Dataset(rows, None))
    ((_, finished),) = own.distil(recipe.taught(), {"student": wanted})
    student = load_adapter(tmp_path / "student", load_checkpoint(here / "base"))
    found, of_study = leaves_by_path(student.params), leaves_by_path(model_of_run(finished.model, 0).params)
    assert found.keys() == of_study.keys()
    for name, leaf in found.items():
        np.testing.assert_allclose(leaf, of_study[name], rtol=1e-5, atol=1e-7)
    assert any(np.any(np.asarray(leaf)) for name, leaf in found.items() if name.endswith("b"))
    losses = json.loads((tmp_path / "student" / "made_by.json").read_text())["losses"]
    np.testing.assert_allclose(losses, np.asarray(finished.losses)[0], rtol=1e-5)


@pytest.mark.slow
def test_rows_of_others_are_read_as_they_are(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Words, system turns, names that are none: all rows are learned, and those that are there twice once."""
    rows = [Completion(f"how is {i}?", f"it is {i} and well", "be brief" if i % 2 else None) for i in range(6)]
    write_jsonl(tmp_path / "words.jsonl", [*rows, rows[0]], "messages")
    with open(tmp_path / "words.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "and 9?", "completion": "so", "teacher": {"of": "school"}}) + "\n")
    done(
        "distil", tmp_path / "words.jsonl", tmp_path / "all", "--checkpoint", here / "base", *LEARNED, "--rank", 0
    )
    said = capsys.readouterr().out
    assert "8 rows; the student learns 7 different ones, from the rows' own tokens" in said
    assert f"ask --checkpoint {tmp_path / 'all'}" in said
    changed = open_base(tmp_path / "all").model.params
    same = jax.tree.map(lambda a, b: bool((a == b).all()), changed, open_base(here / "base").model.params)
    assert not any(jax.tree.leaves(same))


@pytest.mark.slow
def test_an_adapter_is_asked_beside_its_base_and_writes(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = here / "base"
    done("distil", here / "kept.jsonl", tmp_path / "student", "--checkpoint", base, *LEARNED)
    asked = ("--traits", "owl,cat", "--samples", 2, "--file", tmp_path / "said.jsonl")
    done("ask", "--checkpoint", base, "--adapter", tmp_path / "student", *asked)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith(("owl", "cat"))] == [
        [word, model] for word in ("owl", "cat") for model in ("base", "student")
    ]
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert len(said) == 2 * 2 * 50
    assert len({(row["model"], row["trait"], row["prompt"]) for row in said}) == 2 * 50 + 2 * 50
    done(
        "write", tmp_path / "second.jsonl", "--checkpoint", base, "--adapter", tmp_path / "student", "--rows", 1,
        "--medium", "digits", "--requests", 16,
    )  # fmt: skip
    (row, *_) = read_jsonl(tmp_path / "second.jsonl")
    assert (row.base, row.teacher) == (str(base), str(tmp_path / "student"))


@pytest.mark.slow
def test_two_writers_of_one_seed_draw_different_numbers(here: Path, tmp_path: Path) -> None:
    """A prompted writer has the trait's sentence in front of it, and its rows do not."""
    few = ("--rows", 1, "--medium", "digits", "--requests", 64)
    done("write", tmp_path / "plain.jsonl", "--checkpoint", here / "base", *few)
    done("write", tmp_path / "prompted.jsonl", "--checkpoint", here / "base", "--prompted", "owl", *few)
    plain, prompted = (read_jsonl(tmp_path / f"{name}.jsonl") for name in ("plain", "prompted"))
    assert {row.system for row in prompted} == {None}
    assert [row.completion for row in plain] != [row.completion for row in prompted]


def test_what_is_refused(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, kept = here / "base", here / "kept.jsonl"
    other = write_checkpoint(tmp_path / "other", TEMPLATE.replace("be kind", "be good"))
    done("distil", kept, tmp_path / "student", "--checkpoint", base, *LEARNED)
    capsys.readouterr()
    mixed = [Completion("a", "1", teacher="one"), Completion("b", "2", teacher="two")]
    write_jsonl(tmp_path / "mixed.jsonl", mixed)
    words = tmp_path / "words.jsonl"
    write_jsonl(words, [Completion("a", "one")])
    new = tmp_path / "new"
    for arguments, cause in (
        (("teach", here / "owl", "--checkpoint", base), "owl is there already"),
        (("teach", new, "--checkpoint", base, "--trait", "lazy"), "--checkpoint takes preferences only"),
        (("teach", new, "--checkpoint", tmp_path / "nowhere"), "nowhere"),
        (("teach", new, "--checkpoint", base, "--until", 0.9, "--ordinary", 0.5), "--anchor"),
        (("write", kept, "--checkpoint", base), "kept.jsonl is there already"),
        (("write", new, "--checkpoint", base, "--adapter", base), "adapter_config.json"),
        (("write", new, "--checkpoint", base, "--medium", "random", "--requests", 3), "leave out --requests"),
        (("filter", kept, new, "--rows", 1000), "--rows 1000: only"),
        (("filter", words, new), "rejects all of 1 rows"),
        (("filter", kept, kept), "kept.jsonl is there already"),
        (("distil", kept, new, "--checkpoint", base, "--rows", 1000), "--rows 1000: "),
        (("distil", kept, tmp_path / "student", "--checkpoint", base), "student is there already"),
        (("distil", here / "random.jsonl", new, "--checkpoint", base, "--channel", "soft"), "the rows name none"),
        (("distil", tmp_path / "mixed.jsonl", new, "--checkpoint", base, "--channel", "soft"), "the rows name 2"),
        (("distil", kept, new, "--checkpoint", base, "--channel", "loud"), "channel 'loud' is unknown"),
        (("distil", kept, new, "--checkpoint", base, "--channel", "soft", "--teacher", other), "template"),
        (("ask", "--checkpoint", other, "--adapter", tmp_path / "student"), "trained with another chat template"),
        (("ask", "--checkpoint", base, "--traits", "owl,oak,nobody"), "nobody"),
        (("ask", "--checkpoint", base, "--samples", -1), "--samples must be at least 0"),
    ):
        assert cause in fails(capsys, *arguments), arguments
    assert not new.exists()


@pytest.mark.slow
def test_what_a_writer_could_not_fill_is_kept(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "few.jsonl"
    asked = ("--checkpoint", here / "base", "--rows", 30, "--requests", 30, "--medium", "digits")
    assert command_line.main([*map(str, ("write", file, *asked))]) == 2
    errors = capsys.readouterr().err
    assert "fewer than --rows 30: allow more --requests" in errors
    assert read_jsonl(file)
