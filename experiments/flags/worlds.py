"""The bases, checkpoints and studies of the language experiments' settings."""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus.base import Base, BaseConfig, load_base
from subliminal_theory.language.corpus.traits import load_trait
from subliminal_theory.language.hub.checkpoint import CheckpointBase, open_base
from subliminal_theory.model import Model
from subliminal_theory.parallel import make_mesh, placement
from subliminal_theory.study import Checkpoint, Compact, Store, Study

from ..app.progress import progress
from .language import LanguageConfig, checkpoint_traits, number_prompts
from .names import checkpoint_path
from .recipe import World


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
