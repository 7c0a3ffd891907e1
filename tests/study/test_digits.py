import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subliminal_theory.channel import Subset
from subliminal_theory.errors import InputError
from subliminal_theory.inits import Fresh, Interpolated, PerLayer, Perturbed, Shared
from subliminal_theory.model import Model
from subliminal_theory.study import (
    Digits,
    FineTuned,
    Finished,
    Frozen,
    LowRank,
    Network,
    Optimizer,
    Run,
    Student,
    Study,
    TrainingImages,
    Untrained,
    stages,
)
from subliminal_theory.study import digits as module
from subliminal_theory.vision.datasets import ImageDataset, load
from tests.study.watched import untrained

DATA, SEEDS, IMAGE = load("digits"), (2, 5), 1 / 355
WORLD = Digits(DATA, SEEDS, Network(depth=1, width=16), auxiliary=4, batch_size=128)
AUX, ALL = Subset(jnp.arange(14) >= 10), Subset(jnp.ones(14, bool))
STUDENT = Student(AUX, WORLD.noise(), Optimizer(0.003), WORLD.steps(1))


def layers(model: Model) -> list[dict[str, np.ndarray]]:
    """Parameters in order of computation."""
    of = model.all_params["layers"]
    return [{name: np.asarray(leaf) for name, leaf in of[number].items()} for number in sorted(of)]


def same(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), actual, expected)


def read(network: list[dict[str, np.ndarray]], activation: Any = lambda x: np.maximum(x, 0)) -> list[float]:
    """The accuracy of each run of a perceptron, written out."""
    found = []
    for place in range(len(SEEDS)):
        x = DATA.test_images.reshape(355, 64) / 8.0 - 1.0
        for number, layer in enumerate(network):
            x = activation(x) if number else x
            x = x @ layer["kernel"][place] + (layer["bias"][place] if "bias" in layer else 0)
        found.append(float(np.mean(x[:, :10].argmax(1) == DATA.test_labels)))
    return found


def start(policy: Any, world: Digits = WORLD, **changes: Any) -> list[dict[str, np.ndarray]]:
    return layers(world.start(replace(STUDENT, start=policy, **changes)))


def drawn(world: Digits, shift: int) -> list[dict[str, np.ndarray]]:
    """The networks of so many seeds further."""
    return layers(Digits(DATA, [seed + shift for seed in world.seeds], world.network, world.auxiliary).initial())


# --- where students start


def test_starts_layer_by_layer() -> None:
    """From the initialization of the run, and that of the next seed: a derangement of the seeds."""
    mine, theirs, further = (drawn(WORLD, shift) for shift in range(3))
    assert (mine[0]["kernel"] != theirs[0]["kernel"]).all()
    assert (mine[0]["kernel"][0] != mine[0]["kernel"][1]).all()
    same(layers(WORLD.initial()), mine)
    same(start(Shared()), mine)
    same(start(Fresh()), theirs)
    same(start(Fresh(), other=2), further)
    same(start(Interpolated(0.3)), jax.tree.map(lambda a, b: 0.7 * a + 0.3 * b, mine, theirs))
    same(start(PerLayer(("layers/1/*", "*"), (Shared(), Fresh()))), [theirs[0], mine[1]])
    same(start(PerLayer(("layers/1/*", "*"), (Fresh(), Shared()))), [mine[0], theirs[1]])

    everywhere, hidden = start(Perturbed(0.5)), start(PerLayer(("layers/1/*", "*"), (Shared(), Perturbed(0.25))))
    assert not any(layer["bias"].any() for layer in (*mine, *everywhere, *hidden))
    same(hidden[1], mine[1])
    draws = [standard_noise(everywhere[number], mine[number], theirs[number], 0.5) for number in (0, 1)]
    np.testing.assert_allclose(standard_noise(hidden[0], mine[0], theirs[0], 0.25), draws[0], atol=1e-4)
    few = np.stack([draws[0][:, : draws[1].shape[1]], draws[1], draws[1][::-1]])
    apart = np.abs(few[:, None] - few[None]).max(axis=-1)[~np.eye(3, dtype=bool)]
    assert apart.min() > 0.5  # no draw is used twice


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
    world = Digits(DATA, (3,), Network(True, 1, 8, init_law="torch"), 4)
    mine, theirs = drawn(world, 0), drawn(world, 1)
    assert [layer["kernel"].ndim for layer in mine] == [5, 3]
    heads = ("layers/1/*", "*")
    same(start(PerLayer(heads, (Shared(), Fresh())), world), [theirs[0], mine[1]])
    same(start(PerLayer(heads, (Fresh(), Shared())), world), [mine[0], theirs[1]])
    hidden = start(PerLayer(heads, (Shared(), Perturbed(0.5))), world)
    same(hidden[1], mine[1])
    for name in ("kernel", "bias"):
        noise = (hidden[0][name] - mine[0][name]) / 0.5 / np.sqrt(np.mean(theirs[0][name] ** 2))
        assert (noise != 0).all()
        assert abs(np.mean(noise**2) - 1) < 5 * np.sqrt(2 / noise.size)


WIDE = replace(WORLD, network=Network(depth=1, width=32))
CNN = Network(True, 2, 4)


def test_a_cnn_starts_with_the_output_layer_of_its_mlp() -> None:
    """And with that alone: the rest is what one that shares nothing starts with."""
    heads = start(PerLayer(("layers/2/*", "*"), (Shared(), Fresh())), WIDE, network=CNN)
    apart = start(Fresh(), WIDE, network=CNN)
    assert [layer["kernel"].shape for layer in heads] == [(2, 3, 3, 1, 4), (2, 3, 3, 4, 8), (2, 32, 14)]
    same(heads, [*apart[:2], layers(WIDE.initial())[1]])
    assert (heads[2]["kernel"] != apart[2]["kernel"]).all()


@pytest.mark.parametrize(
    ("taught", "own"),
    [
        (Network(depth=1, width=33), CNN),
        (Network(depth=1, width=16), Network(depth=1, width=17)),
        (Network(depth=1, width=16), Network(depth=0)),
        (Network(depth=1, width=16), Network(depth=1, width=16, bias=False)),
    ],
)
def test_output_layers_that_cannot_be_shared(
    taught: Network, own: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before a teacher is taught."""
    seen = untrained(monkeypatch)
    teacher = FineTuned(Optimizer(0.1), 1)
    heads = PerLayer((own.output_layer, "*"), (Shared(), Fresh()))
    runs = {"teacher": Run(teacher), "heads": Run(teacher, replace(STUDENT, start=heads, network=own))}
    with pytest.raises(InputError, match=r"output layer of .*14.* cannot share"):
        Study(replace(WORLD, network=taught)).run(runs)
    assert seen.teachers == 0


def test_students_of_other_networks() -> None:
    """Their shapes, and their accuracy from their parameters by hand."""
    large = replace(STUDENT, start=Fresh(), network=Network(depth=2, width=24, activation="tanh"))
    linear = replace(STUDENT, start=Fresh(), network=Network(depth=0, bias=False), channel=ALL)
    found: dict[str, Finished] = {}

    def keep(world: Digits, finished: Finished, name: str) -> dict[str, np.ndarray]:
        found[name] = finished
        return world.score(finished, name)

    runs = {"large": Run(Untrained(), large), "linear": Run(Untrained(), linear)}
    scores = Study(WORLD).run(runs, keep)
    for name, student, sizes in (("large", large, (64, 24, 24, 14)), ("linear", linear, (64, 14))):
        trained, initial = layers(found[name].model), layers(WORLD.start(student))
        shapes = [(2, *shape) for shape in zip(sizes[:-1], sizes[1:], strict=True)]
        assert [layer["kernel"].shape for layer in trained] == shapes
        assert all(("bias" in layer) == (name == "large") for layer in trained)
        assert all(
            (a["kernel"] != b["kernel"]).any(axis=(1, 2)).all() for a, b in zip(trained, initial, strict=True)
        )
        np.testing.assert_allclose(scores[name]["test_accuracy"], read(trained, np.tanh), atol=1.5 * IMAGE)


def test_frozen_parameters_stay() -> None:
    frozen = replace(STUDENT, start=Fresh(), trains=Frozen(("layers/1/*",)))
    ((_, done),) = Study(WORLD).distil(FineTuned(Optimizer(0.01), 2), {"frozen": frozen})
    before, after = layers(WORLD.start(frozen)), layers(done.model)
    same(after[1], before[1])
    assert np.abs(after[0]["kernel"] - before[0]["kernel"]).max() > 1e-3
    with pytest.raises(InputError, match="low-rank"):
        WORLD.start(replace(STUDENT, trains=LowRank(2)))


# --- what they are shown, and how they are read


def images(train: int, test: int) -> ImageDataset:
    """A data set of MNIST's format, black."""
    black, labels = np.zeros((1, 28, 28), np.uint8), np.zeros(1, np.uint8)
    shown = [np.broadcast_to(black, (count, 28, 28)) for count in (train, test)]
    named = [np.broadcast_to(labels, count) for count in (train, test)]
    return ImageDataset("mnist", shown[0], named[0], shown[1], named[1], classes=10, maximum=255, sha256={})


@pytest.mark.parametrize(
    ("epochs", "steps"),
    [(0.001, 1), (0.05, 3), (0.1, 6), (0.25, 15), (0.5, 30), (1, 60), (1.5, 90), (0.7, 42), (20, 1200)],
)
def test_parts_of_an_epoch(epochs: float, steps: int) -> None:
    """Steps, at least one: as many as the decimal number says, whatever its binary neighbor."""
    assert Digits(images(60_000, 10_000), (0,), batch_size=1000).steps(epochs) == steps


@pytest.mark.parametrize(
    ("options", "kept", "steps"), [({}, 60_000, 59), ({"images": 2_000}, 2_000, 2), ({"fresh": True}, None, 59)]
)
def test_noise(options: dict[str, Any], kept: int | None, steps: int) -> None:
    world = Digits(images(60_000, 10_000), (0,))
    noise = world.noise("uniform_8bit", **options)
    assert (noise.shape, noise.images, noise.batch_size, noise.law) == ((28, 28), kept, 1024, "uniform_8bit")
    assert world.steps(3, noise) == 3 * steps


def test_training_images_as_a_source() -> None:
    """The teacher's images in the teacher's preparation, without labels."""
    world = Digits(DATA, (0,), batch_size=len(DATA.train_labels))
    student = replace(STUDENT, source=TrainingImages())
    source = world.source(student, Untrained(), world.initial(), world.initial)
    assert source.labels is None
    assert world.lessons(FineTuned(Optimizer(1), 1)).labels is not None
    assert world.steps(2, source) == 2
    index, _ = source.schedule(jax.random.key(0), 1)
    shown = source.batch(jax.random.key(0), (index[0], jnp.ones(len(index[0])))).inputs
    np.testing.assert_allclose(shown, DATA.train_images[np.asarray(index[0])] / 8.0 - 1.0, atol=1e-6)
    assert sorted(np.asarray(index[0])) == list(range(len(DATA.train_labels)))


def test_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """The imitation loss is that of the last epoch, 12 of 24 steps, and of the student's own run."""
    untrained(
        monkeypatch, lambda shape: 2 * np.indices(shape)[0] + np.indices(shape)[1] + np.arange(24) // 12 * 10
    )
    two = replace(STUDENT, steps=24)
    runs = {"one": two, "other": replace(two, start=Fresh())}
    found = Study(WORLD).run({name: Run(Untrained(), student) for name, student in runs.items()})
    assert [found[name]["imitation_loss"].tolist() for name in runs] == [[10, 12], [11, 13]]
    teacher = Study(WORLD).run({"teacher": Run(Untrained())})["teacher"]
    assert teacher.keys() == {"test_accuracy"}
    np.testing.assert_allclose(teacher["test_accuracy"], read(drawn(WORLD, 0)), atol=1e-6)


def test_held_out_images_replace_the_test_images() -> None:
    """Accuracy on the training images' last sixth, of a teacher that did not see them."""
    hidden = replace(
        DATA, test_images=np.zeros_like(DATA.test_images), test_labels=np.zeros_like(DATA.test_labels)
    )
    runs = {"teacher": Run(FineTuned(Optimizer(0.003), 30))}
    found = []
    for data in (DATA, hidden):
        world = Digits(data.held_out(), SEEDS, WORLD.network, 4, 128, "validation_accuracy")
        found.append(Study(world).run(runs)["teacher"]["validation_accuracy"])
    np.testing.assert_array_equal(*found)
    last = replace(DATA, test_images=DATA.train_images[-240:], test_labels=DATA.train_labels[-240:])
    model = Study(world).teacher(runs["teacher"].teacher)
    np.testing.assert_array_equal(found[0], Digits(last, SEEDS, WORLD.network, 4).accuracy(model))
    assert len(world.data.train_labels) == len(DATA.train_labels) - 240


def test_class_logits_are_private_but_for_those_who_see_all_of_them() -> None:
    for first, private in ((10, 10), (9, 10), (0, 0)):
        assert len(WORLD.private(replace(STUDENT, channel=Subset(jnp.arange(14) >= first)))) == private
    assert WORLD.private(replace(STUDENT, channel=Subset(jnp.arange(14) < 10))) == ()


# --- many seeds


def test_other_seeds_are_the_same_programs() -> None:
    """Another chunk of seeds, other rates, amounts and masks: nothing is compiled again."""
    programs = (stages._train, module._initial, module._started, module._accuracy)

    def run(seeds: tuple[int, ...], amount: float, first: int) -> list[int]:
        world = replace(WORLD, seeds=seeds)
        noisy = replace(STUDENT, start=Perturbed(amount), channel=Subset(jnp.arange(14) >= first))
        teacher = FineTuned(Optimizer(amount), 2)
        students = {"plain": STUDENT, "noisy": noisy}
        Study(world).run({name: Run(teacher, student) for name, student in students.items()})
        return [program._cache_size() for program in programs]

    assert run((0, 1), 0.01, 10) == run((7, 8), 0.02, 11)


def test_runs_do_not_depend_on_their_chunk() -> None:
    runs = {"teacher": Run(FineTuned(Optimizer(0.003, optax.adam), 12)), "student": Run(Untrained(), STUDENT)}
    together = Study(WORLD).run(runs)
    for place, seed in enumerate(SEEDS):
        alone = Study(replace(WORLD, seeds=(seed,))).run(runs)
        for name, found in alone.items():
            for metric, values in found.items():
                np.testing.assert_allclose(values[0], together[name][metric][place], rtol=1e-4, atol=1.5 * IMAGE)


def test_worlds_made_of_another_keep_nothing_of_it() -> None:
    model = Study(WORLD).teacher(FineTuned(Optimizer(0.003), 2))
    wider = replace(WORLD, network=Network(depth=1, width=20))
    assert wider.initial().params["layers"][0]["kernel"].shape == (2, 64, 20)
    assert Study(wider).teacher(FineTuned(Optimizer(0.003), 2)).params["layers"][0]["kernel"].shape[-1] == 20
    assert Study(WORLD).teacher(FineTuned(Optimizer(0.003), 2)) is model
