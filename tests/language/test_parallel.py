"""Sharded training against one device, with 8 virtual devices and in 2 processes; the rules of every family.

Run as a program, this file is what the tests start: a process has its number of devices from its start on.
"""

import dataclasses
import functools
import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from subliminal_theory.channel import SampledToken, SoftLogits
from subliminal_theory.distill import distill
from subliminal_theory.errors import InputError
from subliminal_theory.language.hub.checkpoint import load_checkpoint, skeleton
from subliminal_theory.language.hub.families import read_family
from subliminal_theory.language.model.config import TransformerConfig
from subliminal_theory.language.model.lora import add_lora
from subliminal_theory.language.model.transformer import Text
from subliminal_theory.model import Model, path_name
from subliminal_theory.parallel import (
    AXES,
    RULES,
    Sharded,
    make_mesh,
    place,
    placement,
    replicate,
    sharded_optimizer,
    spec_of,
)
from subliminal_theory.source import Examples
from tests.golden.make_families import FILE
from tests.language.models import drawn, opinionated

GOLDEN = json.loads(FILE.read_text())

LLAMA = TransformerConfig(
    vocabulary=80, layers=2, width=32, heads=4, kv_heads=2, head_width=8, mlp_width=48, tied=False, context=16
)
NEOX = dataclasses.replace(
    LLAMA, kv_heads=4, norm="layer", parallel=True, gated=False, activation="gelu", rope_width=2,
    attention_bias=True, output_bias=True, mlp_bias=True,
)  # fmt: skip
CONFIGS = {"llama": LLAMA, "neox": NEOX, "tied": dataclasses.replace(LLAMA, tied=True)}
STEPS, ROWS, COLUMNS = 5, 40, 12
OPTIMIZER = optax.adamw(1e-2)


# --- what the processes compute


def setting(case: str) -> tuple[Model, Model | None, Any, Examples]:
    """Student, teacher, channel and source of `CONFIG soft`, `CONFIG sampled` or `CONFIG lora`."""
    name, kind = case.split()
    student, teacher = opinionated(CONFIGS[name], 0), opinionated(CONFIGS[name], 1)
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, 80, (2, ROWS, COLUMNS)).astype(np.int32)
    padding = rng.integers(0, 4, ROWS).astype(np.int32)
    positions = (np.arange(COLUMNS) >= padding[:, None]).astype(np.float32)
    source = Examples(Text(tokens, padding), 16, positions=positions)  # type: ignore[arg-type]
    if kind == "sampled":
        return student, None, SampledToken(), dataclasses.replace(source, targets=targets)
    if kind == "lora":
        student = add_lora(student, ["layers/*/kernel"], 4, 8.0, jax.random.key(2))
        # Factors b of 0 would leave half of the gradients 0, and Adam makes large steps of what rounds to 0.
        draw = lambda _, shape: jnp.asarray(rng.normal(0, shape[0] ** -0.5, shape), jnp.float32)  # noqa: E731
        student = student.with_params(drawn(student.params, draw))
    return student, teacher, SoftLogits(), source


def spelled(sharding: Any) -> list[Any] | str:
    """The axes of each dimension, without the text of a class that differs between versions."""
    if not isinstance(sharding, NamedSharding):
        return str(sharding)
    return [list(axes) if isinstance(axes, tuple) else axes for axes in sharding.spec]


def pieces(tree: Any) -> dict[str, Any]:
    """Whole shape, shape on one device and specification of every leaf."""
    return {
        path_name(path): [leaf.shape, leaf.addressable_shards[0].data.shape, spelled(leaf.sharding)]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def measured(case: str, sizes: list[int] | None) -> dict[str, Any]:
    """Losses of a run, and what was where; on one device if there are no sizes."""
    student, teacher, channel, source = setting(case)
    key = jax.random.key(0)
    if sizes is None:
        train = jax.jit(lambda *given: distill(*given[:2], channel, given[2], OPTIMIZER, STEPS, key=given[3]))
        return {"losses": train(student, teacher, source, key).losses.tolist()}
    mesh = make_mesh(*sizes)
    seen: dict[str, Any] = {}

    def update(gradient: Any, state: Any, params: Any) -> Any:
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            note = functools.partial(lambda name, at: seen.update({name: spelled(at)}), path_name(path))
            jax.debug.inspect_array_sharding(leaf, callback=note)
        return OPTIMIZER.update(gradient, state, params)

    optimizer = sharded_optimizer(optax.GradientTransformation(OPTIMIZER.init, update), mesh)
    train = jax.jit(lambda *given: distill(*given[:2], channel, given[2], optimizer, STEPS, key=given[3]))
    student, teacher = place(student, mesh), None if teacher is None else place(teacher, mesh)
    source, key = Sharded(replicate(source, mesh), mesh), replicate(key, mesh)
    train = train.lower(student, teacher, source, key).compile()
    run = train(student, teacher, source, key)
    whole = replicate(run.model.params, mesh)
    return {
        "losses": run.losses.tolist(),
        "norm": float(np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(whole)))),
        "given": pieces(student),
        "made": pieces(run.model),
        "state": seen,
        "initial": pieces(jax.jit(optimizer.init)(student.params)),
        "gathered": re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", train.as_text()),
    }


def loaded(folder: str, sizes: list[int]) -> dict[str, Any]:
    """A checkpoint that went straight to its shards: where it is, and its logits."""
    mesh = make_mesh(*sizes)
    model = load_checkpoint(Path(folder), placement=placement(mesh)).model
    text = Text(jnp.arange(24).reshape(2, 12), jnp.zeros(2, jnp.int32))
    logits = jax.jit(lambda model, text: model(text))(model, replicate(text, mesh))
    return {"given": pieces(model), "logits": np.asarray(replicate(logits, mesh)).tolist()}


def main(request: dict[str, Any]) -> None:
    """Print what was measured, as JSON, from process 0."""
    if "coordinator" in request:
        jax.distributed.initialize(
            request["coordinator"], 2, request["process"], coordinator_bind_address=request["coordinator"]
        )
    elif "SLURM_JOB_ID" in os.environ:
        jax.distributed.initialize()
    found: dict[str, Any] = {"devices": [jax.local_device_count(), jax.device_count()]}
    for case, sizes in request["runs"]:
        found[f"{case} {sizes}"] = measured(case, sizes)
    if "folder" in request:
        found["loaded"] = loaded(request["folder"], request["sizes"])
    if jax.process_index() == 0:
        print(json.dumps(found))


# --- what they are compared with


def llama_folder(folder: Path) -> Path:
    # Imported here: it uses a device, and processes must have met before.
    from tests.language.test_checkpoint import folder_of

    return folder_of("llama", folder)


def launch(
    devices: int, request: dict[str, Any], variables: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        **(variables or {}),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, "-m", "tests.language.test_parallel", json.dumps(request)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> Any:
    try:
        output, errors = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    # The library between processes prints too.
    found = [line for line in output.splitlines() if line.startswith("{")]
    return json.loads(found[0]) if found else None


def same_losses(found: dict[str, Any], case: str, sizes: Any) -> None:
    sharded, alone = found[f"{case} {sizes}"]["losses"], found[f"{case} None"]["losses"]
    assert min(abs(np.diff(alone))) > 1e-3
    np.testing.assert_allclose(sharded, alone, rtol=0, atol=1e-5)


MESHES = ([8, 1, 1], [2, 4, 1], [2, 2, 2], [1, 1, 8])
CASES = [
    ("llama soft", [2, 4, 1]), ("llama soft", [1, 1, 8]), ("neox sampled", [8, 1, 1]), ("neox sampled", [2, 2, 2])
]  # fmt: skip
SLOW_CASES = [
    (f"{config} {channel}", sizes)
    for config in CONFIGS
    for channel in ("soft", "sampled")
    for sizes in MESHES
    if (f"{config} {channel}", sizes) not in CASES
]
SLOW_CASES += [("llama lora", [2, 2, 2]), ("neox lora", [1, 8, 1])]


def with_references(cases: list[tuple[str, list[int]]]) -> list[tuple[str, list[int] | None]]:
    return [*((case, None) for case in dict.fromkeys(case for case, _ in cases)), *cases]


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All that is computed on 8 devices."""
    folder = llama_folder(tmp_path_factory.mktemp("checkpoint"))
    return answer(launch(8, {"runs": with_references(CASES), "folder": str(folder), "sizes": [2, 2, 2]}))


@pytest.mark.slow
@pytest.mark.parametrize(("case", "sizes"), CASES)
def test_losses_are_those_of_one_device(eight: dict[str, Any], case: str, sizes: list[int]) -> None:
    assert eight["devices"] == [8, 8]
    same_losses(eight, case, sizes)


@pytest.mark.slow
def test_parameters_are_split(eight: dict[str, Any]) -> None:
    given = eight["neox sampled [2, 2, 2]"]["given"]
    assert given["params/embedding"] == [[80, 32], [20, 32], [["tensor", "fsdp"]]]
    assert given["params/head/kernel"] == [[32, 80], [16, 40], ["fsdp", "tensor"]]
    assert given["params/layers/*/attention/query/kernel"][:2] == [[2, 32, 32], [2, 16, 16]]
    assert given["params/layers/*/mlp/down/kernel"] == [[2, 48, 32], [2, 24, 16], [None, "tensor", "fsdp"]]
    assert given["params/layers/*/mlp/up/bias"][:2] == [[2, 48], [2, 24]]
    assert given["params/norm/scale"] == [[32], [32], []]
    assert eight["llama soft [1, 1, 8]"]["given"]["params/layers/*/attention/key/kernel"][:2] == [
        [2, 32, 16],
        [2, 32, 2],
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "sizes"), CASES)
def test_every_matrix_is_split_by_all_that_can(eight: dict[str, Any], case: str, sizes: list[int]) -> None:
    given = eight[f"{case} {sizes}"]["given"]
    shapes = [(whole, own) for name, (whole, own, _) in given.items() if not name.endswith(("scale", "bias"))]
    assert len(shapes) >= 7
    for whole, own in shapes:
        assert math.prod(whole) == math.prod(own) * sizes[1] * sizes[2]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "sizes"), CASES)
def test_what_is_made_lies_as_what_was_given(eight: dict[str, Any], case: str, sizes: list[int]) -> None:
    """Parameters after the run, and the state of the optimizer at its start and inside of it."""
    found = eight[f"{case} {sizes}"]
    given = {name.removeprefix("params/"): at for name, at in found["given"].items() if "params/" in name}
    assert found["made"] == found["given"]
    state = {name: spec for name, spec in found["state"].items() if "/" in name.removeprefix("0/")}
    assert len(state) == len(found["initial"]) - 1 == 2 * len(given)
    for name, at in found["initial"].items():
        if name == "0/count":
            continue
        own = given[name.split("/", 2)[2]]
        assert at == own
        assert state[name] == own[2]


@pytest.mark.slow
def test_matrices_are_gathered_and_activations_are_not(eight: dict[str, Any]) -> None:
    found = eight["llama soft [2, 4, 1]"]
    given = found["given"].items()
    matrices = {tuple(sorted(whole[-2:])) for name, (whole, *_) in given if not name.endswith(("scale", "bias"))}
    gathered = [[int(size) for size in shape.split(",")] for shape in found["gathered"]]
    assert all(math.prod(shape[:-2]) == 1 for shape in gathered)  # of one layer at a time
    assert {tuple(sorted(shape[-2:])) for shape in gathered} == matrices


@pytest.mark.slow
def test_checkpoint_goes_straight_to_its_shards(eight: dict[str, Any], tmp_path: Path) -> None:
    found = eight["loaded"]
    assert found["given"]["params/layers/*/mlp/down/kernel"][:2] == [[2, 48, 32], [2, 24, 16]]
    model = load_checkpoint(llama_folder(tmp_path)).model
    text = Text(jnp.arange(24).reshape(2, 12), jnp.zeros(2, jnp.int32))
    np.testing.assert_allclose(found["logits"], model(text), atol=1e-4)


@pytest.mark.slow
def test_more_losses_are_those_of_one_device() -> None:
    found = answer(launch(8, {"runs": with_references(SLOW_CASES)}))
    for case, sizes in SLOW_CASES:
        same_losses(found, case, sizes)
        assert found[f"{case} {sizes}"]["made"] == found[f"{case} {sizes}"]["given"]
    lora = found["llama lora [2, 2, 2]"]["given"]
    assert lora["frozen/layers/*/mlp/down/kernel/base"][:2] == [[2, 48, 32], [2, 24, 16]]
    assert lora["params/layers/*/mlp/down/kernel/a"][:2] == [[2, 48, 4], [2, 24, 4]]
    assert lora["params/layers/*/mlp/down/kernel/b"][:2] == [[2, 4, 32], [2, 4, 16]]


def answers_of(processes: list[subprocess.Popen[str]]) -> list[Any]:
    try:
        return [answer(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def free_port(first: int = 0, last: int = 0) -> int:
    for port in range(first, last + 1):
        try:
            with socket.create_server(("127.0.0.1", port)) as server:
                return server.getsockname()[1]
        except OSError:
            continue
    raise AssertionError("no port is free")


@pytest.mark.slow
def test_losses_of_two_processes(tmp_path: Path) -> None:
    cases = [("llama soft", [2, 4, 1]), ("neox sampled", [2, 2, 2]), ("llama lora", [1, 4, 2])]
    request: dict[str, Any] = {"runs": cases, "coordinator": f"127.0.0.1:{free_port()}", "sizes": [1, 8, 1]}
    request["folder"] = str(llama_folder(tmp_path / "checkpoint"))
    found, nothing = answers_of([launch(4, {**request, "process": number}) for number in range(2)])
    assert nothing is None
    assert found["devices"] == [4, 8]
    assert found["loaded"]["given"]["params/head/kernel"][:2] == [[32, 50], [4, 50]]
    alone = answer(launch(1, {"runs": [(case, None) for case, _ in cases]}))
    for case, sizes in cases:
        same_losses({**found, **alone}, case, sizes)
        assert found[f"{case} {sizes}"]["made"] == found[f"{case} {sizes}"]["given"]


@pytest.mark.slow
def test_processes_find_each_other_by_the_variables_of_slurm() -> None:
    port = free_port(61440, 65535)  # which follows from the number of the job
    variables = {
        "SLURM_JOB_ID": str(port - 61440), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
        "JAX_COORDINATOR_BIND_ADDRESS": f"localhost:{port}",
    }  # fmt: skip
    own = [{"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)} for number in range(2)]
    request = {"runs": [("llama soft", [2, 2, 1])]}
    found, nothing = answers_of([launch(2, request, {**variables, **process}) for process in own])
    assert nothing is None
    assert found["devices"] == [2, 4]
    same_losses({**found, **answer(launch(1, {"runs": [("llama soft", None)]}))}, "llama soft", [2, 2, 1])


# --- rules, and what is refused


def abstract(*sizes: int) -> AbstractMesh:
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize("family", GOLDEN)
def test_every_parameter_of_a_family_has_a_rule(family: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GOLDEN[family]["config"]))
    model = skeleton(read_family(tmp_path))
    adapted = jax.eval_shape(
        lambda model: add_lora(model, ["*/kernel", "embedding"], 2, 4.0, jax.random.key(0)), model
    )
    mesh, split = abstract(2, 2, 2), 0
    for tree in (model.params, adapted.params, adapted.frozen):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            spec = spec_of(path_name(path), leaf.shape, mesh)
            assert len(spec) <= leaf.ndim
            split += leaf.ndim >= 2 and spec != P()
    assert split > 2 * len(jax.tree.leaves(adapted.frozen)) / 3


@pytest.mark.parametrize(
    ("name", "shape", "sizes", "spec"),
    [
        ("layers/*/attention/key/kernel", (2, 32, 16), (1, 4, 2), P(None, "fsdp", "tensor")),
        ("layers/*/attention/key/kernel", (4, 32, 6), (1, 4, 4), P(None, "fsdp")),
        ("layers/*/attention/key/kernel/0", (30, 16), (1, 4, 4), P(None, "tensor")),
        ("layers/*/attention/key/kernel/11", (30, 6), (1, 4, 4), P()),
        ("layers/*/attention/key/kernel", (8, 32, 16), (8, 1, 1), P()),
        ("embedding", (80, 32), (1, 4, 2), P(("tensor", "fsdp"))),
        ("embedding", (82, 32), (1, 4, 2), P("tensor")),
        ("embedding", (84, 32), (1, 4, 8), P("fsdp")),
        ("embedding", (81, 32), (1, 4, 2), P()),
        ("layers/*/mlp/down/kernel/a", (2, 48, 4), (1, 4, 2), P(None, "tensor")),
        ("layers/*/mlp/down/kernel/b/0", (4, 32), (1, 4, 2), P(None, "fsdp")),
        ("layers/*/attention/query_norm/scale", (2, 8), (1, 4, 2), P()),
    ],
)
def test_dimensions_that_do_not_divide_stay_whole(
    name: str, shape: tuple[int, ...], sizes: tuple[int, int, int], spec: P
) -> None:
    assert spec_of(name, shape, abstract(*sizes)) == spec


def test_no_two_rules_are_for_one_path() -> None:
    for pattern in RULES:
        spec_of(
            pattern.replace("*_norm", "*/mlp_post_norm").replace("[0-9]*", "7"),
            (8,) * len(RULES[pattern]),
            abstract(1, 1, 1),
        )


def refused(*arguments: Any, what: Any) -> str:
    with pytest.raises(InputError) as caught:
        what(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_refuses() -> None:
    said = refused(2, 3, 1, what=make_mesh)
    assert said.startswith(
        f"make_mesh: data 2 x fsdp 3 x tensor 1 is 6 devices, and there are {jax.device_count()}:"
    )
    assert "at least 1, got data 1 x fsdp 0 x tensor 1" in refused(1, 0, 1, what=make_mesh)
    assert "'layers/0/experts' matches 0 of" in refused("layers/0/experts", (4,), abstract(1, 1, 1), what=spec_of)
    stacked = ("head/kernel", (3, 32, 80), abstract(1, 1, 1))
    assert "of shape (3, 32, 80) has a rule" in refused(*stacked, what=spec_of)


def test_refuses_rows_that_cannot_be_split() -> None:
    _, teacher, channel, source = setting("llama soft")
    split = Sharded(source, abstract(2, 3, 1))  # type: ignore[arg-type]
    run = (teacher, teacher, channel, split, OPTIMIZER, 1)
    assert refused(*run, what=functools.partial(distill, key=jax.random.key(0))).startswith(
        "Sharded: a batch of 16 rows cannot be split over data x fsdp = 6"
    )


@pytest.mark.slow
def test_one_device_is_a_mesh_too() -> None:
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    student, _, _, source = setting("llama soft")
    assert place(student, mesh).frozen is None
    half = student.freeze("embedding", "layers/0/*")
    for ours, theirs in ((place(half, mesh), half), (replicate(source, mesh), source)):
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert one.sharding == NamedSharding(mesh, P())
            np.testing.assert_array_equal(one, other)
    entry = jax.tree.map(lambda leaf: leaf[0], source.schedule(jax.random.key(0), 1))
    ours, theirs = (s.batch(jax.random.key(0), entry) for s in (Sharded(source, mesh), source))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(one, other)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
