"""The pipeline of every study: teach, write or draw inputs, distill, score.

    study = Study(world)
    control = replace(student, start=Fresh())
    scores = study.run({"student": Run(teacher, student), "control": Run(teacher, control)})

A world says what is taught and how it is measured. Everything else is here, including the audit.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from subliminal_theory.audit import audit
from subliminal_theory.inits import Fresh
from subliminal_theory.model import Model, by_layer, of_layers
from subliminal_theory.runs import Row
from subliminal_theory.source import batch_shapes
from subliminal_theory.study.run import (
    Elsewhere,
    FineTuned,
    Prompted,
    Run,
    Steered,
    Student,
    Teacher,
    Untrained,
    identity,
    once,
)
from subliminal_theory.study.stages import Computation, Job, PerRun, Result, finite, trained
from subliminal_theory.study.world import Finished, Memo, World, by_policy, numbered, one_stream, require

K = TypeVar("K")
Score = Callable[[Any, Finished, Any], Mapping[str, np.ndarray]]


class Study:
    """Teachers and students of a world's runs.

    Each teacher is trained once for all its students. A student is freed after it is scored, so memory does not
    grow with the number of students.
    """

    def __init__(self, world: World) -> None:
        for member in vars(World):
            if not member.startswith("_"):
                require(world, member)
        self.world = world
        self.computation: Computation = getattr(world, "computation", Computation())
        self._keys = getattr(world, "keys", None) or functools.partial(numbered, world)
        self._stream = getattr(world, "stream", one_stream)
        self._start = getattr(world, "start", None) or functools.partial(by_policy, world, self._keys)
        self._shows = getattr(world, "source", lambda student, *teacher: student.source)
        self._memo = getattr(world, "memo", None) or Memo()
        self._train = getattr(world, "train", None) or functools.partial(_in_memory, self.computation)

    def teacher(self, teacher: Teacher) -> Model:
        """The teacher as a model of runs, trained or steered if it needs to be.

        A prompted or untrained teacher is the base itself.

        Raises:
            InputError: the training diverges, or the world cannot open or steer such a teacher.
        """
        if isinstance(teacher, Elsewhere):
            opened = require(self.world, "opened")
            return self._memo(lambda: of_runs(opened(teacher.name), len(self.world.names)), teacher, large=True)
        if isinstance(teacher, Steered):
            return self._memo(lambda: require(self.world, "steered")(teacher), self.world.names, teacher)
        if not isinstance(teacher, FineTuned):
            return self.world.initial()

        def teach() -> Model:
            world = self.world
            start, loss = untaught(world, self.computation), world.trait_loss
            job = Job(
                start, world.lessons(teacher), teacher.optimizer, teacher.steps, trait_loss=loss,
                until=teacher.until,
            )  # fmt: skip
            stops = {"teacher": (teacher.steps,)}
            ((_, _, result),) = self._train({"teacher": job}, stops, self._keys("teacher"), {"teacher": teacher})
            return finite(result, [f"the teacher of {name}" for name in world.names]).model

        return self._memo(teach, self.world.names, teacher, large=True)

    def shown(self, teacher: Teacher) -> Model:
        """The teacher as students see it: a prompted teacher with its system prompt."""
        return require(self.world, "prompted")() if isinstance(teacher, Prompted) else self.teacher(teacher)

    def run(self, runs: Mapping[K, Run], score: Score | None = None) -> dict[K, dict[str, np.ndarray]]:
        """The metrics [runs, ...] of the student of every run, or of its teacher if it has no student.

        `score(world, finished, name)` replaces the world's own `score`.

        Raises:
            InputError: the audit refuses a student, or a student diverges.
        """
        score = score or (lambda world, finished, name: world.score(finished, name))
        found: dict[K, list[Mapping[str, np.ndarray]]] = {name: [] for name in runs}
        common = {name: run for name, run in runs.items() if self._common(run)}
        own = {name: run for name, run in runs.items() if name not in common}

        def tell(study: Study, some: Mapping[K, Run], world: World) -> None:
            for name, finished in study._finished(some):
                found[name].append(score(world, replace(finished, asked=some[name].asked), name))
                del finished  # free it before the next one is made

        if common:
            # A student of the untrained base learns no trait, so one student serves all runs.
            tell(Study(require(self.world, "at")(0)), common, self.world)
        for part in self._parts() if own else ():
            tell(part, own, part.world)
        return {
            name: {metric: np.concatenate([one[metric] for one in parts]) for metric in parts[0]}
            for name, parts in found.items()
        }

    def _common(self, run: Run) -> bool:
        return self.computation.shared and isinstance(run.teacher, Untrained)

    def _parts(self) -> list["Study"]:
        parts = getattr(self.world, "parts", None)
        return [self] if parts is None else [Study(world) for world in parts()]

    def _finished(self, runs: Mapping[K, Run]) -> Iterator[tuple[K, Finished]]:
        """The models to score, grouped by teacher."""
        groups: dict[Any, list[K]] = {}
        for name, run in runs.items():
            groups.setdefault(identity(run.teacher), []).append(name)
        for names in groups.values():
            teacher = runs[names[0]].teacher
            students = {name: student for name in names if (student := runs[name].student) is not None}
            tame = {name for name in students if not runs[name].may_diverge}
            yield from self.distil(teacher, students, tame)
            for name in names:
                if runs[name].student is None:
                    model = self.world.initial if runs[name].base else functools.partial(self.teacher, teacher)
                    yield name, Finished(teacher, self.teacher(teacher), model())

    def distil(
        self, teacher: Teacher, students: Mapping[K, Student], tame: set[K] | None = None
    ) -> Iterator[tuple[K, Finished]]:
        """Train students of one teacher. They are audited and, if they ask for it, cloned first.

        Students in `tame` (by default all) must not diverge. If the world does not stack students, each student
        starts training after the one before it was yielded.

        Raises:
            InputError: the audit refuses a student, or a tame student diverges.
        """
        groups = dict[Any, dict[K, Student]]()
        for name, student in students.items():
            group = None if self.computation.stacked else identity(once(student))
            groups.setdefault(group, {})[name] = student
        for some in groups.values():
            yield from self._distil(teacher, some, some.keys() if tame is None else tame)

    def _distil(
        self, teacher: Teacher, students: Mapping[K, Student], tame: Collection[K]
    ) -> Iterator[tuple[K, Finished]]:
        # Make starts and drop them: errors come before the teacher trains, and no copy is in memory meanwhile.
        self._starts(students)
        taught = self.teacher(teacher)
        for student in students.values():
            self._source(student, teacher)  # rows are written and kept before the starts take memory
        starts = self._starts(students)
        for name, student in students.items():
            self.audit(student, starts[name], teacher)
        for name, result in self._trained(students, starts, teacher, cloning=False):
            if name in tame:
                finite(result, [f"{_named(name)} of {run}" for run in self.world.names])
            yield name, Finished(teacher, taught, result.model, students[name], result.losses)

    def audit(self, student: Student, start: Model, teacher: Teacher) -> None:
        """Refuse a student whose trait would prove nothing about the channel.

        Raises:
            InputError: see `audit.audit`.
        """
        world, batch = self.world, batch_shapes(_one_run(self._source(student, teacher)))
        audit(
            student_init=self._by_layer(start),
            teacher_init=self._by_layer(world.initial()),
            teacher=self._by_layer(self.teacher(teacher)),
            channel=student.channel,
            logits=world.logits,
            outputs=_outputs(start, batch.inputs, self.computation.shared),
            batch=batch,
            private=world.private(student),
            cross_init=isinstance(student.start, Fresh) and student.cloned is None,
        )

    def _by_layer(self, model: Model) -> dict[str, Any]:
        """The parameters of a model of runs by name, each layer by its own, those that runs share for each run."""
        on_host = lambda path, leaf: np.asarray(leaf) if of_layers(path) else leaf  # noqa: E731
        own, rest = (jax.tree_util.tree_map_with_path(on_host, tree) for tree in (model.params, model.frozen))
        if not self.computation.shared:
            return {**by_layer(own, axis=1), **by_layer(rest, axis=1)}
        runs = len(self.world.names)
        shared = {
            name: np.broadcast_to(np.asarray(leaf), (runs, *leaf.shape)) for name, leaf in by_layer(rest).items()
        }
        return {**by_layer(own, axis=1), **shared}

    def _source(self, student: Student, teacher: Teacher) -> Any:
        return self._shows(student, teacher, self.teacher(teacher), lambda: self.shown(teacher))

    def _starts(self, students: Mapping[K, Student]) -> dict[K, Model]:
        """Where students start, after cloning if they ask for it. Equal cloning runs are made only once."""
        jobs = {
            name: replace(s.cloned, start=s.start, other=s.other, network=s.network)
            for name, s in students.items()
            if s.cloned is not None
        }
        alike = {identity(job): job for job in jobs.values()}
        made = self._memo(lambda: self._matched(alike), self.world.names, [*alike.values()], large=True)
        return {
            name: self._start(student, made[identity(jobs[name])] if name in jobs else None)
            for name, student in students.items()
        }

    def _matched(self, jobs: Mapping[K, Student]) -> dict[K, Model]:
        """Models that imitate the untrained teacher: one for each run, or one for all if they share a base."""
        shared = self.computation.shared
        study = Study(require(self.world, "at")(0)) if shared else self
        starts, found = {name: study._start(job) for name, job in jobs.items()}, dict[K, Model]()
        for name, job in jobs.items():
            study.audit(job, starts[name], Untrained())
        for name, result in study._trained(jobs, starts, Untrained(), cloning=True):
            model = finite(result, [f"a cloning run of {run}" for run in study.world.names]).model
            if shared:
                model = Model(model.apply, jax.tree.map(lambda leaf: leaf[0], model.params))
            found[name] = model
        return found

    def _trained(
        self, students: Mapping[K, Student], starts: Mapping[K, Model], teacher: Teacher, cloning: bool
    ) -> Iterator[tuple[K, Result]]:
        """Train students. Those that differ only in their number of steps train once and yield one result each."""
        longest = _longest(students)
        for stream in dict.fromkeys(self._stream(students[name], cloning) for name in longest):
            jobs = {}
            for name in longest:
                student = students[name]
                if self._stream(student, cloning) == stream:
                    source = self._source(student, teacher)
                    given = batch_shapes(_one_run(source)).targets is not None
                    jobs[name] = Job(
                        starts[name], source, student.optimizer, student.steps,
                        None if given else self.shown(teacher), student.channel,
                    )  # fmt: skip
            stops = {name: tuple(sorted({students[n].steps for n in longest[name]})) for name in jobs}
            for name, stop, result in self._train(jobs, stops, self._keys(stream), students):
                for other in longest[name]:
                    if students[other].steps == stop:
                        yield other, result


def _in_memory(how: Computation, jobs: Any, stops: Any, keys: Any, decided_by: Any) -> Iterator[Any]:
    return trained(jobs, stops, keys, how)


def _longest(students: Mapping[K, Student]) -> dict[K, list[K]]:
    """Group students that differ only in their number of steps, under the name of the longest."""
    alike: dict[Any, list[K]] = {}
    for name, student in students.items():
        alike.setdefault(identity(once(student)), []).append(name)
    return {max(names, key=lambda n: students[n].steps): names for names in alike.values()}


def untaught(world: World, how: Computation) -> Model:
    """The base as a model of runs. Its parameters are copies, because training deletes them."""
    model = world.initial()
    if how.shared:
        return of_runs(model, len(world.names))
    return Model(model.apply, jax.tree.map(jnp.copy, model.all_params))


def of_runs(model: Model, runs: int) -> Model:
    """A model of runs that copies the parameters of one model for each run."""
    copies = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (runs, *leaf.shape)), model.all_params)
    return Model(model.apply, copies)


def _outputs(start: Model, inputs: Any, shared: bool) -> int:
    """The number of logits that the network of one run computes."""

    def one(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tree)

    run = Model(start.apply, one(start.params), start.frozen if shared else one(start.frozen))
    return jax.eval_shape(lambda model, x: model(x), run, inputs).shape[-1]


def _one_run(source: Any) -> Any:
    """The source of the first run."""
    return jax.tree.map(lambda leaf: leaf[0], source.source) if isinstance(source, PerRun) else source


def _named(name: Any) -> str:
    """The name of a student in messages: its condition if the name consists of labels."""
    return str(dict(name).get("condition", name)) if isinstance(name, tuple) else str(name)


def labels(**axes: Any) -> tuple[tuple[str, Any], ...]:
    """The name of a run whose rows have these labels."""
    return tuple(axes.items())


def rows(
    name: tuple[tuple[str, Any], ...],
    runs: Sequence[Mapping[str, Any]],
    scores: Mapping[str, np.ndarray],
    metrics: Sequence[str] | None = None,
) -> list[Row]:
    """Tidy rows of a student's scores: the student's labels, the run's labels, metric and value."""
    return [
        {**dict(name), **run, "metric": metric, "value": float(scores[metric][place])}
        for place, run in enumerate(runs)
        for metric in metrics or scores
    ]
