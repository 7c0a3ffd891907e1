"""A model is a pure function and two pytrees: its trainable and its frozen parameters."""

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PyTree

from subliminal_theory.errors import InputError
from subliminal_theory.pytree import register_dataclass

Apply = Callable[[PyTree, PyTree], Float[Array, "..."]]


@register_dataclass
@dataclass(frozen=True)
class Model:
    """`apply(params, inputs) -> logits` with trainable parameters `params` and frozen parameters `frozen`.

    `apply` is static. Give the same function (or one that compares equal) for the same network; otherwise JAX
    compiles again. `frozen` is None, or a pytree with the structure of `params` that has an array exactly where
    `params` has None.
    """

    apply: Apply = field(metadata={"static": True})
    params: PyTree
    frozen: PyTree = None

    def __call__(self, inputs: PyTree) -> Float[Array, "..."]:
        """Logits [batch, ..., n] of inputs [batch, ...]."""
        return self.apply(self.all_params, inputs)

    @property
    def all_params(self) -> PyTree:
        """Trainable and frozen parameters in one pytree."""
        if self.frozen is None:
            return self.params
        return join(self.params, self.frozen)

    def with_params(self, params: PyTree) -> "Model":
        """The same model with other trainable parameters."""
        return replace(self, params=params)

    def freeze(self, *patterns: str) -> "Model":
        """Stop training the parameters whose path, such as `layers/0/kernel`, matches a glob pattern.

        Raises:
            InputError: a pattern matches no parameter.
        """
        everything = self.all_params
        match_paths(everything, patterns)
        already = leaves_by_path(self.frozen)

        def frozen(path: Any) -> bool:
            return path_name(path) in already or matches(path, patterns)

        split = jax.tree_util.tree_map_with_path
        return Model(
            self.apply,
            split(lambda path, leaf: None if frozen(path) else leaf, everything),
            split(lambda path, leaf: leaf if frozen(path) else None, everything),
        )


def split_trainable(params: PyTree) -> tuple[PyTree, PyTree]:
    """Split parameters into those with a gradient and the rest. Each tree has None where the other has a leaf.

    Integers, booleans and random keys have no gradient.
    """

    def pick(wanted: bool) -> PyTree:
        return jax.tree.map(lambda leaf: leaf if _has_gradient(leaf) == wanted else None, params)

    return pick(True), pick(False)


def join(one: PyTree, other: PyTree) -> PyTree:
    """Merge two pytrees, each with None where the other has a leaf."""
    return jax.tree.map(lambda a, b: b if a is None else a, one, other, is_leaf=lambda leaf: leaf is None)


def _has_gradient(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype if hasattr(leaf, "dtype") else np.result_type(leaf), jnp.inexact)


def path_name(path: Any) -> str:
    """The name of a leaf, such as `layers/0/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def matches(path: Any, patterns: Sequence[str]) -> bool:
    """Whether the name of a leaf matches at least one of the glob patterns."""
    return any(fnmatch.fnmatchcase(path_name(path), pattern) for pattern in patterns)


def leaves_by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves of a pytree by name, in the order of the pytree."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def match_paths(params: PyTree, patterns: Sequence[str]) -> None:
    """Refuse a glob pattern that matches no parameter.

    Raises:
        InputError: names the pattern and all parameters.
    """
    names = list(leaves_by_path(params))
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise InputError(f"pattern {pattern!r} matches no parameter; there are {', '.join(names)}")


@runtime_checkable
class BodyAndHead(Protocol):
    """An `apply` in two parts: logits = readout(params, features(params, inputs)).

    `readout` treats each position on its own.
    """

    def features(self, params: PyTree, inputs: PyTree) -> Float[Array, "batch ... width"]: ...

    def readout(self, params: PyTree, features: Float[Array, "... width"]) -> Float[Array, "... n"]: ...


@dataclass(frozen=True)
class Functional:
    """The pure function of an NNX module, computed in `dtype`. Modules of equal structure give equal functions.

    `factored` and `gathered` are glob patterns of parameters. A `factored` matrix may be given as low-rank
    factors. The module looks up rows of a `gathered` matrix and rounds those rows itself, so the gradient of the
    matrix is summed over the lookups before it is rounded.
    """

    graph: nnx.GraphDef
    factored: tuple[str, ...] = ()
    gathered: tuple[str, ...] = ()
    dtype: Any = None

    def module(self, params: PyTree) -> Any:
        """The module with its parameters rounded to `dtype`."""
        return nnx.merge(self.graph, nnx.State(self.rounded(params, self.gathered)))

    def rounded(self, params: PyTree, but: Sequence[str] = ()) -> PyTree:
        """Parameters rounded to `dtype`, except those that match a pattern in `but`."""
        if self.dtype is None:
            return params

        def one(path: Any, leaf: Array) -> Array:
            kept = matches(path, but) or not jnp.issubdtype(leaf.dtype, jnp.floating)
            return leaf if kept else leaf.astype(self.dtype)

        return jax.tree_util.tree_map_with_path(one, params)

    def __call__(self, params: PyTree, inputs: PyTree) -> Float[Array, "..."]:
        return self.module(params)(inputs)


@dataclass(frozen=True)
class _InTwoParts(Functional):
    """The pure function of an NNX module that has a body and a head."""

    def features(self, params: PyTree, inputs: PyTree) -> Float[Array, "batch ... width"]:
        return self.module(params).features(inputs)

    def readout(self, params: PyTree, features: Float[Array, "... width"]) -> Float[Array, "... n"]:
        return self.module(params).readout(features)


def from_nnx(module: nnx.Module) -> Model:
    """Split an NNX module into a pure function and a nested dictionary of parameters.

    Raises:
        InputError: the module has variables that are not parameters (batch statistics, dropout keys). A pure
            `apply(params, inputs)` cannot update them.
    """
    graph, params, rest = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]
    if jax.tree.leaves(rest):
        names = sorted(leaves_by_path(nnx.to_pure_dict(rest)))
        raise InputError(f"{type(module).__name__} holds state besides its parameters: {', '.join(names)}")
    kind = _InTwoParts if hasattr(module, "features") and hasattr(module, "readout") else Functional
    patterns = (getattr(module, name, ()) for name in ("factored", "gathered"))
    return Model(kind(graph, *patterns), nnx.to_pure_dict(params))


def computed_in(model: Model, dtype: Any) -> Model:
    """The same model computed in another dtype, such as bfloat16. The parameters keep their dtype.

    Every call rounds the parameters. Gradients have the dtype of the parameters, so small updates are not lost.
    Add low-rank factors after this call.

    Raises:
        InputError: the model was not made by `from_nnx`, or has low-rank factors.
    """
    if not isinstance(model.apply, Functional):
        raise InputError("computed_in needs a model of from_nnx; add low-rank factors afterwards")
    return replace(model, apply=replace(model.apply, dtype=jnp.dtype(dtype)))


def rounded(model: Model) -> Model:
    """The model with its parameters rounded to the dtype it computes in, so that a loop rounds them only once."""
    if not isinstance(model.apply, Functional):
        return model
    round_to = model.apply.rounded
    return replace(model, params=round_to(model.params), frozen=round_to(model.frozen))
