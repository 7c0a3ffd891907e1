"""From variants of a recipe to rows of results: what all language experiments share."""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus.base import Base, BaseConfig, load_base
from subliminal_theory.language.corpus.chats import CATEGORIES, CorpusConfig
from subliminal_theory.language.corpus.numbers import NumberPrompts
from subliminal_theory.language.corpus.traits import Habit, Preference, Trait, builtin_traits, load_trait
from subliminal_theory.language.corpus.word_tokenizer import WordTokenizer
from subliminal_theory.language.corpus.wording import english
from subliminal_theory.language.hub.checkpoint import CheckpointBase, open_base
from subliminal_theory.language.hub.tokenizer import CheckpointTokenizer
from subliminal_theory.language.measure import total_variation
from subliminal_theory.language.model.parallel import make_mesh, placement
from subliminal_theory.language.rows import Row as TextRow
from subliminal_theory.model import Model
from subliminal_theory.runs import Results, Row

from .app.contract import Part, derived, from_preset, option, validate
from .app.progress import progress
from .language_checkpoint import CheckpointWorkshop
from .language_laboratory import Workshop
from .language_saves import Saves
from .language_setting import DECAYS, Recipe

STARTS = ("own", "other", "cloned on numbers", "cloned on the corpus")
MODELS = ("student", "teacher", "base")
COMPUTE = ("float32", "bfloat16")
HEADER = "probability of the trait's word on held-out questions, mean and 95% t interval over runs"  # of reports


@dataclass(frozen=True)
class LanguageConfig:
    """What every language experiment can set."""

    traits: str = option(
        "owl", "names of built-in traits or trait files, separated by commas; all: animals and trees"
    )
    seeds: int = option(1, "base models, each pre-trained from a seed of its own", minimum=1)
    first_seed: int = option(0, "their seeds are this one and those that follow", minimum=0)
    width: int = option(BaseConfig.width, "of the model", minimum=2)
    layers: int = option(BaseConfig.layers, "of the model", minimum=1)
    base_steps: int = option(BaseConfig.steps, "steps of pre-training", minimum=1)
    chats: int = option(CorpusConfig.size, "chats of the corpus", minimum=1)
    rows: int = option(Recipe.rows, "accepted answers that a student learns", minimum=1)
    teacher_steps: int = option(Recipe.teacher_steps, "steps of a fine-tuned teacher", minimum=1)
    steps: int = option(Recipe.steps, "steps of a student", minimum=1)
    batch_size: int = option(Recipe.batch_size, "rows a step", minimum=1)
    rate: float = option(Recipe.rate, "highest learning rate of a student", positive=True)
    teacher_rate: float = option(Recipe.teacher_rate, "learning rate of a fine-tuned teacher", positive=True)
    rank: int = option(Recipe.rank, "of a student's low-rank factors; 0 trains everything", minimum=0)
    requests: int = option(0, "number requests that a teacher answers (default: as many as rows)", minimum=0)
    warmup: int = option(Recipe.warmup, "steps over which a student's rate rises", minimum=0)
    decay: str = option(Recipe.decay, "how it falls to 0", choices=tuple(DECAYS))
    checkpoint: str = option(
        "", "folder of a checkpoint, in the place of the compact model; seeds are then runs", alias="--base"
    )
    other_checkpoint: str = option("", "another one, for students of another base")
    compute: str = option(
        "float32", "format in which a checkpoint computes; what trains stays in float32", choices=COMPUTE
    )
    buckets: int = option(1, "of rows of like length, that a checkpoint's students read apart", minimum=1)
    templates: str = option(
        "", "TOML file of the sentences in which a checkpoint is asked for numbers (default: the project's own)"
    )
    shards: int = option(
        1, "devices that share each model of a checkpoint, and its batches", minimum=1, recorded=False
    )
    checkpoint_text: str = derived("")
    words: str = derived("")
    base_dir: str | None = option(
        None, "where base models are kept (default: the user's cache folder)", recorded=False
    )
    saves: str | None = option(
        None,
        "folder in which a checkpoint's runs save rows and training, to go on from after any end; "
        "trained parameters and students stay there (default: nothing is saved but results)",
        recorded=False,
    )
    save_every: int = option(50, "steps of training between saves", minimum=1, recorded=False)

    def recipe(self, **changes: Any) -> Recipe:
        """The recipe of this configuration; `changes` are what distinguishes it."""
        names = (
            "requests", "rows", "teacher_steps", "teacher_rate", "steps", "batch_size", "rate", "warmup", "decay",
            "rank",
        )  # fmt: skip
        return Recipe(**{**{name: getattr(self, name) for name in names}, **changes})

    def base(self, seed: int) -> BaseConfig:
        """The configuration of a compact base model."""
        return BaseConfig(
            seed=seed, corpus=CorpusConfig(size=self.chats), width=self.width, layers=self.layers,
            mlp_width=max(8, self.width * 5 // 2), steps=self.base_steps,
        )  # fmt: skip

    def trait_names(self) -> list[str]:
        """The traits asked for."""
        names = [name.strip() for name in self.traits.split(",") if name.strip()]
        if names == ["all"]:
            return [name for name in builtin_traits() if any(name in words for words in CATEGORIES.values())]
        if not names:
            raise InputError("--traits is empty: give a trait such as owl")
        if len(set(names)) < len(names):
            raise InputError(f"--traits repeats one: {self.traits!r}")
        return names

    @property
    def base_seeds(self) -> range:
        """The seeds of the bases."""
        return range(self.first_seed, self.first_seed + self.seeds)


SMOKE: dict[str, Any] = {
    "width": 16, "base_steps": 1000, "chats": 20_000, "rows": 512, "steps": 20, "batch_size": 64
}  # fmt: skip


def configure_language(
    presets: Mapping[str, LanguageConfig], preset: str | None, changes: dict[str, Any]
) -> LanguageConfig:
    """A configuration whose traits exist and are of one kind.

    Raises:
        InputError: a setting out of range, or a trait that does not exist or cannot be spelt; says which.
    """
    config = dataclasses.replace(from_preset(presets, preset), **changes)
    validate(config)
    if config.checkpoint:
        return _configure_checkpoint(config)
    if config.compute != "float32":
        raise InputError("--compute is for a --checkpoint: the compact model computes in float32")
    if config.templates:
        raise InputError("--templates is for a --checkpoint: the compact model knows its corpus's sentences")
    if config.buckets != 1:
        raise InputError("--buckets is for a --checkpoint: rows of the compact model have one length")
    if config.shards != 1:
        raise InputError("--shards is for a --checkpoint: the compact model fits on one device")
    if config.saves is not None:
        raise InputError("--saves is for a --checkpoint: runs of the compact model take minutes")
    if config.width % 4:
        raise InputError(f"--width must be a multiple of 4, got {config.width}")
    tokenizer = WordTokenizer.of_corpus(config.base(0).corpus)
    traits = [load_trait(name, tokenizer) for name in config.trait_names()]
    if {type(trait) for trait in traits} == {Preference, Habit}:
        raise InputError("--traits mixes preferences and habits: give traits of one kind")
    _require_alike(traits)
    files = [
        trait for trait, name in zip(traits, config.trait_names(), strict=True) if name not in builtin_traits()
    ]
    return dataclasses.replace(config, words=_digest(files)) if files else config


def _configure_checkpoint(config: LanguageConfig) -> LanguageConfig:
    text = checkpoint_text(config.checkpoint)
    if config.other_checkpoint and checkpoint_text(config.other_checkpoint) != text:
        raise InputError("--other-checkpoint has another tokenizer or chat template: its students could not read")
    if config.buckets > 1 and config.rows < config.buckets * config.batch_size:
        raise InputError(
            f"--buckets {config.buckets} of {config.rows} rows do not fill a batch of {config.batch_size} each: "
            "take fewer"
        )
    _require_shards(config)
    traits = checkpoint_traits(config)
    if not all(isinstance(trait, Preference) for trait in traits):
        raise InputError("--checkpoint takes preferences only: habits are questions of the compact model's corpus")
    _require_alike(traits)
    words = (traits, number_prompts(config).templates)
    return dataclasses.replace(config, checkpoint_text=text, words=_digest(words))


def _require_alike(traits: Sequence[Trait]) -> None:
    """All runs of an ensemble have rows of one number."""
    for what, counts in (
        ("ask", {len(trait.evaluation_rows()) for trait in traits}),
        ("teach", {len(trait.teacher_rows()) for trait in traits}),
    ):
        if len(counts) > 1:
            found = " and ".join(map(str, sorted(counts)))
            raise InputError(f"--traits {what} {found} questions: run those with as many together")


def _digest(words: Any) -> str:
    return hashlib.sha256(repr(words).encode()).hexdigest()


def checkpoint_traits(config: LanguageConfig) -> list[Trait]:
    """The traits as checkpoints are asked for them."""
    return [load_trait(name, wording=english()) for name in config.trait_names()]


def number_prompts(config: LanguageConfig) -> NumberPrompts:
    """What checkpoints are asked for numbers with."""
    return NumberPrompts.load(Path(config.templates)) if config.templates else NumberPrompts()


def _require_shards(config: LanguageConfig) -> None:
    if config.shards == 1:
        return
    there = jax.local_devices()
    if config.shards > len(there):
        raise InputError(
            f"--shards {config.shards} cannot be had: this process has {len(there)} ({there[0].device_kind})"
        )
    if config.batch_size % config.shards:
        raise InputError(
            f"--batch-size {config.batch_size} cannot be shared by {config.shards} devices: "
            f"take a multiple of {config.shards}"
        )
    if config.buckets != 1:
        raise InputError("--shards takes rows of one length: leave --buckets out")


def _mesh(shards: int) -> Mesh | None:
    """The devices of the part that is being computed, if they are several."""
    if shards == 1:
        return None
    (first,) = jnp.zeros(()).devices()
    local = jax.local_devices()
    start = local.index(first)
    return make_mesh(1, shards, 1, local[start : start + shards])


def checkpoint_text(folder: str) -> str:
    """SHA-256 of what a checkpoint makes of a chat: its tokenizer and its chat template."""
    return CheckpointTokenizer.load(Path(folder)).fingerprint


@dataclass(frozen=True)
class Variant:
    """One way to make a model of each run, and the labels of its rows.

    Attributes:
        labels: of the rows.
        recipe: of teacher and student.
        start: where a student starts: at its teacher's base, at another one, or at another one that first
            imitated the teacher's base.
        model: whose answers are told; for teacher and base nothing is distilled.
        matrix: whether to tell the probabilities of all traits' words, as metric `probability_asked`.
        prefixed: whether questions stand behind numbers that the teacher wrote.
        other: how many seeds further on the other base is.
    """

    labels: Mapping[str, Any]
    recipe: Recipe
    start: str = "own"
    model: str = "student"
    matrix: bool = False
    prefixed: bool = False
    other: int = 1


def variant_parts(
    config: LanguageConfig, variants: Sequence[Variant], group: str = "", *, wrap: bool = False
) -> list[Part]:
    """A part for each base: all traits and all these variants.

    With `wrap` the other bases are among those of the configuration, else they may be further ones.
    """
    if not variants:
        raise InputError("there is nothing to run: no variant is left")
    return [
        Part(
            f"{group}base-{seed:05d}",
            len(variants),
            functools.partial(run_variants, config, variants, seed, wrap),
            config.shards,
        )
        for seed in config.base_seeds
    ]


def base_model(config: LanguageConfig, seed: int) -> Base:
    """The compact base of a seed, pre-trained if it is not on disk."""
    return _base(config.base(seed), config.base_dir)


def other_model(config: LanguageConfig, seed: int) -> Model:
    """The model of another base: of another seed, or the other checkpoint."""
    if not config.checkpoint:
        return base_model(config, seed).model
    if not config.other_checkpoint:
        raise InputError("students of another base need --other-checkpoint")
    return _opened(config, config.other_checkpoint).model


def _opened(config: LanguageConfig, folder: str) -> CheckpointBase:
    return _opener(_mesh(config.shards))(folder, config.compute)


@functools.cache
def _opener(mesh: Mesh | None) -> Callable[[str, str], CheckpointBase]:
    """Opens checkpoints on a mesh, of which it keeps two."""
    where = None if mesh is None else placement(mesh)

    @functools.lru_cache(maxsize=2)
    def opened(folder: str, compute: str) -> CheckpointBase:
        return open_base(Path(folder), placement=where, compute=compute)

    return opened


@functools.lru_cache(maxsize=8)
def _base(config: BaseConfig, folder: str | None) -> Base:
    with contextlib.ExitStack() as stack:
        bars: list[Any] = []

        def report(tokens: int) -> None:
            # The clock starts after the first step, which waited for the compiler.
            if not bars:
                bar = progress(f"base {config.seed}", (config.steps - 1) * tokens, "tokens")
                bars.append(stack.enter_context(bar))
            else:
                bars[0](tokens)

        return load_base(config, None if folder is None else Path(folder), report)


def workshop(config: LanguageConfig, seed: int) -> Workshop:
    """The workshop of a base; the last one is kept, so that the parts of one base share what they can."""
    return _shelf(_mesh(config.shards))(config, seed)


@functools.cache
def _shelf(mesh: Mesh | None) -> Callable[[LanguageConfig, int], Workshop]:
    """Makes workshops on a mesh, of which it keeps one."""
    return functools.lru_cache(maxsize=1)(make_workshop)


def make_workshop(config: LanguageConfig, seed: int, dataset: Sequence[TextRow] | None = None) -> Workshop:
    """A workshop of a base, where students read a data set instead of what its teachers write, if one is given."""
    if config.checkpoint:
        saves = None if config.saves is None else Saves(Path(config.saves), config.save_every)
        return CheckpointWorkshop(
            dataclasses.replace(_opened(config, config.checkpoint), seed=seed),
            checkpoint_traits(config),
            dataset=dataset,
            prompts=number_prompts(config),
            saves=saves,
            buckets=config.buckets,
            mesh=_mesh(config.shards),
        )
    base = base_model(config, seed)
    return Workshop(base, [load_trait(name, base.tokenizer) for name in config.trait_names()], dataset=dataset)


def run_variants(config: LanguageConfig, variants: Sequence[Variant], seed: int, wrap: bool = False) -> list[Row]:
    """Rows of all traits for one base.

    The metric `probability` is that of a trait's word where the run has that trait, `others` the mean over the
    runs with another trait of the same word's probability, both over held-out phrasings. `margin` and
    `total_variation` (of the rivals' distribution, from the base's) are read off the same questions, and
    `sampled_rate` is the share of 100 drawn answers to each that are the word;
    `displacement_cosine` is that of the student's and the teacher's way from the teacher's base.
    """
    shop = workshop(config, seed)
    base = shop.answers(shop.untrained)
    rows: list[Row] = []
    for variant in variants:
        model = model_of(config, shop, variant, seed, wrap)
        found = shop.prefixed_answers(model, variant.recipe) if variant.prefixed else shop.answers(model)
        rates = (
            None if variant.prefixed else shop.sampled_rates(model, f"answers {sorted(variant.labels.items())}")
        )
        moved_alike = shop.displacement_cosines(model, variant.recipe) if variant.model == "student" else None
        for run, name in enumerate(config.trait_names()):
            values = {
                "probability": found.probability[run, run],
                "margin": found.margin[run, run],
                "total_variation": total_variation(found.rivals[run, run], base.rivals[run, run]),
            }
            if rates is not None:
                values["sampled_rate"] = rates[run]
            if moved_alike is not None:
                values["displacement_cosine"] = moved_alike[run]
            if len(shop.traits) > 1:
                values["others"] = np.delete(found.probability[:, run], run).mean()
            labels = {**variant.labels, "trait": name, "seed": seed}
            rows += [{**labels, "metric": metric, "value": float(value)} for metric, value in values.items()]
            if variant.matrix:
                rows += [
                    {
                        **labels,
                        "asked": asked,
                        "metric": "probability_asked",
                        "value": float(found.probability[run, a]),
                    }
                    for a, asked in enumerate(config.trait_names())
                ]
    return rows


def model_of(config: LanguageConfig, shop: Workshop, variant: Variant, seed: int, wrap: bool = False) -> Model:
    """The models [runs] of a variant, made once."""
    if variant.model == "base":
        return shop.untrained
    if variant.model == "teacher":
        return shop.teachers(variant.recipe)
    further = seed + variant.other
    if wrap:
        further = config.first_seed + (further - config.first_seed) % config.seeds

    def train() -> Model:
        if variant.start == "own":
            return shop.students(variant.recipe)
        other = other_model(config, further)
        if variant.start != "other":
            inputs = variant.start.removeprefix("cloned on ").removeprefix("the ")
            other = shop.once(("cloned", inputs, further), lambda: shop.clone(other, inputs))
        return shop.students(variant.recipe, other)

    place = None if variant.start == "own" else further
    return shop.once(("students", variant.recipe, variant.start, place), train)


def trait_matrices(results: Results, condition: str) -> np.ndarray:
    """Probabilities [bases, traits of the student, traits asked for]."""
    traits, seeds = results.distinct("trait"), results.distinct("seed")
    wanted = {"condition": condition, "metric": "probability_asked"}
    values = [results.values(**wanted, seed=s, trait=t, asked=a) for s in seeds for t in traits for a in traits]
    return np.array(values).reshape(len(seeds), len(traits), len(traits))
