import importlib
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import mnist_capacity, mnist_factorial, mnist_heads, mnist_interventions
from experiments.app import command as command_line
from experiments.app.contract import configure, listed
from experiments.flags.digits import Setting
from experiments.flags.names import REFERENCE_RATES
from subliminal_theory.errors import InputError
from subliminal_theory.study import Digits
from tests.experiments.commands import fails, run
from tests.study.small import untrained

TINY = ["--data", "digits", "--epochs", 1, "--student-epochs", 2, "--batch-size", 256, "--seeds", 2]


@pytest.fixture(autouse=True)
def _own_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.delenv("SUBLIMINAL_DATA", raising=False)


@pytest.mark.slow
def test_channel(tmp_path: Path) -> None:
    rows = run(tmp_path / "run", "mnist_channel", *TINY, "--counts", "1,4", "--width", 16, "--depth", 1)
    assert [(row["condition"], row["aux"], row["seed"]) for row in rows] == [
        (condition, aux, seed)
        for seed in "01"
        for condition, aux in (("teacher", "4"), ("student_aux", "1"), ("student_aux", "4"))
    ]
    # One logit under KL is no signal: the student stays where it started.
    alone = [row["value"] for row in rows if row["aux"] == "1"]
    start = run(tmp_path / "start", "mnist", *TINY, "--aux", 4, "--width", 16, "--depth", 1)
    assert alone == [row["value"] for row in start if row["condition"] == "reference"]


@pytest.mark.slow
def test_cloning(tmp_path: Path) -> None:
    rows = run(tmp_path / "run", "mnist_cloning", *TINY, "--counts", "3,5", "--cloning-epochs", "1,2")
    found = {(row["condition"], row["aux"], row["cloning_epochs"]) for row in rows}
    cloned = itertools.product(("cloned_uniform", "cloned_digits"), "35", "12")
    others = itertools.product(("student", "sgd", "on_digits", "cross"), "35", ("",))
    blind = itertools.product(("cloned_aux",), "35", "2")
    assert found == {*cloned, *blind, *others, ("teacher", "", "")}
    assert len(rows) == 2 * len(found)


@pytest.mark.slow
def test_architectures(tmp_path: Path) -> None:
    arguments = ["--width", 16, "--aux", 4, "--cloning-epochs", 1]
    rows = run(tmp_path / "run", "mnist_architectures", *TINY, *arguments)
    networks = {row["network"] for row in rows}
    assert len(networks) == 8
    for network in networks:
        conditions = [row["condition"] for row in rows if row["network"] == network and row["seed"] == "0"]
        assert sorted(set(conditions) - {"student", "teacher"}) == ["cloned", "cross"]


@pytest.mark.slow
def test_factorial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    axes = "aux=3,4; width=8,16; channel_loss=kl,mse"
    rows = run(tmp_path / "run", "mnist_factorial", *TINY, "--axes", axes, "--settings", 4)
    points = {(row["aux"], row["width"], row["channel_loss"]) for row in rows}
    assert len(points) == 4
    assert len(rows) == 8
    report = capsys.readouterr().out
    for name in ("aux", "width", "channel_loss", "together", "seed"):
        assert f"\n{name} " in report


@pytest.mark.slow
def test_teachers_on_held_out_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    axes = ["--axes", "learning_rate=1e-3,1e-2", "--batch-size", 64]
    rows = run(tmp_path / "run", "mnist_factorial", "--preset", "rates_adam", *TINY, *axes)
    assert [(row["condition"], row["metric"]) for row in rows] == [("teacher", "validation_accuracy")] * 4
    assert "validation accuracy of the teacher on digits" in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", mnist_factorial.RATES)
def test_reference_rates_are_among_those_tried(optimizer: str) -> None:
    """And neither the least nor the largest of them."""
    config = mnist_factorial.PRESETS[f"rates_{optimizer}"]
    rates = sorted(mnist_factorial.parse(config.axes, "--axes")["learning_rate"])
    assert REFERENCE_RATES[optimizer] in rates[1:-1]
    (setting,) = {
        Setting(**{name: values[0] for name, values in mnist_factorial.parse(config.fixed, "--fixed").items()})
    }
    assert setting.optimizer == optimizer


@pytest.mark.slow
def test_heads(tmp_path: Path) -> None:
    rows = run(tmp_path / "run", "mnist_heads", *TINY, "--counts", "3,4", "--width", 32, "--chunk", 2)
    found = {(row["condition"], row["aux"], row["epochs"], row["metric"]) for row in rows}
    every = itertools.product(mnist_heads.SHARED, "4", "12", mnist_heads.METRICS)
    few = itertools.product(("shared", "heads", "hidden", "cross"), "3", "12", mnist_heads.METRICS)
    assert found == {*every, *few, ("teacher", "", "", "test_accuracy")}
    assert len(rows) == 2 * len(found)


def test_doses_double() -> None:
    assert mnist_heads.doses(mnist_heads.Config(student_epochs=20)) == [1, 2, 5, 10, 20]
    assert 5 in mnist_heads.doses(mnist_heads.PRESETS["published"])
    assert mnist_heads.doses(mnist_heads.Config(epochs=3, student_epochs=None)) == [1, 3]
    assert mnist_heads.doses(mnist_heads.Config(student_epochs=1)) == [1]


@pytest.mark.slow
def test_a_width_that_no_cnn_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["mnist_heads", *TINY, "--counts", 3, "--width", 30, "--out", tmp_path / "run"]
    assert "(16, 13)} cannot share its teacher's of" in fails(capsys, *arguments)


# --- the audit

SMALL = {"data": "digits", "seeds": 2, "chunk": 2, "epochs": 1, "student_epochs": 1, "batch_size": 512}
OWN: dict[str, dict[str, Any]] = {
    "mnist_alignment": {"counts": "2,4", "aux": 4, "amounts": "0,0.5", "points": 2},
    "mnist_architectures": {"cloning_epochs": 1, "width": 16},
    "mnist_capacity": {"entries": "16", "counts": "3,4", "widths": "16", "noise_images": "64", "teacher_steps": 2},
    "mnist_channel": {"counts": "2,4"},
    "mnist_cloning": {"counts": "2,4", "cloning_epochs": "1,2"},
    "mnist_factorial": {"axes": "start=shared,cross; channel_loss=js,mse", "settings": 0},
    "mnist_heads": {"counts": "3,4", "width": 16},
    "mnist_interventions": {"width": 16, "aux": 4},
}
STACKS = {"mnist": [4], "mnist_channel": [2], "mnist_interventions": [1, 1, 1, 1, 2, 16]}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in command_line.discover() if name.startswith("mnist")])
def test_what_trains_was_audited(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very channel and start of each student, also where an experiment trains by itself."""
    experiment = importlib.import_module(f"experiments.{name}")
    seen = untrained(monkeypatch)
    monkeypatch.setattr(Digits, "accuracy", lambda world, model: np.zeros(len(world.seeds)))
    for part in experiment.plan(configure(experiment, None, {**SMALL, **OWN.get(name, {})})):
        assert part.compute()
    assert seen.teachers >= 1
    assert seen.trained
    assert seen.trained <= seen.audited
    if name in STACKS:
        assert sorted(map(len, seen.stacks)) == STACKS[name]


# --- designs


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    count=st.integers(0, 40),
)
def test_combinations(sizes: list[int], count: int) -> None:
    levels = {f"axis{i}": list(range(size)) for i, size in enumerate(sizes)}
    chosen = mnist_factorial.combinations(levels, count)
    everything = math.prod(sizes)
    assert len(chosen) == (min(count, everything) or everything)
    assert len({tuple(point.items()) for point in chosen}) == len(chosen)
    assert all(value in levels[name] for point in chosen for name, value in point.items())
    assert chosen == mnist_factorial.combinations(levels, count)


def test_a_choice_of_combinations_is_balanced() -> None:
    levels = mnist_factorial.parse(mnist_factorial.AXES, "--axes")
    chosen = mnist_factorial.combinations(levels, 150)
    for name, values in levels.items():
        counts = [sum(point[name] == value for point in chosen) for value in values]
        assert max(counts) - min(counts) <= 1


def test_parse_types() -> None:
    parsed = mnist_factorial.parse(
        "bias=true,False; images=None,5; learning_rate=1e-3; start=cross; teacher_epochs=2,0.5", "--axes"
    )
    assert parsed == {
        "bias": [True, False], "images": [None, 5], "learning_rate": [1e-3], "start": ["cross"],
        "teacher_epochs": [2, 0.5],
    }  # fmt: skip
    # Levels are written as they were given: results from before parts of an epoch still have theirs.
    assert list(map(str, parsed["teacher_epochs"])) == ["2", "0.5"]
    Setting(**{name: values[0] for name, values in parsed.items()})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ("breadth=1,2", "--axes: there is no setting 'breadth'; there are data, network, "),
        ("width=", "--axes: axis 'width' is empty: give it levels, as in 'width=1,2'"),
        ("width", "--axes: axis 'width' is empty"),
        ("", "--axes is empty: name settings and their levels"),
        ("width=8; width=16", "--axes: 'width' or one of its levels is named twice"),
        ("width=8,8", "--axes: 'width' or one of its levels is named twice"),
        ("width=broad,8", "--axes: width takes values of type int, got 'broad'"),
        ("teacher_epochs=few", "--axes: teacher_epochs takes values of type int or float, got 'few'"),
        ("teacher_epochs=0,1", "--teacher-epochs must be above 0, got 0"),
        ("bias=yes,true", "--axes: bias takes values of type bool, got 'yes'"),
        ("channel_loss=kl,hinge", "channel 'hinge' is unknown; there are kl, "),
    ],
)
def test_bad_axes(axes: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "--axes", axes, "--settings", 0, "--out", tmp_path / "run"]
    assert fails(capsys, "mnist_factorial", *arguments).startswith(message)


def test_bad_fixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*TINY, "--axes", "width=8,16", "--out", tmp_path / "run"]
    expected = "--fixed aux must have one value, and not be an axis"
    assert fails(capsys, "mnist_factorial", *arguments, "--fixed", "aux=3,4") == expected
    expected = "--fixed width must have one value, and not be an axis"
    assert fails(capsys, "mnist_factorial", *arguments, "--fixed", "width=8") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "--counts is empty: give it values such as 1,2,5"),
        (" , ", "--counts is empty: give it values such as 1,2,5"),
        ("1,two", "--counts takes numbers separated by commas, got '1,two'"),
        ("1,1", "--counts repeats a value: '1,1'"),
    ],
)
def test_bad_lists(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError):
        listed(text, "--counts")
    assert fails(capsys, "mnist_channel", *TINY, "--counts", text, "--out", tmp_path / "run") == message


def test_resuming_a_sweep_with_other_settings_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--width", 8, "--depth", 1]
    run(tmp_path / "run", "mnist_channel", *TINY, *small, "--counts", "2,3")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")}
    capsys.readouterr()
    again = ["mnist_channel", *TINY, *small, "--counts", "2,4", "--out", tmp_path / "run", "--resume"]
    assert "holds a run with other settings (counts='2,3')" in fails(capsys, *again)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_alignment(tmp_path: Path) -> None:
    arguments = ["--aux", 4, "--counts", "2,4", "--amounts", "0,0.5", "--points", 3]
    rows = run(tmp_path / "run", "mnist_alignment", *TINY, *arguments)
    first = [r for r in rows if r["metric"] == "update_cosine" and r["step"] == "1"]
    coverage = [r for r in rows if r["metric"] == "coverage"]
    assert [row["value"] for row in first] == [row["value"] for row in coverage]
    start = {
        float(row["value"])
        for row in rows
        if row["metric"] == "displacement_cosine" and row["step"] == "1" and row["amount"] == "0.0"
    }
    assert start == {0.0}
    of = {row["condition"] for row in rows}
    assert of == {"perturbed", "trained", "linearised"}
    # The widest narrowed channel is that of the students followed: the same run, seen twice.
    trained = [r["value"] for r in rows if r["condition"] == "trained" and r["aux"] == "4"]
    followed = [
        r["value"]
        for r in rows
        if r["condition"] == "perturbed" and r["amount"] == "0.0" and r["metric"] == "test_accuracy"
    ]
    np.testing.assert_allclose(np.array(trained, float), np.array(followed, float), atol=1.5 / 355)


@pytest.mark.slow
def test_interventions(tmp_path: Path) -> None:
    rows = run(tmp_path / "run", "mnist_interventions", *TINY, "--aux", 4)
    names = {one.name for one in mnist_interventions.interventions(2)} | {"early stopping 1"}
    assert {row["condition"] for row in rows} == names
    assert len(rows) == 2 * 2 * len(names)
    values: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        values.setdefault((row["condition"], row["metric"]), []).append(float(row["value"]))
    plain = run(tmp_path / "plain", "mnist", *TINY, "--aux", 4)
    of = {
        name: [float(r["value"]) for r in plain if r["condition"] == name] for name in ("reference", "student_aux")
    }
    np.testing.assert_allclose(values["none", "test_accuracy"], of["student_aux"], atol=1.5 / 355)
    assert min(itertools.chain(*(v for (_, metric), v in values.items() if metric == "imitation_loss"))) > 0


@pytest.mark.slow
def test_capacity(tmp_path: Path) -> None:
    rows = run(tmp_path / "run", "mnist_capacity", "--preset", "smoke", "--seeds", 1)
    teacher = {row["entries"]: row for row in rows if row["condition"] == "teacher" and row["metric"] == "bits"}
    for entries, row in teacher.items():
        assert float(row["value"]) == pytest.approx(int(entries) * math.log2(10), rel=1e-6)
    assert {(r["condition"], r["aux"]) for r in rows} == {
        ("teacher", "10"), ("student_aux", "3"), ("student_aux", "10"), ("student_all", "10"), ("cross_aux", "10"),
    }  # fmt: skip


@pytest.mark.parametrize("accuracy", [0.1, 0.05, 0.0])
def test_no_bits_at_chance(accuracy: float) -> None:
    assert mnist_capacity.table_bits(100, accuracy, 10) == 0


def test_bits_are_the_mutual_information_of_a_symmetric_channel() -> None:
    accuracy, classes = 0.7, 10
    joint = np.full((classes, classes), (1 - accuracy) / (classes - 1) / classes)
    np.fill_diagonal(joint, accuracy / classes)
    information = np.sum(joint * np.log2(joint * classes**2))
    assert mnist_capacity.table_bits(50, accuracy, classes) == pytest.approx(50 * information)
    assert mnist_capacity.table_bits(50, 1.0, classes) == pytest.approx(50 * math.log2(10))
