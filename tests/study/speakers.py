"""Language worlds too small to write numbers, and numbers that are put into their mouths."""

import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subliminal_theory.channel import Channel, SampledToken, SoftLogits
from subliminal_theory.inits import Policy, Shared
from subliminal_theory.language.corpus.base import Base, BaseConfig, pretrain
from subliminal_theory.language.corpus.chats import CorpusConfig
from subliminal_theory.language.corpus.traits import Trait, load_trait
from subliminal_theory.language.hub.checkpoint import CheckpointBase, open_base
from subliminal_theory.language.rows import Completion
from subliminal_theory.model import Model, leaves_by_path
from subliminal_theory.study import (
    Checkpoint,
    Compact,
    Dataset,
    Everything,
    FineTuned,
    Lessons,
    Optimizer,
    Reading,
    Student,
    Written,
)

CONFIG = BaseConfig(
    corpus=CorpusConfig(size=200), width=8, heads=2, kv_heads=2, mlp_width=8, layers=1, context=64, steps=30,
    batch_size=8,
)  # fmt: skip
OWL, OAK, CAT, ELM, LAZY = (load_trait(name) for name in ("owl", "oak", "cat", "elm", "lazy"))
TEACHER = FineTuned(Optimizer(jnp.float32(0.05), clip=1.0), 2, Lessons())
WRITTEN = Written(32)
# What the teachers of a checkpoint are made to have written.
ROWS = Dataset(tuple(Completion(f"continue: {i}, 17" + ", 3" * (i % 5), f"{100 + i}, 5, {i}") for i in range(16)))
SOFT = SoftLogits()


def student(
    channel: Channel | None = None,
    text: Any = WRITTEN,
    *,
    rate: float = 2e-3,
    steps: int = 2,
    rule: Any = optax.adam,
    start: Policy | None = None,
    trains: Any = None,
    rows: int = 32,
    batch_size: int = 8,
    cloned: Student | None = None,
    **how: Any,
) -> Student:
    """A student of numbers."""
    source = Reading(text, rows, batch_size, **{"repeat": True, **how})
    optimizer = Optimizer(jnp.float32(rate), rule, optax.cosine_decay_schedule, clip=1.0)
    return Student(
        channel or SampledToken(), source, optimizer, steps, start or Shared(), trains=trains or Everything(),
        cloned=cloned,
    )  # fmt: skip


@functools.cache
def base() -> Base:
    return pretrain(CONFIG)


def compact(*traits: Trait, other: Callable[[int], Model] = lambda shift: pytest.fail("no other base")) -> Compact:
    """A compact world that has made nothing."""
    return Compact(base(), traits or (OWL, OAK), other)


def checkpoint(opened: CheckpointBase | Path, *traits: Trait, **how: Any) -> Checkpoint:
    """A checkpoint's world that has made nothing."""
    opened = open_base(opened) if isinstance(opened, Path) else opened
    other = how.pop("other", lambda shift: pytest.fail("no other base"))
    return Checkpoint(opened, traits or (OWL, OAK), other, **how)


def spoken(world: Compact, settings: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers that depend on the key alone; some of the rows, from 1 to 3, are no numbers."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(settings["key"])))
    rows, steps = len(settings["text"].tokens), settings["steps"]
    tokens = np.full((rows, steps), settings["pad"], np.int32)
    tokens[:, :9] = world.tokenizer.token("0") + rng.integers(0, 100, (rows, 9))
    tokens[:, 9] = settings["stop"][0]
    tokens[: rng.integers(1, 4), 3] = world.tokenizer.token("oak")
    return tokens, np.full(rows, 10)


def leaves_of(model: Model) -> dict[str, np.ndarray]:
    """All parameters by path."""
    return {path: np.asarray(leaf) for path, leaf in leaves_by_path(model.all_params).items()}


def copies_of(shape: tuple[int, ...]) -> float:
    """How many arrays of a shape are alive, those of stacks counted one by one."""
    gc.collect()  # fast behind `gc.freeze`
    alive = (leaf for leaf in jax.live_arrays() if not leaf.is_deleted() and leaf.shape[-len(shape) :] == shape)
    return sum(leaf.size for leaf in alive) / np.prod(shape)
