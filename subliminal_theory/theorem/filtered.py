"""Filtered answers: the theorem holds of a student less the student of the base's answers under the same filter.

An answer a is drawn token by token, P(a) = prod_t p(a_t | a_<t), and F is a set of whole answers. The teacher, at
theta_T = theta_0 + eps D_T, writes answers of law P_T(. | F); the student takes one gradient step on their
cross-entropy, a sum over the tokens of an answer and a mean over answers. With the score
s(a) = grad log P_0(a) . D_T,

    D_S . D_T = E_{T|F}[s] = grad log P_0(F) . D_T + eps Var_{0|F}(s) + O(eps^2).

The first term, of no sign, is what the base's own answers under F give. The difference of the two students is
eps Var_{0|F}(s) + O(eps^2) >= 0. Derivations and what fails: docs/theory.md.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from subliminal_theory.channel import SampledToken, weighted_mean
from subliminal_theory.errors import InputError
from subliminal_theory.model import Apply, split_trainable
from subliminal_theory.pytree import register_dataclass
from subliminal_theory.theorem.setting import of_trainable, teacher_direction

LogLaw = Callable[[PyTree], Float[Array, "*prompts answers"]]


@register_dataclass
@dataclass(frozen=True)
class FilteredSignal:
    """What students of the teacher's and of the base's drawn answers do; scalar arrays, means over prompts.

    Attributes:
        student: D_S . D_T of the teacher's answers.
        control: the same of the base's answers, drawn in the same way.
        predicted: the leading order of their difference in the teacher's step.
    """

    student: PyTree
    control: PyTree
    predicted: PyTree

    @property
    def difference(self) -> PyTree:
        """Student less control."""
        return self.student - self.control


def filtered_answers(
    log_law: LogLaw,
    params: PyTree,
    direction: PyTree,
    accepted: Bool[Array, "*prompts answers"],
    *,
    teacher_step: float | Float[Array, ""],
    lengths: Float[Array, "*prompts answers"] | None = None,
    weights: Float[Array, "*prompts"] | None = None,
) -> FilteredSignal:
    """The exact quantities for a model whose answers can be enumerated.

    `log_law(params)` are log P(a | x) in nats of every answer to every prompt, `accepted` those that pass. Each
    prompt is asked until an answer passes, and counts by `weights` [*prompts]. Where prompts are asked once and
    rejected answers dropped, a pair of prompt and answer is what is accepted: flatten both and add the log
    probabilities of the prompts. `predicted` is then eps times the mean over prompts of Var_{0|F}(s).

    With `lengths` the loss is a mean over all tokens, E[s] / E[length] instead of E[s]: the theorem does not cover
    it, and `predicted`, eps Cov(s, s - r length) / E[length] with r = E[s] / E[length], has no sign.

    Raises:
        InputError: a prompt of which no answer is accepted, or as `drawn_answers`.
    """
    passes = jnp.any(accepted, axis=-1)
    if not isinstance(passes, jax.core.Tracer) and not bool(jnp.all(passes)):
        raise InputError("filtered_answers: the filter accepts no answer to some prompt: leave that prompt out")

    def filtered(p: PyTree) -> Float[Array, "*prompts answers"]:
        return jax.nn.log_softmax(jnp.where(accepted, log_law(p), -jnp.inf))

    return drawn_answers(
        log_law, filtered, params, direction, teacher_step=teacher_step, lengths=lengths, weights=weights
    )


def drawn_answers(
    log_law: LogLaw,
    drawn: LogLaw,
    params: PyTree,
    direction: PyTree,
    *,
    teacher_step: float | Float[Array, ""],
    lengths: Float[Array, "*prompts answers"] | None = None,
    weights: Float[Array, "*prompts"] | None = None,
) -> FilteredSignal:
    """As `filtered_answers`, of answers drawn in any other way, such as from the k likeliest tokens.

    `drawn(params)` are log probabilities of drawing each answer, -inf for one that cannot be drawn. `predicted` is
    eps Cov_q(dlog q, s), q the base's law of drawing and dlog q the derivative of its logarithm along D_T: a
    variance for a filter; of no sign in general. Exact, but for `predicted`. Two Jacobian-vector products and one
    evaluation of `drawn` at the teacher. Pure.

    Raises:
        InputError: the two laws differ in shape; the direction is unlike the parameters.
    """
    trained, _ = split_trainable(params)
    _, direction = teacher_direction(None, direction, trained)
    law, drawn = of_trainable(params, log_law), of_trainable(params, drawn)
    own, score = jax.jvp(law, (trained,), (direction,))
    before, moves = jax.jvp(drawn, (trained,), (direction,))
    if before.shape != own.shape:
        raise InputError(f"drawn gives log probabilities of shape {before.shape}, log_law {own.shape}")
    teacher = optax.tree.add_scale(trained, teacher_step, direction)
    after = drawn(teacher)
    weights = jnp.ones(own.shape[:-1], own.dtype) if weights is None else weights
    lengths = jnp.ones_like(own) if lengths is None else lengths

    def mean(log_probabilities: Float[Array, "*prompts answers"], values: Array) -> Float[Array, ""]:
        # An answer that cannot be drawn may have a score that is not finite.
        probabilities = jnp.exp(log_probabilities)
        drawable = jnp.where(probabilities > 0, values, 0)
        return weighted_mean(jnp.sum(probabilities * drawable, axis=-1), weights)

    length = mean(before, lengths)
    control = mean(before, score) / length
    # The derivative of E_q[s] / E_q[length]: of a law of drawing, E_q[dlog q] = 0.
    slope = mean(before, moves * (score - control * lengths)) / length
    return FilteredSignal(mean(after, score) / mean(after, lengths), control, teacher_step * slope)


# --- rows of any model


@register_dataclass
@dataclass(frozen=True)
class AnswerScores:
    """Of rows: their score s = grad log P_0(answer) . D_T, and the tokens that each has; both [rows]."""

    score: PyTree
    tokens: PyTree


def answer_scores(
    apply: Apply,
    params: PyTree,
    direction: PyTree,
    inputs: PyTree,
    targets: Int[Array, "rows positions"],
    weights: Float[Array, "rows positions"],
) -> AnswerScores:
    """The score of each row: one Jacobian-vector product.

    `apply(params, inputs)` gives logits [rows, positions, n], each position's from the tokens before it; `targets`
    are the tokens there, and `weights` 1 on an answer and its end, 0 elsewhere. Exact. Pure.

    Raises:
        InputError: the direction is unlike the parameters.
    """
    trained, _ = split_trainable(params)
    _, direction = teacher_direction(None, direction, trained)
    law = of_trainable(params, lambda p: answer_log_law(apply, p, inputs, targets, weights))
    _, score = jax.jvp(law, (trained,), (direction,))
    return AnswerScores(score, jnp.sum(weights, axis=-1))


def answer_log_law(
    apply: Apply,
    params: PyTree,
    inputs: PyTree,
    targets: Int[Array, "rows positions"],
    weights: Float[Array, "rows positions"],
) -> Float[Array, " rows"]:
    """log P(answer) of each row, in nats; arguments as of `answer_scores`."""
    return -jnp.sum(weights * SampledToken().loss(apply(params, inputs), targets), axis=-1)


def every_answer(vocabulary: int, length: int, end: int) -> tuple[Int[np.ndarray, "rows length"], np.ndarray]:
    """All answers of at most `length` tokens, and the weights of their positions.

    An answer ends with its first token `end`, or without it at `length`; behind its end weights are 0 and tokens
    `end`. There are (vocabulary - 1)^length without an end and (vocabulary - 1)^k with one behind k tokens.

    Raises:
        InputError: `end` is no token, or no length.
    """
    if not 0 <= end < vocabulary or length < 1:
        raise InputError(f"every_answer: no token {end} among {vocabulary}, or no length {length}")
    others = [token for token in range(vocabulary) if token != end]
    rows = [
        [*before, *[end] * (length - size)]
        for size in range(length + 1)
        for before in itertools.product(others, repeat=size)
    ]
    tokens = np.array(rows, np.int32)
    ended = np.cumsum(tokens == end, axis=1) - (tokens == end)
    return tokens, (ended == 0).astype(float)


@register_dataclass
@dataclass(frozen=True)
class Measured:
    """A value and its standard error; scalar arrays."""

    value: PyTree
    error: PyTree


@register_dataclass
@dataclass(frozen=True)
class FilteredEstimate:
    """`FilteredSignal` from rows, and its `difference`, each with a standard error."""

    student: Measured
    control: Measured
    difference: Measured
    predicted: Measured


def filtered_rows(
    taught: AnswerScores, regular: AnswerScores, *, teacher_step: float | Float[Array, ""], per_token: bool = False
) -> FilteredEstimate:
    """The quantities of `filtered_answers` from rows that the teacher and its base wrote under one filter.

    Rows are independent draws; each prompt is asked once, so that the pair of prompt and answer is what is
    accepted. `per_token` is the loss that is a mean over all tokens, of no sign. Standard errors are those of the
    delta method, exact to leading order in 1 / rows; the difference is of unpaired rows. Pure.

    Raises:
        InputError: fewer than two rows of either.
    """
    for name, rows in (("taught", taught), ("regular", regular)):
        if rows.score.shape[0] < 2:
            raise InputError(f"filtered_rows: {name} has {rows.score.shape[0]} rows, give at least two")

    def moments(rows: AnswerScores) -> Float[Array, "rows 4"]:
        size = rows.tokens if per_token else jnp.ones_like(rows.score)
        return jnp.stack([rows.score, size, rows.score**2, rows.score * size], axis=-1)

    def mean(m: Float[Array, "4"]) -> Float[Array, ""]:
        return m[0] / m[1]

    def slope(m: Float[Array, "4"]) -> Float[Array, ""]:
        """Cov(s, s - r length) / E[length], from E[s], E[length], E[s^2], E[s length]."""
        ratio = m[0] / m[1]
        return (m[2] - m[0] ** 2 - ratio * (m[3] - m[0] * m[1])) / m[1]

    student, control = _measured(mean, moments(taught)), _measured(mean, moments(regular))
    predicted = _measured(slope, moments(regular))
    error = jnp.hypot(student.error, control.error)
    return FilteredEstimate(
        student,
        control,
        Measured(student.value - control.value, error),
        Measured(teacher_step * predicted.value, teacher_step * predicted.error),
    )


def _measured(function: Callable[[Array], Array], moments: Float[Array, "rows 4"]) -> Measured:
    """A function of means over rows, and its standard error by the delta method."""
    value, gradient = jax.value_and_grad(function)(jnp.mean(moments, axis=0))
    influence = (moments - jnp.mean(moments, axis=0, keepdims=True)) @ gradient
    rows = moments.shape[0]
    return Measured(value, jnp.sqrt(jnp.sum(influence**2) / (rows * (rows - 1))))
