from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subliminal_theory.channel import Subset
from subliminal_theory.errors import InputError
from subliminal_theory.inits import Fresh, Interpolated, PerLayer, Perturbed, Shared
from subliminal_theory.study import Digits, Frozen, LowRank, Network, Run, Study, TrainingImages, Untrained, stages
from subliminal_theory.study import digits as module
from tests.study.small import ALL, CROSS, DATA, IMAGE, SEEDS, STUDENT, TEACHER, WORLD, black, close, run, untrained

HEADS = ("layers/1/*", "*")
Layers = list[dict[str, np.ndarray]]


def layers(model: Any) -> Layers:
    """Parameters in order of computation."""
    of = model.all_params["layers"]
    return [{name: np.asarray(leaf) for name, leaf in of[number].items()} for number in sorted(of)]


def start(policy: Any, world: Digits = WORLD, **changes: Any) -> Layers:
    return layers(world.start(replace(STUDENT, start=policy, **changes)))


def drawn(world: Digits, shift: int) -> Layers:
    """The networks of so many seeds further."""
    return layers(replace(world, seeds=[seed + shift for seed in world.seeds]).initial())


def read(network: Layers, activation: Any = lambda x: np.maximum(x, 0)) -> list[float]:
    """The accuracy of each run of a perceptron, written out."""
    found = []
    for place in range(len(SEEDS)):
        x = DATA.test_images.reshape(355, 64) / 8.0 - 1.0
        for number, layer in enumerate(network):
            x = activation(x) if number else x
            x = x @ layer["kernel"][place] + (layer["bias"][place] if "bias" in layer else 0)
        found.append(float(np.mean(x[:, :10].argmax(1) == DATA.test_labels)))
    return found


# --- where students start


@pytest.mark.slow
def test_starts_layer_by_layer() -> None:
    """From the initialization of the run, and that of the next seed: a derangement of the seeds."""
    mine, theirs, further = (drawn(WORLD, shift) for shift in range(3))
    assert all((mine[0]["kernel"] != other[0]["kernel"]).all() for other in (theirs, further))
    assert (mine[0]["kernel"][0] != mine[0]["kernel"][1]).all()
    for found, expected in (
        (layers(WORLD.initial()), mine),
        (start(Shared()), mine),
        (start(Fresh()), theirs),
        (start(Fresh(), other=2), further),
        (start(Interpolated(0.3)), jax.tree.map(lambda a, b: 0.7 * a + 0.3 * b, mine, theirs)),
        (start(PerLayer(HEADS, (Shared(), Fresh()))), [theirs[0], mine[1]]),
        (start(PerLayer(HEADS, (Fresh(), Shared()))), [mine[0], theirs[1]]),
    ):
        close(found, expected)

    everywhere, hidden = start(Perturbed(0.5)), start(PerLayer(HEADS, (Shared(), Perturbed(0.25))))
    assert not any(layer["bias"].any() for layer in (*mine, *everywhere, *hidden))
    close(hidden[1], mine[1])
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
    for place in range(2):
        correlation = np.corrcoef([noise[place], *(net["kernel"][place].reshape(-1) for net in (mine, theirs))])
        assert np.abs(correlation[np.triu_indices(3, 1)]).max() < 5 / np.sqrt(size)
    return noise


@pytest.mark.slow
def test_starts_of_a_cnn_with_biases() -> None:
    """Its output layer comes after the convolutions."""
    world = Digits(DATA, (3,), Network(True, 1, 8, init_law="torch"), 4)
    mine, theirs = drawn(world, 0), drawn(world, 1)
    assert [layer["kernel"].ndim for layer in mine] == [5, 3]
    close(start(PerLayer(HEADS, (Shared(), Fresh())), world), [theirs[0], mine[1]])
    close(start(PerLayer(HEADS, (Fresh(), Shared())), world), [mine[0], theirs[1]])
    hidden = start(PerLayer(HEADS, (Shared(), Perturbed(0.5))), world)
    close(hidden[1], mine[1])
    for name in ("kernel", "bias"):
        noise = (hidden[0][name] - mine[0][name]) / 0.5 / np.sqrt(np.mean(theirs[0][name] ** 2))
        assert (noise != 0).all()
        assert abs(np.mean(noise**2) - 1) < 5 * np.sqrt(2 / noise.size)


CNN = Network(True, 2, 4)


@pytest.mark.slow
def test_a_cnn_starts_with_the_output_layer_of_its_mlp() -> None:
    """And with that alone: the rest is what one that shares nothing starts with."""
    world = replace(WORLD, network=Network(depth=1, width=32))
    heads = start(PerLayer(("layers/2/*", "*"), (Shared(), Fresh())), world, network=CNN)
    apart = start(Fresh(), world, network=CNN)
    assert [layer["kernel"].shape for layer in heads] == [(2, 3, 3, 1, 4), (2, 3, 3, 4, 8), (2, 32, 14)]
    close(heads, [*apart[:2], layers(world.initial())[1]])
    assert (heads[2]["kernel"] != apart[2]["kernel"]).all()


@pytest.mark.parametrize(
    "own", [CNN, Network(depth=1, width=17), Network(depth=0), Network(depth=1, width=16, bias=False)]
)
def test_output_layers_that_cannot_be_shared(own: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before a teacher is taught."""
    seen = untrained(monkeypatch)
    heads = replace(STUDENT, start=PerLayer((own.output_layer, "*"), (Shared(), Fresh())), network=own)
    with pytest.raises(InputError, match=r"output layer of .*14.* cannot share"):
        run({"teacher": Run(TEACHER), "heads": Run(TEACHER, heads)}, replace(WORLD))
    assert seen.teachers == 0


@pytest.mark.slow
def test_students_of_other_networks() -> None:
    """Their shapes, and their accuracy from their parameters by hand."""
    large = replace(CROSS, network=Network(depth=2, width=24, activation="tanh"))
    linear = replace(CROSS, network=Network(depth=0, bias=False), channel=ALL)
    found, scores = run({"large": Run(Untrained(), large), "linear": Run(Untrained(), linear)})
    for name, student, sizes in (("large", large, (64, 24, 24, 14)), ("linear", linear, (64, 14))):
        trained, initial = layers(found[name].model), layers(WORLD.start(student))
        shapes = [(2, *shape) for shape in zip(sizes[:-1], sizes[1:], strict=True)]
        assert [layer["kernel"].shape for layer in trained] == shapes
        assert all(("bias" in layer) == (name == "large") for layer in trained)
        for one, other in zip(trained, initial, strict=True):
            assert (one["kernel"] != other["kernel"]).any(axis=(1, 2)).all()
        np.testing.assert_allclose(scores[name]["test_accuracy"], read(trained, np.tanh), atol=1.5 * IMAGE)


@pytest.mark.slow
def test_frozen_parameters_stay() -> None:
    frozen = replace(CROSS, trains=Frozen(("layers/1/*",)))
    before, after = (layers(m) for m in (WORLD.start(frozen), run({0: Run(TEACHER, frozen)})[0][0].model))
    close(after[1], before[1])
    assert np.abs(after[0]["kernel"] - before[0]["kernel"]).max() > 1e-3
    with pytest.raises(InputError, match="low-rank"):
        WORLD.start(replace(STUDENT, trains=LowRank(2)))


# --- what they are shown, and how they are read


@pytest.mark.parametrize(
    ("epochs", "steps"),
    [(0.001, 1), (0.05, 3), (0.1, 6), (0.25, 15), (0.5, 30), (1, 60), (1.5, 90), (0.7, 42), (20, 1200)],
)
def test_parts_of_an_epoch(epochs: float, steps: int) -> None:
    """Steps, at least one: as many as the decimal number says, whatever its binary neighbor."""
    assert Digits(black(60_000, 10_000), (0,), batch_size=1000).steps(epochs) == steps


@pytest.mark.parametrize(
    ("options", "kept", "steps"), [({}, 60_000, 59), ({"images": 2_000}, 2_000, 2), ({"fresh": True}, None, 59)]
)
def test_noise(options: dict[str, Any], kept: int | None, steps: int) -> None:
    world = Digits(black(60_000, 10_000), (0,))
    noise = world.noise("uniform_8bit", **options)
    assert (noise.shape, noise.images, noise.batch_size, noise.law) == ((28, 28), kept, 1024, "uniform_8bit")
    assert world.steps(3, noise) == 3 * steps


@pytest.mark.slow
def test_training_images_as_a_source() -> None:
    """The teacher's images in the teacher's preparation, without labels."""
    world = replace(WORLD, batch_size=len(DATA.train_labels))
    student = replace(STUDENT, source=TrainingImages())
    source = world.source(student, Untrained(), world.initial(), world.initial)
    assert source.labels is None
    assert world.lessons(TEACHER).labels is not None
    assert world.steps(2, source) == 2
    index, weights = source.schedule(jax.random.key(0), 1)
    shown = source.batch(jax.random.key(0), (index[0], weights[0])).inputs
    np.testing.assert_allclose(shown, DATA.train_images[np.asarray(index[0])] / 8.0 - 1.0, atol=1e-6)
    assert sorted(np.asarray(index[0])) == list(range(len(DATA.train_labels)))


@pytest.mark.slow
def test_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """The imitation loss is that of the last epoch, 12 of 24 steps, and of the student's own run."""
    number = lambda shape: np.arange(shape[0] * shape[1]).reshape(*shape[:2], 1)  # noqa: E731
    untrained(monkeypatch, lambda shape: number(shape) + np.where(np.arange(24) < 12, 100, np.arange(24)))
    found = run({"one": Run(Untrained(), STUDENT), "other": Run(Untrained(), CROSS)})[1]
    assert [found[name]["imitation_loss"].tolist() for name in found] == [[17.5, 19.5], [18.5, 20.5]]
    reference = run({"reference": Run(Untrained())})[1]["reference"]
    assert reference.keys() == {"test_accuracy"}
    np.testing.assert_allclose(reference["test_accuracy"], read(drawn(WORLD, 0)), atol=1e-6)


@pytest.mark.slow
def test_held_out_images_replace_the_test_images() -> None:
    """Accuracy on the training images' last sixth, of a teacher that did not see them."""
    hidden = replace(DATA, test_images=0 * DATA.test_images, test_labels=0 * DATA.test_labels)
    worlds = [replace(WORLD, data=data.held_out(), metric="validation_accuracy") for data in (DATA, hidden)]
    found = [run({"teacher": Run(TEACHER)}, world)[1]["teacher"]["validation_accuracy"] for world in worlds]
    np.testing.assert_array_equal(*found)
    last = replace(DATA, test_images=DATA.train_images[-240:], test_labels=DATA.train_labels[-240:])
    model = Study(worlds[0]).teacher(TEACHER)
    np.testing.assert_array_equal(found[0], replace(WORLD, data=last).accuracy(model))
    assert len(worlds[0].data.train_labels) == len(DATA.train_labels) - 240


def test_class_logits_are_private_but_for_those_who_see_all_of_them() -> None:
    for mask, private in ((range(10, 14), 10), (range(9, 14), 10), (range(14), 0), (range(10), 0)):
        assert len(WORLD.private(replace(STUDENT, channel=Subset(mask)))) == private


# --- many worlds


@pytest.mark.slow
def test_other_seeds_are_the_same_programs() -> None:
    """Another chunk of seeds, other amounts and masks: nothing is compiled again."""
    programs = (stages._train, module._initial, module._started, module._accuracy)

    def count(seeds: tuple[int, ...], amount: float, first: int) -> list[int]:
        noisy = replace(STUDENT, start=Perturbed(amount), channel=Subset(jnp.arange(14) >= first))
        run({"plain": Run(TEACHER, STUDENT), "noisy": Run(TEACHER, noisy)}, replace(WORLD, seeds=seeds))
        return [program._cache_size() for program in programs]

    assert count((0, 1), 0.01, 10) == count((7, 8), 0.02, 11)


@pytest.mark.slow
def test_worlds_made_of_another_keep_nothing_of_it() -> None:
    model = Study(WORLD).teacher(TEACHER)
    wider = replace(WORLD, network=Network(depth=1, width=20))
    for other in (wider.initial(), Study(wider).teacher(TEACHER)):
        assert other.params["layers"][0]["kernel"].shape == (2, 64, 20)
    assert Study(WORLD).teacher(TEACHER) is model
