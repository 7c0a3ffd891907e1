"""Dataclasses as pytrees."""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

from jax.tree_util import GetAttrKey, register_pytree_with_keys

T = TypeVar("T")


def register_dataclass(kind: type[T]) -> type[T]:
    """Make a dataclass a pytree. Its fields are leaves, except those with `metadata={"static": True}`.

    Use this instead of `jax.tree_util.register_dataclass`, also for your own channels. In JAX 0.10.2 that function
    can treat the structures of two classes with equal fields as equal. In about one of a hundred processes, a
    compiled function then runs the program of one class for the other.
    """
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    static = [field.name for field in fields if field.metadata.get("static")]
    leaves = [field.name for field in fields if not field.metadata.get("static")]
    keys = [GetAttrKey(name) for name in leaves]

    def flatten(value: T) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(value, name) for name in leaves), tuple(getattr(value, name) for name in static)

    def flatten_with_keys(value: T) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
        children, fixed = flatten(value)
        return tuple(zip(keys, children, strict=True)), fixed

    def unflatten(fixed: Iterable[Any], children: Iterable[Any]) -> T:
        return kind(**dict(zip(leaves, children, strict=True)), **dict(zip(static, fixed, strict=True)))

    register_pytree_with_keys(kind, flatten_with_keys, unflatten, flatten)
    return kind
