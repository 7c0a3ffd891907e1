"""Fills parameters from tensors, layer by layer, and puts them on devices."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from subliminal_theory.language.hub.tensor_map import Entry
from subliminal_theory.language.hub.tensors import release
from subliminal_theory.model import names_of, path_name

_ALIGNED, _THREADS = 64, 4


def filled(
    like: PyTree, entries: Sequence[Entry], tensors: Mapping[str, Any], dtype: Any, placement: Any
) -> PyTree:
    """Parameters with the paths and shapes of `like`, read from tensors; `placement` as in `load_checkpoint`."""
    leaves = jax.tree_util.tree_leaves_with_path(like)
    shapes = {path_name(path): leaf.shape for path, leaf in leaves}
    whole = {name: path_name(path) for path, leaf in leaves for name in names_of(path, leaf)}
    # Each group has the tensors that go into the same parameters, one for each layer.
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        groups.setdefault(tuple(whole[name] for name in entry.ours), []).append(entry)
    found: dict[str, jax.Array] = {}
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for names, some in groups.items():
            places = [placement(name, shapes[name]) if callable(placement) else placement for name in names]
            kind = {"layers": names != some[0].ours, "turned": some[0].transposed}
            parts = [_Filled(shapes[name], dtype, to, **kind) for name, to in zip(names, places, strict=True)]

            def read(layer: int, some: list[Entry] = some, parts: list[_Filled] = parts) -> None:
                tensor = np.asarray(tensors[some[layer].theirs])
                for own, part in zip(parts, some[layer].take_apart(tensor), strict=True):
                    own.fill(layer, part)
                release(tensor)

            list(pool.map(read, range(len(some))))
            found |= {name: own.put() for name, own in zip(names, parts, strict=True)}
    return jax.tree_util.tree_map_with_path(lambda path, _: found[path_name(path)], like)


class _Filled:
    """A parameter in host memory, with an array for each device's share. It is filled and then put on the devices.

    With `layers` the first axis is the axis of layers. With `turned` the file stores the outputs as the slower
    axis; the arrays on the host then have the same layout.
    """

    def __init__(self, shape: Sequence[int], dtype: Any, place: Any, *, layers: bool, turned: bool) -> None:
        self.shape, self.place, self.layers = tuple(shape), place, layers
        self.turned = turned and len(shape) > 1 + layers
        shares: Any = [(place, tuple(slice(0, size) for size in shape))]
        if isinstance(place, jax.sharding.Sharding):  # each process only has its own shares
            shares = place.addressable_devices_indices_map(self.shape).items()
        self.shares = [(device, index, self._room(index, dtype)) for device, index in shares]

    def _room(self, index: Sequence[slice], dtype: Any) -> np.ndarray:
        sides = [len(range(*own.indices(size))) for own, size in zip(index, self.shape, strict=True)]
        return _empty([*sides[:-2], *sides[:-3:-1]] if self.turned else sides, np.dtype(dtype))

    def fill(self, layer: int, part: np.ndarray) -> None:
        """Fill one layer of the parameter, or all of it if it has no axis of layers."""
        for _, index, room in self.shares:
            own, to = index, room
            if self.layers:
                held = range(*index[0].indices(self.shape[0]))
                if layer not in held:
                    continue
                own, to = index[1:], room[held.index(layer)]
            share = part[tuple(own)]
            to[...] = share.T if self.turned else share

    def put(self) -> jax.Array:
        """The parameter on its devices. Call this once: it gives up the arrays on the host."""
        pieces = [_put(room, device, self.turned) for device, _, room in self.shares]
        self.shares = []
        if not isinstance(self.place, jax.sharding.Sharding):
            return pieces[0]
        return jax.make_array_from_single_device_arrays(self.shape, self.place, pieces)


def _put(room: np.ndarray, device: Any, turned: bool) -> jax.Array:
    if not turned:
        return jax.device_put(room, device)
    if jax.default_backend() == "cpu":  # the copy transposes it
        return jax.device_put(np.swapaxes(room, -1, -2), device).block_until_ready()
    # The device transposes it: NumPy takes several times as long.
    return _turn(jax.device_put(room, device)).block_until_ready()


@jax.jit
def _turn(leaf: jax.Array) -> jax.Array:
    return jnp.swapaxes(leaf, -1, -2)


def _empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An array with an alignment that lets a CPU device use it without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    room = np.empty(size + _ALIGNED, np.uint8)
    start = -room.ctypes.data % _ALIGNED
    return room[start : start + size].view(dtype).reshape(shape)
