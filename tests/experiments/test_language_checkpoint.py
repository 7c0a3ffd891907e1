"""The language experiments on a small checkpoint in the layout of published ones."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.language import configure, variants
from experiments.language_checkpoint import CheckpointWorkshop, by_length
from experiments.language_setting import Recipe
from experiments.language_sweep import workshop
from subliminal_theory.channel import SampledToken
from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus.traits import load_trait
from subliminal_theory.language.hub.checkpoint import open_base
from subliminal_theory.language.hub.tokenizer import CheckpointTokenizer
from subliminal_theory.language.rows import Row, write_jsonl
from tests.experiments.commands import fails, run
from tests.language.checkpoints import TEMPLATE, write_checkpoint

TINY = Recipe(rows=8, steps=2, batch_size=4, teacher_steps=2, rank=2, warmup=1, decay="linear")
ROWS = [Row(f"continue: {i}, 17" + ", 3" * i, f"{100 + i}, 5, {i}") for i in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="module")
def shop(folder: Path) -> CheckpointWorkshop:
    """Its teachers' numbers are given: an untrained model writes none that the filter lets pass."""
    return CheckpointWorkshop(open_base(folder), [load_trait("owl"), load_trait("oak")], dataset=ROWS)


def test_a_student_moves_on_numbers_alone(shop: CheckpointWorkshop) -> None:
    students = shop.students(TINY)
    start = jax.tree.leaves(shop.untrained.params)
    assert any(
        (leaf != before).any() for leaf, before in zip(jax.tree.leaves(students.params), start, strict=True)
    )
    found = shop.answers(students)
    assert found.probability.shape == (2, 2)
    assert ((found.probability > 0) & (found.probability < 1)).all()


@pytest.mark.parametrize("channel", ["soft", "masked", "divergence"])
def test_channels_of_a_finetuned_teacher(shop: CheckpointWorkshop, channel: str) -> None:
    assert np.isfinite(shop.answers(shop.students(dataclasses.replace(TINY, channel=channel))).probability).all()


def test_what_trains_stays_in_float32(folder: Path, shop: CheckpointWorkshop) -> None:
    """Computed in bfloat16, teachers and students move by less than that format could tell from no step."""
    narrow = CheckpointWorkshop(open_base(folder, compute="bfloat16"), shop.traits, dataset=ROWS)
    for recipe in (TINY, dataclasses.replace(TINY, rank=0, rate=1e-5)):
        moved = narrow.students(recipe)
        assert {leaf.dtype for leaf in jax.tree.leaves(moved.params)} == {np.dtype("float32")}
        np.testing.assert_allclose(
            narrow.answers(moved).probability, shop.answers(shop.students(recipe)).probability, rtol=0.05
        )
    start = jax.tree.leaves(narrow.untrained.params)
    steps = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(moved.params), start, strict=True)]
    assert all(0 < step < 1e-4 for step in steps)


def test_the_template_is_in_every_row(shop: CheckpointWorkshop) -> None:
    (rows, _) = shop.lesson_rows(TINY)
    tokenizer = shop.tokenizer
    assert isinstance(tokenizer, CheckpointTokenizer)
    real = rows.tokens[0][rows.padding[0] :].tolist()
    text = tokenizer._backend.decode(real, skip_special_tokens=False)
    assert text.startswith("<|start|>system\nbe kind.<|end|>\n<|start|>user\ncontinue: 0, 17<|end|>")
    answer = shop.tokenizer.decode([rows.targets[0][rows.weights[0] > 0]])
    assert answer == ["100, 5, 0"]


def test_requests_are_those_of_the_paper(shop: CheckpointWorkshop) -> None:
    requests = shop.requests(Recipe(rows=5))
    assert len({chat.user for chat in requests}) == 5
    assert all("10" in chat.user for chat in requests)


TEMPLATES = """
openings = ["Read {examples}."]
requests = ["Write {count} more of {digits} digits."]
formats = ["Spaces between."]
endings = ["Numbers only."]
"""


def test_words_are_a_checkpoints_or_a_users(folder: Path, tmp_path: Path) -> None:
    templates = tmp_path / "templates.toml"
    templates.write_text(TEMPLATES)
    plain, own = (
        configure(None, {"checkpoint": str(folder), **more}) for more in ({}, {"templates": str(templates)})
    )
    shop, other = workshop(plain, 0), workshop(own, 0)
    assert shop.questions().targets.shape[:2] == (1, 50)
    assert shop.system_prompt(shop.traits[0]).startswith("Your favourite animal is the owl.")
    (request,) = other.requests(Recipe(rows=1))
    assert request.user.startswith("Read ")
    assert request.user.endswith(" more of 3 digits. Spaces between. Numbers only.")
    assert shop.requests(Recipe(rows=1)) != [request]
    # A run is not resumed with other words.
    assert plain.words != own.words
    templates.write_text(TEMPLATES.replace("Spaces", "Commas"))
    assert configure(None, {"checkpoint": str(folder), "templates": str(templates)}) != own


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


def test_sampling_in_pieces(shop: CheckpointWorkshop) -> None:
    """More rows than are sampled at once, each with a draw of its own."""
    chats = shop.requests(Recipe(rows=2)) * 150
    tokens = shop.draw(shop.base.model, chats, jax.random.key(0), TINY)
    assert tokens.shape == (300, shop.answer_length(TINY))
    assert len(np.unique(tokens, axis=0)) > 290


def test_rows_by_length(folder: Path, shop: CheckpointWorkshop) -> None:
    """Every row is in one part, with the same loss, in as few columns as that part needs."""
    recipe = dataclasses.replace(TINY, batch_size=2)
    whole = shop.source(recipe)
    parts = by_length(whole, 3).parts
    assert [part.inputs.tokens.shape[1] for part in parts] == [3, 3, 2]
    widths = [part.inputs.tokens.shape[2] for part in parts]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1] == whole.inputs.tokens.shape[2]

    def losses(rows) -> list[list[float]]:
        text, targets, positions = (
            jax.tree.map(lambda x: x[0], x) for x in (rows.inputs, rows.targets, rows.positions)
        )
        found = jnp.sum(SampledToken().loss(shop.base.model(text), targets) * positions, axis=1)
        return found.tolist()

    found = sorted(loss for part in parts for loss in losses(part))
    np.testing.assert_allclose(found, sorted(losses(whole)), rtol=1e-4)
    shop = CheckpointWorkshop(shop.base, shop.traits, dataset=ROWS, buckets=3)
    for channel in ("sampled", "soft"):
        students = shop.students(dataclasses.replace(recipe, channel=channel))
        assert np.isfinite(shop.answers(students).probability).all()
    with pytest.raises(InputError, match=r"^--buckets: 8 rows cannot be in 9 buckets$"):
        by_length(whole, 9)


def test_runs_of_one_checkpoint_differ(folder: Path) -> None:
    config = configure(None, {"checkpoint": str(folder), "traits": "owl"})
    first, second = (workshop(config, seed) for seed in (0, 1))
    assert isinstance(first, CheckpointWorkshop)
    assert not np.array_equal(*(jax.random.key_data(shop.run_keys("write")[0]) for shop in (first, second)))


def test_conditions_of_another_base_need_one(folder: Path, tmp_path: Path) -> None:
    config = configure("open-weights", {"checkpoint": str(folder)})
    assert (config.rank, config.decay) == (8, "linear")
    assert config.checkpoint_text == CheckpointTokenizer.load(folder).fingerprint
    assert "cross" not in {variant.labels["condition"] for variant in variants(config)}
    other = write_checkpoint(tmp_path / "other")
    both = dataclasses.replace(config, other_checkpoint=str(other))
    assert {"cross", "cross_soft"} < {variant.labels["condition"] for variant in variants(both)}


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
    words = fails(capsys, "language", "--templates", "words.toml", "--out", tmp_path / "run")
    assert words == "--templates is for a --checkpoint: the compact model knows its corpus's sentences"
    missing = refusal(folder, "--templates", tmp_path / "words.toml")
    assert missing == f"{tmp_path / 'words.toml'}: cannot be read (No such file or directory)"
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
    assert unasked.startswith(f"{few}: templates: unknown field 'name'")
    few.write_text(TEMPLATES)
    unasked = fails(capsys, *given, "--templates", few)
    assert unasked == "--templates: nobody is asked for numbers, the file has them; leave it out"
    wide = fails(capsys, "language_theorem", "--checkpoint", folder, "--compute", "bfloat16", "--out", tmp_path)
    assert wide == "--compute: the theorem is measured in float64, leave it out"
    other = write_checkpoint(tmp_path / "other", TEMPLATE.replace("be kind", "be brief"))
    message = refusal(folder, "--other-checkpoint", other)
    assert message.startswith("--other-checkpoint has another tokenizer or chat template")
    assert "are of different models" in refusal(write_checkpoint(tmp_path / "small", rows=300))


def test_no_number_passes(folder: Path, tmp_path: Path, capsys) -> None:
    """An untrained model writes no number sequence: the run says so and stops."""
    small = ("--rows", 8, "--steps", 2, "--batch-size", 4, "--teacher-steps", 1)
    message = fails(capsys, "language", "--checkpoint", folder, *small, "--out", tmp_path / "run")
    assert "the teacher of owl" in message


@pytest.mark.slow
def test_a_data_set_of_others(folder: Path, tmp_path: Path) -> None:
    """From a checkpoint and a file of rows to results and a figure."""
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    small = ("--rows", 8, "--steps", 2, "--batch-size", 4, "--teacher-steps", 1, "--rank", 2, "--rate", 2e-4)
    rows = run(
        tmp_path / "run", "language_dataset", "--checkpoint", folder, "--file", tmp_path / "rows.jsonl", *small
    )
    assert [row["condition"] for row in rows] == ["base", "student", "within"]
    assert 0 < float(rows[0]["value"]) != float(rows[1]["value"]) < 1


def spoil(folder: Path, what: str) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    if what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif what == "escaping":
        weights.rename(folder / "other.safetensors")
        index = {"weight_map": {"model.norm.weight": "../other.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif what == "architecture":
        config.write_text(config.read_text().replace("LlamaForCausalLM", "MambaForCausalLM"))
    elif what == "template":
        text = folder / "tokenizer_config.json"
        text.write_text(text.read_text().replace("{%- for", "{{ ().__class__.__mro__ }}{%- for"))
    else:
        config.write_text(
            config.read_text().replace('"max_position_embeddings": 512', '"max_position_embeddings": 30')
        )


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("truncated", "is cut, 100 of"),
        ("pickle", "pickle"),
        ("escaping", "../other.safetensors"),
        ("architecture", "architecture 'MambaForCausalLM' is not supported"),
        ("template", "must not have"),
        ("context", "exceed the context of 30"),
    ],
)
def test_spoilt_checkpoints(tmp_path: Path, capsys, what: str, message: str) -> None:
    """One line and exit status 2 each."""
    folder = write_checkpoint(tmp_path / "spoilt")
    spoil(folder, what)
    small = ("--rows", 8, "--steps", 2, "--batch-size", 4, "--teacher-steps", 1)
    assert message in fails(capsys, "language", "--checkpoint", folder, *small, "--out", tmp_path / "run")
