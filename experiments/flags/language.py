"""The settings of the language experiments, and the way from variants of a recipe to result rows."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from subliminal_theory.errors import InputError
from subliminal_theory.estimate import method
from subliminal_theory.files import fingerprint
from subliminal_theory.language.corpus.base import Base, BaseConfig, load_base
from subliminal_theory.language.corpus.chats import CATEGORIES, CorpusConfig
from subliminal_theory.language.corpus.numbers import NumberPrompts
from subliminal_theory.language.corpus.traits import Habit, Preference, Trait, builtin_traits, load_trait
from subliminal_theory.language.corpus.word_tokenizer import WordTokenizer
from subliminal_theory.language.corpus.wording import english
from subliminal_theory.language.hub.checkpoint import CheckpointBase, open_base
from subliminal_theory.language.hub.families import read_family
from subliminal_theory.language.hub.tokenizer import CheckpointTokenizer
from subliminal_theory.language.hub.weights import WEIGHTS
from subliminal_theory.language.model.steered import require_layer
from subliminal_theory.model import Model
from subliminal_theory.parallel import make_mesh, placement
from subliminal_theory.runs import Results, Row
from subliminal_theory.study import Checkpoint, Compact, Store, Study, labels, rows

from ..app.contract import Part, derived, from_preset, option, validate
from ..app.progress import progress
from .names import DECAYS, checkpoint_path
from .recipe import LIMIT, RECIPE_FIELDS, REPEAT, UNTIL, Recipe, Variant, World

COMPUTE = ("float32", "bfloat16")


@dataclass(frozen=True)
class Measure:
    """What is reported about a trait's word.

    Attributes:
        metric: the metric for a run's own word.
        others: the metric for the same word in the runs with other traits.
        asked: the metric for the words of all traits.
        label: a description for figures and reports.
    """

    metric: str
    others: str
    asked: str
    label: str

    def header(self, results: Results) -> str:
        """The first line of a report."""
        return f"{self.label} on held-out questions, mean and {method(results.values(metric=self.metric))}"


PROBABILITY = Measure("probability", "others", "probability_asked", "probability of the trait's word")
SHARE = Measure("share", "others_share", "share_asked", "probability of the trait's word among its rivals")
LOG_ODDS = Measure(
    "log_odds", "others_log_odds", "log_odds_asked", "log odds of the trait's word among its rivals"
)
MEASURES = (PROBABILITY, SHARE, LOG_ODDS)
TINY = 1e-3


def measure_of(results: Results, condition: str = "base") -> Measure:
    """The probability, or the share if the mean probability of a condition (by default the base) is below `TINY`.

    A checkpoint rarely begins an answer with the name itself, so its preference shows only among the names.
    """
    base = results.values(condition=condition, metric="probability")
    tiny = bool(base) and np.mean(base) < TINY
    return SHARE if tiny and results.values(condition=condition, metric="share") else PROBABILITY


@dataclass(frozen=True)
class LanguageConfig:
    """The settings that every language experiment has. Settings with `only` are for checkpoints."""

    traits: str = option("owl", "built-in traits or trait files, separated by commas; all: animals and trees")
    seeds: int = option(1, "number of base models, each pre-trained from its own seed", minimum=1)
    first_seed: int = option(0, "seed of the first base; the other seeds follow it", minimum=0)
    width: int = option(BaseConfig.width, "width of the model", minimum=2)
    layers: int = option(BaseConfig.layers, "layers of the model", minimum=1)
    base_steps: int = option(BaseConfig.steps, "steps of pre-training", minimum=1)
    chats: int = option(CorpusConfig.size, "chats in the corpus", minimum=1)
    rows: int = option(Recipe.rows, "distinct accepted answers that a student learns", minimum=1)
    teacher_steps: int = option(Recipe.teacher_steps, "most steps of a fine-tuned teacher", minimum=1)
    teacher_until: float = option(Recipe.teacher_until, UNTIL, minimum=0)
    steps: int = option(Recipe.steps, "steps of a student", minimum=1)
    batch_size: int = option(Recipe.batch_size, "rows per step", minimum=1)
    rate: float = option(Recipe.rate, "highest learning rate of a student", positive=True)
    teacher_rate: float = option(Recipe.teacher_rate, "learning rate of a fine-tuned teacher", positive=True)
    rank: int = option(Recipe.rank, "rank of a student's low-rank factors; 0 trains everything", minimum=0)
    requests: int = option(
        0, f"most number requests to a teacher; 0: {LIMIT} times --rows, or --rows with --repeat-rows",
        minimum=0,
    )  # fmt: skip
    repeat_rows: bool = option(False, REPEAT)
    warmup: int = option(Recipe.warmup, "steps in which a student's learning rate rises", minimum=0)
    decay: str = option(Recipe.decay, "how the learning rate falls to 0", choices=tuple(DECAYS))
    checkpoint: str = option(
        "",
        "folder or GGUF file of a checkpoint, smollm2 (see weights), or OWNER/NAME[@REVISION] on the Hub, instead "
        "of the compact model; each seed is then a run",
        alias="--base",
    )
    other_checkpoint: str = option("", "another checkpoint, for students of another base")
    compute: str = option(
        "float32", "dtype in which a checkpoint computes; trained parameters stay in float32", choices=COMPUTE,
        only="the compact model computes in float32",
    )  # fmt: skip
    gradient_checkpointing: bool = option(
        True, "recompute activations of a checkpoint for gradients: less memory, a quarter more work",
        recorded=False, only="the compact model keeps its activations",
    )  # fmt: skip
    buckets: int = option(
        1, "parts of similar length into which a checkpoint's rows are split for students", minimum=1,
        only="rows of the compact model have one length",
    )  # fmt: skip
    templates: str = option(
        "", "TOML file with the sentences of number requests to a checkpoint (default: the project's own)",
        only="the compact model knows its corpus's sentences",
    )  # fmt: skip
    samples: int = option(
        20, "whole answers of a checkpoint per question, searched for the trait's word; 0: none", minimum=0,
        only="the compact model answers in one word",
    )  # fmt: skip
    shards: int = option(
        1, "devices over which each model of a checkpoint and its batches are split", minimum=1, recorded=False,
        only="the compact model fits on one device",
    )  # fmt: skip
    checkpoint_text: str = derived("")
    words: str = derived("")
    base_dir: str | None = option(
        None, "folder of base models; automatic: in the user's cache folder", recorded=False
    )
    saves: str | None = option(
        None,
        "folder in which a checkpoint's runs save rows and training, so that they can resume; trained parameters "
        "and students stay there; automatic: only results are saved",
        recorded=False,
        only="runs of the compact model take minutes",
    )
    save_every: int = option(50, "training steps between saves", minimum=1, recorded=False)

    def recipe(self, **changes: Any) -> Recipe:
        """The recipe with this configuration's values. `changes` replace some of them."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name in RECIPE_FIELDS}
        return Recipe(**{**own, **changes})

    def base(self, seed: int) -> BaseConfig:
        """The configuration of a compact base model."""
        return BaseConfig(
            seed=seed, corpus=CorpusConfig(size=self.chats), width=self.width, layers=self.layers,
            mlp_width=max(8, self.width * 5 // 2), steps=self.base_steps,
        )  # fmt: skip

    def trait_names(self) -> list[str]:
        """The names of the requested traits.

        Raises:
            InputError: there is none, or a name is repeated.
        """
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
    "width": 16, "base_steps": 1000, "chats": 20_000, "rows": 512, "steps": 20, "batch_size": 64,
    "repeat_rows": True,
}  # fmt: skip


def configure_language(
    presets: Mapping[str, LanguageConfig], preset: str | None, changes: dict[str, Any]
) -> LanguageConfig:
    """A configuration whose traits exist and are of one kind.

    Raises:
        InputError: a setting is out of range, or a trait does not exist or cannot be spelled; says which.
    """
    config = replace(from_preset(presets, preset), **changes)
    validate(config)
    if config.checkpoint:
        # Presets repeat rows for the compact model. For a checkpoint, only an explicit flag repeats rows.
        return _configure_checkpoint(replace(config, repeat_rows=changes.get("repeat_rows", False)))
    for setting in fields(config):
        if setting.metadata.get("only") and getattr(config, setting.name) != setting.default:
            flag = "--" + setting.name.replace("_", "-")
            raise InputError(f"{flag} is for a --checkpoint: {setting.metadata['only']}")
    if config.width % 4:
        raise InputError(f"--width must be a multiple of 4, got {config.width}")
    tokenizer, names = WordTokenizer.of_corpus(config.base(0).corpus), config.trait_names()
    traits = [load_trait(name, tokenizer) for name in names]
    if {type(trait) for trait in traits} == {Preference, Habit}:
        raise InputError("--traits mixes preferences and habits: give traits of one kind")
    _require_alike(traits)
    files = [trait for trait, name in zip(traits, names, strict=True) if name not in builtin_traits()]
    return replace(config, words=fingerprint(files)) if files else config


def _here(checkpoint: str) -> str:
    """The name or path as given, or the folder into which a model on the Hub was downloaded."""
    folder = checkpoint_path(checkpoint)
    return checkpoint if checkpoint in WEIGHTS or folder == Path(checkpoint) else str(folder)


def _configure_checkpoint(config: LanguageConfig) -> LanguageConfig:
    config = replace(
        config, checkpoint=_here(config.checkpoint),
        other_checkpoint=config.other_checkpoint and _here(config.other_checkpoint),
    )  # fmt: skip
    text = CheckpointTokenizer.load(checkpoint_path(config.checkpoint)).fingerprint
    if config.other_checkpoint:
        other = CheckpointTokenizer.load(checkpoint_path(config.other_checkpoint)).fingerprint
        if other != text:
            raise InputError(
                "--other-checkpoint has another tokenizer or chat template: its students could not read the rows"
            )
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
    return replace(config, checkpoint_text=text, words=fingerprint(words))


def _require_alike(traits: Sequence[Trait]) -> None:
    """Refuse traits that cannot form an ensemble: equal names, or different numbers of questions.

    Runs of an ensemble stack their rows and take their random keys from their names.
    """
    if len({trait.name for trait in traits}) < len(traits):
        raise InputError("--traits: two have one name, and would draw the same random numbers: rename one")
    for what, counts in (
        ("ask", {len(trait.evaluation_rows()) for trait in traits}),
        ("teach", {len(trait.teacher_rows()) for trait in traits}),
    ):
        if len(counts) > 1:
            found = " and ".join(map(str, sorted(counts)))
            raise InputError(f"--traits {what} {found} questions: run only traits with equal numbers together")


def checkpoint_traits(config: LanguageConfig) -> list[Trait]:
    """The traits, with the wording for checkpoints."""
    return [load_trait(name, wording=english()) for name in config.trait_names()]


def number_prompts(config: LanguageConfig) -> NumberPrompts:
    """The number requests to checkpoints."""
    return NumberPrompts.load(Path(config.templates)) if config.templates else NumberPrompts()


def _require_shards(config: LanguageConfig) -> None:
    if config.shards == 1:
        return
    there = jax.local_devices()
    if config.shards > len(there):
        raise InputError(
            f"--shards {config.shards} is not possible: this process has {len(there)} ({there[0].device_kind})"
        )
    if config.batch_size % config.shards:
        raise InputError(
            f"--batch-size {config.batch_size} cannot be shared by {config.shards} devices: "
            f"take a multiple of {config.shards}"
        )
    if config.buckets != 1:
        raise InputError("--shards takes rows of one length: leave --buckets out")


def require_steering(config: Any, conditions: Sequence[str]) -> None:
    """Refuse steering settings if no teacher is steered, or a layer that the model does not have.

    Raises:
        InputError: says which condition is needed, or which layers there are.
    """
    for name in ("steering_layer", "steering_strength"):
        if getattr(config, name) is not None and "steered" not in conditions:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} is for steered teachers: add steered to --conditions, or leave it out")
    if config.steering_layer is not None:
        path = checkpoint_path(config.checkpoint) if config.checkpoint else None
        require_layer(config.steering_layer, config.layers if path is None else read_family(path).config.layers)


# --- worlds


def _mesh(shards: int) -> Mesh | None:
    """The devices of the current part as a mesh, or None for a single device."""
    if shards == 1:
        return None
    (first,) = jnp.zeros(()).devices()
    local = jax.local_devices()
    start = local.index(first)
    return make_mesh(1, shards, 1, local[start : start + shards])


@functools.lru_cache(maxsize=2)
def _opened(folder: str, compute: str, remat: bool, mesh: Mesh | None) -> CheckpointBase:
    place = None if mesh is None else placement(mesh)
    return open_base(checkpoint_path(folder), placement=place, compute=compute, remat=remat)


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


def base_model(config: LanguageConfig, seed: int) -> Base:
    """The compact base of a seed, pre-trained if it is not on disk."""
    return _base(config.base(seed), config.base_dir)


def other_model(config: LanguageConfig, seed: int) -> Model:
    """The model of another base: another seed, or the other checkpoint.

    Raises:
        InputError: there is no other checkpoint.
    """
    if not config.checkpoint:
        return base_model(config, seed).model
    if not config.other_checkpoint:
        raise InputError("students of another base need --other-checkpoint")
    return _opened(
        config.other_checkpoint, config.compute, config.gradient_checkpointing, _mesh(config.shards)
    ).model


def study(config: LanguageConfig, seed: int, wrap: bool = False) -> Study:
    """The study of a base. The last one is cached, so that parts of one base share teachers and rows.

    With `wrap`, seeds of other bases wrap around to stay within those of the configuration.
    """
    return _study(config, seed, wrap, _mesh(config.shards))


@functools.lru_cache(maxsize=1)
def _study(config: LanguageConfig, seed: int, wrap: bool, mesh: Mesh | None) -> Study:
    def other(shift: int) -> Model:
        further = seed + shift
        if wrap:
            further = config.first_seed + (further - config.first_seed) % config.seeds
        return other_model(config, further)

    return Study(_world(config, seed, other, mesh))


def _world(config: LanguageConfig, seed: int, other: Callable[[int], Model], mesh: Mesh | None) -> World:
    if not config.checkpoint:
        base = base_model(config, seed)
        return Compact(base, [load_trait(name, base.tokenizer) for name in config.trait_names()], other)
    store = None if config.saves is None else Store(Path(config.saves), config.save_every)
    opened = replace(_opened(config.checkpoint, config.compute, config.gradient_checkpointing, mesh), seed=seed)
    return Checkpoint(
        opened, checkpoint_traits(config), other, prompts=number_prompts(config), store=store,
        buckets=config.buckets, mesh=mesh, samples=config.samples, progress=progress,
        opened=lambda name: _opened(name, config.compute, config.gradient_checkpointing, mesh).model,
    )  # fmt: skip


# --- from variants to rows


def variant_parts(
    config: LanguageConfig, variants: Sequence[Variant], group: str = "", *, wrap: bool = False
) -> list[Part]:
    """One part for each base, with all traits and variants.

    Raises:
        InputError: there is no variant.
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


def run_variants(config: LanguageConfig, variants: Sequence[Variant], seed: int, wrap: bool = False) -> list[Row]:
    """The result rows of all traits for one base.

    The metrics are those of the world's score and, for each measure, `others`: the measure of this run's word,
    averaged over the runs with other traits. Rows with an `answer` hold what a checkpoint said.
    """
    return variant_rows(study(config, seed, wrap), variants)


def variant_rows(own: Study, variants: Sequence[Variant]) -> list[Row]:
    """The result rows of all variants and traits of a study; see `run_variants`."""
    assert isinstance(own.world, World)
    runs = {labels(**variant.labels): variant.run(own.world) for variant in variants}
    found: list[Row] = []
    for variant, (name, scores) in zip(variants, own.run(runs).items(), strict=True):
        asked = {measure: scores.pop(measure.asked) for measure in MEASURES if measure.asked in scores}
        said = scores.pop("answers", None)
        for measure, values in asked.items():
            if len(values) > 1:
                others = [np.delete(values[:, run], run).mean() for run in range(len(values))]
                scores[measure.others] = np.array(others)
        for place, run in enumerate(own.world.labels):
            row = {**dict(name), **run}
            found += rows(name, [run], {metric: values[place : place + 1] for metric, values in scores.items()})
            for measure, values in asked.items() if variant.matrix else ():
                found += [
                    {**row, "asked": trait, "metric": measure.asked, "value": float(value)}
                    for trait, value in zip((t.name for t in own.world.asked), values[place], strict=True)
                ]
            if said is not None:
                found += answer_rows(row, said[place])
    return found


def answer_rows(row: Row, said: Sequence[tuple[str, str]]) -> list[Row]:
    """The questions and answers of a run with its labels, for answers.jsonl."""
    return [{**row, "question": question, "answer": answer} for question, answer in said]


def trait_matrices(results: Results, condition: str, measure: Measure = PROBABILITY) -> np.ndarray:
    """A measure, by default the probability, as [bases, traits of the students, traits asked for]."""
    traits, seeds = results.distinct("trait"), results.distinct("seed")
    wanted = {"condition": condition, "metric": measure.asked}
    values = [results.values(**wanted, seed=s, trait=t, asked=a) for s in seeds for t in traits for a in traits]
    return np.array(values).reshape(len(seeds), len(traits), len(traits))
