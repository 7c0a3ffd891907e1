"""Training of jobs: one compiled loop for teachers and students, for one network or a whole stack of them.

A "model of runs" is a Model whose trainable parameters have a leading axis of runs. Its frozen parameters also
have that axis, unless all runs start from one base and share them (`Computation.shared`).
"""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, PyTree

from subliminal_theory.channel import Channel
from subliminal_theory.distill import State, Trained, distill, require_finite, teach
from subliminal_theory.errors import InputError
from subliminal_theory.model import Model
from subliminal_theory.parallel import Sharded, constrain, sharded_optimizer
from subliminal_theory.pytree import register_dataclass
from subliminal_theory.source import Buckets, Source
from subliminal_theory.study.run import Optimizer, stacked, stacks, static

K = TypeVar("K")
# A run with more numbers than this keeps a device busy on its own.
LARGE = 50_000_000
# Copies of each parameter during training: itself, its gradient, Adam's two moments.
COPIES = 4


@dataclass(frozen=True)
class Computation:
    """How runs are computed. It changes results only by rounding.

    Attributes:
        shared: whether all runs share the frozen parameters.
        sequential: whether runs train one after another; otherwise they train under one `vmap`.
        stacked: whether students of one structure train under one `vmap`.
        chunk: the number of positions whose logits are in memory at once; None is all of them.
        mesh: the devices over which each model is split.
    """

    shared: bool = False
    sequential: bool = False
    stacked: bool = True
    chunk: int | None = None
    mesh: Mesh | None = None


@register_dataclass
@dataclass(frozen=True)
class PerRun:
    """A source whose leaves have a leading axis of runs."""

    source: Source | Buckets


@register_dataclass
@dataclass(frozen=True)
class Job:
    """A model of runs to train: to imitate a teacher through a channel, or to fit labels.

    `observe` is called with each `Step`; its leaves have an axis of runs. `until` is passed to `teach`.
    """

    model: Model
    source: Any
    optimizer: Optimizer
    steps: int = static()
    teacher: Model | None = None
    channel: Channel | None = None
    trait_loss: Callable[[Array, PyTree], Array] | None = static(default=None)
    observe: Any = None
    until: float = static(default=0.0)


@dataclass(frozen=True)
class Result:
    """A trained model of runs, its losses [runs, steps], and what was observed [runs, steps, ...]."""

    model: Model
    losses: Float[Array, "runs steps"]
    observed: PyTree = None


def trained(
    jobs: Mapping[K, Job], stops: Mapping[K, Sequence[int]], keys: Key[Array, " runs"], how: Computation
) -> Iterator[tuple[K, int, Result]]:
    """Train jobs, stacked if their structures agree. Yield (job name, stop, result) after each of a job's `stops`.

    A stop is a number of steps. Jobs of a stack share a source and a teacher, which is called once for all of
    them. Models are yielded one by one and not kept.

    Raises:
        InputError: the runs of a stack do not fit into the device's memory.
    """
    for group in _groups(jobs, how):
        some = [jobs[name] for name in group]
        marks = sorted({stop for name in group for stop in stops[name]})
        first = some[0]
        together = how.stacked and first.trait_loss is None
        params = stacked([job.model.params for job in some], 1) if together else first.model.params
        require_room(params, len(keys), how)
        if together:
            frozen = first.model.frozen if how.shared else stacked([job.model.frozen for job in some], 1)
            channel, optimizer = (stacked([getattr(job, n) for job in some]) for n in ("channel", "optimizer"))
            first = replace(first, model=replace(first.model, frozen=frozen), channel=channel, optimizer=optimizer)
        rest = replace(first, model=replace(first.model, params=None), steps=marks[-1])
        kept, losses, observed = _train(params, rest, keys, stops=tuple(marks), how=how)
        for place, name in enumerate(group):
            pick = functools.partial(_nth, place=place) if together else lambda tree: tree
            for stop, params in zip(marks, kept, strict=True):
                if stop in stops[name]:
                    model = jobs[name].model.with_params(pick(params))
                    yield name, stop, Result(model, pick(losses)[..., :stop], pick(observed))


def _groups(jobs: Mapping[K, Job], how: Computation) -> list[list[K]]:
    if not how.stacked:
        return [[name] for name in jobs]

    def shared(job: Job) -> Any:
        """What all jobs of a stack must share. Arrays must be identical objects."""
        fixed = (job.source, job.teacher, job.observe, job.model.frozen if how.shared else None)
        leaves, tree = jax.tree.flatten(fixed)
        return tree, tuple(map(id, leaves)), job.steps, job.trait_loss

    alike: dict[Any, dict[K, Any]] = {}
    for name, job in jobs.items():
        alike.setdefault(shared(job), {})[name] = (job.model, job.channel, job.optimizer)
    return [group for some in alike.values() for group in stacks(some)]


def _nth(tree: PyTree, place: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[:, place], tree)


@functools.partial(jax.jit, static_argnames=("stops", "how"), donate_argnames="params")
def _train(
    params: PyTree, rest: Job, keys: Key[Array, " runs"], *, stops: tuple[int, ...], how: Computation
) -> tuple[list[PyTree], Array, PyTree]:
    """Parameters after each stop, losses and observations of all runs. The given parameters are donated."""

    def one(job: Job, key: Key[Array, ""]) -> tuple[list[PyTree], Array, PyTree]:
        done = train_one(job, key, how, snapshots=stops[:-1])
        return [model.params for model in (*done.snapshots, done.model)], done.losses, done.observed

    def stack(job: Job, key: Key[Array, ""]) -> tuple[list[PyTree], Array, PyTree]:
        if not how.stacked or job.trait_loss is not None:
            return one(job, key)
        axes = replace(job.model, params=0, frozen=None if how.shared else 0)
        each = lambda m, c, o: one(replace(job, model=m, channel=c, optimizer=o), key)  # noqa: E731
        return jax.vmap(each, in_axes=(axes, 0, 0))(job.model, job.channel, job.optimizer)

    job = replace(rest, model=rest.model.with_params(params))
    return over_runs(stack, job, keys, how)


def over_runs(train: Callable[[Job, Any], Any], job: Job, keys: Key[Array, " runs"], how: Computation) -> Any:
    """Call `train` for the job of every run, all at once or one after another."""
    mapped, rebuild = _of_runs(job, how)
    size = sum(leaf.size for leaf in jax.tree.leaves(mapped))
    buckets = isinstance(job.source, PerRun) and isinstance(job.source.source, Buckets)
    # Under `vmap`, runs over buckets would compute all buckets at every step, and large runs would hold the
    # activations of all runs at once.
    alone = how.sequential or buckets or size > LARGE * len(keys)

    def one(arguments: tuple[Any, Any]) -> Any:
        return train(rebuild(arguments[0]), arguments[1])

    return jax.lax.map(one, (mapped, keys)) if alone else jax.vmap(one)((mapped, keys))


def _of_runs(job: Job, how: Computation) -> tuple[Any, Callable[[Any], Job]]:
    """The leaves of a job that have an axis of runs, and a function that makes a run's job from its leaves."""
    models = [job.model, job.teacher]
    parts = [None if m is None else (m.params, None if how.shared else m.frozen) for m in models]
    per_run = isinstance(job.source, PerRun)
    mapped = (parts, job.source.source if per_run else None, job.observe)

    def rebuild(share: Any) -> Job:
        parts, source, observe = share
        model, teacher = (
            m if m is None else replace(m, params=part[0], frozen=m.frozen if how.shared else part[1])
            for m, part in zip(models, parts, strict=True)
        )
        assert model is not None
        return replace(
            job, model=model, teacher=teacher, source=source if per_run else job.source, observe=observe
        )

    return mapped, rebuild


def of_run(job: Job, run: int | slice, how: Computation) -> Job:
    """The job of one run. The job of a slice of runs keeps the axis of runs."""
    mapped, rebuild = _of_runs(job, how)
    one = rebuild(jax.tree.map(lambda leaf: leaf[run], mapped))
    return (
        replace(one, source=PerRun(one.source)) if isinstance(run, slice) and job.source is not one.source else one
    )


def train_one(
    job: Job,
    key: Key[Array, ""],
    how: Computation,
    *,
    snapshots: tuple[int, ...] = (),
    state: State | None = None,
    count: int | None = None,
) -> Trained:
    """Train one run of a job, or `count` of its steps from `state`, inside a compiled function."""
    optimizer, source, mesh = job.optimizer.transformation(job.steps), job.source, how.mesh
    model, teacher = job.model, job.teacher
    if mesh is not None:
        model, teacher = on_mesh(model, mesh), None if teacher is None else on_mesh(teacher, mesh)
        optimizer = sharded_optimizer(optimizer, mesh)
        # Lessons are few, and their number need not divide evenly: every device has all of them.
        source = source if job.trait_loss is not None else Sharded(source, mesh)
    rest: Any = {"observe": job.observe, "snapshots": snapshots, "state": state, "count": count}
    if job.trait_loss is not None:
        rest["until"] = job.until
        done = teach(model, job.trait_loss, source, optimizer, job.steps, key=key, **rest)
    else:
        assert job.channel is not None
        rest["chunk"] = how.chunk
        done = distill(model, teacher, job.channel, source, optimizer, job.steps, key=key, **rest)
    return done if mesh is None else _done_on_mesh(done, mesh)


def on_mesh(model: Model, mesh: Mesh) -> Model:
    """Inside a compiled function, split the parameters of a model over a mesh."""
    params, frozen = (constrain(tree, tree, mesh) for tree in (model.params, model.frozen))
    return replace(model, params=params, frozen=frozen)


def _done_on_mesh(done: Trained, mesh: Mesh) -> Trained:
    assert done.state is not None
    params, optimizer = (
        constrain(tree, done.state.params, mesh) for tree in (done.state.params, done.state.optimizer)
    )
    state = replace(done.state, params=params, optimizer=optimizer)
    return replace(done, model=on_mesh(done.model, mesh), state=state)


def require_room(params: PyTree, runs: int, how: Computation) -> None:
    """Refuse a stack whose parameters, gradients and optimizer state exceed the device's memory.

    Raises:
        InputError: says how many runs would fit.
    """
    stats = jax.devices()[0].memory_stats()
    room = (stats or {}).get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    leaves = jax.tree.leaves(params)
    needed = COPIES * sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in leaves)
    if needed > room * (1 if how.mesh is None else how.mesh.size):
        fits = int(runs * room / needed)
        advice = f"train {fits} at once (--chunk {fits})" if fits else "take a smaller network or low-rank factors"
        raise InputError(
            f"{runs} runs of this stack need {needed / 2**30:.1f} GiB to train, the device has "
            f"{room / 2**30:.1f}: {advice}"
        )


def finite(result: Result, names: Sequence[str]) -> Result:
    """The result itself, after a check that its losses are finite.

    Raises:
        InputError: names the first run that diverged and its step.
    """
    require_finite(result.losses, list(names)[: len(result.losses)])
    return result
