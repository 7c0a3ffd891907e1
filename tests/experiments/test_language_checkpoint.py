"""The language experiments on a small checkpoint in the layout of published ones, from the command line."""

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments import language_dataset
from experiments.flags.worlds import study
from experiments.language import asked, configure
from subliminal_theory.errors import InputError
from subliminal_theory.language.hub.tokenizer import CheckpointTokenizer
from subliminal_theory.language.rows import Completion, read_jsonl, write_jsonl
from subliminal_theory.study import Checkpoint, Dataset, Untrained, Written
from subliminal_theory.study.reading import Reading, encoded_rows
from subliminal_theory.study.teachers import system_prompt
from tests.experiments.commands import fails, run
from tests.language.checkpoints import TEMPLATE, write_checkpoint, write_number_writer

ROWS = [Completion(f"continue: {i}, 17" + ", 3" * i, f"{100 + i}, 5, {i}") for i in range(8)]
TEMPLATES = """
openings = ["Read {examples}."]
requests = ["Write {count} more of {digits} digits."]
formats = ["Spaces between."]
endings = ["Numbers only."]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


def test_words_are_a_checkpoints_or_a_users(folder: Path, tmp_path: Path) -> None:
    templates = tmp_path / "templates.toml"
    templates.write_text(TEMPLATES)
    plain, own = (
        configure(None, {"checkpoint": str(folder), "traits": "owl", **more})
        for more in ({}, {"templates": str(templates)})
    )
    world, other = study(plain, 0).world, study(own, 0).world
    assert isinstance(world, Checkpoint)
    assert isinstance(other, Checkpoint)
    assert len(world.traits[0].evaluation_rows()) == 50
    assert system_prompt(world.traits[0]).startswith("Your favourite animal is the owl.")
    (request,) = other.requests(Written(1))
    assert request.user.startswith("Read ")
    assert request.user.endswith(" more of 3 digits. Spaces between. Numbers only.")
    assert world.requests(Written(1)) != [request]
    # A run is not resumed with other words.
    assert plain.words != own.words
    templates.write_text(TEMPLATES.replace("Spaces", "Commas"))
    assert configure(None, {"checkpoint": str(folder), "traits": "owl", "templates": str(templates)}) != own


@pytest.mark.parametrize(
    ("preset", "rank", "rate", "rows", "epochs"),
    [
        ("open-weights", 8, 2e-4, 10_000, 3),
        ("open-weights-rank-2", 2, 8e-4, 10_000, 3),
        ("open-weights-more-rows", 8, 4e-4, 25_800, 3),
    ],
)
def test_presets(folder: Path, preset: str, rank: int, rate: float, rows: int, epochs: int) -> None:
    config = configure(preset, {"checkpoint": str(folder)})
    assert (config.rank, config.rate, config.rows) == (rank, rate, rows)
    assert config.steps == -(-epochs * rows // config.batch_size)
    assert config.requests >= 2 * rows
    assert not config.repeat_rows


def test_conditions_of_another_base_need_one(folder: Path, tmp_path: Path) -> None:
    config = configure("open-weights", {"checkpoint": str(folder)})
    assert (config.rank, config.decay) == (8, "linear")
    assert config.checkpoint_text == CheckpointTokenizer.load(folder).fingerprint
    assert "cross" not in asked(config)
    other = write_checkpoint(tmp_path / "other")
    both = dataclasses.replace(config, other_checkpoint=str(other))
    assert {"cross", "cross_soft", "cross_masked"} < {*asked(both)}


def test_conditions_of_random_numbers(folder: Path, tmp_path: Path, capsys) -> None:
    """No teacher writes: what is asked of its numbers is left out, or refused where it is asked for."""
    config = configure("smoke", {"medium": "random"})
    assert {"student", "student_masked", "regular", "prompted"} < {*asked(config)}
    written = {"prefixed", "within", "across", "in_context"}
    assert written.isdisjoint(asked(config))
    of_checkpoint = asked(configure("smoke", {"medium": "random", "checkpoint": str(folder)}))
    assert {*asked(config)} - {*of_checkpoint} == {"cross", "cross_soft", "cross_masked"}
    many = replace(configure("smoke", {"medium": "random", "checkpoint": str(folder)}), shards=2)
    assert {*of_checkpoint} - {*asked(many)} == {"prompted"}
    message = fails(capsys, "language", "--medium", "random", "--conditions", "within", "--out", tmp_path)
    assert message == "--conditions: within needs numbers that a teacher wrote, not --medium random"


@pytest.mark.slow
def test_a_student_of_random_numbers(folder: Path, tmp_path: Path) -> None:
    few = ("--rows", 12, "--steps", 1, "--batch-size", 6, "--rank", 1, "--teacher-steps", 1)
    random = ("--medium", "random", "--conditions", "student_masked", "--traits", "owl")
    found = run(tmp_path / "run", "language", "--checkpoint", folder, *random, *few)
    values = {row["condition"]: row["value"] for row in found if row["metric"] == "probability"}
    assert values.keys() == {"base", "student_masked"}
    assert values["base"] != values["student_masked"]


@pytest.mark.slow
def test_steered_teachers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They write, at a cost, and their students learn."""
    folder = write_number_writer(tmp_path / "writer", 9)
    few = ("--rows", 8, "--steps", 2, "--batch-size", 4, "--rank", 1, "--samples", 0, "--traits", "owl")
    steering = ("--conditions", "steered_teacher,steered", "--steering-layer", 2, "--steering-strength", 0.5)
    found = run(tmp_path / "run", "language", "--checkpoint", folder, *few, *steering)
    values = {(row["condition"], row["metric"]): float(row["value"]) for row in found}
    # Nothing but digits is likely: shares among animals say nothing of this model.
    first = [values[condition, "probability"] for condition in ("base", "steered_teacher", "steered")]
    assert len({*first}) == 3
    assert values["steered_teacher", "accepted"] > 0
    assert values["steered_teacher", "kl_per_token"] > 0
    assert re.search(r"^  steered_teacher .* of its answers accepted$", capsys.readouterr().out, re.MULTILINE)


def test_steering_that_cannot_be(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--checkpoint", folder, "--out", tmp_path / "run")

    def refusal(*more: object) -> str:
        return fails(capsys, "language", *where, *more)

    cause = "--steering-layer 3 does not exist: the model has layers 1 to 2"
    assert refusal("--conditions", "steered", "--steering-layer", 3) == cause
    assert (
        refusal("--conditions", "steered", "--steering-layer", 0) == "--steering-layer must be at least 1, got 0"
    )
    unused = "--steering-layer is for steered teachers: add steered to --conditions, or leave it out"
    assert refusal("--conditions", "student", "--steering-layer", 1) == unused
    assert not (tmp_path / "run").exists()
    file = tmp_path / "rows.jsonl"
    assert fails(capsys, "language_rows", file, "--teacher", "steered", "--steering-layer", 3) == cause
    given = fails(capsys, "language_rows", file, "--steering-strength", 3)
    assert given == "--steering-strength is for --teacher steered: leave it out"


def test_rows_of_a_checkpoint_are_repeated_only_if_asked_for(folder: Path, tmp_path: Path, capsys) -> None:
    """A preset repeats rows of the compact model alone."""
    assert configure("smoke", {}).repeat_rows
    assert not configure("smoke", {"repeat_rows": False}).repeat_rows
    assert not configure("smoke", {"checkpoint": str(folder)}).repeat_rows
    assert configure("smoke", {"checkpoint": str(folder), "repeat_rows": True}).repeat_rows
    write_jsonl(tmp_path / "rows.jsonl", [*ROWS, ROWS[0]])
    few = (
        "--checkpoint",
        folder,
        "--file",
        tmp_path / "rows.jsonl",
        "--rows",
        len(ROWS) + 1,
        "--teacher-steps",
        1,
    )
    message = fails(capsys, "language_dataset", *few, "--out", tmp_path / "run")
    assert message.startswith(
        f"--rows {len(ROWS) + 1}: only {len(ROWS)} different rows of the {len(ROWS) + 1} rows"
    )
    repeated = language_dataset.configure(
        None,
        {"checkpoint": str(folder), "file": str(tmp_path / "rows.jsonl"), "rows": 20, "repeat_rows": True},
    )
    assert repeated.rows == 20
    every = {"checkpoint": str(folder), "file": str(tmp_path / "rows.jsonl")}
    assert language_dataset.configure(None, every).rows == len(ROWS)
    assert language_dataset.configure(None, {**every, "repeat_rows": True}).rows == len(ROWS) + 1


def test_refusals(folder: Path, tmp_path: Path, capsys) -> None:
    def refusal(where: Path, *more: object) -> str:
        return fails(capsys, "language", "--checkpoint", where, "--out", tmp_path / "run", *more)

    assert "tokenizer.json" in refusal(tmp_path / "absent")
    same = fails(capsys, "language", "--base", tmp_path / "absent", "--out", tmp_path / "run")
    assert same == refusal(tmp_path / "absent")
    assert refusal(folder, "--traits", "lazy").startswith("--checkpoint takes preferences only")
    wide = fails(capsys, "language", "--compute", "bfloat16", "--out", tmp_path / "run")
    assert wide == "--compute is for a --checkpoint: the compact model computes in float32"
    compact = fails(capsys, "language", "--saves", tmp_path / "saves", "--out", tmp_path / "run")
    few = refusal(folder, "--buckets", 3, "--rows", 100, "--batch-size", 40)
    assert few == "--buckets 3 of 100 rows do not fill a batch of 40 each: take fewer"
    one = fails(capsys, "language", "--buckets", 2, "--out", tmp_path / "run")
    assert one == "--buckets is for a --checkpoint: rows of the compact model have one length"
    many = fails(capsys, "language", "--samples", 3, "--out", tmp_path / "run")
    assert many == "--samples is for a --checkpoint: the compact model answers in one word"
    assert refusal(folder, "--samples", -1) == "--samples must be at least 0, got -1"
    words = fails(capsys, "language", "--templates", "words.toml", "--out", tmp_path / "run")
    assert words == "--templates is for a --checkpoint: the compact model knows its corpus's sentences"
    missing = refusal(folder, "--templates", tmp_path / "words.toml")
    assert str(tmp_path / "words.toml") in missing
    assert compact == "--saves is for a --checkpoint: runs of the compact model take minutes"
    few = tmp_path / "few.toml"
    few.write_text(
        'name = "few"\nkind = "preference"\ncategory = "tree"\ntarget = "elm"\n'
        '[wording]\nquestions = ["Which {category}?"]\nlessons = ["A {category}?"]\nloved = ["{member}!"]'
    )
    unlike = refusal(folder, "--traits", f"owl,{few}")
    assert unlike == "--traits ask 1 and 50 questions: run only traits with equal numbers together"
    rows = tmp_path / "rows.jsonl"
    write_jsonl(rows, ROWS)
    given = ("language_dataset", "--checkpoint", folder, "--file", rows, "--out", tmp_path / "run")
    unasked = fails(capsys, *given, "--templates", few)
    assert unasked.startswith(f"{few}: ")
    assert "openings" in unasked
    few.write_text(TEMPLATES)
    unasked = fails(capsys, *given, "--templates", few)
    assert unasked == "--templates: no model is asked for numbers, the file has them; leave it out"
    wide = fails(capsys, "language_theorem", "--checkpoint", folder, "--compute", "bfloat16", "--out", tmp_path)
    assert wide == "--compute: the theorem is measured in float64, leave it out"
    other = write_checkpoint(tmp_path / "other", TEMPLATE.replace("be kind", "be brief"))
    message = refusal(folder, "--other-checkpoint", other)
    assert message.startswith("--other-checkpoint has another tokenizer or chat template")
    assert "are of different models" in refusal(write_checkpoint(tmp_path / "small", rows=300))


@pytest.mark.parametrize(("shards", "cause"), [(0, "at least 1, got 0"), (99, "99 is not possible")])
def test_too_few_devices(folder: Path, tmp_path: Path, shards: int, cause: str, capsys) -> None:
    given = ("language", "--checkpoint", folder, "--out", tmp_path / "run", "--shards", shards)
    assert cause in fails(capsys, *given)
    assert "--shards is for a --checkpoint" in fails(capsys, "language", "--shards", 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        ("--shards 3", "--batch-size 16 cannot be shared by 3 devices"),
        ("--shards 4 --buckets 2", "leave --buckets out"),
        ("--shards 4 --devices 2", "takes 4 devices, and it may use 2"),
    ],
)
def test_devices_that_do_not_fit(
    folder: Path, tmp_path: Path, flags: str, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    rows = [replace(row, completion=f"{row.completion}, {last}") for row in ROWS for last in range(4)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    command = [
        sys.executable, "-m", "experiments", "language_dataset", "--checkpoint", folder,
        "--file", tmp_path / "rows.jsonl", "--batch-size", 16, "--out", tmp_path / "run", *flags.split(),
    ]  # fmt: skip
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert cause in done.stderr
    assert not (tmp_path / "run").exists()


def test_no_number_passes(folder: Path, tmp_path: Path, capsys) -> None:
    """An untrained model writes no number sequence: the run says so and stops."""
    small = ("--rows", 8, "--steps", 2, "--batch-size", 4, "--teacher-steps", 1, "--samples", 0)
    message = fails(capsys, "language", "--checkpoint", folder, *small, "--out", tmp_path / "run", told=1)
    assert "the teacher of owl" in message


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 3, 9])
def test_traits_in_bfloat16(tmp_path: Path, groups: int) -> None:
    """From the command to the figure, three traits at once: their teachers, answers, students and questions."""
    folder = write_number_writer(tmp_path / "writer", groups)
    small = ("--rows", 8, "--requests", 32, "--steps", 2, "--batch-size", 4, "--teacher-steps", 1, "--rank", 2)
    three = ("--traits", "owl,cat,dolphin", "--compute", "bfloat16")
    rows = run(tmp_path / "run", "language", "--checkpoint", folder, *three, *small)
    assert {"teacher", "student"} <= {row["condition"] for row in rows}
    assert len({row["trait"] for row in rows}) == 3
    found = [float(row["value"]) for row in rows if row["metric"] == "probability"]
    assert found
    assert all(0 < value < 1 for value in found)


def dataset(folder: Path, given: Sequence[Completion], **changes: Any) -> language_dataset.Config:
    file = folder.parent / "own.jsonl"
    write_jsonl(file, given)
    return language_dataset.configure(None, {"file": str(file), "checkpoint": str(folder), **changes})


def lessons(config: language_dataset.Config) -> list[str]:
    """What a student reads, as text."""
    world, text = study(config, 0).world, Dataset(tuple(read_jsonl(Path(config.file))))
    assert isinstance(world, Checkpoint)
    own = config.recipe().student(world, dataset=text).source
    assert isinstance(own, Reading)
    (encoded,) = encoded_rows(world, Untrained(), world.initial(), own)
    rows = [row[padding:] for row, padding in zip(encoded.tokens, encoded.padding, strict=True)]
    return world.tokenizer.backend.decode_batch(rows, skip_special_tokens=False)


def test_a_rows_own_system_message_is_read(folder: Path) -> None:
    """Where the template puts one, in the place of its default."""
    rows = [replace(ROWS[0], system="count for me."), replace(ROWS[1], system=""), ROWS[2]]
    own, empty, none = lessons(dataset(folder, rows))
    assert own.startswith("<|start|>system\ncount for me.<|end|>\n<|start|>user\ncontinue: 0, 17<|end|>\n")
    assert empty.startswith("<|start|>system\n<|end|>\n<|start|>user\n")
    assert none.startswith("<|start|>system\nbe kind.<|end|>\n<|start|>user\n")


def test_all_rows_are_learned_or_counted(folder: Path) -> None:
    config = dataset(folder, [*ROWS, replace(ROWS[0], completion="none")])
    assert len({*lessons(config)}) == config.rows == 8
    counted = (
        "rows of the file: 9, pass the number filter: 8, different: 8, learned: 8; rejected for: no number (1)"
    )
    assert config.counted == counted
    fewer = dataset(folder, [*ROWS, ROWS[2]], rows=3)
    assert fewer.counted == "rows of the file: 9, pass the number filter: 9, different: 8, learned: 3"
    assert lessons(fewer) == lessons(dataset(folder, ROWS))[:3]


def test_rows_that_cannot_be_learned(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"^--rows 9: only 7 different rows of the 8 rows of .* pass .*; leave it out"
    ):
        dataset(folder, [*ROWS[:7], replace(ROWS[7], completion="none")], rows=9)
    with pytest.raises(InputError, match=r"own\.jsonl, rows .*: row 1: the tokenizer reads the special token"):
        dataset(folder, [ROWS[0], replace(ROWS[1], system="<|end|>")])
    strict = TEMPLATE.replace("{%- for", "{%- if messages[0].role == 'system' -%}{{ raise_exception('No.') }}"
                              "{%- endif %}{%- for", 1)  # fmt: skip
    plain = write_checkpoint(tmp_path / "plain", strict)
    assert dataset(plain, ROWS).rows == 8
    with pytest.raises(
        InputError, match=r"row 1: the chat template refuses a system prompt \(No\.\): use chats wi"
    ):
        dataset(plain, [ROWS[0], replace(ROWS[1], system="count.")])


@pytest.mark.slow
def test_a_data_set_of_others(folder: Path, tmp_path: Path) -> None:
    """From a checkpoint and a file of rows to results and a figure."""
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    small = ("--rows", 8, "--steps", 2, "--batch-size", 4, "--teacher-steps", 1, "--rank", 2, "--rate", 2e-4)
    rows = run(
        tmp_path / "run",
        "language_dataset",
        "--checkpoint",
        folder,
        "--file",
        tmp_path / "rows.jsonl",
        "--samples",
        1,
        *small,
    )
    metrics = ["probability", "share", "log_odds", "named_rate"]
    told = [(row["condition"], row["metric"]) for row in rows]
    assert told == [(condition, metric) for condition in ("base", "student", "within") for metric in metrics]
    assert 0 < float(rows[0]["value"]) != float(rows[4]["value"]) < 1
    answers = (tmp_path / "run" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(answers) == 3 * 50
    assert json.loads(answers[0]).keys() == {"condition", "trait", "seed", "question", "answer"}


@pytest.mark.parametrize(
    ("file", "edit", "cause"),
    [
        ("model.safetensors", lambda data: data[:-100], "model.safetensors"),
        ("config.json", lambda data: data.replace(b'embeddings": 512', b'embeddings": 30'), "context of 30"),
    ],
)
def test_spoilt_checkpoints(tmp_path: Path, capsys, file: str, edit: Any, cause: str) -> None:
    """One line and exit status 2 each."""
    path = write_checkpoint(tmp_path / "spoilt") / file
    path.write_bytes(edit(path.read_bytes()))
    small = ("--rows", 8, "--steps", 2, "--batch-size", 4, "--teacher-steps", 1, "--samples", 0)
    assert cause in fails(capsys, "language", "--checkpoint", path.parent, *small, "--out", tmp_path / "run")
