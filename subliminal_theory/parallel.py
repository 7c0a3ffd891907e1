"""Run `distill` on many devices: a mesh, a sharding rule for each parameter, and batches split over the mesh.

    mesh = make_mesh(data=1, fsdp=8, tensor=1)
    student, teacher, source = place(student, mesh), place(teacher, mesh), Sharded(replicate(source, mesh), mesh)
    optimizer = sharded_optimizer(optax.adamw(1e-5), mesh)
    train = jax.jit(lambda *given: distill(*given[:2], SoftLogits(), given[2], optimizer, 100, key=given[3]))
    run = train(student, teacher, source, replicate(jax.random.key(0), mesh))

A mesh has three axes. Along `data`, each device has a copy of the model and its own rows. Along `fsdp`, each
device has its own rows and a shard of every matrix, which is gathered where it is used (arXiv 2304.11277). Along
`tensor`, all devices have the same rows, and each computes a part of every product (arXiv 1909.08053). With
several processes, start `jax.distributed` first. `jax.devices()` then lists the devices of all processes, and
every process runs the same program.
"""

import fnmatch
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Key, PyTree

from subliminal_theory.errors import InputError
from subliminal_theory.model import Model, leaves_by_path, path_name
from subliminal_theory.pytree import register_dataclass
from subliminal_theory.source import Batch, Source

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the axes over which a batch is split

# Embeddings are split only by rows. If columns were split over `fsdp` too, the compiler would split all
# activations by columns and gather their rows before each product; it should gather matrices.
_TABLES: dict[str, P] = {
    "embedding": P(("tensor", "fsdp"), None),
    "positions": P(None, None),
    "head/kernel": P("fsdp", "tensor"),
}
# Of one layer: those of all layers have one more axis in front, which is not split.
_MATRICES: dict[str, P] = {
    **{f"layers/*/attention/{name}/kernel": P("fsdp", "tensor") for name in ("query", "key", "value")},
    **{f"layers/*/mlp/{name}/kernel": P("fsdp", "tensor") for name in ("gate", "up")},
    "layers/*/attention/output/kernel": P("tensor", "fsdp"),
    "layers/*/mlp/down/kernel": P("tensor", "fsdp"),
}
_VECTORS: dict[str, P] = {
    "layers/*_norm/scale": P(None),
    "layers/*_norm/bias": P(None),
    **{f"layers/*/attention/{name}/bias": P("tensor") for name in ("query", "key", "value")},
    **{f"layers/*/mlp/{name}/bias": P("tensor") for name in ("gate", "up")},
    "layers/*/attention/output/bias": P(None),
    "layers/*/mlp/down/bias": P(None),
}


def _adapted(rules: dict[str, P]) -> dict[str, P]:
    """The rules of matrices, and of their low-rank form W + A B with A [inputs, rank] and B [rank, outputs]."""
    return {
        **rules,
        **{f"{name}/base": spec for name, spec in rules.items()},
        **{f"{name}/a": P(*spec[:-1], None) for name, spec in rules.items()},
        **{f"{name}/b": P(*spec[:-2], None, spec[-1]) for name, spec in rules.items()},
    }


def _of_all(rules: dict[str, P]) -> dict[str, P]:
    return {name: P(None, *spec) for name, spec in rules.items()}


_APART = {**_VECTORS, **_adapted(_MATRICES)}
# From glob patterns of parameters' paths to the mesh axes of their dimensions. Each path matches exactly one.
RULES: dict[str, P] = {
    "norm/scale": P(None),
    "norm/bias": P(None),
    "steering": P(None, None),
    **_adapted(_TABLES),
    "embedding/rows": P(None, None),
    **_of_all(_VECTORS),
    **_adapted(_of_all(_MATRICES)),
    # Layers that are apart, where only some of them train.
    **{f"{name}/[0-9]*": spec for name, spec in _APART.items()},
}


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of data x fsdp x tensor devices. By default it takes all devices of all processes.

    Raises:
        InputError: a size is below 1, or the product of the sizes is not the number of devices.
    """
    found = list(jax.devices() if devices is None else devices)
    sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    said = " x ".join(f"{name} {size}" for name, size in sizes.items())
    if min(sizes.values()) < 1:
        raise InputError(f"make_mesh: sizes must be at least 1, got {said}")
    if math.prod(sizes.values()) != len(found):
        raise InputError(
            f"make_mesh: {said} is {math.prod(sizes.values())} devices, and there are {len(found)}: "
            "choose sizes whose product is the number of devices"
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=found)


def spec_of(name: str, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """How `RULES` split a parameter with this path and shape over the axes of a mesh.

    A dimension is split only by axes that divide it evenly. The split may cut through an attention head. The
    result is the same, but it needs more communication, so choose a `tensor` that divides the number of key heads.

    Raises:
        InputError: no rule matches the path, or more than one does, or the rule is for another number of
            dimensions.
    """
    found = [spec for pattern, spec in RULES.items() if fnmatch.fnmatchcase(name, pattern)]
    if len(found) != 1:
        raise InputError(f"parameter {name!r} matches {len(found)} of the RULES of sharding: give it one rule")
    if len(found[0]) != len(shape):
        raise InputError(
            f"parameter {name!r} of shape {tuple(shape)} has a rule of sharding for {len(found[0])} dimensions: "
            "place one model at a time, no ensemble"
        )
    split = [_dividing(axes, size, mesh) for axes, size in zip(found[0], shape, strict=True)]
    while split and split[-1] is None:
        split.pop()  # compiled functions return it like this, and equal placements must compare equal
    return P(*split)


def _dividing(axes: Any, size: int, mesh: Mesh | AbstractMesh) -> Any:
    chosen: list[str] = []
    for axis in (axes,) if isinstance(axes, str) else axes or ():
        ways = math.prod(mesh.shape[name] for name in (*chosen, axis))
        if mesh.shape[axis] > 1 and size % ways == 0:
            chosen.append(axis)
    return tuple(chosen) if len(chosen) > 1 else chosen[0] if chosen else None


def placement(mesh: Mesh) -> Callable[[str, Sequence[int]], NamedSharding]:
    """A function from a parameter's path and shape to its sharding; `load_checkpoint` takes such a function."""
    return lambda name, shape: NamedSharding(mesh, spec_of(name, shape, mesh))


def place(model: Model, mesh: Mesh) -> Model:
    """Place a model's parameters, including the frozen ones, on the devices of a mesh.

    Every process must have the same model. Low-rank factors are split as the rules of their matrix say.

    Raises:
        InputError: see `spec_of`.
    """
    where = placement(mesh)

    def put(params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: _put(leaf, where(path_name(path), leaf.shape)), params
        )

    return replace(model, params=put(model.params), frozen=put(model.frozen))


def place_runs(models: Model, mesh: Mesh) -> Model:
    """Place an ensemble [runs] that shares its frozen parameters. Each run is split over the mesh as one model.

    Raises:
        InputError: see `spec_of`.
    """

    def one(path: Any, leaf: Array) -> Array:
        spec = spec_of(path_name(path), leaf.shape[1:], mesh)
        return jax.device_put(leaf, NamedSharding(mesh, P(None, *spec)))

    placed = place(replace(models, params=None), mesh)
    return placed.with_params(jax.tree_util.tree_map_with_path(one, models.params))


def split_rows(tree: PyTree, mesh: Mesh) -> PyTree:
    """Split every leaf by rows over `data` and `fsdp`, or replicate it if its rows do not divide evenly."""
    ways = math.prod(mesh.shape[axis] for axis in ROWS)

    def one(leaf: Array) -> Array:
        return jax.device_put(leaf, NamedSharding(mesh, P(ROWS if leaf.shape[0] % ways == 0 else None)))

    return jax.tree.map(one, tree)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Put all of every leaf of a pytree (stored examples, keys, a placed model) on every device.

    A leaf that is not yet on all devices must be the same in every process. Afterward every process can read the
    whole pytree, as `save_checkpoint` needs.
    """
    return jax.tree.map(lambda leaf: _put(leaf, NamedSharding(mesh, P())), tree)


def _put(leaf: Any, sharding: NamedSharding) -> Array:
    everywhere = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    if sharding.is_fully_addressable or everywhere:
        return jax.device_put(leaf, sharding)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    # Avoid device_put: it sends the whole array over the network to compare it between processes.
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


@register_dataclass
@dataclass(frozen=True)
class Sharded:
    """A source whose batches are split by rows over the axes `data` and `fsdp` of a mesh.

    The schedule and the stored examples stay on every device (`replicate`), because token ids need little memory
    and any device may draw any of them. The rows and their order are those of the wrapped source.
    """

    source: Source
    mesh: Mesh = field(metadata={"static": True})

    def schedule(self, key: Key[Array, ""], steps: int) -> PyTree:
        """The schedule of the wrapped source."""
        return self.source.schedule(key, steps)

    def batch(self, key: Key[Array, ""], entry: PyTree) -> Batch:
        """The batch of the wrapped source, split by rows.

        Raises:
            InputError: its rows cannot be split evenly.
        """
        ways = math.prod(self.mesh.shape[axis] for axis in ROWS)
        by_rows = NamedSharding(self.mesh, P(ROWS))

        def split(leaf: Array) -> Array:
            if leaf.shape[0] % ways:
                raise InputError(
                    f"Sharded: a batch of {leaf.shape[0]} rows cannot be split over data x fsdp = {ways} devices: "
                    f"take a multiple of {ways}"
                )
            return jax.lax.with_sharding_constraint(leaf, by_rows)

        return jax.tree.map(split, self.source.batch(key, entry))


def shardings_like(tree: PyTree, params: PyTree, mesh: Mesh) -> PyTree:
    """The sharding of every leaf that belongs to a parameter; None for other leaves.

    A leaf belongs to a parameter if its path ends in the parameter's path and the shapes are equal.
    """
    where, shapes = placement(mesh), {name: leaf.shape for name, leaf in leaves_by_path(params).items()}

    def one(path: Any, leaf: Any) -> NamedSharding | None:
        parts = path_name(path).split("/")
        names = ["/".join(parts[start:]) for start in range(len(parts))]
        name = next((name for name in names if name in shapes), None)
        return None if name is None or leaf.shape != shapes[name] else where(name, leaf.shape)

    return jax.tree_util.tree_map_with_path(one, tree)


def constrain(tree: PyTree, params: PyTree, mesh: Mesh) -> PyTree:
    """Inside a compiled function, split every leaf that belongs to a parameter as that parameter is split."""

    def one(leaf: Array, sharding: NamedSharding | None) -> Array:
        return leaf if sharding is None else jax.lax.with_sharding_constraint(leaf, sharding)

    return jax.tree.map(one, tree, shardings_like(tree, params, mesh))


def sharded_optimizer(optimizer: optax.GradientTransformation, mesh: Mesh) -> optax.GradientTransformation:
    """The same optimizer, with its state and updates split over the mesh as the parameters are.

    A leaf of the state belongs to a parameter if its path ends in the parameter's path and the shapes are equal.
    The compiler places the other leaves, such as step counts. Without this wrapper, the compiler places the whole
    state. Inside `distill` it has so far split the state as the parameters, but `optimizer.init` alone creates
    whole arrays on one device.
    """

    def init(params: PyTree) -> PyTree:
        return constrain(optimizer.init(params), params, mesh)

    def update(gradient: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
        # Without parameters, use the gradients: they have the same paths and shapes.
        like = gradient if params is None else params
        return constrain(optimizer.update(constrain(gradient, like, mesh), state, params), like, mesh)

    return optax.GradientTransformation(init, update)
