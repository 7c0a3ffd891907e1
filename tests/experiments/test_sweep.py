import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import sweep
from experiments.laboratory import Laboratory
from experiments.setting import METRICS, STARTS, Cell, Setting
from experiments.sweep import SweepConfig, parts, run_group
from subliminal_theory.distill import Trained
from subliminal_theory.errors import InputError
from subliminal_theory.keys import named
from subliminal_theory.model import Model
from subliminal_theory.vision.datasets import load

IMAGE = 1 / 355  # of the digits' test images
SEEDS = (2, 5)
BASE = Setting(
    data="digits", depth=1, width=16, aux=4, teacher_epochs=3, epochs=2, batch_size=128, learning_rate=0.003
)  # fmt: skip


@dataclass
class Watched:
    """What one call of `run_group` computed; models have a leading axis of seeds."""

    accuracy: dict[tuple[str, int], float] = field(default_factory=dict)
    models: dict[str, Model] = field(default_factory=dict)
    starts: dict[Setting, Model] = field(default_factory=dict)
    init: Model | None = None


def watch(cells: Sequence[Cell], seeds: Sequence[int] = SEEDS) -> Watched:
    seen, measured = Watched(), []
    accuracy_of, audit = sweep._accuracy, Laboratory.audit

    def accuracy(laboratory: Laboratory, model: Model, *test: Any) -> np.ndarray:
        """Instead of accuracies, where they and the model are found."""
        measured.append((model, np.asarray(accuracy_of(laboratory, model, *test))))
        return np.full(len(seeds), len(measured) - 1)

    def audited(laboratory: Laboratory, start: Model, init: Model, teacher: Model) -> None:
        seen.starts[laboratory.setting], seen.init = start, init
        audit(laboratory, start, init, teacher)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "_accuracy", accuracy)
        patch.setattr(Laboratory, "audit", audited)
        rows = run_group(cells, seeds)
    assert [(row["condition"], row["seed"]) for row in rows] == [
        (one.labels["condition"], seed) for seed in seeds for one in cells
    ]
    for row in rows:
        assert row["metric"] == "test_accuracy"
        model, values = measured[int(row["value"])]
        seen.models[row["condition"]] = model
        seen.accuracy[row["condition"], row["seed"]] = float(values[list(seeds).index(row["seed"])])
    return seen


def cell(condition: str, who: str = "student", **changes: Any) -> Cell:
    return Cell({"condition": condition}, dataclasses.replace(BASE, **changes), who)


def layers(model: Model) -> list[dict[str, np.ndarray]]:
    """Parameters in order of computation."""
    of = model.params["layers"]
    return [{name: np.asarray(leaf) for name, leaf in of[number].items()} for number in sorted(of)]


def close(actual: Any, expected: Any, **tolerances: float) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerances), actual, expected)


same = functools.partial(close, rtol=1e-6, atol=1e-7)


# --- students of one teacher


CELLS = [
    cell("reference", "reference"),
    cell("shared"),
    cell("cross", start="cross"),
    cell("all", sees="all", start="cross"),
    cell("perturbed", start="perturbed", amount=0.5),
    cell("perturbed_hidden", start="perturbed_hidden", amount=0.25, sees="all"),
    cell("teacher", "teacher"),
    cell("interpolated", start="interpolated", amount=0.3, shown=2),
    cell("shared_heads", start="shared_heads", sees="classes"),
    cell("shared_hidden", start="shared_hidden", student_rate=0.01),
    cell("cloned 2", start="cross", cloning_epochs=2),
    cell("cloned 1", start="cross", cloning_epochs=1),
    cell("cloned on digits", start="cross", cloning_epochs=2, cloning_inputs="digits"),
    cell("cloned 3", start="cross", cloning_epochs=3),
    cell("cloned through all", start="cross", cloning_epochs=2, sees="all"),
    cell("cloned through aux", start="cross", cloning_epochs=2, cloning_sees="aux"),
]
SETTING = {one.labels["condition"]: one.setting for one in CELLS}


@pytest.fixture(scope="module")
def together() -> Watched:
    return watch(CELLS)


@pytest.mark.parametrize("one", CELLS, ids=lambda one: one.labels["condition"])
def test_together_is_alone(together: Watched, one: Cell) -> None:
    """Neither the stack nor its snapshots change a student."""
    name, alone = one.labels["condition"], watch([one])
    if one.who == "student":
        close(alone.starts[one.setting].params, together.starts[one.setting].params, rtol=0, atol=1e-4)
    close(alone.models[name].params, together.models[name].params, rtol=0, atol=1e-4)
    for seed in SEEDS:
        assert alone.accuracy[name, seed] == pytest.approx(together.accuracy[name, seed], abs=2.5 * IMAGE)


def test_students_differ(together: Watched) -> None:
    """Or equality of those together and those alone would tell nothing."""
    kernels = [layers(model)[0]["kernel"] for model in together.models.values()]
    for number, one in enumerate(kernels):
        for other in kernels[:number]:
            assert np.abs(one - other).max(axis=(1, 2)).min() > 0.01
    for seed in SEEDS:
        values = [together.accuracy[name, seed] for name in SETTING]
        assert max(values) - min(values) > 50 * IMAGE


def test_cells_of_one_setting_are_one_student() -> None:
    run = watch([cell("one name"), cell("another")])
    assert run.models["one name"] is run.models["another"]
    assert list(run.accuracy) == [("one name", 2), ("another", 2), ("one name", 5), ("another", 5)]


def untrained(monkeypatch: pytest.MonkeyPatch, losses: np.ndarray) -> None:
    """Leave students where they start, with these losses."""

    def stay(stack: Sequence[Laboratory], starts: Sequence[Model], *rest: Any) -> Trained:
        return Trained(jax.tree.map(lambda *leaves: jnp.stack(leaves, 1), *starts), jnp.asarray(losses, float))

    monkeypatch.setattr(sweep, "_imitate_stack", stay)


def test_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """The imitation loss is that of the last epoch, 12 of 24 steps, and of the cell's own student and seed."""

    steps = np.repeat([100, 0], 12) + np.tile(np.arange(12), 2)
    untrained(monkeypatch, np.array([[1, 2], [3, 4]])[:, :, None] + steps)
    both = dataclasses.replace(cell("both"), metrics=("imitation_loss", "test_accuracy"))
    loss = dataclasses.replace(cell("loss", start="cross"), metrics=("imitation_loss",))
    rows = run_group([both, loss, cell("teacher", "teacher")], SEEDS)
    assert [(row["condition"], row["seed"], row["metric"]) for row in rows] == [
        (name, seed, metric)
        for seed in SEEDS
        for name, metric in (
            ("both", "imitation_loss"),
            ("both", "test_accuracy"),
            ("loss", "imitation_loss"),
            ("teacher", "test_accuracy"),
        )
    ]
    assert [row["value"] for row in rows if row["metric"] == "imitation_loss"] == [6.5, 7.5, 8.5, 9.5]
    assert all(0 <= row["value"] <= 1 for row in rows if row["metric"] == "test_accuracy")


def test_epochs_are_stages_of_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Students that differ in nothing else are trained once, and are those that each would be alone."""
    stages = [
        cell(f"{epochs} epochs", epochs=epochs, images=images) for epochs in (3, 1, 2) for images in (None, 0)
    ]
    other = cell("other", epochs=3, start="cross")
    stacks, imitate = [], sweep._imitate_stack

    def counted(stack: Sequence[Laboratory], *rest: Any) -> Trained:
        stacks.append([laboratory.setting.epochs for laboratory in stack])
        return imitate(stack, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "_imitate_stack", counted)
        cells = [dataclasses.replace(one, metrics=("imitation_loss",)) for one in [*stages, other]]
        together = [row["value"] for row in run_group(cells, SEEDS)]
    assert sorted(stacks) == [[3], [3, 3]]
    alone = [[row["value"] for row in run_group([one], SEEDS)] for one in cells]
    np.testing.assert_allclose(together, np.transpose(alone).reshape(-1), rtol=1e-3)


def test_validation_never_looks_at_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its accuracy is that on the training images' last sixth, of a teacher that did not see them."""
    one = Cell({"condition": "teacher"}, dataclasses.replace(BASE, validation=True), "teacher", None, METRICS[2:])
    digits = load("digits")
    hidden = dataclasses.replace(
        digits, test_images=np.zeros_like(digits.test_images), test_labels=np.zeros_like(digits.test_labels)
    )
    found = []
    for data in (digits, hidden):
        monkeypatch.setattr("experiments.laboratory.load_data", lambda *_, data=data: data)
        found.append(run_group([one], SEEDS))
    assert found[0] == found[1]
    assert [(row["seed"], row["metric"]) for row in found[0]] == [(seed, "validation_accuracy") for seed in SEEDS]
    test = jnp.asarray(digits.train_images[-240:]), jnp.asarray(digits.train_labels[-240:].astype(np.int32))
    room = sweep.classroom(one.setting, SEEDS)
    accuracy = jax.jit(jax.vmap(lambda model: room.laboratory.accuracy(model, *test)))(room.teacher)
    np.testing.assert_allclose([row["value"] for row in found[0]], accuracy, atol=1.5 / 240)


# --- where they start


def test_starts_layer_by_layer(together: Watched) -> None:
    """From the initialisation of the run, and that of the next seed."""
    initial = jax.jit(jax.vmap(Laboratory(BASE, load("digits")).initial))
    mine, theirs = (layers(initial(jax.vmap(jax.random.key)(jnp.asarray(SEEDS) + shift))) for shift in (0, 1))
    assert (mine[0]["kernel"] != theirs[0]["kernel"]).all()
    same(layers(together.init), mine)
    same(layers(together.models["reference"]), mine)
    between = jax.tree.map(lambda a, b: 0.7 * a + 0.3 * b, mine, theirs)
    expected = {
        "shared": mine,
        "cross": theirs,
        "interpolated": between,
        "shared_heads": [theirs[0], mine[1]],
        "shared_hidden": [mine[0], theirs[1]],
    }
    for name, start in expected.items():
        same(layers(together.starts[SETTING[name]]), start)

    everywhere, hidden = (layers(together.starts[SETTING[name]]) for name in ("perturbed", "perturbed_hidden"))
    assert not any(
        leaf.any() for layer in (mine, everywhere, hidden) for leaf in (layer[0]["bias"], layer[1]["bias"])
    )
    same(hidden[1], mine[1])
    draws = [standard_noise(everywhere[number], mine[number], theirs[number], 0.5) for number in (0, 1)]
    np.testing.assert_allclose(standard_noise(hidden[0], mine[0], theirs[0], 0.25), draws[0], atol=1e-4)
    few = np.stack([draws[0][:, : draws[1].shape[1]], draws[1], draws[1][::-1]])
    assert (
        np.abs(few[:, None] - few[None]).max(axis=-1)[~np.eye(3, dtype=bool)].min() > 0.5
    )  # no draw is used twice


def standard_noise(start: Any, mine: Any, theirs: Any, amount: float) -> np.ndarray:
    """Of a kernel, in units of its initial scale: N(0, 1), independent of where it was added."""
    added = (start["kernel"] - mine["kernel"]).reshape(2, -1)
    noise = added / amount / np.sqrt(np.mean(theirs["kernel"] ** 2, axis=(1, 2)))[:, None]
    size = noise.shape[1]
    assert (np.abs(noise.mean(1)) < 5 / np.sqrt(size)).all()
    assert (np.abs(np.mean(noise**2, axis=1) - 1) < 5 * np.sqrt(2 / size)).all()
    for run in range(2):
        correlation = np.corrcoef([noise[run], mine["kernel"][run].reshape(-1), theirs["kernel"][run].reshape(-1)])
        assert np.abs(correlation[np.triu_indices(3, 1)]).max() < 5 / np.sqrt(size)
    return noise


def test_starts_of_a_cnn_with_biases() -> None:
    """Its output layer comes after the convolutions."""
    setting = dataclasses.replace(BASE, network="cnn", width=8, init_law="torch")
    laboratory = Laboratory(setting, load("digits"))
    key, other_key = jax.random.key(3), jax.random.key(4)
    initial = jax.jit(laboratory.initial)
    init = initial(key)
    mine, theirs = layers(init), layers(initial(other_key))
    assert [layer["kernel"].ndim for layer in mine] == [4, 2]

    def start(how: str, amount: float) -> list[dict[str, np.ndarray]]:
        there = laboratory.at(dataclasses.replace(setting, start=how))
        return layers(jax.jit(there.start)(init, key, other_key, amount))

    same(start("shared_heads", 0.5), [theirs[0], mine[1]])
    same(start("shared_hidden", 0.5), [mine[0], theirs[1]])
    hidden = start("perturbed_hidden", 0.5)
    same(hidden[1], mine[1])
    for name in ("kernel", "bias"):
        noise = (hidden[0][name] - mine[0][name]) / 0.5 / np.sqrt(np.mean(theirs[0][name] ** 2))
        assert (noise != 0).all()
        assert abs(np.mean(noise**2) - 1) < 5 * np.sqrt(2 / noise.size)


def test_every_start_is_covered() -> None:
    assert {setting.start for setting in SETTING.values()} == set(STARTS)


# --- cloning


@pytest.mark.parametrize(
    "names",
    [
        ("cross", "cloned 1", "cloned 2", "cloned 3"),
        ("cross", "cloned on digits"),
        ("all", "cloned through all"),
        ("cross", "cloned through aux"),
    ],
)
def test_cloning_imitates_the_untrained_teacher(together: Watched, names: Sequence[str]) -> None:
    """On the very images of the cloning, of which 1000 are taken."""
    last = SETTING[names[-1]]
    laboratory = Laboratory(last.cloning(), load("digits"))
    source, channel = laboratory.source(), laboratory.channel()
    steps = laboratory.steps(1, source)

    @jax.jit
    def distances(starts: Any, init: Any, seeds: Any) -> Any:
        def of_run(starts: Any, init: Any, seed: Any) -> Any:
            key = named(jax.random.key(seed), "clone", "source")
            index, _ = source.schedule(key, steps)
            inputs = source.batch(key, (index.reshape(-1)[:1000], jnp.ones(1000))).inputs
            targets = channel.targets(None, init(inputs))
            return jnp.stack([jnp.mean(channel.loss(start(inputs), targets)) for start in starts])

        return jax.vmap(of_run)(starts, init, seeds)

    starts = [together.starts[SETTING[name]] for name in (*names, "shared")]
    losses, to_taught = (
        np.asarray(distances(starts, teacher, jnp.asarray(SEEDS)))
        for teacher in (together.init, together.models["teacher"])
    )
    assert (np.diff(losses, axis=1) < 0).all()
    assert (losses[:, -2] < losses[:, 0] / 2).all()
    assert (losses[:, -2] < to_taught[:, -2]).all()
    np.testing.assert_allclose(losses[:, -1], 0, atol=1e-6)


def test_cloning_is_through_the_logits_it_sees(together: Watched) -> None:
    """Of the output layer only what is seen moves; the hidden layer does."""
    before = layers(together.starts[SETTING["cross"]])
    after = {name: layers(together.starts[SETTING[name]]) for name in SETTING if name.startswith("cloned")}
    for name, start in after.items():
        hidden, heads = (np.abs(new["kernel"] - old["kernel"]) for new, old in zip(start, before, strict=True))
        assert (hidden.max(axis=(1, 2)) > 0.01).all()
        assert (heads[..., 10:].max(axis=(1, 2)) > 0.01).all()
        assert (heads[..., :10] > 0).any() == (name != "cloned through aux")
    assert np.abs(after["cloned 2"][0]["kernel"] - after["cloned on digits"][0]["kernel"]).max() > 0.01


# --- students of another architecture


def test_students_of_other_architectures() -> None:
    """Their shapes, and their accuracy from their parameters by hand."""
    large = cell("large", start="cross", student_depth=2, student_width=24, student_activation="tanh")
    linear = cell("linear", start="cross", student_depth=0, student_bias=False, channel_loss="mse", sees="all")
    cells = [cell("teacher", "teacher"), large, linear]
    run, data = watch(cells), load("digits")
    for one, sizes in ((large, (64, 24, 24, 14)), (linear, (64, 14))):
        name = one.labels["condition"]
        trained, initial = layers(run.models[name]), layers(run.starts[one.setting])
        shapes = [(2, *shape) for shape in zip(sizes[:-1], sizes[1:], strict=True)]
        assert [layer["kernel"].shape for layer in trained] == shapes
        assert all(("bias" in layer) == (one is large) for layer in trained)
        for place, seed in enumerate(SEEDS):
            x = data.test_images.reshape(355, 64) / 8.0 - 1.0
            for number, layer in enumerate(trained):
                assert (layer["kernel"][place] != initial[number]["kernel"][place]).any()
                x = np.tanh(x) if number else x
                x = x @ layer["kernel"][place] + (layer["bias"][place] if one is large else 0)
            read = np.mean(x[:, :10].argmax(1) == data.test_labels)
            assert run.accuracy[name, seed] == pytest.approx(read, abs=1.5 * IMAGE)


WIDE = {"width": 32, "student_network": "cnn", "student_depth": 2, "student_width": 4}


def test_a_cnn_starts_with_the_output_layer_of_its_mlp() -> None:
    """And with that alone: the rest is what one that shares nothing starts with."""
    heads, apart = cell("heads", start="shared_heads", **WIDE), cell("apart", start="cross", **WIDE)
    run = watch([heads, apart])
    start, other = layers(run.starts[heads.setting]), layers(run.starts[apart.setting])
    assert [layer["kernel"].shape for layer in start] == [(2, 3, 3, 1, 4), (2, 3, 3, 4, 8), (2, 32, 14)]
    same(start, [*other[:2], layers(run.init)[1]])
    assert (start[2]["kernel"] != other[2]["kernel"]).all()
    assert run.accuracy["heads", 2] != run.accuracy["apart", 2]


@pytest.mark.parametrize(
    ("changes", "own", "shared"),
    [
        ({**WIDE, "width": 33}, "bias (14,), kernel (32, 14)", "bias (14,), kernel (33, 14)"),
        ({"student_width": 17}, "bias (14,), kernel (17, 14)", "bias (14,), kernel (16, 14)"),
        ({"student_depth": 0}, "bias (14,), kernel (64, 14)", "bias (14,), kernel (16, 14)"),
        ({"student_bias": False}, "kernel (16, 14)", "bias (14,), kernel (16, 14)"),
    ],
)
def test_output_layers_that_cannot_be_shared(
    changes: dict[str, Any], own: str, shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before a teacher is taught."""
    monkeypatch.setattr(sweep, "_teach", None)
    with pytest.raises(InputError) as caught:
        run_group([cell("heads", start="shared_heads", **changes)], SEEDS)
    assert str(caught.value) == (
        f"a student with an output layer of {own} cannot share its teacher's of {shared}: "
        "give both as many features, and biases or none"
    )


# --- what students see


def channel_of(**changes: Any) -> Any:
    return Laboratory(dataclasses.replace(BASE, **changes), load("digits")).channel()


@pytest.mark.parametrize(("aux", "loss"), [(1, "kl"), (4, "mse")])
def test_visible_logits(aux: int, loss: str) -> None:
    see = functools.partial(channel_of, aux=aux, channel_loss=loss)
    outputs, numbers = 10 + aux, np.arange(10 + aux)
    for m in range(1, aux + 1):
        assert np.flatnonzero(see(sees="aux", shown=m).visible(outputs)).tolist() == list(range(10, 10 + m))
        assert np.flatnonzero(see(sees="all", shown=m).visible(outputs)).tolist() == list(range(10 + m))
        assert np.flatnonzero(see(sees="classes", shown=m).visible(outputs)).tolist() == list(range(10))
    assert (see(sees="aux").visible(outputs) == (numbers >= 10)).all()
    assert see(sees="all").visible(outputs).all()
    assert (see(sees="classes").visible(outputs) == (numbers < 10)).all()


@pytest.mark.parametrize("loss", ["kl", "mse"])
@pytest.mark.parametrize(("sees", "shown"), [("aux", 2), ("all", 3), ("classes", None), ("aux", None)])
def test_losses_are_of_the_visible_logits(sees: str, shown: int | None, loss: str) -> None:
    channel = channel_of(sees=sees, shown=shown, channel_loss=loss)
    seen = np.asarray(channel.visible(14))
    teacher, student = np.random.default_rng(0).normal(size=(2, 3, 14)).astype(np.float32)

    @jax.jit
    def losses(teacher: Any, student: Any) -> Any:
        def loss(student: Any) -> Any:
            return channel.loss(student, channel.targets(None, teacher))

        return loss(student), jax.grad(lambda z: jnp.sum(loss(z)))(student)

    values, gradient = losses(teacher, student)
    s, z = teacher[:, seen].astype(float), student[:, seen].astype(float)
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (s, z))
    by_hand = (p * np.log(p / q)).sum(1) if loss == "kl" else ((s - z) ** 2).sum(1)
    np.testing.assert_allclose(values, by_hand, rtol=1e-5, atol=1e-6)
    assert ((gradient != 0) == seen[None]).all()
    elsewhere, _ = losses(np.where(seen, teacher, teacher + 5), np.where(seen, student, student - 7))
    np.testing.assert_array_equal(elsewhere, values)


# --- optimizers of their own, and runs that diverge


SGD = {"epochs": 1, "student_optimizer": "sgd", "sees": "all"}
HUGE = 1e30


def test_rates_of_their_own() -> None:
    """Small steps of SGD move in proportion to the student's rate, whatever the teacher's optimizer."""
    run = watch([cell("slow", **SGD, student_rate=0.001), cell("fast", **SGD, student_rate=0.002)])
    init = run.init.params
    slow, fast = (jax.tree.map(jnp.subtract, run.models[name].params, init) for name in ("slow", "fast"))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(slow))
    assert 1e-4 < largest < 1e-1
    close(fast, jax.tree.map(lambda leaf: 2 * leaf, slow), rtol=0, atol=0.02 * largest)


def test_diverging_student_is_named() -> None:
    cells = [cell("tame", **SGD, student_rate=0.001), cell("wild", **SGD, student_rate=HUGE)]
    message = r"^the loss of wild of seed 2 is not finite at step [23] of 12: use a smaller learning rate$"
    with pytest.raises(InputError, match=message):
        run_group(cells, SEEDS)


def test_a_student_that_may_diverge_answers_nothing() -> None:
    """It reads each image as the first class; those beside it stay as they are, and may not diverge."""
    cells = [cell("tame", **SGD, student_rate=0.001), cell("wild", **SGD, student_rate=HUGE)]
    wild = dataclasses.replace(cells[1], may_diverge=True)
    both = [row["value"] for row in run_group([cells[0], wild], SEEDS)]
    zeros = np.mean(load("digits").test_labels == 0)
    np.testing.assert_allclose(both[1::2], zeros, atol=1e-6)
    np.testing.assert_allclose(both[::2], [row["value"] for row in run_group(cells[:1], SEEDS)], atol=1.5 * IMAGE)
    with pytest.raises(InputError, match=r"^the loss of other of seed 2 is not finite"):
        run_group(
            [
                wild,
                dataclasses.replace(
                    cells[1],
                    labels={"condition": "other"},
                    setting=dataclasses.replace(cells[1].setting, start="cross"),
                ),
            ],
            SEEDS,
        )


@pytest.mark.parametrize("bad", [(0, 1), (1, 0), (1, 1)])
def test_the_right_student_and_seed_are_named(bad: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    losses = np.ones((2, 2, 12))
    losses[(*bad, 3)] = np.nan
    untrained(monkeypatch, losses)
    name, seed = ("first", "second")[bad[1]], SEEDS[bad[0]]
    with pytest.raises(InputError, match=f"^the loss of {name} of seed {seed} is not finite at step 4 of 12: "):
        run_group([cell("first"), cell("second", start="cross")], SEEDS)


def test_diverging_teacher_is_named() -> None:
    wild = {"teacher_epochs": 1, "optimizer": "sgd", "learning_rate": HUGE}
    message = r"^the loss of the teacher of seed 2 is not finite at step [23] of 12: use a smaller learning rate$"
    with pytest.raises(InputError, match=message):
        run_group([cell("student", **wild)], SEEDS)


# --- parts


def planned(cells: Sequence[Cell], seeds: range, chunk: int) -> list[tuple[str, int, list[Cell], list[int]]]:
    """Names, sizes, cells and seeds of parts; nothing is trained."""
    calls: list[tuple[Sequence[Cell], Sequence[int], str | None]] = []

    def record(cells: Sequence[Cell], seeds: Sequence[int], data_dir: str | None = None) -> list[Any]:
        calls.append((cells, seeds, data_dir))
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "run_group", record)
        found = parts(cells, seeds, chunk=chunk, data_dir="folder")
        assert not calls  # all is yet to be computed
        assert all(part.compute() == [] for part in found)
    assert all(data_dir == "folder" for *_, data_dir in calls)
    return [(p.name, p.size, list(c), list(s)) for p, (c, s, _) in zip(found, calls, strict=True)]


def test_cells_of_one_teacher_are_one_part() -> None:
    cells = [cell("teacher", "teacher"), cell("a"), cell("b", start="cross", epochs=7), cell("c", inputs="blocks")]
    assert planned(cells, range(3, 8), 2) == [
        ("seeds-00003", 2, cells, [3, 4]),
        ("seeds-00005", 2, cells, [5, 6]),
        ("seeds-00007", 1, cells, [7]),
    ]


def test_teachers_are_parts_of_their_own() -> None:
    narrow, wide, long = cell("narrow"), cell("wide", width=20), cell("long", teacher_epochs=4)
    other = cell("other", start="cross", width=20)
    assert planned([narrow, wide, long, other], range(2), 1) == [
        ("teacher-000-seeds-00000", 1, [narrow], [0]),
        ("teacher-000-seeds-00001", 1, [narrow], [1]),
        ("teacher-001-seeds-00000", 1, [wide, other], [0]),
        ("teacher-001-seeds-00001", 1, [wide, other], [1]),
        ("teacher-002-seeds-00000", 1, [long], [0]),
        ("teacher-002-seeds-00001", 1, [long], [1]),
    ]


@pytest.mark.parametrize("first", [0, 40])
def test_cells_on_the_first_seeds(first: int) -> None:
    """Parts that begin after a cell's last seed do without it, wherever the seeds begin."""
    every, few = cell("every"), dataclasses.replace(cell("few"), seeds=3)
    seeds = range(first, first + 6)
    assert planned([every, few], seeds, 2) == [
        (f"seeds-{first:05d}", 2, [every, few], [first, first + 1]),
        (f"seeds-{first + 2:05d}", 2, [every, few], [first + 2, first + 3]),
        (f"seeds-{first + 4:05d}", 2, [every], [first + 4, first + 5]),
    ]
    assert [(chosen, group) for _, _, group, chosen in planned([every, few], seeds, 1)] == [
        ([seed], [every, few] if seed < first + 3 else [every]) for seed in seeds
    ]
    assert [chosen for *_, chosen in planned([few], seeds, 2)] == [[first, first + 1], [first + 2, first + 3]]


SETTINGS = st.builds(
    lambda **changes: dataclasses.replace(BASE, **changes),
    width=st.integers(1, 3),
    optimizer=st.sampled_from(["adam", "sgd"]),
    start=st.sampled_from(STARTS),
    epochs=st.integers(1, 3),
)


@given(st.lists(SETTINGS, min_size=1, max_size=8), st.integers(1, 9), st.integers(1, 10))
def test_parts_hold_every_cell_and_seed_once(settings: list[Setting], seeds: int, chunk: int) -> None:
    cells = [Cell({"condition": f"cell {number}"}, setting) for number, setting in enumerate(settings)]
    found = planned(cells, range(seeds), chunk)
    names = [name for name, *_ in found]
    assert len(set(names)) == len(names)
    held = [(one.labels["condition"], seed) for _, _, group, chosen in found for one in group for seed in chosen]
    assert sorted(held) == sorted((one.labels["condition"], seed) for one in cells for seed in range(seeds))
    teachers = []
    for _, size, group, chosen in found:
        assert size == len(chosen) <= chunk
        assert len({one.setting.teacher_only() for one in group}) == 1
        teachers.append((group[0].setting.teacher_only(), tuple(chosen)))
    assert len(set(teachers)) == len(teachers)


def test_no_cell_is_refused() -> None:
    with pytest.raises(InputError, match=r"^there is nothing to run: no setting is left$"):
        parts([], range(3))
    with pytest.raises(InputError, match=r"^there is nothing to run: no setting is left$"):
        SweepConfig().parts([])


def test_parts_of_a_configuration() -> None:
    one = cell("one")
    assert [part.name for part in SweepConfig(seeds=3).parts([one])] == [f"seeds-0000{seed}" for seed in range(3)]
    chunked = SweepConfig(seeds=3, first_seed=4, chunk=2).parts([one])
    assert [(part.name, part.size) for part in chunked] == [("seeds-00004", 2), ("seeds-00006", 1)]
