"""Where students of one base start: trainable parameters for each run, and frozen parameters once for all runs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from subliminal_theory.errors import InputError
from subliminal_theory.inits import Fresh, Shared, initialise
from subliminal_theory.keys import named
from subliminal_theory.language.model.lora import add_lora
from subliminal_theory.language.model.soft_prompt import soft_prompt
from subliminal_theory.model import Model
from subliminal_theory.study.run import Embeddings, Everything, Frozen, LowRank, Student


def started(base: Model, student: Student, keys: Key[Array, " runs"]) -> Model:
    """A model of runs that starts from `base`, changed by the student's policy.

    Raises:
        InputError: the policy changes the base differently for each run, but some parameters do not train; a
            pattern matches no parameter, or a token does not exist.
    """
    trains, plain = student.trains, isinstance(student.start, Shared | Fresh)
    if not plain and not isinstance(trains, Everything):
        raise InputError("a start that differs from the base is for students that train everything: leave one out")
    if isinstance(trains, LowRank):

        def factors(key: Key[Array, ""]) -> Model:
            return add_lora(base, trains.matrices, trains.rank, trains.rank, named(key, "lora"))

        params = jax.vmap(lambda key: factors(key).params)(keys)
        return factors(keys[0]).with_params(params)
    model = base.freeze(*trains.patterns) if isinstance(trains, Frozen) else base
    if isinstance(trains, Embeddings):
        model = soft_prompt(base, trains.tokens)

    def own(key: Key[Array, ""]) -> PyTree:
        return model.params if plain else initialise(student.start, base.params, base.params, key)

    return model.with_params(jax.vmap(own)(keys) if not plain else _copies(model.params, len(keys)))


def _copies(params: PyTree, runs: int) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (runs, *leaf.shape)), params)
