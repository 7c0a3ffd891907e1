import dataclasses
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.setting import ARCHITECTURE as NAMES
from experiments.setting import LOSSES, METRICS, NETWORKS, OPTIMIZERS, REFERENCE_RATES, SEES, STARTS, Cell, Setting
from subliminal_theory.errors import InputError
from subliminal_theory.vision.mlp import ACTIVATIONS, INIT_LAWS
from subliminal_theory.vision.noise import LAWS

SHOWN = (*LAWS, "digits")
TEACHER: dict[str, st.SearchStrategy[Any]] = {
    "data": st.sampled_from(["mnist", "digits", "folder"]),
    "network": st.sampled_from(NETWORKS),
    "depth": st.integers(0, 3),
    "width": st.integers(1, 300),
    "activation": st.sampled_from(list(ACTIVATIONS)),
    "bias": st.booleans(),
    "init_law": st.sampled_from(list(INIT_LAWS)),
    "aux": st.integers(3, 60),
    "teacher_epochs": st.integers(1, 9) | st.floats(0.01, 9),
    "optimizer": st.sampled_from(list(OPTIMIZERS)),
    "learning_rate": st.floats(1e-6, 10),
    "validation": st.booleans(),
    "batch_size": st.integers(1, 2048),
}
# What an argument of a compiled function can carry; what decides its shapes or its code comes after.
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "start": st.sampled_from(STARTS),
    "amount": st.floats(0, 2),
    "sees": st.sampled_from(SEES),
    "shown": st.none() | st.integers(1, 3),
    "student_rate": st.none() | st.floats(1e-6, 10),
    "relative_rate": st.none() | st.floats(1e-6, 10),
    "cloning_epochs": st.integers(0, 5),
    "cloning_inputs": st.sampled_from(SHOWN),
    "cloning_sees": st.sampled_from(SEES),
}
SHAPES: dict[str, st.SearchStrategy[Any]] = {
    "channel_loss": st.sampled_from(LOSSES),
    "inputs": st.sampled_from(SHOWN),
    "images": st.none() | st.integers(0, 100),
    "epochs": st.integers(1, 9),
    "student_optimizer": st.none() | st.sampled_from(list(OPTIMIZERS)),
}
ARCHITECTURE: dict[str, st.SearchStrategy[Any]] = {
    "student_network": st.none() | st.sampled_from(NETWORKS),
    "student_depth": st.none() | st.integers(0, 3),
    "student_width": st.none() | st.integers(1, 300),
    "student_activation": st.none() | st.sampled_from(list(ACTIVATIONS)),
    "student_bias": st.none() | st.booleans(),
}
STUDENT = {**VALUES, **SHAPES, **ARCHITECTURE}


def valid(values: dict[str, Any]) -> Setting:
    """A setting with these values, started elsewhere where it must be."""
    other = any(
        values.get(f"student_{name}") not in (None, values.get(name, getattr(Setting, name))) for name in NAMES
    )
    start = {"start": "cross"} if other or values.get("cloning_epochs") else {}
    rate = {"student_rate": None} if values.get("relative_rate") else {}
    return Setting(**{**values, **start, **rate})


def some(fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


def test_every_field_is_drawn() -> None:
    assert {*TEACHER, *STUDENT} == {field.name for field in dataclasses.fields(Setting)}


# --- refusals


@pytest.mark.parametrize(
    ("field", "known"),
    [
        ("network", "mlp, cnn"),
        ("activation", "relu, tanh, gelu, sigmoid, identity"),
        ("init_law", "lecun_normal, he_normal, glorot_uniform, torch"),
        ("optimizer", "adam, sgd, momentum"),
        ("start", "shared, cross, perturbed, perturbed_hidden, interpolated, shared_heads, shared_hidden"),
        ("sees", "aux, all, classes"),
        ("cloning_sees", "aux, all, classes"),
        ("channel_loss", "kl, mse"),
        ("inputs", "uniform, uniform_8bit, gaussian, blocks, blurred, digits"),
        ("cloning_inputs", "uniform, uniform_8bit, gaussian, blocks, blurred, digits"),
    ],
)
@pytest.mark.parametrize("name", ["nonsense", ""])
def test_unknown_names(field: str, known: str, name: str) -> None:
    with pytest.raises(InputError, match=f"^{field} {name!r} is unknown; there are {known}$"):
        Setting(**{field: name})
    for each in known.split(", "):
        assert getattr(Setting(**{field: each}), field) == each


@pytest.mark.parametrize(("field", "least"), [("width", 1), ("depth", 0), ("aux", 1), ("epochs", 1)])
@pytest.mark.parametrize("below", [1, 5])
def test_numbers_below_their_least(field: str, least: int, below: int) -> None:
    message = f"^{field} must be at least {least}, got {least - below}$"
    with pytest.raises(InputError, match=message):
        Setting(**{field: least - below})
    assert getattr(Setting(**{field: least}), field) == least


@pytest.mark.parametrize("field", ["teacher_epochs", "learning_rate", "student_rate", "relative_rate"])
@pytest.mark.parametrize("value", [0, -0.5, math.inf, math.nan])
def test_numbers_above_zero(field: str, value: float) -> None:
    with pytest.raises(InputError, match=f"^{field} must be positive and finite, got {value}$"):
        Setting(**{field: value})
    assert getattr(Setting(**{field: 0.05}), field) == 0.05


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0),
        ("batch_size", -1),
        ("images", -1),
        ("cloning_epochs", -1),
        ("student_network", "nonsense"),
        ("student_depth", -1),
        ("student_width", 0),
        ("student_activation", "nonsense"),
        ("student_optimizer", "nonsense"),
    ],
)
def test_bad_values_of_the_student_and_of_batches(field: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"\b{field} .*{re.escape(repr(value))}"):
        Setting(**{"start": "cross", field: value})


@pytest.mark.parametrize("shown", [0, -1, 4])
def test_shown_out_of_range(shown: int) -> None:
    with pytest.raises(InputError, match=f"^shown must be between 1 and aux = 3, got {shown}$"):
        Setting(aux=3, shown=shown)
    assert [Setting(aux=3, shown=m).shown for m in (1, 2, 3)] == [1, 2, 3]


OTHER: list[dict[str, Any]] = [
    {"student_network": "cnn"},
    {"student_depth": 1},
    {"student_depth": 0},
    {"student_width": 255},
    {"student_activation": "tanh"},
    {"student_bias": False},
    {"bias": False, "student_bias": True},
]


@pytest.mark.parametrize("start", STARTS)
def test_other_architectures_share_the_output_layer_or_nothing(start: str) -> None:
    for changes in OTHER:
        if start in ("cross", "shared_heads"):
            assert Setting(start=start, **changes).other_architecture
            continue
        with pytest.raises(InputError) as caught:
            Setting(start=start, **changes)
        assert str(caught.value) == (
            "a student of another architecture shares no more than the output layer: "
            "set start to 'cross' or 'shared_heads'"
        )
    alike = {"depth": 2, "width": 256, "activation": "relu", "bias": True, "network": "mlp"}
    same = Setting(start=start, **{f"student_{name}": value for name, value in alike.items()})
    assert not same.other_architecture


@pytest.mark.parametrize("start", [start for start in STARTS if start != "cross"])
def test_cloning_needs_another_start(start: str) -> None:
    message = "^cloning is for a student of another initialisation: set start to 'cross'$"
    with pytest.raises(InputError, match=message):
        Setting(start=start, cloning_epochs=1)
    assert Setting(start="cross", cloning_epochs=1).cloning_epochs == 1


def test_defaults_are_those_of_the_released_script() -> None:
    assert dataclasses.asdict(Setting()) == {
        "data": "mnist", "network": "mlp", "depth": 2, "width": 256, "activation": "relu", "bias": True,
        "init_law": "lecun_normal", "aux": 3, "teacher_epochs": 5, "optimizer": "adam", "learning_rate": 3e-4,
        "validation": False, "batch_size": 1024, "start": "shared", "amount": 0.0, "student_network": None,
        "student_depth": None, "student_width": None, "student_activation": None, "student_bias": None,
        "cloning_epochs": 0, "cloning_inputs": "uniform", "cloning_sees": "all", "sees": "aux", "shown": None,
        "channel_loss": "kl", "inputs": "uniform", "images": None, "epochs": 5, "student_optimizer": None,
        "student_rate": None, "relative_rate": None,
    }  # fmt: skip


# --- what is shared between settings


@given(some(TEACHER), some(STUDENT), some(STUDENT))
def test_teacher_only(teacher: dict[str, Any], first: dict[str, Any], second: dict[str, Any]) -> None:
    """It keeps all of the teacher and nothing of the student."""
    only = valid({**teacher, **first}).teacher_only()
    assert only == Setting(**teacher) == valid({**teacher, **second}).teacher_only()
    assert only.teacher_only() == only
    assert hash(only) == hash(Setting(**teacher))


@given(some({**TEACHER, **SHAPES, **ARCHITECTURE}), some(VALUES), some(VALUES), st.floats(1e-6, 10))
def test_shapes_only_forgets_values(
    kept: dict[str, Any], first: dict[str, Any], second: dict[str, Any], rate: float
) -> None:
    one, other = valid({**kept, **first}), valid({**kept, **second, "learning_rate": rate})
    assert one.shapes_only() == other.shapes_only()
    assert one.shapes_only().shapes_only() == one.shapes_only()


KEPT = {name: draw for name, draw in {**TEACHER, **SHAPES, **ARCHITECTURE}.items() if name != "learning_rate"}


@given(some({**TEACHER, **STUDENT}), st.sampled_from(list(KEPT)), st.data())
def test_shapes_only_keeps_the_rest(values: dict[str, Any], field: str, data: st.DataObject) -> None:
    """Settings of which one compiled function cannot serve both stay apart."""
    setting = valid(values)
    value = data.draw(KEPT[field].filter(lambda value: value != getattr(setting, field)))
    other = valid({**values, field: value})
    assert other.shapes_only() != setting.shapes_only()
    assert {name: getattr(other.shapes_only(), name) for name in KEPT} == {
        name: getattr(other, name) for name in KEPT
    }


# Of what a stack of students needs, all but how its teacher came about.
STACK = {
    name: draw for name, draw in KEPT.items() if name not in ("teacher_epochs", "optimizer", "student_optimizer")
}


@given(some({**STACK, **VALUES}), some(TEACHER), st.sampled_from(list(OPTIMIZERS)), some(VALUES))
def test_student_shapes(
    values: dict[str, Any], teacher: dict[str, Any], optimizer: str, second: dict[str, Any]
) -> None:
    """Students with equal optimizers train as one stack, whichever way the optimizer is given."""
    taught = {name: teacher[name] for name in ("teacher_epochs", "learning_rate") if name in teacher}
    one = valid({**values, "optimizer": optimizer})
    others = {"optimizer": teacher.get("optimizer", "adam"), "student_optimizer": optimizer}
    other = valid({**values, **second, **taught, **others})
    assert one.student_shapes() == other.student_shapes() == one.student_shapes().student_shapes()
    assert one.student_shapes().optimizer == optimizer
    apart = valid({**values, "optimizer": optimizer, "student_optimizer": {"adam": "sgd"}.get(optimizer, "adam")})
    assert apart.student_shapes() != one.student_shapes()


@given(some({**TEACHER, **STUDENT}), st.sampled_from(list(STACK)), st.data())
def test_student_shapes_keeps_the_rest(values: dict[str, Any], field: str, data: st.DataObject) -> None:
    setting = valid(values)
    value = data.draw(STACK[field].filter(lambda value: value != getattr(setting, field)))
    other = valid({**values, field: value})
    assert other.student_shapes() != setting.student_shapes()
    kept = {name: getattr(other.student_shapes(), name) for name in STACK}
    assert kept == {name: getattr(other, name) for name in STACK}


RUN_LATER = {name: SHAPES[name] for name in ("inputs", "images", "epochs")}


@given(some({**TEACHER, **STUDENT}), st.integers(1, 5), st.integers(1, 5), some(RUN_LATER), st.sampled_from(SHOWN))
def test_cloning(values: dict[str, Any], first: int, second: int, later: dict[str, Any], shown: str) -> None:
    """One run clones all students that differ only in how long, and in what comes after it."""
    cloned = {**values, "cloning_inputs": shown}
    one = valid({**cloned, "cloning_epochs": first}).cloning()
    assert one == valid({**cloned, **later, "cloning_epochs": second}).cloning()
    assert (one.inputs, one.images, one.cloning_epochs) == (shown, None, 0)
    assert one.sees == valid(values).cloning_sees
    assert one.teacher_only() == valid(values).teacher_only()
    for name in ("shown", "channel_loss", "student_optimizer", "student_rate", *ARCHITECTURE):
        assert getattr(one, name) == getattr(valid(values), name)


@given(some({**TEACHER, **STUDENT}))
def test_student_architecture(values: dict[str, Any]) -> None:
    setting = valid(values)
    network = setting.student_architecture()
    assert not network.other_architecture
    for name in NAMES:
        own = values.get(f"student_{name}")
        assert getattr(network, name) == (getattr(setting, name) if own is None else own)
    rest = {name for name in (*TEACHER, *STUDENT) if name.removeprefix("student_") not in NAMES}
    assert {name: getattr(network, name) for name in rest} == {name: getattr(setting, name) for name in rest}


@given(st.floats(1e-6, 10), st.none() | st.floats(1e-6, 10))
def test_rate(teachers: float, students: float | None) -> None:
    setting = Setting(learning_rate=teachers, student_rate=students)
    assert setting.rate == (teachers if students is None else students)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_relative_rate(optimizer: str) -> None:
    """Multiples of the student's own optimiser's reference rate, whatever the teacher's."""
    own = Setting(optimizer=optimizer, learning_rate=7, relative_rate=0.5)
    other = Setting(student_optimizer=optimizer, learning_rate=7, relative_rate=0.5)
    assert own.rate == other.rate == REFERENCE_RATES[optimizer] / 2
    with pytest.raises(
        InputError, match=r"^student_rate and relative_rate are both given: leave one of the two out$"
    ):
        Setting(student_rate=1, relative_rate=1)


def test_cells() -> None:
    cell = Cell({"condition": "a"}, Setting())
    assert (cell.who, cell.seeds, cell.metrics) == ("student", None, ("test_accuracy",))
    assert METRICS == ("test_accuracy", "imitation_loss", "validation_accuracy")
    assert Cell({}, Setting(validation=True), "teacher", metrics=METRICS[2:]).setting.accuracy == METRICS[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"who": "nobody"}, "a cell's who must be one of student, teacher, reference, got 'nobody'"),
        ({"metrics": ("speed",)}, "a student has no metric 'speed'; there are test_accuracy, imitation_loss"),
        ({"who": "teacher", "metrics": ("imitation_loss",)}, "a teacher has no metric 'imitation_loss'; "),
        ({"metrics": METRICS[2:]}, "a student has no metric 'validation_accuracy'; there are test_accuracy, imit"),
        (
            {"setting": Setting(validation=True)},
            "a student has no metric 'test_accuracy'; there are validation_accuracy, imitation_loss",
        ),
    ],
)
def test_bad_cells(arguments: dict, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Cell({"condition": "a"}, **{"setting": Setting(), **arguments})
    assert str(caught.value).startswith(message)
