import csv
import dataclasses
import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.app import command as command_line
from experiments.flags import digits
from experiments.flags.digits import Setting
from experiments.flags.names import OPTIMIZERS
from experiments.mnist import PRESETS, STUDENTS, Config, configure, plan, setting
from subliminal_theory.channel import SoftLogits, Subset
from subliminal_theory.inits import Fresh, Shared
from subliminal_theory.keys import named
from subliminal_theory.study import Digits
from subliminal_theory.vision.datasets import load
from tests.experiments.commands import fails
from tests.study.small import black

CONDITIONS = ["reference", "teacher", "student_aux", "student_all", "cross_aux", "cross_all"]
IMAGE = 1 / 355  # of the digits' test images
QUICK = ["--data", "digits", "--epochs", 3, "--student-epochs", 2, "--depth", 1, "--width", 32, "--aux", 4,
         "--learning-rate", 0.003, "--batch-size", 128]  # fmt: skip


@pytest.fixture(autouse=True)
def _own_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    # Set, it keeps this process from using the user's compilation cache.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.delenv("SUBLIMINAL_DATA", raising=False)


def train(out: Path, *arguments: object) -> dict[str, dict[int, float]]:
    """Run the command and read its accuracies by condition and seed."""
    assert command_line.main(["mnist", "--out", str(out), *map(str, arguments)]) == 0
    table: dict[str, dict[int, float]] = {}
    with open(out / "results.csv", newline="") as file:
        for row in csv.DictReader(file):
            assert row.keys() == {"condition", "seed", "metric", "value"}
            assert row["metric"] == "test_accuracy"
            table.setdefault(row["condition"], {})[int(row["seed"])] = float(row["value"])
    assert list(table) == CONDITIONS
    return table


# --- settings


@pytest.mark.parametrize(("preset", "aux"), [("released", 3), ("nature", 50)])
def test_presets_are_those_of_the_paper(preset: str, aux: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "load_data", lambda name, folder: black(60_000, 10_000))
    config, out = PRESETS[preset], 10 + aux
    assert (config.data, config.seeds, config.epochs, config.student_epochs) == ("mnist", 20, 5, None)
    world = setting(config).world()
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(world.builder(), jax.random.key(0))))
    assert shapes == sorted([(784, 256), (256,), (256, 256), (256,), (256, out), (out,)])
    assert world.steps(1) == 59
    for name, changes in STUDENTS.items():
        run = setting(config, **changes).run(world)
        student, noise = run.student, run.student.source
        assert run.teacher.steps == student.steps == 295
        assert run.teacher.optimizer.rule == student.optimizer.rule == OPTIMIZERS["adam"]
        assert float(student.optimizer.rate) == pytest.approx(run.teacher.optimizer.rate) == 3e-4
        assert (noise.shape, noise.images, noise.batch_size, noise.law) == ((28, 28), 60_000, 1024, "uniform")
        assert (student.network, student.cloned, student.channel.of) == (None, None, SoftLogits())
        assert type(student.start) is (Shared if name.startswith("student") else Fresh)
        first = 10 if name.endswith("aux") else 0
        assert student.channel.visible(out).tolist() == [logit >= first for logit in range(out)]
    drawn = noise.batch(jax.random.key(0), (jnp.arange(16), jnp.ones(16))).inputs
    assert len(np.unique(drawn)) > 0.99 * drawn.size  # not the 256 levels of bytes
    assert (-1 <= drawn.min() < -0.99) & (0.99 < drawn.max() < 1)


def test_options_reach_the_setting() -> None:
    """Every option by a value that is not its default."""
    config = Config(
        data="digits", seeds=2, epochs=7, student_epochs=8, batch_size=9, chunk=2, aux=4, width=16, depth=3,
        noise_images=40, inputs="blocks", optimizer="momentum", learning_rate=0.5, channel_loss="mse",
    )  # fmt: skip
    expected = Setting(
        data="digits", teacher_epochs=7, epochs=8, batch_size=9, aux=4, width=16, depth=3, images=40,
        inputs="blocks", optimizer="momentum", learning_rate=0.5, channel_loss="mse", start="cross", sees="all",
    )  # fmt: skip
    assert setting(config, **STUDENTS["cross_all"]) == expected
    assert setting(dataclasses.replace(config, student_epochs=None)).epochs == 7


def test_configure() -> None:
    for preset in (None, "digits"):
        assert configure(preset, {"data": "digits"}) == dataclasses.replace(PRESETS["digits"], chunk=1)
    changed = configure(None, {"data": "digits", "aux": 7, "chunk": 2})
    assert changed == dataclasses.replace(PRESETS["digits"], aux=7, chunk=2)
    of_the_paper = configure("nature", {"data": "digits"})
    assert (of_the_paper.aux, of_the_paper.epochs, of_the_paper.batch_size) == (50, 5, 1024)


@pytest.mark.parametrize(("found", "preset"), [("digits", "digits"), ("mnist", "released")])
def test_configure_auto(found: str, preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load("digits") if found == "digits" else black(60_000, 10_000)
    monkeypatch.setattr(digits, "load_data", lambda name, data_dir: data)
    assert configure(None, {"data": "auto"}) == dataclasses.replace(PRESETS[preset], chunk=1)
    assert PRESETS[preset].data == found


# --- what a run computes


def log_softmax(z: Any) -> Any:
    return z - jnp.log(jnp.sum(jnp.exp(z), axis=-1, keepdims=True))


def divergence(teacher: Any, student: Any) -> Any:
    """KL(teacher || student) of each row."""
    s, z = log_softmax(teacher), log_softmax(student)
    return jnp.sum(jnp.exp(s) * (s - z), axis=-1)


def logits(params: Any, inputs: Any) -> Any:
    x = inputs.reshape(len(inputs), -1)
    layers = [params["layers"][number] for number in range(len(params["layers"]))]
    for layer in layers[:-1]:
        x = jnp.maximum(x @ layer["kernel"] + layer["bias"][None], 0)
    return x @ layers[-1]["kernel"] + layers[-1]["bias"][None]


def descend(loss: Any, params: Any, rate: float) -> Any:
    return jax.tree.map(lambda p, g: p - rate * g, params, jax.grad(loss)(params))


@pytest.mark.slow
def test_a_chunk_against_single_runs_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of teacher and students on all images at once, where no order of images can matter."""
    data, rate, count = load("digits"), 3.0, 40
    examples = len(data.train_labels)
    config = Config(
        data="digits", aux=4, width=16, epochs=1, batch_size=examples, noise_images=count,
        optimizer="sgd", learning_rate=rate, seeds=5, chunk=2,
    )  # fmt: skip
    build = setting(config).world().builder()
    noise = setting(config).source(setting(config).world(), "uniform")
    models = []

    def accuracy(world: Digits, model: Any) -> np.ndarray:
        """Instead of accuracies, where each run's parameters are found."""
        models.extend(jax.tree.map(lambda leaf, run=run: leaf[run], model.params) for run in range(2))
        return np.array([len(models) - 2, len(models) - 1])

    monkeypatch.setattr(Digits, "accuracy", accuracy)
    _, chunk, _ = plan(config)
    rows = chunk.compute()
    measured = {(row["condition"], row["seed"]): models[int(row["value"])] for row in rows}
    assert list(measured) == [(condition, seed) for seed in (2, 3) for condition in CONDITIONS]
    pixels = jnp.asarray(data.train_images / 8.0 - 1.0, jnp.float32)
    labels = jnp.asarray(data.train_labels, jnp.int32)

    def trait(params: Any) -> Any:
        classes = log_softmax(logits(params, pixels)[:, :10])
        return -jnp.mean(classes[jnp.arange(examples), labels])

    @jax.jit
    def written_out(key: Any, other_key: Any) -> Any:
        init, other = build(key).params, build(other_key).params
        teacher = descend(trait, init, rate)
        source = named(key, "students", "source")
        shown = jax.lax.map(lambda number: noise.image(source, number), jnp.arange(count))

        def imitation(first: int) -> Any:
            return lambda params: jnp.mean(
                divergence(logits(teacher, shown)[:, first:], logits(params, shown)[:, first:])
            )

        starts = {
            "student_aux": (init, 10), "student_all": (init, 0), "cross_aux": (other, 10), "cross_all": (other, 0),
        }  # fmt: skip
        students = {
            name: (descend(imitation(first), start, rate), start) for name, (start, first) in starts.items()
        }
        return init, {"teacher": (teacher, init), **students}

    for seed in (2, 3):
        init, expected = written_out(jax.random.key(seed), jax.random.key(seed + 1))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), measured["reference", seed], init)
        for name, (stepped, start) in expected.items():
            compare(measured[name, seed], stepped, start)


def compare(params: Any, expected: Any, start: Any) -> None:
    """Parameters after a step agree, and much better than they would if the step were left out."""
    moved = max(float(jnp.abs(a - b).max()) for a, b in zip(*map(jax.tree.leaves, (expected, start)), strict=True))
    assert moved > 1e-3
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * moved + 1e-7)


@pytest.fixture(scope="module")
def two_seeds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, dict[int, float]]]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", "")
        out = tmp_path_factory.mktemp("mnist") / "run"
        yield out, train(out, *QUICK, "--seeds", 2)


def test_run(two_seeds: tuple[Path, dict[str, dict[int, float]]]) -> None:
    out, table = two_seeds
    assert all(list(values) == [0, 1] for values in table.values())
    assert all(0 <= value <= 1 for values in table.values() for value in values.values())
    assert min(table["teacher"].values()) > max(table["reference"].values())
    assert {path.name for path in (out / "parts").iterdir()} == {"seeds-00000.json", "seeds-00001.json"}
    config = json.loads((out / "config.json").read_text())["config"]
    given = {"seeds": 2, "epochs": 3, "student_epochs": 2, "depth": 1, "width": 32, "aux": 4, "chunk": 1,
             "learning_rate": 0.003, "batch_size": 128}  # fmt: skip
    assert {"data_dir": None, **config} == {**dataclasses.asdict(PRESETS["digits"]), **given}
    assert "data_dir" not in config  # where the files lie is no setting of the experiment
    summary = {group["condition"]: group for group in json.loads((out / "summary.json").read_text())}
    assert list(summary) == CONDITIONS
    for name, (first, second) in ((name, values.values()) for name, values in table.items()):
        assert summary[name]["mean"] == pytest.approx((first + second) / 2, rel=1e-12)
        # t_1 s / sqrt(2), where s = |first - second| / sqrt(2)
        half = 12.706204736 * abs(first - second) / 2
        assert summary[name]["half_width_95"] == pytest.approx(half, rel=1e-8, abs=1e-12)


def test_figure_is_drawn_from_files(
    two_seeds: tuple[Path, dict[str, dict[int, float]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(digits, "run_cells", never)
    out = shutil.copytree(two_seeds[0], tmp_path / "run")
    drawn = {name: (out / name).read_bytes() for name in ("figure.png", "figure.pdf", "results.csv")}
    assert drawn["figure.png"].startswith(b"\x89PNG\r\n\x1a\n")
    assert drawn["figure.pdf"].startswith(b"%PDF-")
    for name in drawn:
        (out / name).unlink()
    train(out, *QUICK, "--seeds", 2, "--resume")
    assert {name: (out / name).read_bytes() for name in drawn} == drawn
    part = out / "parts" / "seeds-00001.json"
    part.write_text(part.read_text().replace('"value": 0.', '"value": 0.9'))
    train(out, *QUICK, "--seeds", 2, "--resume")
    assert (out / "figure.png").read_bytes() != drawn["figure.png"]


@pytest.mark.slow
def test_runs_do_not_depend_on_number_and_chunk(
    two_seeds: tuple[Path, dict[str, dict[int, float]]], tmp_path: Path
) -> None:
    table = train(tmp_path / "run", *QUICK, "--seeds", 3, "--chunk", 3)
    assert [path.name for path in (tmp_path / "run" / "parts").iterdir()] == ["seeds-00000.json"]
    for condition, values in two_seeds[1].items():
        assert list(table[condition]) == [0, 1, 2]
        for seed, value in values.items():
            # Another chunk may round another way: that may turn one image over, which a wrong key would not.
            assert table[condition][seed] == pytest.approx(value, abs=1.5 * IMAGE)


def test_audit_refuses_a_channel_that_shows_the_trait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Setting.channel
    leak = lambda own, world, sees: Subset(real(own, world, sees).where.at[7].set(True))  # noqa: E731
    monkeypatch.setattr(Setting, "channel", leak)
    line = fails(capsys, "mnist", *QUICK, "--depth", 0, "--out", tmp_path / "run")
    assert "the channel shows logit 7, in which the trait itself is read" in line


@pytest.mark.slow
def test_digits_show_the_effect(tmp_path: Path) -> None:
    table = train(tmp_path / "run", "--data", "digits", "--seeds", 3)
    mean = {condition: np.mean(list(values.values())) for condition, values in table.items()}
    assert min(table["teacher"].values()) > 0.9
    assert mean["student_aux"] > mean["cross_aux"] + 0.1
    assert mean["student_all"] > 0.85
    assert abs(mean["cross_aux"] - 0.1) < 0.1
