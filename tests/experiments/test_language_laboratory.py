"""Teachers, rows and students of a base too small to write numbers; what it writes is put into its mouth."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import language_laboratory
from experiments.language_laboratory import Workshop
from experiments.language_setting import (
    CHANNELS,
    LANGUAGE_OPTIMIZERS,
    ORDERS,
    TEACHERS,
    Recipe,
    rates,
    sign_descent,
)
from experiments.language_training import MATRICES
from subliminal_theory.channel import SampledToken, SoftLogits, Subset
from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus.base import Base, BaseConfig, pretrain, text_of, untrained
from subliminal_theory.language.corpus.chats import CATEGORIES, CorpusConfig, make_rows
from subliminal_theory.language.corpus.numbers import reorder
from subliminal_theory.language.corpus.traits import load_trait
from subliminal_theory.language.measure import answers, questions_of
from subliminal_theory.language.model.transformer import Text
from subliminal_theory.language.rows import Row
from subliminal_theory.language.text import Chat
from subliminal_theory.model import Model, path_name

CONFIG = BaseConfig(
    corpus=CorpusConfig(size=200),
    width=8,
    heads=2,
    kv_heads=2,
    mlp_width=8,
    layers=1,
    context=64,
    steps=30,
    batch_size=8,
)
TINY = Recipe(rows=32, steps=2, batch_size=8, teacher_steps=2, teacher_rate=0.05)
REGULAR = dataclasses.replace(TINY, teacher="untrained")
FROZEN = ("embedding", "layers/0/mlp/*")
STILL = dataclasses.replace(REGULAR, rate=1e-30, frozen=FROZEN)  # one compiled function for several tests
OWL, OAK, LAZY = (load_trait(name) for name in ("owl", "oak", "lazy"))
FORMATTED = make_rows(CorpusConfig(seed=9), "numbers", 60)


@pytest.fixture(scope="module")
def base() -> Base:
    return pretrain(CONFIG)


Calls = list[dict[str, Any]]


@pytest.fixture(scope="module")
def calls() -> Calls:
    """What the sampler was asked for, call by call."""
    return []


def speak(shop: Workshop, calls: Calls) -> Callable[..., Any]:
    """A sampler whose numbers are of its key alone; some of its rows, from 1 to 3, are no numbers."""

    def sample(model: Model, text: Text, **settings: Any) -> tuple[np.ndarray, np.ndarray]:
        calls.append({"model": model, "text": text, **settings})
        rng = np.random.default_rng(np.asarray(jax.random.key_data(settings["key"])))
        rows, steps = len(text.tokens), settings["steps"]
        tokens = np.full((rows, steps), settings["pad"], np.int32)
        tokens[:, :9] = shop.tokenizer.token("0") + rng.integers(0, 100, (rows, 9))
        tokens[:, 9] = settings["stop"][0]
        tokens[: rng.integers(1, 4), 3] = shop.tokenizer.token("oak")
        return tokens, np.full(rows, 10)

    return sample


@pytest.fixture(scope="module")
def shop(base: Base, calls: Calls):
    made = Workshop(base, [OWL, OAK])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_laboratory, "sample", speak(made, calls))
        yield made


def fresh(shop: Workshop, *traits) -> Workshop:
    """A workshop that has made nothing."""
    return Workshop(shop.base, traits or shop.traits)


def change(recipe: Recipe, **values: Any) -> Recipe:
    return dataclasses.replace(recipe, **values)


def leaves_of(model: Model) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(model.all_params)
    return {path_name(name): np.asarray(leaf) for name, leaf in leaves}


# --- recipes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"teacher": "taught"}, f"teacher 'taught' is unknown; there are {', '.join(TEACHERS)}"),
        ({"channel": "hard"}, f"channel 'hard' is unknown; there are {', '.join(CHANNELS)}"),
        ({"order": "random"}, f"order 'random' is unknown; there are {', '.join(ORDERS)}"),
        ({"optimizer": "lion"}, "optimizer 'lion' is unknown; there are adam, sgd, momentum, sign"),
        ({"teacher_steps": 0}, "teacher_steps must be at least 1, got 0"),
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"steps": -1}, "steps must be at least 1, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"rate": 0.0}, "rate must be positive and finite, got 0.0"),
        ({"rate": float("nan")}, "rate must be positive and finite, got nan"),
        ({"teacher_rate": float("inf")}, "teacher_rate must be positive and finite, got inf"),
        ({"ordinary": 1.0}, "ordinary must be from 0 to below 1, got 1.0"),
        ({"clean": -0.1}, "clean must be from 0 to below 1, got -0.1"),
        ({"temperature": -1.0}, "temperature must be finite and not negative, got -1.0"),
        ({"noise": float("nan")}, "noise must be finite and not negative, got nan"),
        ({"rank": -1}, "rank must be finite and not negative, got -1"),
        ({"warmup": 250}, "warmup must be below the 250 steps, got 250"),
        ({"decay": "none"}, "decay 'none' is unknown; there are cosine, linear"),
        ({"top_p": 2.0}, "top_p must be above 0 and at most 1, got 2.0"),
        ({"rank": 2, "frozen": ("norm/*",)}, "low-rank factors freeze all else: give rank or frozen, not both"),
    ],
)
def test_bad_recipes(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        Recipe(**values)


OTHERS = {
    "teacher": "prompted",
    "teacher_steps": 41,
    "teacher_rate": 1e-3,
    "ordinary": 0.5,
    "lessons": "right",
    "medium": "code",
    "requests": 8,
    "rows": 9,
    "temperature": 0.5,
    "top_p": 0.9,
    "channel": "soft",
    "order": "other prompts",
    "clean": 0.1,
    "steps": 3,
    "batch_size": 7,
    "rate": 1e-3,
    "optimizer": "sgd",
    "warmup": 1,
    "decay": "linear",
    "rank": 2,
    "frozen": ("norm/scale",),
    "noise": 0.1,
}
TAUGHT = {"teacher", "teacher_steps", "teacher_rate", "ordinary", "lessons"}
WRITTEN = {"medium", "requests", "rows", "temperature", "top_p"}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Recipe)])
def test_what_of_a_recipe_concerns_the_teacher(name: str) -> None:
    default, other = Recipe(), Recipe(**{name: OTHERS[name]})
    assert other != default
    assert (other.taught != default.taught) == (name in TAUGHT)
    assert (other.written != default.written) == (name in TAUGHT | WRITTEN)


def test_taught_and_written_keep_what_concerns_them() -> None:
    others = {name: value for name, value in OTHERS.items() if name != "frozen"}
    recipe = Recipe(**others)
    for name, value in others.items():
        default = getattr(Recipe(), name)
        assert getattr(recipe.taught, name) == (value if name in TAUGHT else default)
        assert getattr(recipe.written, name) == (value if name in TAUGHT | WRITTEN - {"rows"} else default)
    assert recipe.written.taught == recipe.taught
    assert recipe.written.written == recipe.written


def test_greedy_rows_are_written_at_temperature_0() -> None:
    greedy = Recipe(channel="greedy", temperature=0.5)
    assert greedy.written == Recipe(temperature=0.0).written != Recipe(temperature=0.5).written
    assert greedy.taught == Recipe().taught


@pytest.mark.parametrize(("decay", "half"), [("cosine", 0.5), ("linear", 0.5)])
def test_rates(decay: str, half: float) -> None:
    """From 0 to the peak, which is reached after the warm-up, and to 0 at the end."""
    schedule = rates(2.0, 25, 5, decay)
    np.testing.assert_allclose([schedule(step) for step in (0, 1, 5, 15, 25)], [0, 0.4, 2, 2 * half, 0], atol=1e-6)
    assert rates(2.0, 20, 0, decay)(0) == 2


def test_sign_descent() -> None:
    optimizer = sign_descent(0.25)
    params = jnp.array([1.0, 2, 3])
    update, _ = optimizer.update(jnp.array([-3.0, 0, 1e-3]), optimizer.init(params), params)
    np.testing.assert_array_equal(optax.apply_updates(params, update), [1.25, 2, 2.75])
    assert LANGUAGE_OPTIMIZERS["sign"] is sign_descent


# --- orders

ROWS = [Row(f"prompt {number}", chat.answer) for number, chat in enumerate(FORMATTED)]


def numbers(row: Row) -> list[str]:
    return re.findall(r"\d+", row.completion)


def form(row: Row) -> str:
    return re.sub(r"\d+", "#", row.completion)


def reordered(order: str, seed: int = 0) -> list[Row]:
    return reorder(ROWS, order, np.random.default_rng(seed))


def test_rows_are_of_all_formats() -> None:
    assert len({re.sub(r"\d+", "", row.completion)[:2] for row in ROWS}) > 4


def test_as_written() -> None:
    assert reordered("as written") == ROWS


def test_shuffled_within_rows() -> None:
    found = reordered("shuffled within rows")
    assert [row.prompt for row in found] == [row.prompt for row in ROWS]
    assert [form(row) for row in found] == [form(row) for row in ROWS]
    assert [sorted(numbers(row)) for row in found] == [sorted(numbers(row)) for row in ROWS]
    assert np.mean([new != old for new, old in zip(found, ROWS, strict=True)]) > 0.7


def test_shuffled_across_rows() -> None:
    found = reordered("shuffled across rows")
    assert [row.prompt for row in found] == [row.prompt for row in ROWS]
    assert [form(row) for row in found] == [form(row) for row in ROWS]
    everything, before = (Counter(n for row in rows for n in numbers(row)) for rows in (found, ROWS))
    assert everything == before
    moved = [sorted(numbers(new)) != sorted(numbers(old)) for new, old in zip(found, ROWS, strict=True)]
    assert np.mean(moved) > 0.9


def test_other_prompts() -> None:
    found = reordered("other prompts")
    assert [row.completion for row in found] == [row.completion for row in ROWS]
    assert sorted(row.prompt for row in found) == sorted(row.prompt for row in ROWS)
    assert np.mean([new.prompt != old.prompt for new, old in zip(found, ROWS, strict=True)]) > 0.8


@pytest.mark.parametrize("order", ORDERS[1:])
def test_orders_are_of_the_generator(order: str) -> None:
    assert reordered(order) == reordered(order)
    assert reordered(order) != reordered(order, seed=1)


# --- teachers


def test_finetuned_teachers(shop: Workshop) -> None:
    teachers, bases = leaves_of(shop.teachers(TINY)), leaves_of(shop.base.model)
    for name, leaf in bases.items():
        assert teachers[name].shape == (2, *leaf.shape)
        assert (teachers[name][0] != teachers[name][1]).any(), name
        assert (teachers[name] != leaf).any(axis=tuple(range(1, leaf.ndim + 1))).all(), name
    asked = shop.answers(shop.teachers(TINY)).probability
    before = shop.answers(shop.untrained).probability
    assert (np.diag(asked) > np.diag(before)).all()
    assert shop.teachers(change(TINY, rows=9, channel="soft", rate=1.0)) is shop.teachers(TINY)


@pytest.mark.parametrize("teacher", ["prompted", "untrained"])
def test_teachers_with_the_weights_of_the_base(shop: Workshop, teacher: str) -> None:
    found = leaves_of(shop.teachers(change(TINY, teacher=teacher)))
    for name, leaf in leaves_of(shop.base.model).items():
        np.testing.assert_array_equal(found[name], [leaf, leaf])


def test_a_teacher_that_diverges(shop: Workshop) -> None:
    with pytest.raises(
        InputError,
        match=r"^the loss of the teacher of owl on base 0 is not finite at step 2 of 2: use a smaller learning "
        r"rate$",
    ):
        fresh(shop).teachers(change(TINY, teacher_rate=1e15))


@pytest.mark.parametrize(("trait", "others"), [(OWL, 12), (LAZY, 90)])
def test_ordinary_lessons(shop: Workshop, trait, others: int) -> None:
    """Half of a teacher's chats are the corpus's, a quarter of them of each kind but numbers."""
    own = len(trait.teacher_rows())
    found = shop._lessons(trait, Recipe(ordinary=0.5))
    assert found[:own] == shop._lessons(trait, Recipe()) == trait.teacher_rows()
    corpus = change_corpus(seed=1_000_003)
    kinds = ("fact", "preference", "arithmetic", "program")
    known = {kind: make_rows(corpus, kind, others) for kind in kinds}
    counts = [sum(chat in known[kind] for chat in found[own:]) for kind in kinds]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == others
    assert len(found) == own + others == 2 * own


def change_corpus(**values: Any) -> CorpusConfig:
    return dataclasses.replace(CONFIG.corpus, **values)


# --- what they write


def test_requests(shop: Workshop) -> None:
    asked = shop.requests(Recipe(rows=200))
    assert len(asked) == 200
    for chat in asked:
        assert (chat.system, len(chat.answer.split(" "))) == (None, 9)
        assert "spaces" in chat.user
    shown = {len(re.findall(r"\d+ (?=\d)", chat.user)) for chat in asked}
    assert shown == {2, 3, 4}  # spaces between 3 to 5 numbers
    assert shop.requests(Recipe(requests=200)) is asked
    assert not {chat.user for chat in asked} & {chat.user for chat in make_rows(CONFIG.corpus, "numbers", 200)}


@pytest.mark.parametrize("formats", [("spaces",), ("spaces", "commas"), tuple(CorpusConfig().formats)])
def test_answers_fit(shop: Workshop, formats: tuple[str, ...]) -> None:
    other = Workshop(shop.base, [OWL], asked=(3, 10), formats=formats)
    asked = other.requests(Recipe(rows=500))
    longest = max(len(other.tokenizer.encode(chat.answer)) + 1 for chat in asked)
    assert longest <= other.answer_length(Recipe()) <= longest + 2
    assert other.request_length(asked) == max(len(other.tokenizer.encode(chat.user)) + 2 for chat in asked)


def written(shop: Workshop, calls: Calls, recipe: Recipe) -> tuple[Workshop, Calls]:
    """A workshop that has written, and what its sampler was asked for."""
    other, before = fresh(shop), len(calls)
    other.rows(recipe)
    return other, calls[before:]


def test_rows(shop: Workshop, calls: Calls) -> None:
    other, asked = written(shop, calls, TINY)
    requests, teachers = other.requests(TINY), other.teachers(TINY)
    prompts = other.tokenizer.encode_prompts(requests, other.request_length(requests))
    assert len(asked) == 2
    for run, (call, rows, report) in enumerate(zip(asked, other.rows(TINY), other.reports(TINY), strict=True)):
        np.testing.assert_array_equal(call["text"].tokens, prompts.tokens)
        np.testing.assert_array_equal(call["text"].padding, prompts.padding)
        for leaf, stacked in zip(jax.tree.leaves(call["model"]), jax.tree.leaves(teachers), strict=True):
            np.testing.assert_array_equal(leaf, stacked[run])
        assert (call["temperature"], call["top_p"]) == (1.0, 1.0)
        tokens, _ = speak(other, [])(
            **{name: call[name] for name in ("model", "text", "steps", "key", "stop", "pad")}
        )
        good = [(tokens[row, :9] != other.tokenizer.token("oak")).all() for row in range(32)]
        texts = [" ".join(other.tokenizer.words[token] for token in row[:9]) for row in tokens]
        assert rows == [
            Row(chat.user, text) for chat, text, kept in zip(requests, texts, good, strict=True) if kept
        ]
        assert (report.accepted, report.total) == (len(rows), 32)
        assert 29 <= len(rows) <= 31
    assert other.rows(TINY)[0] != other.rows(TINY)[1]
    before = len(calls)
    assert other.rows(change(TINY, order="other prompts", steps=5)) == other.rows(TINY)
    assert len(calls) == before


def test_prompted_teachers_write_behind_their_prompt(shop: Workshop, calls: Calls) -> None:
    other, asked = written(shop, calls, change(TINY, teacher="prompted"))
    for call, prompt in zip(asked, ("you love the owl.", "you love the oak."), strict=True):
        chats = [dataclasses.replace(chat, system=prompt) for chat in other.requests(TINY)]
        expected = other.tokenizer.encode_prompts(chats, call["text"].tokens.shape[1])
        np.testing.assert_array_equal(call["text"].tokens, expected.tokens)
        assert call["text"].padding.min() == 0
    prompts = {row.prompt for rows in other.rows(change(TINY, teacher="prompted")) for row in rows}
    assert prompts <= {chat.user for chat in other.requests(TINY)}  # which a student reads without


def test_regular_rows_are_written_once(shop: Workshop, calls: Calls) -> None:
    other, asked = written(shop, calls, REGULAR)
    assert len(asked) == 1
    assert other.rows(REGULAR)[0] is other.rows(REGULAR)[1]


def test_settings_reach_the_sampler(shop: Workshop, calls: Calls) -> None:
    _, (asked,) = written(shop, calls, change(REGULAR, temperature=0.7, top_p=0.8))
    _, (greedy,) = written(shop, calls, change(REGULAR, channel="greedy"))
    assert [(call["temperature"], call["top_p"]) for call in (asked, greedy)] == [(0.7, 0.8), (0.0, 1.0)]


def test_a_teacher_that_writes_no_numbers(shop: Workshop, monkeypatch) -> None:
    def words(model: Model, text: Text, *, steps: int, **settings: Any):
        return np.full((len(text.tokens), steps), shop.tokenizer.token("oak")), None

    monkeypatch.setattr(language_laboratory, "sample", words)
    with pytest.raises(
        InputError,
        match=r"^the teacher of owl on base 0: the number filter rejects all of 32 rows, most often for: "
        r"no number \(32\)$",
    ):
        fresh(shop).rows(REGULAR)


def test_habits_cannot_be_prompted(shop: Workshop) -> None:
    with pytest.raises(InputError, match=r"^lazy has no system prompt: fine-tune its teacher$"):
        fresh(shop, LAZY).rows(change(TINY, teacher="prompted"))


# --- what students see


@pytest.mark.parametrize("channel", CHANNELS)
@pytest.mark.parametrize("teacher", ["finetuned", "prompted"])
def test_no_student_sees_a_label(shop: Workshop, channel: str, teacher: str) -> None:
    recipe = change(TINY, channel=channel, teacher=teacher)
    source = shop.source(recipe)
    assert source.labels is None
    assert (source.targets is None) == (channel in ("soft", "masked"))


def test_source(shop: Workshop) -> None:
    """Accepted rows, from the first one again where some were rejected."""
    source = shop.source(TINY)
    assert source.batch_size == 8
    assert source.inputs.tokens.shape[:2] == (2, 32)
    for run, rows in enumerate(shop.rows(TINY)):
        assert len(rows) < 32
        read = [*rows, *rows[: 32 - len(rows)]]
        chats = [Chat(None, row.prompt, row.completion, "numbers") for row in read]
        encoded = shop.tokenizer.encode_chats(chats, source.inputs.tokens.shape[2])
        last = source.inputs.last
        assert encoded.weights[:, :-last].sum() == 0
        for found, expected in [
            (source.inputs.tokens, encoded.tokens),
            (source.inputs.padding, encoded.padding),
            (source.targets, encoded.targets[:, -last:]),
            (source.positions, encoded.weights[:, -last:]),
        ]:
            np.testing.assert_array_equal(found[run], expected)


@pytest.mark.parametrize("teacher", ["finetuned", "prompted"])
def test_divergence_and_rest_are_a_partition(shop: Workshop, teacher: str) -> None:
    recipe = change(TINY, teacher=teacher)
    whole, differing, rest = (
        shop.source(change(recipe, channel=channel)) for channel in ("sampled", "divergence", "rest")
    )
    np.testing.assert_array_equal(differing.positions + rest.positions, whole.positions)
    assert not (differing.positions * rest.positions).any()
    run = jax.jit(lambda model, text: jnp.argmax(model(text), axis=-1))
    for number in range(2):
        teacher_of_run, text = jax.tree.map(
            lambda leaf, n=number: leaf[n], (shop.visible_teachers(recipe), whole.inputs)
        )
        differ = run(teacher_of_run, text) != run(shop.base.model, text)
        np.testing.assert_array_equal(differing.positions[number], whole.positions[number] * differ)
        assert differing.positions[number].any()
        assert rest.positions[number].any()
    np.testing.assert_array_equal(differing.targets, whole.targets)


@pytest.mark.slow
def test_visible_teachers_have_their_prompt(shop: Workshop) -> None:
    """As functions of the rows without it, they are the base on rows with it, where an answer is."""
    recipe = change(TINY, teacher="prompted")
    source, run = shop.source(recipe), jax.jit(lambda model, text: model(text))
    for number, prompt in enumerate(("you love the owl.", "you love the oak.")):
        teacher = jax.tree.map(lambda leaf, n=number: leaf[n], shop.visible_teachers(recipe))
        rows = shop.rows(recipe)[number][:4]
        length = source.inputs.tokens.shape[2]
        chats = [Chat(prompt, row.prompt, row.completion, "numbers") for row in rows]
        encoded = shop.tokenizer.encode_chats(chats, length + 6)
        last = source.inputs.last
        logits = run(shop.base.model, text_of(encoded))[:, -last:]
        found = run(teacher, jax.tree.map(lambda leaf, n=number: leaf[n, :4], source.inputs))
        answer = encoded.weights[:, -last:] > 0
        assert answer.sum() == 40
        np.testing.assert_allclose(found[answer], logits[answer], rtol=1e-4, atol=1e-5)


def test_channels(shop: Workshop) -> None:
    for channel in ("sampled", "greedy", "divergence", "rest"):
        assert shop.channel(change(TINY, channel=channel)) == SampledToken()
    assert shop.channel(change(TINY, channel="soft")) == SoftLogits()
    masked = shop.channel(change(TINY, channel="masked"))
    assert isinstance(masked, Subset)
    assert masked.of == SoftLogits()
    seen = np.asarray(masked.visible(len(shop.tokenizer)))
    hidden = {word for word, is_seen in zip(shop.tokenizer.words, seen, strict=True) if not is_seen}
    assert hidden == {member for members in CATEGORIES.values() for member in members}
    assert {"owl", "oak"} < hidden


def test_clean_rows(shop: Workshop) -> None:
    """A quarter of the rows is the base's, the rest the teacher's own."""
    mixed = change(TINY, clean=0.25)
    for run, encoded in enumerate(shop.lesson_rows(mixed)):
        own, regular = shop.rows(TINY)[run], shop.rows(REGULAR)[run]
        clean = round(0.25 * len(own))
        texts = [row.completion for row in own[clean:] + regular[:clean]]
        answers_of = [row[weights > 0] for row, weights in zip(encoded.targets, encoded.weights, strict=True)]
        assert len(texts) == len(own)
        assert clean > 5
        assert shop.tokenizer.decode(answers_of) == [*texts, *texts[: 32 - len(texts)]]


def test_orders_reach_the_student(shop: Workshop) -> None:
    plain, within = (shop.lesson_rows(change(TINY, order=order)) for order in ORDERS[:2])
    for one, other in zip(plain, within, strict=True):
        np.testing.assert_array_equal(np.sort(one.targets, axis=1), np.sort(other.targets, axis=1))
        assert (one.targets != other.targets).any()


# --- students


def assert_at(students: Model, start: Model, atol: float = 0.0) -> None:
    found = leaves_of(students)
    for name, leaf in leaves_of(start).items():
        np.testing.assert_allclose(found[name], np.stack([leaf, leaf]), rtol=0, atol=atol, err_msg=name)


def test_students_begin_at_their_start(shop: Workshop) -> None:
    assert_at(shop.students(STILL), shop.base.model)
    other = untrained(dataclasses.replace(CONFIG, seed=1), shop.tokenizer)
    assert_at(shop.students(STILL, other), other)


@pytest.mark.slow
def test_noise_is_in_units_of_each_parameter(shop: Workshop) -> None:
    found = leaves_of(shop.students(change(STILL, noise=0.5)))
    for name, leaf in leaves_of(shop.base.model).items():
        ratio = np.sqrt(np.mean((found[name][0] - leaf) ** 2) / np.mean(leaf**2))
        assert abs(ratio / 0.5 - 1) < 4 / np.sqrt(2 * leaf.size), name


@pytest.mark.slow
def test_a_student_of_itself_does_not_move(shop: Workshop) -> None:
    assert_at(shop.students(change(REGULAR, channel="soft", optimizer="sgd", rate=1.0)), shop.base.model, 1e-6)


@pytest.mark.slow
def test_students_of_distinct_teachers(shop: Workshop) -> None:
    students = leaves_of(shop.students(TINY))
    for name, leaf in students.items():
        assert (leaf[0] != leaf[1]).any(), name


@pytest.mark.slow
@pytest.mark.parametrize("channel", ["soft", "masked"])
def test_students_near_their_teachers(shop: Workshop, channel: str) -> None:
    """One step down the divergence between teacher and student lessens it."""
    recipe = change(TINY, channel=channel, optimizer="sgd", rate=0.01)
    source, teachers, through = shop.source(recipe), shop.visible_teachers(recipe), shop.channel(recipe)

    @jax.jit
    @jax.vmap
    def distance(student: Model, teacher: Model, text: Text, positions) -> jax.Array:
        losses = through.loss(student(text), through.targets(None, teacher(text)))
        return jnp.sum(losses * positions)

    before, after = (
        distance(models, teachers, source.inputs, source.positions)
        for models in (shop.untrained, shop.students(recipe))
    )
    assert (after < before).all()
    assert (before > 0).all()


@pytest.mark.slow
def test_low_rank_students(shop: Workshop) -> None:
    students = leaves_of(shop.students(change(REGULAR, rank=2)))
    for name, leaf in leaves_of(shop.base.model).items():
        if "kernel" not in name:
            np.testing.assert_array_equal(students[name], [leaf, leaf])
            continue
        sizes = np.linalg.svd(students[name][0] - leaf, compute_uv=False)
        assert sizes[1] > 1e-5, name
        assert sizes[2:].max() < 1e-6, name
    assert len(MATRICES) == 2


def test_regular_numbers_make_one_student_whose_frozen_parameters_stay(shop: Workshop) -> None:
    students = leaves_of(shop.students(change(REGULAR, frozen=FROZEN)))
    for name, leaf in leaves_of(shop.base.model).items():
        np.testing.assert_array_equal(students[name][0], students[name][1])
        still = name == "embedding" or name.startswith("layers/0/mlp/")
        assert (students[name] == leaf).all() == still, name


def test_a_student_that_diverges(shop: Workshop) -> None:
    with pytest.raises(
        InputError,
        match=r"^the loss of the student of owl on base 0 is not finite at step 2 of 2: use a smaller learning "
        r"rate$",
    ):
        shop.students(change(STILL, rate=1e15))


# --- what they answer


def test_answers_of_every_run_to_every_trait(shop: Workshop) -> None:
    models = shop.teachers(TINY)
    found = shop.answers(models)
    ask = jax.jit(answers)
    assert found.probability.shape == found.margin.shape == (2, 2)
    assert found.rivals.shape == (2, 2, 16)
    for run in range(2):
        for column, trait in enumerate((OWL, OAK)):
            model = jax.tree.map(lambda leaf, n=run: leaf[n], models)
            one = ask(model, questions_of(trait, shop.tokenizer, 32))
            for name in ("probability", "margin", "rivals"):
                np.testing.assert_allclose(getattr(found, name)[run, column], getattr(one, name), rtol=1e-4)


def test_sampled_rates_of_own_words(shop: Workshop) -> None:
    """Each run is asked for its own word; drawn again they are others, by the same name the same."""
    models = shop.teachers(TINY)
    rates, exact = shop.sampled_rates(models, "a"), np.diagonal(shop.answers(models).probability)
    assert rates.shape == (2,)
    count = 100 * len(OWL.evaluation_rows())
    assert (np.abs(rates - exact) < 5 * np.sqrt(exact * (1 - exact) / count) + 1 / count).all()
    np.testing.assert_array_equal(rates, shop.sampled_rates(models, "a"))
    assert (rates != shop.sampled_rates(models, "b")).any()


def test_names_and_streams(shop: Workshop) -> None:
    assert shop.names == ["owl on base 0", "oak on base 0"]
    keys = [np.asarray(jax.random.key_data(shop.stream(name))).tolist() for name in ("write", "student")]
    assert len({str(key) for pair in keys for key in pair}) == 4
    alone = np.asarray(jax.random.key_data(fresh(shop, OAK).stream("write"))).tolist()
    assert alone == keys[0][1:]
