"""A model is a pure function and two pytrees: its trainable and its frozen parameters.

A parameter with `*` in its name, such as `layers/*/kernel`, belongs to all layers and has a leading axis of them.
Patterns are matched with the names of single layers, `layers/0/kernel`. Where a pattern matches only some of the
layers, the parameter becomes a tuple with one entry for each layer, None for those that are in the other pytree.
"""

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import SequenceKey
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
        already = set(names_in(self.frozen))

        def part(path: Any, leaf: Any, wanted: bool) -> Any:
            names = names_of(path, leaf)
            own = [(name in already or match(name, patterns)) == wanted for name in names]
            if all(own) or not any(own):
                return leaf if own[0] else None
            return tuple(leaf[layer] if chosen else None for layer, chosen in enumerate(own))

        split = jax.tree_util.tree_map_with_path
        return Model(
            self.apply,
            split(lambda path, leaf: part(path, leaf, False), everything),
            split(lambda path, leaf: part(path, leaf, True), everything),
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


def of_layers(path: Any) -> bool:
    """Whether a leaf is a parameter of all layers."""
    return "*" in path_name(path).split("/") and not isinstance(path[-1], SequenceKey)


def names_of(path: Any, leaf: Any, axis: int = 0) -> list[str]:
    """The names of what is in a leaf: its own, or one for each layer along an axis if it is of all layers."""
    parts = path_name(path).split("/")
    if "*" not in parts:
        return ["/".join(parts)]
    layers: Sequence[Any] = range(leaf.shape[axis]) if of_layers(path) else [parts.pop()]
    place = parts.index("*")
    return ["/".join([*parts[:place], str(layer), *parts[place + 1 :]]) for layer in layers]


def shapes_of(tree: PyTree) -> dict[str, tuple[int, ...]]:
    """The shapes of all that is in a pytree by its names, in its order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name: leaf.shape[of_layers(path) :] for path, leaf in leaves for name in names_of(path, leaf)}


def names_in(tree: PyTree) -> list[str]:
    """The names of all that is in a pytree, in its order."""
    return list(shapes_of(tree))


def by_layer(tree: PyTree, axis: int = 0) -> dict[str, Any]:
    """All that is in a pytree of arrays by its names, each layer by its own."""
    found: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        own = leaf.swapaxes(0, axis) if of_layers(path) else [leaf]
        found |= dict(zip(names_of(path, leaf, axis), own, strict=True))
    return found


def together(params: PyTree) -> PyTree:
    """Parameters whose layers are apart as those of all layers, with zeros for the layers that are None."""

    def one(path: Any, node: Any) -> Any:
        if not (isinstance(node, tuple) and of_layers(path)):
            return node
        like = next(leaf for leaf in node if leaf is not None)
        return jnp.stack([jnp.zeros_like(like) if leaf is None else leaf for leaf in node])

    return jax.tree_util.tree_map_with_path(one, params, is_leaf=lambda node: isinstance(node, tuple))


def matches(path: Any, patterns: Sequence[str]) -> bool:
    """Whether the name of a leaf matches at least one of the glob patterns."""
    return match(path_name(path), patterns)


def match(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name matches at least one of the glob patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def leaves_by_path(tree: PyTree) -> dict[str, Any]:
    """The leaves of a pytree by name, in the order of the pytree."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def match_paths(params: PyTree, patterns: Sequence[str]) -> None:
    """Refuse a glob pattern that matches no parameter.

    Raises:
        InputError: names the pattern and all parameters.
    """
    names = names_in(params)
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
        return nnx.merge(self.graph, nnx.State(self.rounded(together(params), self.gathered)))

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


_PARTITION = "params, static = equinox.partition(module, equinox.is_inexact_array)"
# How to make a Model of a module of another library, by the library's package.
_HOW = {
    "equinox": f"{_PARTITION}, then "
    "Model(lambda params, inputs: jax.vmap(equinox.combine(params, static))(inputs), params)",
    "flax.linen": "Model(module.apply, module.init(key, inputs))",
}


def as_model(given: Any) -> Model:
    """A Model as it is, or the Model of an NNX module.

    Raises:
        InputError: it is neither, or a parameter is not an array; says what to write for modules of equinox and
            linen.
    """
    if isinstance(given, nnx.Module):
        return from_nnx(given)
    if not isinstance(given, Model):
        packages = [kind.__module__ for kind in type(given).__mro__]
        found = (how for name, how in _HOW.items() if any(package.startswith(name) for package in packages))
        how = next(found, "give Model(apply, params) or an NNX module")
        raise InputError(f"{type(given).__name__} is no Model: {how}")
    require_arrays(given.params)
    return given


def require_arrays(params: PyTree) -> None:
    """Refuse parameters that are not arrays or numbers, such as the functions in an equinox module.

    Raises:
        InputError: names the first such parameter.
    """
    for name, leaf in leaves_by_path(params).items():
        if not hasattr(leaf, "dtype") and not isinstance(leaf, int | float | complex):
            how = f"{_PARTITION} gives arrays alone"
            raise InputError(
                f"parameter {name} is a {type(leaf).__name__} and no array; of an equinox module, {how}"
            )


def computed_in(model: Model, dtype: Any) -> Model:
    """The same model computed in another dtype, such as bfloat16. The parameters keep their dtype.

    Every call rounds the parameters. Gradients have the dtype of the parameters, so small updates are not lost.
    Add low-rank factors after this call.

    Raises:
        InputError: the model was not made by `from_nnx`, or has low-rank factors.
    """
    if not isinstance(model.apply, Functional):
        raise InputError("computed_in needs a model of from_nnx; add low-rank factors afterward")
    return replace(model, apply=replace(model.apply, dtype=jnp.dtype(dtype)))


def rounded(model: Model) -> Model:
    """The model with its parameters rounded to the dtype it computes in, so that a loop rounds them only once."""
    if not isinstance(model.apply, Functional):
        return model
    round_to = model.apply.rounded
    return replace(model, params=round_to(model.params), frozen=round_to(model.frozen))
