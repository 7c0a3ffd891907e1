import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.flags import digits
from experiments.flags.digits import METRICS, STARTS, Cell, Setting, SweepConfig, run_cells
from experiments.flags.names import LOSSES, OPTIMIZERS, REFERENCE_RATES
from subliminal_theory.channel import SoftLogits, SquaredError, TopK
from subliminal_theory.divergence import JensenShannon, ReverseKL
from subliminal_theory.errors import InputError
from subliminal_theory.inits import Fresh, Interpolated, PerLayer, Perturbed, Shared
from subliminal_theory.study import FineTuned, Network, Optimizer, Run, TrainingImages, Untrained, identity
from subliminal_theory.study.run import once
from tests.experiments.commands import fails, run
from tests.study.small import untrained

BASE = Setting(data="digits", depth=1, width=16, aux=4, teacher_epochs=3, epochs=2, batch_size=128)
NAMES = {
    "network": "mlp cnn",
    "activation": "relu tanh gelu sigmoid identity",
    "init_law": "lecun_normal he_normal glorot_uniform torch",
    "optimizer": "adam sgd momentum sign",
    "start": "shared cross perturbed perturbed_hidden interpolated shared_heads shared_hidden",
    "sees": "aux all classes",
    "cloning_sees": "aux all classes",
    "channel_loss": "kl mse reverse_kl js top_k",
    "inputs": "uniform uniform_8bit gaussian blocks blurred digits",
    "cloning_inputs": "uniform uniform_8bit gaussian blocks blurred digits",
    "student_network": "mlp cnn",
    "student_activation": "relu tanh gelu sigmoid identity",
    "student_optimizer": "adam sgd momentum sign",
}


def cell(condition: str, who: str = "student", **changes: Any) -> Cell:
    return Cell({"condition": condition}, dataclasses.replace(BASE, **changes), who)


def student(**changes: Any) -> Any:
    setting = dataclasses.replace(BASE, **changes)
    return setting.run(setting.world()).student


# --- refusals


@pytest.mark.parametrize("field", NAMES)
def test_unknown_names_list_what_there_is(field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = NAMES[field].split()
    for name in known:
        assert getattr(Setting(**{"start": "cross", field: name}), field) == name
    with pytest.raises(InputError, match=r"'.*' is unknown"):
        Setting(**{field: ""})
    line = fails(
        capsys, "mnist_factorial", "--data", "digits", "--axes", f"{field}=nonsense", "--out", tmp_path / "run"
    )
    assert all(word in line for word in ("'nonsense' is unknown", field.split("_")[0], *known))


@pytest.mark.parametrize(
    ("names", "good", "bad"),
    [
        ("width aux epochs batch_size student_width", 1, (0, -5)),
        ("depth images cloning_epochs student_depth amount", 0, (-1,)),
        ("teacher_epochs learning_rate student_rate relative_rate", 0.05, (0, -0.5, math.inf, math.nan)),
        ("shown", 3, (0, -1, 5)),
    ],
)
def test_numbers_out_of_range(names: str, good: float, bad: Sequence[float]) -> None:
    for name, value in itertools.product(names.split(), bad):
        assert getattr(dataclasses.replace(BASE, start="cross", **{name: good}), name) == good
        with pytest.raises(InputError, match=rf"{name.replace('_', '.')} .*{value}"):
            dataclasses.replace(BASE, start="cross", **{name: value})


OTHER_NETWORKS: list[dict[str, Any]] = [
    {"student_network": "cnn"}, {"student_depth": 2}, {"student_depth": 0}, {"student_width": 255},
    {"student_activation": "tanh"}, {"student_bias": False}, {"bias": False, "student_bias": True},
]  # fmt: skip


@pytest.mark.parametrize("start", STARTS)
def test_other_networks_share_the_output_layer_or_nothing(start: str) -> None:
    for changes in OTHER_NETWORKS:
        if start in ("cross", "shared_heads"):
            assert dataclasses.replace(BASE, start=start, **changes).other_network is not None
            continue
        with pytest.raises(InputError, match=r"another architecture.*'shared_heads'"):
            dataclasses.replace(BASE, start=start, **changes)
    alike = {"depth": 1, "width": 16, "activation": "relu", "bias": True, "network": "mlp"}
    same = dataclasses.replace(BASE, start=start, **{f"student_{name}": value for name, value in alike.items()})
    assert same.other_network is None


@pytest.mark.parametrize("start", [start for start in STARTS if start != "cross"])
def test_cloning_needs_another_start(start: str) -> None:
    with pytest.raises(InputError, match="cloning is for a student with another"):
        Setting(start=start, cloning_epochs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"who": "nobody"}, "'nobody' is unknown; there are student, teacher, reference"),
        ({"metrics": ("speed",)}, "'speed' is unknown; there are test_accuracy, imitation_loss"),
        ({"who": "teacher", "metrics": ("imitation_loss",)}, "a teacher's metric 'imitation_loss'"),
        ({"metrics": METRICS[2:]}, "'validation_accuracy' is unknown"),
        ({"setting": Setting(validation=True)}, "'test_accuracy' is unknown; there are validation_accuracy"),
    ],
)
def test_bad_cells(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Cell({"condition": "a"}, **{"setting": Setting(), **arguments})
    assert Cell({}, Setting(validation=True), "teacher", metrics=METRICS[2:]).setting.accuracy == METRICS[2]


# --- names become values


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


def test_starts() -> None:
    heads = ("layers/1/*", "*")
    expected = {
        "shared": Shared(), "cross": Fresh(), "perturbed": Perturbed(0.5), "interpolated": Interpolated(0.5),
        "perturbed_hidden": PerLayer(heads, (Shared(), Perturbed(0.5))),
        "shared_heads": PerLayer(heads, (Shared(), Fresh())),
        "shared_hidden": PerLayer(heads, (Fresh(), Shared())),
    }  # fmt: skip
    assert {name: student(start=name, amount=0.5).start for name in STARTS} == expected
    assert student(start="shared_heads", student_depth=3).start.patterns == ("layers/3/*", "*")


def test_runs() -> None:
    world = BASE.world((3, 4))
    assert (world.seeds, world.auxiliary, world.batch_size, world.metric) == ((3, 4), 4, 128, "test_accuracy")
    assert world.network == Network(depth=1, width=16)
    teacher = FineTuned(Optimizer(3e-4), 36)
    assert BASE.run(world, "reference") == Run(Untrained())
    assert BASE.run(world, "teacher") == Run(teacher)
    whole = BASE.run(world, may_diverge=True)
    assert identity(whole) == identity(Run(teacher, student(), may_diverge=True))
    assert (student().steps, student().network, student().cloned) == (24, None, None)
    assert student(start="cross", student_network="cnn").network == Network(True, 1, 16)


def test_sources() -> None:
    world = BASE.world()
    for changes, source, steps in (
        ({}, world.noise(), 24),
        ({"images": 5, "inputs": "blocks"}, world.noise("blocks", 5), 2),
        ({"images": 0}, world.noise(fresh=True), 24),
        ({"inputs": "digits"}, TrainingImages(), 24),
    ):
        assert (student(**changes).source, student(**changes).steps) == (source, steps)
    cloned = student(start="cross", images=5, cloning_epochs=3, cloning_inputs="gaussian").cloned
    assert (cloned.source, cloned.steps) == (world.noise("gaussian"), 36)


@given(
    first=st.integers(1, 5),
    second=st.integers(1, 5),
    later=st.fixed_dictionaries({}, optional={"inputs": st.sampled_from(["gaussian", "digits"]),
                                              "images": st.integers(0, 9), "epochs": st.integers(1, 9)}),
)  # fmt: skip
def test_one_cloning_run_serves_many_students(first: int, second: int, later: dict[str, Any]) -> None:
    """Those that differ only in how long they clone, and in what comes after it."""
    one = student(start="cross", cloning_epochs=first).cloned
    other = student(start="cross", cloning_epochs=second, **later).cloned
    assert identity(once(one)) == identity(once(other))
    apart = student(start="cross", cloning_epochs=first, cloning_sees="aux").cloned
    assert identity(once(apart)) != identity(once(one))


@given(st.floats(1e-6, 10), st.none() | st.floats(1e-6, 10))
def test_rate(teachers: float, students: float | None) -> None:
    setting = Setting(learning_rate=teachers, student_rate=students)
    assert setting.rate == (teachers if students is None else students)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_relative_rate(optimizer: str) -> None:
    """Multiples of the student's own optimizer's reference rate, whatever the teacher's."""
    settings = [
        {"optimizer": optimizer, "learning_rate": 7, "relative_rate": 0.5},
        {"student_optimizer": optimizer, "learning_rate": 7, "relative_rate": 0.5},
    ]
    if optimizer in REFERENCE_RATES:
        assert {Setting(**setting).rate for setting in settings} == {REFERENCE_RATES[optimizer] / 2}
    else:
        with pytest.raises(InputError, match="'sign' is unknown; there are adam, sgd, momentum"):
            _ = Setting(**settings[0]).rate
    with pytest.raises(InputError, match="student_rate and relative_rate"):
        Setting(student_rate=1, relative_rate=1)


# --- what students see


@pytest.mark.parametrize("loss", [*LOSSES, "top_k:3", "kl:2"])
def test_visible_logits(loss: str) -> None:
    def seen(**changes: Any) -> list[int]:
        return np.flatnonzero(student(channel_loss=loss, **changes).channel.visible(14)).tolist()

    for m in range(3, 5):
        assert seen(sees="aux", shown=m) == list(range(10, 10 + m))
        assert seen(sees="all", shown=m) == list(range(10 + m))
        assert seen(sees="classes", shown=m) == list(range(10))
    assert [len(seen(sees=sees)) for sees in ("aux", "all", "classes")] == [4, 14, 10]
    kinds = {"kl": SoftLogits(), "mse": SquaredError(), "reverse_kl": ReverseKL(), "js": JensenShannon()}
    kinds |= {"top_k": TopK(2), "top_k:3": TopK(3), "kl:2": SoftLogits(2)}
    assert student(channel_loss=loss).channel.of == kinds[loss]


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_every_channel_trains_from_the_command_line(loss: str, tmp_path: Path) -> None:
    small = ["--data", "digits", "--seeds", 1, "--epochs", 1, "--student-epochs", 1, "--batch-size", 256]
    wide = ["--depth", 1, "--width", 32, "--aux", 4, "--learning-rate", 0.01]
    rows = run(tmp_path / "run", "mnist", *small, *wide, "--channel-loss", loss)
    read = {row["condition"]: float(row["value"]) for row in rows}
    assert len(read) == len(rows) == 6
    assert read["student_all"] > read["reference"]
    assert read["student_aux"] != read["reference"]


# --- one teacher for its students, one stack for students of one structure

OTHER: dict[str, Any] = {
    "data": "mnist", "network": "cnn", "depth": 2, "width": 17, "activation": "tanh", "bias": False,
    "init_law": "torch", "aux": 5, "teacher_epochs": 4, "optimizer": "sgd", "learning_rate": 1e-3,
    "validation": True, "batch_size": 64, "start": "perturbed", "amount": 0.5, "student_network": "cnn",
    "student_depth": 2, "student_width": 8, "student_activation": "tanh", "student_bias": False,
    "cloning_epochs": 1, "cloning_inputs": "gaussian", "cloning_sees": "aux", "sees": "all", "shown": 2,
    "channel_loss": "mse", "inputs": "gaussian", "images": 9, "epochs": 3, "student_optimizer": "sgd",
    "student_rate": 0.5, "relative_rate": 0.5,
}  # fmt: skip
FIELDS = [field.name for field in dataclasses.fields(Setting)]
OF_THE_TEACHER = FIELDS[: FIELDS.index("start")]
# What decides the program of a student, or the images that it is shown.
STATIC = [*(name for name in FIELDS if name.startswith("student_") and name != "student_rate"),
          "channel_loss", "inputs", "images"]  # fmt: skip
ELSEWHERE = {name: {"start": "cross"} for name in FIELDS if name.startswith(("student_", "cloning"))}


@pytest.mark.parametrize("field", FIELDS)
def test_students_share_their_teacher(field: str) -> None:
    assert OTHER.keys() == set(FIELDS)
    setting = dataclasses.replace(BASE, **ELSEWHERE.get(field, {}), **{field: OTHER[field]})
    other = Cell({}, setting, metrics=(setting.accuracy,))
    assert len(SweepConfig(seeds=1).parts([cell("base"), other])) == (2 if field in OF_THE_TEACHER else 1)


@pytest.mark.slow
def test_students_that_differ_in_values_alone_are_one_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = [name for name in FIELDS if name not in (*OF_THE_TEACHER, "cloning_inputs", "cloning_sees")]
    cells = [cell(name, **{**ELSEWHERE.get(name, {}), name: OTHER[name]}) for name in fields]
    seen = untrained(monkeypatch)
    run_cells([cell("base"), *cells], (0,))
    assert seen.teachers == 1
    found = [[dict(name)["condition"] for name in stack] for stack in seen.stacks[1:]]  # after that of cloning
    # `amount` alone changes nothing, so that student and the base are a look at the longer run of `epochs`.
    leaves = {name for name in fields if name not in (*STATIC, "amount", "epochs")}
    assert [{*stack} for stack in found if len(stack) > 1] == [leaves]
    assert sorted(name for stack in found if len(stack) == 1 for name in stack) == sorted([*STATIC, "epochs"])


# --- parts


def planned(cells: Sequence[Cell], seeds: range, chunk: int) -> list[tuple[str, int, list[Cell], list[int]]]:
    """Names, sizes, cells and seeds of parts; nothing is trained."""
    calls: list[tuple[Sequence[Cell], Sequence[int], str | None]] = []

    def record(cells: Sequence[Cell], seeds: Sequence[int], data_dir: str | None = None) -> list[Any]:
        calls.append((cells, seeds, data_dir))
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "run_cells", record)
        config = SweepConfig(data_dir="folder", seeds=len(seeds), first_seed=seeds[0], chunk=chunk)
        found = config.parts(cells)
        assert not calls  # all is yet to be computed
        assert all(part.compute() == [] for part in found)
    assert all(data_dir == "folder" for *_, data_dir in calls)
    return [(p.name, p.size, list(c), list(s)) for p, (c, s, _) in zip(found, calls, strict=True)]


def test_cells_of_one_teacher_are_one_part() -> None:
    cells = [cell("teacher", "teacher"), cell("a"), cell("b", start="cross", epochs=7), cell("c", inputs="blocks")]
    assert planned(cells, range(3, 8), 2) == [
        ("seeds-00003", 2, cells, [3, 4]), ("seeds-00005", 2, cells, [5, 6]), ("seeds-00007", 1, cells, [7]),
    ]  # fmt: skip
    narrow, wide, long = cell("narrow"), cell("wide", width=20), cell("long", teacher_epochs=4)
    other = cell("other", start="cross", width=20)
    assert planned([narrow, wide, long, other], range(2), 1) == [
        (f"teacher-00{number}-seeds-0000{seed}", 1, group, [seed])
        for number, group in enumerate([[narrow], [wide, other], [long]])
        for seed in range(2)
    ]


@pytest.mark.parametrize("first", [0, 40])
def test_cells_on_the_first_seeds(first: int) -> None:
    """Parts that begin after a cell's last seed do without it, wherever the seeds begin."""
    every, few = cell("every"), dataclasses.replace(cell("few"), seeds=3)
    seeds = range(first, first + 6)
    assert planned([every, few], seeds, 2) == [
        (f"seeds-{first + place:05d}", 2, [every, few], [first + place, first + place + 1]) for place in (0, 2, 4)
    ]
    assert [chosen for *_, chosen in planned([few], seeds, 2)] == [[first, first + 1], [first + 2, first + 3]]


def test_rows_are_told_seed_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a cell on the first seeds only there."""
    untrained(monkeypatch)
    few = dataclasses.replace(cell("few"), seeds=3, metrics=METRICS[1::-1])
    for first, conditions in ((2, ["every", "few", "few"]), (3, ["every"])):
        found = run_cells([cell("every", "teacher"), few], (first, 7))
        assert [(row["seed"], row["condition"]) for row in found] == [
            (seed, condition) for seed in (first, 7) for condition in conditions
        ]
        assert found[1]["metric"] == METRICS[first == 2]


SETTINGS = st.builds(
    lambda **changes: dataclasses.replace(BASE, **changes),
    width=st.integers(1, 3),
    optimizer=st.sampled_from(["adam", "sgd"]),
    start=st.sampled_from(list(STARTS)),
    epochs=st.integers(1, 3),
)


@given(st.lists(SETTINGS, min_size=1, max_size=8), st.integers(1, 9), st.integers(1, 10))
def test_parts_hold_every_cell_and_seed_once(settings: list[Setting], seeds: int, chunk: int) -> None:
    cells = [Cell({"condition": f"cell {number}"}, setting) for number, setting in enumerate(settings)]
    found = planned(cells, range(seeds), chunk)
    held = [(one.labels["condition"], seed) for _, _, group, chosen in found for one in group for seed in chosen]
    assert sorted(held) == sorted((one.labels["condition"], seed) for one in cells for seed in range(seeds))
    assert all(size == len(chosen) <= chunk for _, size, _, chosen in found)
    taught = [{(one.setting.width, one.setting.optimizer) for one in group} for _, _, group, _ in found]
    assert all(len(teachers) == 1 for teachers in taught)
    whole = [(*teachers, *chosen) for teachers, (*_, chosen) in zip(taught, found, strict=True)]
    assert len({*whole}) == len({name for name, *_ in found}) == len(found)


def test_no_cell_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to run"):
        SweepConfig().parts([])
