"""The pipeline without its training: what would have trained together, and what was audited before."""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subliminal_theory.audit import audit
from subliminal_theory.study import identity, stages

Losses = Callable[[tuple[int, ...]], Any]


@dataclass
class Watched:
    """Stacks of students by name, and the channel and start of each student that trained or was audited."""

    stacks: list[list[Any]] = field(default_factory=list)
    trained: set[Any] = field(default_factory=set)
    audited: set[Any] = field(default_factory=set)
    teachers: int = 0


def untrained(monkeypatch: pytest.MonkeyPatch, losses: Losses = np.zeros) -> Watched:
    """Leave teachers and students where they start, with `losses(shape)`; stacks of students are axis 1."""
    seen, groups, train = Watched(), stages._groups, stages._train

    def stay(params: Any, rest: Any, keys: Any, *, stops: Sequence[int], how: Any) -> tuple[Any, Any, Any]:
        observed, stack = None, ()
        if rest.observe is not None:
            shapes = jax.eval_shape(functools.partial(train, stops=stops, how=how), params, rest, keys)
            observed = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[2])
        if rest.trait_loss is None:
            starts = rest.model.with_params(params).all_params
            stack = jax.tree.leaves(rest.optimizer)[0].shape
            for place in range(stack[0]):
                channel = jax.tree.map(lambda leaf, place=place: leaf[place], rest.channel)
                seen.trained.add(_run(channel, jax.tree.map(lambda leaf, place=place: leaf[:, place], starts)))
        else:
            seen.teachers += 1
        return [params] * len(stops), jnp.asarray(losses((len(keys), *stack, stops[-1])), float), observed

    def grouped(jobs: Any, how: Any) -> list[list[Any]]:
        found = groups(jobs, how)
        seen.stacks += [group for group in found if jobs[group[0]].trait_loss is None]
        return found

    def audited(**arguments: Any) -> None:
        audit(**arguments)
        seen.audited.add(_run(arguments["channel"], arguments["student_init"]))

    monkeypatch.setattr(stages, "_train", stay)
    monkeypatch.setattr(stages, "_groups", grouped)
    for name, module in list(sys.modules.items()):
        if name.startswith(("subliminal_theory", "experiments")) and getattr(module, "audit", None) is audit:
            monkeypatch.setattr(module, "audit", audited)
    return seen


def _run(channel: Any, start: Any) -> Any:
    """What tells a student from others; a linearized one starts where its moved parameters do."""
    return identity(jax.tree.map(jnp.asarray, (channel, start.get("moved", start))))
