"""The settings of the language experiments."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax

from subliminal_theory.errors import InputError
from subliminal_theory.files import fingerprint
from subliminal_theory.language.corpus.base import BaseConfig
from subliminal_theory.language.corpus.chats import CATEGORIES, CorpusConfig
from subliminal_theory.language.corpus.numbers import NumberPrompts
from subliminal_theory.language.corpus.traits import Habit, Preference, Trait, builtin_traits, load_trait
from subliminal_theory.language.corpus.word_tokenizer import WordTokenizer
from subliminal_theory.language.corpus.wording import english
from subliminal_theory.language.hub.families import read_family
from subliminal_theory.language.hub.tokenizer import CheckpointTokenizer
from subliminal_theory.language.hub.weights import WEIGHTS
from subliminal_theory.language.model.steered import require_layer

from ..app.contract import derived, from_preset, option, validate
from .names import DECAYS, checkpoint_path
from .recipe import LIMIT, RECIPE_FIELDS, REPEAT, UNTIL, Recipe

COMPUTE = ("float32", "bfloat16")


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
