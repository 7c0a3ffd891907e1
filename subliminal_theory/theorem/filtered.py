"""Filtered answers: the theorem holds for the difference of two students.

One student reads the teacher's filtered answers. The other, the control, reads the base model's answers under the
same filter.

An answer a is drawn token by token, P(a) = prod_t p(a_t | a_<t). The filter F is a set of whole answers. The
teacher, at theta_T = theta_0 + eps D_T, writes answers with the distribution P_T(. | F). The student takes one
gradient step on their cross-entropy: a sum over the tokens of an answer, and a mean over answers. The score is
s(a) = grad log P_0(a) . D_T. Then

    D_S . D_T = E_{T|F}[s] = grad log P_0(F) . D_T + eps Var_{0|F}(s) + O(eps^2).

The first term can have either sign. It is D_S . D_T of the control. The difference of the two students is
eps Var_{0|F}(s) + O(eps^2), and its leading term is not negative. docs/theory.md has the derivations and the cases
that fail.
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
    """D_S . D_T for students of the teacher's and of the base's answers: scalar arrays, means over prompts.

    Attributes:
        student: D_S . D_T for the teacher's answers.
        control: D_S . D_T for the base's answers, drawn in the same way.
        predicted: the leading order in eps of student - control.
    """

    student: PyTree
    control: PyTree
    predicted: PyTree

    @property
    def difference(self) -> PyTree:
        """student - control."""
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
    """The exact quantities for a model with few enough answers to enumerate.

    `log_law(params)` gives log P(a | x) in nats for every answer to every prompt. `accepted` marks the answers
    that pass the filter. Each prompt is asked until an answer passes, and counts with its weight in `weights`
    [*prompts], 1 by default. `predicted` is eps times the mean over prompts of Var_{0|F}(s). If instead each
    prompt is asked once and rejected answers are dropped, the filter accepts pairs of prompt and answer. For that
    case, flatten both axes into one and add the log probabilities of the prompts.

    With `lengths`, in tokens, the loss is a mean over all tokens: E[s] / E[length] instead of E[s]. The theorem
    does not cover this loss: `predicted` is eps Cov(s, s - r length) / E[length] with r = E[s] / E[length], and
    can have either sign.

    Raises:
        InputError: the filter accepts no answer to some prompt; as `drawn_answers`.
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
    """As `filtered_answers`, for answers drawn in any other way, such as top-k sampling.

    `drawn(params)` gives the log probability of drawing each answer, -inf for an answer that cannot be drawn.
    `predicted` is eps Cov_q(dlog q, s), where q is the base's distribution of drawn answers and dlog q the
    derivative of its logarithm along D_T. For a filter this is a variance; in general it can have either sign.
    `student` and `control` are exact, `predicted` is the leading order. The cost is two Jacobian-vector products
    and one evaluation of `drawn` at the teacher. Pure.

    Raises:
        InputError: `log_law` and `drawn` give different shapes; the direction does not match the parameters.
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
        # The score of an answer that cannot be drawn may be infinite or nan.
        probabilities = jnp.exp(log_probabilities)
        drawable = jnp.where(probabilities > 0, values, 0)
        return weighted_mean(jnp.sum(probabilities * drawable, axis=-1), weights)

    length = mean(before, lengths)
    control = mean(before, score) / length
    # The derivative of E_q[s] / E_q[length], because E_q[dlog q] = 0.
    slope = mean(before, moves * (score - control * lengths)) / length
    return FilteredSignal(mean(after, score) / mean(after, lengths), control, teacher_step * slope)


# --- rows of any model


@register_dataclass
@dataclass(frozen=True)
class AnswerScores:
    """The score s = grad log P_0(answer) . D_T of each row, and its number of tokens; both [rows]."""

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
    """The score and the number of tokens of each row.

    `apply(params, inputs)` gives logits [rows, positions, n]; the logits at a position depend on the tokens before
    it. `targets` are the tokens at the positions. `weights` are 1 on an answer and its end token, 0 elsewhere. The
    cost is one Jacobian-vector product. Exact. Pure.

    Raises:
        InputError: the direction does not match the parameters.
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
    """log P(answer) of each row, in nats. The arguments are as in `answer_scores`."""
    return -jnp.sum(weights * SampledToken().loss(apply(params, inputs), targets), axis=-1)


def every_answer(vocabulary: int, length: int, end: int) -> tuple[Int[np.ndarray, "rows length"], np.ndarray]:
    """All answers of at most `length` tokens, and the weights of their positions, both [rows, length].

    An answer ends with its first token `end`, or after `length` tokens. After the end, weights are 0 and tokens
    are `end`. (vocabulary - 1)^length answers have no end token. For each k below `length`, (vocabulary - 1)^k
    answers end after k other tokens.

    Raises:
        InputError: `end` is not a token, or `length` is below 1.
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
    """The fields of `FilteredSignal` and its `difference`, estimated from rows, each with a standard error."""

    student: Measured
    control: Measured
    difference: Measured
    predicted: Measured


def filtered_rows(
    taught: AnswerScores, regular: AnswerScores, *, teacher_step: float | Float[Array, ""], per_token: bool = False
) -> FilteredEstimate:
    """Estimate the quantities of `filtered_answers` from accepted rows.

    `taught` are rows that the teacher wrote, `regular` rows that the base wrote under the same filter. Rows are
    independent draws. Each prompt is asked once, so the filter accepts pairs of prompt and answer. With
    `per_token` the loss is a mean over all tokens, and `predicted` can have either sign. Standard errors use the
    delta method, which is exact to leading order in 1 / rows. The difference treats the two sets of rows as
    independent. Pure.

    Raises:
        InputError: `taught` or `regular` has fewer than two rows.
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
    """A function of the mean moments over rows, and its standard error by the delta method."""
    value, gradient = jax.value_and_grad(function)(jnp.mean(moments, axis=0))
    influence = (moments - jnp.mean(moments, axis=0, keepdims=True)) @ gradient
    rows = moments.shape[0]
    return Measured(value, jnp.sqrt(jnp.sum(influence**2) / (rows * (rows - 1))))
