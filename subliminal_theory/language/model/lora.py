"""LoRA, low-rank adaptation (arXiv 2106.09685): matrices become W + (alpha / rank) A B, and only A and B train."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from subliminal_theory.errors import InputError
from subliminal_theory.keys import named
from subliminal_theory.language.model.layers import Factored
from subliminal_theory.language.model.soft_prompt import without_soft_prompt
from subliminal_theory.model import (
    Apply,
    BodyAndHead,
    Model,
    match,
    match_paths,
    matches,
    names_of,
    of_layers,
    shapes_of,
    together,
)


@dataclass(frozen=True)
class Adapted:
    """The function of a model at W + scale A B. Two are equal if their functions and scales are equal.

    Matrices that the function only uses in `multiply` stay factored. For other matrices the sum is formed.
    """

    apply: Apply
    scale: float

    def __call__(self, params: PyTree, inputs: PyTree) -> Float[Array, "..."]:
        return self.apply(self._opened(params), inputs)

    def features(self, params: PyTree, inputs: PyTree) -> Float[Array, "batch ... width"]:
        return self._parts.features(self._opened(params), inputs)

    def readout(self, params: PyTree, features: Float[Array, "... width"]) -> Float[Array, "... n"]:
        return self._parts.readout(self._opened(params), features)

    @property
    def _parts(self) -> BodyAndHead:
        if not isinstance(self.apply, BodyAndHead):
            raise InputError("the adapted model does not divide into features and readout")
        return self.apply

    def merged(self, params: PyTree) -> PyTree:
        """Parameters for `apply`, with the sum W + scale A B in place of all factors, in the dtype of W."""
        return self._opened(params, ())

    def multiplied(self, params: PyTree) -> PyTree:
        """Parameters for `apply`, with scaled factors where it multiplies by them, and sums elsewhere."""
        return self._opened(params)

    def _opened(self, params: PyTree, kept: Sequence[str] | None = None) -> PyTree:
        """Parameters with factors (the scale in B) where a pattern of `kept` matches, and sums elsewhere.

        If `kept` is None, the patterns match the matrices for which `apply` accepts factors.
        """
        patterns = getattr(self.apply, "factored", ()) if kept is None else kept

        def one(path: Any, node: Any) -> Any:
            if not isinstance(node, Factored):
                return node
            base, a, b = jax.tree.leaves(node)
            if matches(path, patterns):
                return Factored(base, a, self.scale * b)
            return (base + self.scale * (a @ b)).astype(base.dtype)

        whole = together(params)
        return jax.tree_util.tree_map_with_path(one, whole, is_leaf=lambda node: isinstance(node, Factored))


def add_lora(model: Model, patterns: Sequence[str], rank: int, alpha: float, key: Key[Array, ""]) -> Model:
    """The same model with trainable LoRA factors for the matrices that match a glob pattern.

    A matrix W [inputs, outputs] becomes W + (alpha / rank) A B. A [inputs, rank] starts uniform between
    -inputs^(-1/2) and inputs^(-1/2), as in the library `peft`. B [rank, outputs] starts as 0, so that the new
    model computes exactly the function of the given one. All given parameters are frozen. Factors are in at least
    float32. Products with them and sums with W are in the dtype of W.

    Raises:
        InputError: there is no pattern, or a pattern matches nothing or an array that is not a matrix; the rank is
            below 1 or above the smaller side of a matrix; alpha is not positive and finite; the model has factors
            already.
    """
    if isinstance(model.apply, Adapted):
        raise InputError("add_lora: the model has low-rank factors already; merge them first")
    if not patterns:
        raise InputError("add_lora: no pattern of matrices to adapt")
    if not 0 < alpha < math.inf:
        raise InputError(f"add_lora: alpha must be positive and finite, got {alpha}")
    everything = together(model.all_params)
    match_paths(everything, patterns)
    chosen = {name: shape for name, shape in shapes_of(everything).items() if match(name, patterns)}
    others = [f"{name} {shape}" for name, shape in chosen.items() if len(shape) != 2]
    if others:
        raise InputError(f"add_lora: only matrices can be adapted, and the patterns match {', '.join(others)}")
    for name, shape in chosen.items():
        if not 1 <= rank <= min(shape):
            raise InputError(f"add_lora: rank must be from 1 to {min(shape)} for {name} {shape}, got {rank}")
    leaves = jax.tree_util.tree_leaves_with_path(everything)
    dtypes = {name: leaf.dtype for path, leaf in leaves for name in names_of(path, leaf)}

    def draw(name: str) -> tuple[Array, Array]:
        (inputs, outputs), dtype = chosen[name], jnp.promote_types(dtypes[name], jnp.float32)
        bound = inputs**-0.5
        a = jax.random.uniform(named(key, name), (inputs, rank), dtype, -bound, bound)
        return a, jnp.zeros((rank, outputs), dtype)

    return with_factors(model, alpha / rank, {name: draw(name) for name in chosen})


def with_factors(model: Model, scale: float, factors: Mapping[str, tuple[Array, Array]]) -> Model:
    """The model with W + scale A B in place of the matrices W with these names. Only A and B train."""

    def one(path: Any, leaf: Array) -> Any:
        pairs = [factors.get(name) for name in names_of(path, leaf)]
        if not any(pairs):
            return leaf
        a, b = (tuple(pair and pair[side] for pair in pairs) for side in (0, 1))
        if not of_layers(path):
            return Factored(leaf, a[0], b[0])
        whole: Any = jnp.stack
        return Factored(leaf, a, b) if None in pairs else Factored(leaf, whole(a), whole(b))

    def trained(node: Any) -> Any:
        return replace(node, base=None) if isinstance(node, Factored) else None

    def frozen(node: Any) -> Any:
        nothing = lambda part: jax.tree.map(lambda leaf: None, part)  # noqa: E731
        return Factored(node.base, nothing(node.a), nothing(node.b)) if isinstance(node, Factored) else node

    nodes = jax.tree_util.tree_map_with_path(one, together(model.all_params))
    is_leaf = lambda node: isinstance(node, Factored)  # noqa: E731
    parts = (jax.tree.map(part, nodes, is_leaf=is_leaf) for part in (trained, frozen))
    return Model(Adapted(model.apply, scale), *parts)


def merge_lora(model: Model) -> Model:
    """A plain model with W + (alpha / rank) A B in place of W. All its parameters are trainable.

    A soft prompt is put into the embedding. A plain model is returned unchanged.
    """
    if not isinstance(model.apply, Adapted):
        return without_soft_prompt(model)
    return Model(model.apply.apply, model.apply.merged(model.all_params))


def unmerged(model: Model) -> Model:
    """A plain model with the same function, which multiplies by W and by its factors separately.

    Unlike `merge_lora`, it does not round W + (alpha / rank) A B. A soft prompt is put into the embedding. A plain
    model is returned unchanged.
    """
    if not isinstance(model.apply, Adapted):
        return without_soft_prompt(model)
    return Model(model.apply.apply, model.apply.multiplied(model.all_params))
