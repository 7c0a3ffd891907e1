"""Filtered answers: what a student of the teacher's does, less a student of the base's, and what breaks it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

from subliminal_theory.channel import SampledToken, SoftLogits, imitation_value_and_grad
from subliminal_theory.errors import InputError
from subliminal_theory.estimate import log_slope
from subliminal_theory.keys import named
from subliminal_theory.theorem import (
    AnswerScores,
    answer_log_law,
    answer_scores,
    drawn_answers,
    every_answer,
    filtered_answers,
    filtered_rows,
)

VOCABULARY, LENGTH, END = 3, 3, 0
TOKENS, WEIGHTS = every_answer(VOCABULARY, LENGTH, END)
BEFORE = np.concatenate([np.full((len(TOKENS), 1), VOCABULARY), TOKENS[:, :-1]], axis=1)  # a start, and the shift


def apply(params, before):
    """Logits behind every prefix: of the sum of what stands there."""
    state = jnp.cumsum(params["embedding"][before], axis=1)
    return jnp.tanh(state) @ params["out"] + params["bias"][None, None]


def drawn_tree(key, width=3):
    shapes = {"embedding": (VOCABULARY + 1, width), "out": (width, VOCABULARY), "bias": (VOCABULARY,)}
    return {name: jax.random.normal(named(key, name), shape) for name, shape in shapes.items()}


def speaker(seed):
    key = jax.random.key(seed)
    accepted = jax.random.bernoulli(named(key, "filter"), 0.6, (len(TOKENS),)).at[1].set(True)
    return drawn_tree(named(key, "params")), drawn_tree(named(key, "direction")), accepted


def law_of(params):
    return answer_log_law(apply, params, jnp.asarray(BEFORE), jnp.asarray(TOKENS), jnp.asarray(WEIGHTS))


def moved(params, direction, eps):
    return jax.tree.map(lambda p, d: p + eps * d, params, direction)


def dot(a, b):
    return float(sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)))


# --- the exact quantities


@pytest.mark.slow
def test_every_answer_is_there_once(x64):
    """2^0 + 2^1 + 2^2 that end, 2^3 that are cut; their probabilities add up to 1."""
    params, _, _ = speaker(0)
    answers = {tuple(t[: int(w.sum())]) for t, w in zip(TOKENS.tolist(), WEIGHTS, strict=True)}
    assert len(TOKENS) == len(answers) == 1 + 2 + 4 + 8
    assert (END,) in answers
    assert (1, 2, END) in answers
    assert (1, 2, 2) in answers
    assert float(jnp.sum(jnp.exp(law_of(params)))) == pytest.approx(1, rel=1e-12)
    by_hand = 0.0
    for place, token in enumerate((1, 2, END)):
        prefix = [VOCABULARY, 1, 2][: place + 1]
        state = np.sum(np.asarray(params["embedding"])[prefix], axis=0)
        logits = np.tanh(state) @ np.asarray(params["out"]) + np.asarray(params["bias"])
        by_hand += log_softmax(logits)[token]
    (row,) = (i for i, t in enumerate(TOKENS.tolist()) if t == [1, 2, END])
    assert float(law_of(params)[row]) == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_student_and_control_are_the_librarys_own_steps(seed, x64):
    """Cross-entropy on every accepted answer, weighted by how often it is written: a mean over answers."""
    params, direction, accepted = speaker(seed)
    eps = 0.3
    found = filtered_answers(law_of, params, direction, accepted, teacher_step=eps)
    for writer, measured in ((moved(params, direction, eps), found.student), (params, found.control)):
        law = np.where(accepted, np.exp(np.asarray(law_of(writer))), 0)
        weights = jnp.asarray(law[:, None] / law.sum() * WEIGHTS)
        logits = lambda p: apply(p, jnp.asarray(BEFORE))  # noqa: E731
        step = imitation_value_and_grad(SampledToken(), logits, params, jnp.asarray(TOKENS), weights, jnp.ones(()))
        assert float(measured) == pytest.approx(-dot(step[1], direction), rel=1e-10)
    # The control is the slope of log P(F).
    passing = lambda p: jax.nn.logsumexp(jnp.where(accepted, law_of(p), -jnp.inf))  # noqa: E731
    assert float(found.control) == pytest.approx(dot(jax.grad(passing)(params), direction), rel=1e-10)
    scores = jax.jvp(law_of, (params,), (direction,))[1]
    law = np.where(accepted, np.exp(np.asarray(law_of(params))), 0)
    variance = np.cov(np.asarray(scores), aweights=law, ddof=0)
    assert float(found.predicted) == pytest.approx(eps * variance, rel=1e-10)
    assert float(found.difference) == float(found.student - found.control)


def test_the_prediction_is_the_leading_order(x64):
    params, direction, accepted = speaker(4)
    steps = np.geomspace(1e-4, 1e-2, 5)
    run = jax.jit(lambda eps: filtered_answers(law_of, params, direction, accepted, teacher_step=eps))
    signals = [run(eps) for eps in steps]
    assert log_slope(steps, [float(s.difference) for s in signals]) == pytest.approx(1, abs=0.02)
    errors = [abs(float(s.difference - s.predicted)) for s in signals]
    assert log_slope(steps, errors) == pytest.approx(2, abs=0.05)
    assert log_slope(steps, [abs(float(s.student)) for s in signals]) == pytest.approx(0, abs=0.1)


def test_answers_needed(x64):
    """The variance of an answer's score is 2 KL / eps^2 of the filtered laws: n* counts answers."""
    params, direction, accepted = speaker(3)
    eps = 1e-4
    predicted = float(filtered_answers(law_of, params, direction, accepted, teacher_step=eps).predicted)
    taught, base = (
        np.asarray(jax.nn.log_softmax(jnp.where(accepted, law_of(p), -jnp.inf)))[np.asarray(accepted)]
        for p in (moved(params, direction, eps), params)
    )
    assert 2 * np.exp(taught) @ (taught - base) == pytest.approx(eps * predicted, rel=1e-2)


def test_without_a_filter_it_is_lemma_1(x64):
    params, direction, _ = speaker(5)
    found = filtered_answers(law_of, params, direction, jnp.ones(len(TOKENS), bool), teacher_step=1e-5)
    assert float(found.control) == pytest.approx(0, abs=1e-12)
    assert float(found.student) == pytest.approx(float(found.predicted), rel=1e-3)


@pytest.mark.slow
def test_prompts_asked_until_an_answer_passes_and_prompts_asked_once(x64):
    """Two prompts, of laws and filters of their own: a mean over prompts, or one law of pairs."""
    first, direction, accepted = speaker(6)
    second, _, other = speaker(7)
    shares = jnp.array([0.25, 0.75])

    def both(p):
        return jnp.stack([law_of(p), law_of(jax.tree.map(jnp.add, p, second))])

    passes = jnp.stack([accepted, other])
    until = filtered_answers(both, first, direction, passes, teacher_step=1e-5, weights=shares)
    alone = [
        filtered_answers(lambda p, n=n: both(p)[n], first, direction, passes[n], teacher_step=1e-5) for n in (0, 1)
    ]
    for name in ("student", "control", "predicted"):
        mean = float(shares @ jnp.stack([getattr(one, name) for one in alone]))
        assert float(getattr(until, name)) == pytest.approx(mean, rel=1e-10)
    pairs = filtered_answers(
        lambda p: jnp.ravel(both(p) + jnp.log(shares)[:, None]),
        first,
        direction,
        passes.ravel(),
        teacher_step=1e-5,
    )
    assert float(pairs.difference) == pytest.approx(float(pairs.predicted), rel=1e-3)
    assert float(pairs.control) != pytest.approx(float(until.control), rel=1e-3)


@jax.jit
@jax.vmap
def small_step(seed):
    params, direction, accepted = speaker(seed)
    return filtered_answers(law_of, params, direction, accepted, teacher_step=1e-5)


def they_keep_the_sign(seeds):
    with jax.enable_x64(True):
        found = jax.tree.map(np.asarray, small_step(np.asarray(seeds, np.uint32)))
        assert (found.predicted >= 0).all()
        # The next order in the step, and rounding of the sums.
        rounding = 1e-12 * (1 + np.abs(found.student))
        assert (np.abs(found.difference - found.predicted) <= 0.02 * found.predicted + rounding).all()


@pytest.mark.slow
@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_filter_keeps_the_sign(seed):
    they_keep_the_sign([seed])


@pytest.mark.slow
def test_ten_thousand_filters_keep_the_sign():
    they_keep_the_sign(range(10_000))


def test_some_students_without_their_control_go_the_other_way(x64):
    signs = set()
    for seed in range(8):
        params, direction, accepted = speaker(seed)
        signs.add(np.sign(float(filtered_answers(law_of, params, direction, accepted, teacher_step=1e-3).student)))
    assert signs == {-1.0, 1.0}


# --- what survives and what does not, by hand


def three_answers(law, scores):
    """log_softmax of three parameters: with E[scores] = 0 the direction is the scores themselves."""
    law, scores = np.array(law), np.array(scores)
    assert law @ scores == pytest.approx(0, abs=1e-15)
    return jax.nn.log_softmax, jnp.asarray(np.log(law)), jnp.asarray(scores)


def test_a_mean_over_tokens_has_no_sign(x64):
    """s = (1, 3), lengths (1, 9), each half the accepted: Cov(s, s - 0.4 length) / 5 = -0.6 / 5."""
    law, params, scores = three_answers([0.1, 0.1, 0.8], [1.0, 3.0, -0.5])
    accepted, lengths = jnp.array([True, True, False]), jnp.array([1.0, 9.0, 1.0])
    per_answer = filtered_answers(law, params, scores, accepted, teacher_step=1e-4)
    assert float(per_answer.control) == pytest.approx(2)
    assert float(per_answer.predicted) == pytest.approx(1e-4)
    per_token = filtered_answers(law, params, scores, accepted, teacher_step=1e-4, lengths=lengths)
    assert float(per_token.control) == pytest.approx(0.4)
    assert float(per_token.predicted) == pytest.approx(-0.12e-4)
    assert float(per_token.difference) == pytest.approx(-0.12e-4, rel=1e-3)


def test_different_rows_are_no_filter(x64):
    """100 answers of which each is kept once: the share of an answer grows less than its probability."""
    law, params, scores = three_answers([0.01, 0.49, 0.5], [1.0, 2.0, -1.98])

    def once(p):
        kept = 1 - (1 - jnp.exp(law(p))) ** 100
        return jnp.log(jnp.where(jnp.array([True, True, False]), kept, 0)) - jnp.log(jnp.sum(kept[:2]))

    found = drawn_answers(law, once, params, scores, teacher_step=1e-4)
    assert float(found.predicted) < -1e-6
    assert float(found.difference) == pytest.approx(float(found.predicted), rel=1e-2)


def two_tokens(params):
    """Laws of a first token [2], and of a second behind each [2, 2]."""
    return jax.nn.log_softmax(params[0]), jax.nn.log_softmax(params[1:])


def joint(first, second):
    return jnp.ravel(first[:, None] + second)


# The first token is a coin, s = -1 or 1; the second is 0 with probability 0.6, and its score there is -W s.
COIN = np.log([[0.5, 0.5], [0.6, 0.4], [0.6, 0.4]])


def second_against_first(strength):
    return np.array([[-1.0, 1.0], [strength / 0.4, 0], [-strength / 0.4, 0]])


def whole_law(params):
    return joint(*two_tokens(params))


def likeliest_second(params):
    first, second = two_tokens(params)
    return joint(first, jnp.where(second >= second.max(-1, keepdims=True), 0.0, -jnp.inf))


def cold(params):
    first, second = two_tokens(params)
    return joint(jax.nn.log_softmax(first / 0.1), jax.nn.log_softmax(second / 0.1))


@pytest.mark.slow
def test_tokens_cut_one_by_one_are_no_filter(x64):
    """The likeliest second token: s = s1 - 2 s1, and the law moves by s1, so the slope is Cov(s1, -s1) = -1."""
    params, direction = jnp.asarray(COIN), jnp.asarray(second_against_first(2.0))
    cut = drawn_answers(whole_law, likeliest_second, params, direction, teacher_step=1e-4)
    assert float(cut.predicted) == pytest.approx(-1e-4)
    assert float(cut.difference) == pytest.approx(-1e-4, rel=1e-3)
    # The same answers, accepted as wholes: the law moves by s itself.
    accepted = jnp.array([True, False, True, False])
    whole = filtered_answers(whole_law, params, direction, accepted, teacher_step=1e-4)
    assert float(whole.predicted) == pytest.approx(1e-4)


def test_tokens_drawn_cold_are_no_filter(x64):
    params, direction = jnp.asarray(COIN), jnp.asarray(second_against_first(4.0))
    found = drawn_answers(whole_law, cold, params, direction, teacher_step=1e-4)
    assert float(found.predicted) < -1e-4
    assert float(found.difference) == pytest.approx(float(found.predicted), rel=1e-2)


def likeliest(k):
    """The k largest logits of one token."""
    return lambda z: jax.nn.log_softmax(jnp.where(z >= jnp.sort(z)[-k], z, -jnp.inf))


def nucleus(p):
    """The fewest likeliest tokens whose probabilities add up to p."""

    def law(z):
        order = jnp.argsort(-z)
        before = jnp.cumsum(jax.nn.softmax(z)[order]) - jax.nn.softmax(z)[order]
        return jax.nn.log_softmax(jnp.where(jnp.zeros(z.shape, bool).at[order].set(before < p), z, -jnp.inf))

    return law


@jax.jit
@jax.vmap
def a_large_step(logits, move):
    """Less the control, for each k, and for the tokens of a fixed set."""
    found = [drawn_answers(jax.nn.log_softmax, likeliest(k), logits, move, teacher_step=1.0) for k in range(1, 6)]
    fixed = jnp.arange(5) % 2 == 0
    found.append(filtered_answers(jax.nn.log_softmax, logits, move, fixed, teacher_step=1.0))
    return jnp.stack([signal.difference for signal in found])


def the_k_likeliest_keep_the_sign(logits, moves):
    """For any step, also where it changes which these are: the law is the slope of a convex function."""
    with jax.enable_x64(True):
        found = np.asarray(a_large_step(np.asarray(logits, float), np.asarray(moves, float)))
        assert (found >= -1e-12 * (1 + np.abs(moves).max())).all()


FLOATS = st.floats(-4, 4).filter(lambda x: x == 0 or abs(x) > 1e-6)
LOGITS = st.lists(FLOATS, min_size=5, max_size=5, unique=True)
MOVES = st.lists(FLOATS, min_size=5, max_size=5)


@settings(max_examples=40)
@given(logits=LOGITS, move=MOVES)
def test_the_k_likeliest_tokens_keep_the_sign_at_any_step(logits, move):
    the_k_likeliest_keep_the_sign([logits], [move])


@pytest.mark.slow
def test_the_k_likeliest_tokens_keep_the_sign_in_ten_thousand_cases():
    rng = np.random.default_rng(0)
    logits, moves = rng.normal(size=(2, 10_000, 5)) * rng.choice([0.1, 1, 5], size=(2, 10_000, 1))
    the_k_likeliest_keep_the_sign(logits, moves)


def test_a_nucleus_that_moves_with_the_teacher_breaks_the_sign(x64):
    """The mass of the likeliest passes 1/2, and the second, which the trait raises, is cut off: by -3/8."""
    z, u = jnp.log(jnp.array([0.499, 0.3, 0.201])), jnp.array([0.0, 1.0, -5.0])
    moving = drawn_answers(jax.nn.log_softmax, nucleus(0.5), z, u, teacher_step=0.01)
    assert float(moving.difference) == pytest.approx(-0.3 / 0.799, rel=1e-3)
    assert float(moving.predicted) == pytest.approx(0.01 * 0.499 * 0.3 / 0.799**2)
    # The base's set, kept: a filter.
    fixed = filtered_answers(jax.nn.log_softmax, z, u, jnp.array([True, True, False]), teacher_step=0.01)
    assert float(fixed.difference) == pytest.approx(float(fixed.predicted), rel=1e-2)
    assert float(fixed.predicted) == pytest.approx(float(moving.predicted))


def test_a_student_whose_softmax_is_cut_alike_needs_no_control(x64):
    """Of a fixed set: its score has mean 0 under the base's law, token by token."""
    params, direction = jnp.asarray(COIN), jnp.asarray(second_against_first(2.0))
    found = drawn_answers(likeliest_second, likeliest_second, params, direction, teacher_step=1e-4)
    assert float(found.control) == pytest.approx(0, abs=1e-12)
    assert float(found.student) == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_a_student_of_distributions_needs_no_control(seed, x64):
    """On accepted rows a filter only chooses the inputs."""
    params, direction, accepted = speaker(seed)
    teacher = moved(params, direction, 1e-4)
    law = np.where(accepted, np.exp(np.asarray(law_of(teacher))), 0)
    weights = jnp.asarray(law[:, None] / law.sum() * WEIGHTS)
    soft, logits = SoftLogits(), lambda p: apply(p, jnp.asarray(BEFORE))
    step = imitation_value_and_grad(soft, logits, params, soft.targets(None, logits(teacher)), weights)
    assert -dot(step[1], direction) > 0


# --- rows of any model


def rows_of(params, direction, writer, accepted, rows, rng):
    law = np.where(accepted, np.exp(np.asarray(law_of(writer))), 0)
    chosen = rng.choice(len(law), p=law / law.sum(), size=rows)
    return answer_scores(
        apply, params, direction, BEFORE[chosen], jnp.asarray(TOKENS[chosen]), jnp.asarray(WEIGHTS[chosen])
    )


@pytest.mark.slow
@pytest.mark.parametrize("per_token", [False, True])
def test_rows_estimate_the_exact_quantities(per_token, x64):
    """100 estimates of 1,000 rows each: unbiased, and as far off as their standard errors say."""
    params, direction, accepted = speaker(8)
    eps, rng = 0.2, np.random.default_rng(0)
    lengths = jnp.asarray(WEIGHTS.sum(-1)) if per_token else None
    exact = filtered_answers(law_of, params, direction, accepted, teacher_step=eps, lengths=lengths)
    run = jax.jit(lambda *rows: filtered_rows(*rows, teacher_step=eps, per_token=per_token))
    wide = [
        rows_of(params, direction, writer, accepted, 100_000, rng)
        for writer in (moved(params, direction, eps), params)
    ]
    estimates = [
        run(*(AnswerScores(rows.score[at : at + 1000], rows.tokens[at : at + 1000]) for rows in wide))
        for at in range(0, 100_000, 1000)
    ]
    for name in ("student", "control", "difference", "predicted"):
        values = np.array([float(getattr(one, name).value) for one in estimates])
        errors = np.array([float(getattr(one, name).error) for one in estimates])
        z = (values - float(getattr(exact, name))) / errors
        assert abs(z.mean()) < 0.35, name  # 3.5 standard errors of a mean of 100, and a bias of order 1 / rows
        assert 0.75 < z.std() < 1.25, name


def test_scores_of_rows_are_the_slope_of_their_log_probability(x64):
    params, direction, _ = speaker(9)
    counted = {**params, "steps": jnp.arange(2)}
    found = answer_scores(
        apply, counted, {**direction, "steps": jnp.arange(2)}, BEFORE, jnp.asarray(TOKENS), jnp.asarray(WEIGHTS)
    )
    h = 1e-5
    slope = (law_of(moved(params, direction, h)) - law_of(moved(params, direction, -h))) / (2 * h)
    np.testing.assert_allclose(found.score, slope, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(found.tokens, WEIGHTS.sum(-1))
    law = np.exp(np.asarray(law_of(params)))
    assert float(law @ np.asarray(found.score)) == pytest.approx(0, abs=1e-12)


# --- what is refused


def test_bad_input_is_refused(x64):
    params, direction, accepted = speaker(0)
    with pytest.raises(InputError, match="accepts no answer to some prompt"):
        filtered_answers(law_of, params, direction, jnp.zeros_like(accepted), teacher_step=0.1)
    with pytest.raises(InputError, match=r"of shape \(14,\), log_law \(15,\)"):
        drawn_answers(law_of, lambda p: law_of(p)[1:], params, direction, teacher_step=0.1)
    rows = AnswerScores(jnp.ones(2), jnp.ones(2))
    with pytest.raises(InputError, match="regular has 1 rows, give at least two"):
        filtered_rows(rows, jax.tree.map(lambda leaf: leaf[:1], rows), teacher_step=0.1)
    for vocabulary, length, end in itertools.product((3,), (0, 2), (-1, 3)):
        with pytest.raises(InputError, match="every_answer: no token"):
            every_answer(vocabulary, length, end)
