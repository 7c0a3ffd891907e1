"""Where a student starts: a policy per layer, relative to the teacher's initialization.

    initialise(PerLayer.of({"layers/2/*": Shared(), "*": Fresh()}), reference, fresh, key)

shares layer 2 and draws the other layers again. The first pattern that matches a parameter's path decides.
Policies are pytrees whose numbers are leaves, so policies of one structure stack and run under one `vmap`.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key, PyTree

from subliminal_theory.channel import Channel
from subliminal_theory.distill import Trained, distill
from subliminal_theory.errors import InputError
from subliminal_theory.keys import named
from subliminal_theory.model import Model, match_paths, names_of, of_layers
from subliminal_theory.pytree import register_dataclass
from subliminal_theory.source import Source


@runtime_checkable
class Policy(Protocol):
    """Makes a student's parameter from the teacher's initial parameter and an independent draw."""

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
    """(1 - t) reference + t fresh. The scale of the parameters is smaller for 0 < t < 1 than at the ends."""

    t: PyTree

    def __call__(self, key: Key[Array, ""], reference: Array, fresh: Array) -> Array:
        """The point at t between `reference` (t = 0) and `fresh` (t = 1)."""
        return (1 - self.t) * reference + self.t * fresh


@register_dataclass
@dataclass(frozen=True)
class PerLayer:
    """One policy for each glob pattern of parameter paths, such as `layers/0/*`. The first match decides.

    The order matters, so this is not a dictionary: JAX sorts the keys of dictionaries.

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
        """The rules of a mapping from patterns to policies, in its order."""
        return cls(tuple(rules), tuple(rules.values()))


def initialise(
    policy: Policy | PerLayer | Mapping[str, Policy], reference: PyTree, fresh: PyTree, key: Key[Array, ""]
) -> PyTree:
    """A student's initial parameters, made from the teacher's initial parameters and an independent draw.

    `reference` (the teacher's) and `fresh` (the draw) have one structure and equal shapes, as has the result.
    `policy` is one policy for all parameters, or one for each pattern of paths.

    Raises:
        InputError: a pattern matches no parameter, or no pattern matches a parameter.
    """
    if isinstance(policy, Mapping):
        policy = PerLayer.of(policy)
    rules = policy if isinstance(policy, PerLayer) else PerLayer(("*",), (policy,))
    match_paths(reference, rules.patterns)

    def of_name(name: str, old: Array, new: Array) -> Array:
        for pattern, rule in zip(rules.patterns, rules.policies, strict=True):
            if fnmatch.fnmatchcase(name, pattern):
                return rule(named(key, name), old, new)
        raise InputError(f"no initialization policy for parameter {name}: add a rule, or '*' for the rest")

    def one(path: Any, old: Array, new: Array) -> Array:
        names = names_of(path, old)
        return jnp.stack(list(map(of_name, names, old, new))) if of_layers(path) else of_name(names[0], old, new)

    return jax.tree_util.tree_map_with_path(one, reference, fresh)


def permute_neurons(params: PyTree, layers: Sequence[PyTree], key: Key[Array, ""]) -> PyTree:
    """Permute the neurons of every hidden layer at random. The network computes the same function.

    `params["layers"]` maps each layer to its `kernel` [..., inputs, outputs] and an optional `bias`; `layers` are
    its keys in order of computation. If a layer first flattens feature maps, channels must vary fastest.

    Raises:
        InputError: a layer does not exist.
    """
    network = dict(params["layers"])
    missing = [layer for layer in layers if layer not in network]
    if missing:
        raise InputError(f"no layer {missing[0]!r}; there are {list(network)}")
    for here, after in zip(layers[:-1], layers[1:], strict=True):
        neurons = network[here]["kernel"].shape[-1]
        order = jax.random.permutation(named(key, str(here)), neurons)
        network[here] = {name: leaf[..., order] for name, leaf in network[here].items()}
        kernel = network[after]["kernel"]
        grouped = kernel.reshape(*kernel.shape[:-2], -1, neurons, kernel.shape[-1])
        network[after] = {**network[after], "kernel": grouped[..., order, :].reshape(kernel.shape)}
    return {**params, "layers": network}


def clone(
    student: Model,
    reference: Model,
    channel: Channel,
    source: Source,
    optimizer: optax.GradientTransformation,
    steps: int,
    *,
    key: Key[Array, ""],
) -> Trained:
    """Train a student to behave like the untrained teacher.

    This "behavioral matching" distills the untrained `reference`. It cannot match what the channel and the source
    do not show. The arguments and errors are those of `distill`.
    """
    return distill(student, reference, channel, source, optimizer, steps, key=key)
