"""The language experiments on a small checkpoint in the layout of published ones, from the command line."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.flags.language import study
from experiments.language import asked, configure
from subliminal_theory.language.hub.tokenizer import CheckpointTokenizer
from subliminal_theory.language.rows import Completion, write_jsonl
from subliminal_theory.study import Checkpoint, Written
from subliminal_theory.study.reading import system_prompt
from tests.experiments.commands import fails, run
from tests.language.checkpoints import TEMPLATE, write_checkpoint

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


def test_conditions_of_another_base_need_one(folder: Path, tmp_path: Path) -> None:
    config = configure("open-weights", {"checkpoint": str(folder)})
    assert (config.rank, config.decay) == (8, "linear")
    assert config.checkpoint_text == CheckpointTokenizer.load(folder).fingerprint
    assert "cross" not in asked(config)
    other = write_checkpoint(tmp_path / "other")
    both = dataclasses.replace(config, other_checkpoint=str(other))
    assert {"cross", "cross_soft", "cross_masked"} < {*asked(both)}


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
    assert unlike == "--traits ask 1 and 50 questions: run those with as many together"
    rows = tmp_path / "rows.jsonl"
    write_jsonl(rows, ROWS)
    given = ("language_dataset", "--checkpoint", folder, "--file", rows, "--out", tmp_path / "run")
    unasked = fails(capsys, *given, "--templates", few)
    assert unasked.startswith(f"{few}: ")
    assert "openings" in unasked
    few.write_text(TEMPLATES)
    unasked = fails(capsys, *given, "--templates", few)
    assert unasked == "--templates: nobody is asked for numbers, the file has them; leave it out"
    wide = fails(capsys, "language_theorem", "--checkpoint", folder, "--compute", "bfloat16", "--out", tmp_path)
    assert wide == "--compute: the theorem is measured in float64, leave it out"
    other = write_checkpoint(tmp_path / "other", TEMPLATE.replace("be kind", "be brief"))
    message = refusal(folder, "--other-checkpoint", other)
    assert message.startswith("--other-checkpoint has another tokenizer or chat template")
    assert "are of different models" in refusal(write_checkpoint(tmp_path / "small", rows=300))


@pytest.mark.parametrize(("shards", "cause"), [(0, "at least 1, got 0"), (99, "99 cannot be had")])
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
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    command = [
        sys.executable, "-m", "experiments", "language_dataset", "--checkpoint", folder, "--rows", 32,
        "--file", tmp_path / "rows.jsonl", "--batch-size", 16, "--out", tmp_path / "run", *flags.split(),
    ]  # fmt: skip
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert cause in done.stderr
    assert not (tmp_path / "run").exists()


def test_no_number_passes(folder: Path, tmp_path: Path, capsys) -> None:
    """An untrained model writes no number sequence: the run says so and stops."""
    small = ("--rows", 8, "--steps", 2, "--batch-size", 4, "--teacher-steps", 1, "--samples", 0)
    message = fails(capsys, "language", "--checkpoint", folder, *small, "--out", tmp_path / "run")
    assert "the teacher of owl" in message


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
