"""Where a student starts: a policy per layer, relative to the teacher's initialisation.

    initialise(PerLayer.of({"layers/2/*": Shared(), "*": Fresh()}), reference, fresh, key)

shares the output layer and draws the rest anew. The first pattern that matches a parameter's path decides.
Policies are pytrees: their amounts are leaves, so policies of one structure stack and run under one `vmap`.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from subliminal_theory.errors import InputError
from subliminal_theory.keys import named
from subliminal_theory.model import match_paths, path_name
from subliminal_theory.pytree import register_dataclass


@runtime_checkable
class Policy(Protocol):
    """Makes a student's parameter from the teacher's initial one and an independent draw of it."""

    def __call__(
        self, key: Key[Array, ""], reference: Float[Array, "..."], fresh: Float[Array, "..."]
    ) -> Float[Array, "..."]: ...


@register_dataclass
@dataclass(frozen=True)
class Shared:
    """The teacher's initial parameter itself."""

    def __call__(self, key: Key[Array, ""], reference: Array, fresh: Array) -> Array:
        """`reference`."""
        return reference


@register_dataclass
@dataclass(frozen=True)
class Fresh:
    """An independent draw."""

    def __call__(self, key: Key[Array, ""], reference: Array, fresh: Array) -> Array:
        """`fresh`."""
        return fresh


@register_dataclass
@dataclass(frozen=True)
class Perturbed:
    """reference + sigma * rms(fresh) * N(0, 1): noise in units of the parameter's own initial scale.

    Parameters that start at 0, such as biases, stay there.
    """

    sigma: PyTree

    def __call__(self, key: Key[Array, ""], reference: Array, fresh: Array) -> Array:
        """The perturbed parameter."""
        scale = jnp.sqrt(jnp.mean(jnp.square(fresh)))
        return reference + self.sigma * scale * jax.random.normal(key, reference.shape, reference.dtype)


@register_dataclass
@dataclass(frozen=True)
class Interpolated:
    """(1 - t) reference + t fresh; its scale is smaller between than at the ends."""

    t: PyTree

    def __call__(self, key: Key[Array, ""], reference: Array, fresh: Array) -> Array:
        """The point t of the way."""
        return (1 - self.t) * reference + self.t * fresh


@register_dataclass
@dataclass(frozen=True)
class PerLayer:
    """A policy for each of some glob patterns of parameter paths, such as `layers/0/*`; the first match decides.

    The order matters, so this is no dictionary: JAX sorts the keys of dictionaries.

    Raises:
        InputError: the numbers of patterns and policies differ.
    """

    patterns: tuple[str, ...] = field(metadata={"static": True})
    policies: PyTree

    def __post_init__(self) -> None:
        if isinstance(self.policies, Sequence) and len(self.policies) != len(self.patterns):
            raise InputError(f"PerLayer: {len(self.patterns)} patterns and {len(self.policies)} policies")

    @classmethod
    def of(cls, rules: Mapping[str, Policy]) -> "PerLayer":
        """The rules of a mapping, in its order."""
        return cls(tuple(rules), tuple(rules.values()))


def initialise(
    policy: Policy | PerLayer | Mapping[str, Policy], reference: PyTree, fresh: PyTree, key: Key[Array, ""]
) -> PyTree:
    """Parameters of a student from its teacher's initial ones and an independent draw of the same shape.

    `policy` is one policy for all parameters, or one for each pattern of their paths.

    Raises:
        InputError: a pattern matches no parameter, or a parameter is matched by no pattern.
    """
    if isinstance(policy, Mapping):
        policy = PerLayer.of(policy)
    rules = policy if isinstance(policy, PerLayer) else PerLayer(("*",), (policy,))
    match_paths(reference, rules.patterns)

    def one(path: Any, old: Array, new: Array) -> Array:
        name = path_name(path)
        for pattern, rule in zip(rules.patterns, rules.policies, strict=True):
            if fnmatch.fnmatchcase(name, pattern):
                return rule(named(key, name), old, new)
        raise InputError(f"no initialisation policy for parameter {name}: add a rule, or '*' for the rest")

    return jax.tree_util.tree_map_with_path(one, reference, fresh)
