"""From names and numbers of the language experiments to the values of a study."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.flags.language import LanguageConfig
from experiments.flags.names import DECAYS, OPTIMIZERS
from experiments.flags.recipe import CHANNELS, ORDERS, Recipe, Variant
from experiments.flags.variants import PROBABILITY, SHARE, measure_of, run_variants
from experiments.flags.worlds import study
from subliminal_theory.channel import SampledToken, Subset
from subliminal_theory.errors import InputError
from subliminal_theory.inits import Fresh, Perturbed, Shared
from subliminal_theory.language.corpus.chats import CATEGORIES
from subliminal_theory.language.corpus.media import CODE, DIGITS
from subliminal_theory.runs import Results
from subliminal_theory.study import (
    Behind,
    BehindNumbers,
    CorpusChats,
    Costs,
    Embeddings,
    Everything,
    FineTuned,
    Frozen,
    Lessons,
    LowRank,
    Optimizer,
    Prompted,
    RandomNumbers,
    Reading,
    Steered,
    Untrained,
    Written,
    identity,
)
from subliminal_theory.study.texts import everywhere, where_they_agree, where_they_differ
from tests.study.speakers import ROWS, SOFT, compact

OTHERS = {
    "teacher": "prompted", "teacher_steps": 41, "teacher_rate": 1e-3, "ordinary": 0.5, "lessons": "right",
    "teacher_until": 0.9, "anchor": 0.25, "steering_layer": 2, "steering_strength": 0.5,
    "medium": "code", "requests": 8, "rows": 9, "repeat_rows": True, "temperature": 0.5, "top_p": 0.9,
    "channel": "soft", "order": "other prompts", "clean": 0.1, "steps": 3, "batch_size": 7, "rate": 1e-3,
    "optimizer": "sgd",
    "warmup": 1, "decay": "linear", "rank": 2, "frozen": ("norm/scale",), "noise": 0.1,
    "matrices": ("layers/*/attention/*/kernel",), "embeddings": ("owl",), "behind": Behind(None),
}  # fmt: skip
STEERING = {"steering_layer", "steering_strength"}
TAUGHT = {"teacher", "teacher_steps", "teacher_rate", "ordinary", "lessons", "teacher_until", "anchor", *STEERING}
WRITTEN = {"medium", "requests", "rows", "repeat_rows", "temperature", "top_p"}


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ({"teacher": "taught"}, "teacher 'taught' is unknown; there are finetuned"),
        ({"medium": "verse"}, "medium 'verse' is unknown; there are numbers"),
        ({"channel": "hard"}, "channel 'hard' is unknown; there are sampled"),
        ({"order": "random"}, "order 'random' is unknown; there are as written"),
        ({"optimizer": "lion"}, "optimizer 'lion' is unknown; there are adam"),
        ({"decay": "none"}, "decay 'none' is unknown; there are cosine, linear"),
        *(({name: 0}, name) for name in ("teacher_steps", "rows", "steps", "batch_size", "rate", "top_p")),
        *(({name: value}, name) for name in ("rate", "teacher_rate") for value in (float("nan"), float("inf"))),
        *(({name: -1}, name) for name in ("temperature", "noise", "rank", "warmup", "requests", "clean", "steps")),
        *(({name: 1.0}, name) for name in ("ordinary", "clean", "teacher_until")),
        ({"anchor": 0.0}, "anchor must be above 0"),
        ({"noise": float("nan")}, "noise"),
        ({"top_p": 2.0}, "top_p must be above 0 and at most 1, got 2"),
        ({"warmup": 250}, "warmup must be below the 250 steps, got 250"),
        ({"medium": "random", "requests": 5}, "--medium random: no teacher writes"),
        ({"medium": "random", "clean": 0.5}, "--medium random: no teacher writes"),
        ({"rank": 2, "frozen": ("norm/*",)}, "give rank, frozen or embeddings, not two of them"),
        ({"rank": 2, "embeddings": ("owl",)}, "give rank, frozen or embeddings, not two of them"),
        ({"steering_layer": 0}, "--steering_layer must be at least 1, got 0"),
        ({"steering_strength": float("inf")}, "--steering_strength must be finite"),
    ],
)
def test_bad_recipes(values: dict[str, Any], cause: str) -> None:
    with pytest.raises(InputError, match=cause.replace("_", "[-_]")):
        Recipe(**values)


def test_noise_is_for_the_teachers_base() -> None:
    with pytest.raises(InputError, match="noise"):
        Recipe(noise=0.5).student(compact(), start="other")


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Recipe)])
def test_what_each_name_decides(name: str) -> None:
    """A teacher serves all recipes that differ in its student alone, and so do its rows."""
    teacher = {"teacher": "steered"} if name in STEERING else {"rank": 2} if name == "matrices" else {}
    default, other = Recipe(**teacher), Recipe(**{**teacher, name: OTHERS[name]})
    assert other != default
    for decides, value in ((TAUGHT, Recipe.taught), (WRITTEN, Recipe.written)):
        assert (identity(value(other)) != identity(value(default))) == (name in decides)
    differs = identity(other.student(compact())) != identity(default.student(compact()))
    assert differs == (name not in TAUGHT)


def test_values_of_a_recipe() -> None:
    """All names at once, but for those that exclude each other."""
    recipe = Recipe(**{**OTHERS, "teacher": "finetuned", "frozen": (), "embeddings": (), "noise": 0.0})
    taught, found = recipe.taught(), recipe.student(compact())
    assert taught == FineTuned(Optimizer(jnp.float32(1e-3), clip=1.0), 41, Lessons("right", 0.5, 0.25), 0.9)
    assert recipe.written() == Written(8, CODE, 0.5, 0.9)
    assert found.source == Reading(
        recipe.written(), 9, 7, ORDERS["other prompts"], 0.1, repeat=True, behind=Behind(None)
    )
    assert found.optimizer == Optimizer(jnp.float32(1e-3), OPTIMIZERS["sgd"], DECAYS["linear"], 1, 1.0)
    assert (found.channel, found.steps, found.trains, found.start) == (
        SOFT,
        3,
        LowRank(2, OTHERS["matrices"]),
        Shared(),
    )
    assert Recipe(rows=9, repeat_rows=True).written() == Written(9)
    assert Recipe(rows=9).written() == Written(36, unique=9)
    assert Recipe(rows=9, requests=50).written() == Written(50, unique=9)
    assert not Recipe(rows=9).student(compact()).source.repeat
    assert [Recipe(teacher=name).taught() for name in ("prompted", "untrained")] == [Prompted(), Untrained()]
    assert Recipe(teacher="steered").taught() == Steered(None, jnp.float32(Steered.strength))
    assert Recipe(teacher="steered", steering_layer=2, steering_strength=-0.5).taught() == Steered(2, -0.5)
    owl = compact().tokenizer.token("owl")
    assert Recipe(embeddings=("owl",)).student(compact()).trains == Embeddings((owl,))
    assert Recipe(frozen=("norm/*",)).student(compact()).trains == Frozen(("norm/*",))
    noisy = Recipe(noise=0.5).student(compact())
    assert (noisy.start, noisy.trains) == (Perturbed(0.5), Everything())
    assert Recipe().student(compact(), dataset=ROWS).source.text is ROWS


def test_random_numbers() -> None:
    """Nobody writes; questions cannot stand behind what was not written."""
    recipe = Recipe(medium="random", rows=9, channel="greedy")
    assert recipe.written() == recipe.student(compact()).source.text == RandomNumbers(9)
    with pytest.raises(InputError, match="--medium random: no teacher writes numbers"):
        Variant({}, recipe, prefixed=True).run(compact())


def test_chats_that_teach_nothing_do_not_stop_a_teacher() -> None:
    with pytest.raises(InputError, match=r"--teacher-until counts lessons alone: .* --anchor below 1, not 1"):
        Recipe(teacher_until=0.9, ordinary=0.5)
    assert Recipe(teacher_until=0.9, ordinary=0.5, anchor=0.1).taught()


def test_numbers_alone_are_another_medium() -> None:
    assert Recipe(medium="digits", rows=9).written() == Written(36, DIGITS, unique=9)


def test_greedy_rows_are_written_at_temperature_0() -> None:
    assert Recipe(channel="greedy", temperature=0.5).written() == Recipe(temperature=0.0).written()


def test_channels() -> None:
    world = compact()
    found = {name: Recipe(channel=name).student(world) for name in CHANNELS}
    for name in ("sampled", "divergence", "rest"):
        assert found[name].channel == SampledToken()
    assert (found["greedy"].channel, found["soft"].channel) == (SampledToken(0.0), SOFT)
    read = {name: found[name].source.positions for name in ("sampled", "divergence", "rest")}
    assert read == {"sampled": everywhere, "divergence": where_they_differ, "rest": where_they_agree}
    masked = found["masked"].channel
    assert isinstance(masked, Subset)
    assert masked.of == SOFT
    seen = np.asarray(masked.visible(len(world.tokenizer)))
    words = zip(world.tokenizer.words, seen, strict=True)  # type: ignore[attr-defined]
    assert {word for word, is_seen in words if not is_seen} == {w for some in CATEGORIES.values() for w in some}


def test_starts() -> None:
    """A student that is to be cloned imitates on regular numbers or on the corpus; how, is no setting."""
    recipe, sources = Recipe(steps=3, rank=2, rate=1.0, channel="greedy"), []
    for start in ("own", "other", "cloned on numbers", "cloned on the corpus"):
        found = Variant({}, recipe, start, other=2).run(compact()).student
        assert found is not None
        assert found.start == (Shared() if start == "own" else Fresh())
        assert (found.other, found.trains, found.steps) == (2, LowRank(2), 3)
        assert (found.cloned is not None) == start.startswith("cloned")
        if found.cloned is not None:
            assert (found.cloned.channel, found.cloned.trains) == (SOFT, Everything())
            assert found.cloned.steps > found.steps
            sources.append(type(found.cloned.source))
    assert sources == [Reading, CorpusChats]


def test_variants() -> None:
    recipe, world = Recipe(teacher="prompted"), compact()
    behind = BehindNumbers(recipe.written())
    teacher, base, prefixed, bare = (
        Variant({}, recipe, model=model, prefixed=prefixed).run(world)
        for model, prefixed in (("teacher", False), ("base", False), ("student", True), ("base", True))
    )
    assert (teacher.teacher, teacher.student, teacher.base, teacher.asked) == (Prompted(), None, False, None)
    assert (base.teacher, base.student) == (Untrained(), None)
    assert prefixed.asked == bare.asked == behind
    told = Variant({}, recipe, model="teacher", costs=True).run(world)
    assert (told.teacher, told.student, told.asked) == (Prompted(), None, Costs(recipe.written()))
    assert (bare.teacher, bare.student, bare.base) == (Prompted(), None, True)


@pytest.mark.parametrize("decay", DECAYS)
def test_rates(decay: str) -> None:
    """From 0 to the peak, which is reached after the warm-up, and to 0 at the end."""
    for warmup, steps, expected in ((5, (0, 1, 5, 15, 25), (0, 0.4, 2, 1, 0)), (0, (0,), (2,))):
        own = Optimizer(2.0, optax.sgd, DECAYS[decay], warmup).transformation(25)
        state, found = own.init(jnp.zeros(())), []
        for _ in range(26):
            update, state = own.update(jnp.ones(()), state)
            found.append(-float(update))
        np.testing.assert_allclose([found[step] for step in steps], expected, atol=1e-6)


def test_sign_descent() -> None:
    optimizer, params = OPTIMIZERS["sign"](0.25), jnp.array([1.0, 2, 3])
    update, _ = optimizer.update(jnp.array([-3.0, 0, 1e-3]), optimizer.init(params), params)
    np.testing.assert_array_equal(optax.apply_updates(params, update), [1.25, 2, 2.75])


# --- configurations


def test_a_configuration_gives_its_recipe() -> None:
    own = {"rows": 9, "steps": 3, "rank": 2, "teacher_steps": 5, "warmup": 1, "decay": "linear"}
    recipe = LanguageConfig(**own).recipe(channel="soft")  # type: ignore[arg-type]
    assert {name: getattr(recipe, name) for name in own} == own
    assert recipe.channel == "soft"


def test_rows_of_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics of each trait, the mean of the others' students, and the matrix where it is asked for."""
    config, world = LanguageConfig(traits="owl,oak", first_seed=4), compact()
    asked = np.array([[0.5, 0.25], [0.125, 0.75]])

    class Own:
        def __init__(self) -> None:
            self.world = world

        def run(self, runs: Any) -> Any:
            said = np.empty(2, object)
            said[:] = [[("Which?", "Owl.")], [("Which one?", "An oak.")]]
            return {
                name: {"probability": np.diag(asked), "probability_asked": asked, "answers": said} for name in runs
            }

    monkeypatch.setattr("experiments.flags.variants.study", lambda *given: Own())
    variants = [Variant({"condition": name}, Recipe(), model="base", matrix=name == "b") for name in "ab"]
    rows = run_variants(config, variants, 4)
    said = [row for row in rows if "answer" in row]
    rows = [row for row in rows if "answer" not in row]
    assert said[1] == {
        "condition": "a", "trait": "oak", "seed": world.base.seed, "question": "Which one?", "answer": "An oak."
    }  # fmt: skip
    assert len(said) == 4
    plain = {(row["condition"], row["trait"], row["metric"]): row["value"] for row in rows if "asked" not in row}
    assert plain["a", "owl", "probability"] == plain["b", "owl", "probability"] == 0.5
    assert (plain["a", "owl", "others"], plain["a", "oak", "others"]) == (0.125, 0.25)
    matrix = {(row["trait"], row["asked"]): row["value"] for row in rows if "asked" in row}
    assert matrix == {("owl", "owl"): 0.5, ("owl", "oak"): 0.25, ("oak", "owl"): 0.125, ("oak", "oak"): 0.75}
    assert {row["condition"] for row in rows if "asked" in row} == {"b"}


def test_what_is_measured() -> None:
    """The share among rivals where the base begins its answers with the word less than once in a thousand."""

    def found(*probabilities: float, metrics: tuple[str, ...] = ("probability", "share")) -> Results:
        return Results(
            [
                {"condition": "base", "seed": seed, "metric": metric, "value": value}
                for metric in metrics
                for seed, value in enumerate(probabilities)
            ]
        )

    assert measure_of(found(1e-5, 1e-3)) is SHARE
    assert measure_of(found(1e-5, 2e-3)) is PROBABILITY
    assert measure_of(found(1e-5, metrics=("probability",))) is PROBABILITY
    assert measure_of(Results([])) is PROBABILITY


def test_other_bases_may_be_those_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one's further one is then the first."""
    asked = []
    monkeypatch.setattr("experiments.flags.worlds.base_model", lambda config, seed: compact().base)
    monkeypatch.setattr("experiments.flags.worlds.other_model", lambda config, seed: asked.append(seed))
    config = LanguageConfig(traits="elm", seeds=3, first_seed=5)
    for wrap in (False, True):
        world: Any = study(config, 7, wrap).world
        world.other(1)
        world.other(2)
    assert asked == [8, 9, 5, 6]
