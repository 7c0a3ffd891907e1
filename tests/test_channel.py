import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import special, stats

from subliminal_theory.channel import (
    Channel,
    SampledToken,
    SoftLogits,
    SquaredError,
    Subset,
    TopK,
    WeightedSum,
    imitation_loss,
    imitation_value_and_grad,
    weighted_mean,
)
from subliminal_theory.divergence import JensenShannon, ReverseKL, channel_named
from subliminal_theory.errors import InputError
from tests.tolerances import TOLERANCE

N = 5
RNG = np.random.default_rng(0)
TEACHER, STUDENT = RNG.normal(size=(2, 3, N)).astype(np.float32) * 2
WEIGHTS = np.array([0.5, 2.0, 1.0, 0.0, 3.0])
MASK = np.array([True, False, True, True, False])
INDICES = (0, 2, 3)
SOFT = [
    *(SoftLogits(), SoftLogits(0.3), SoftLogits(4.0), SquaredError(), SquaredError(WEIGHTS)),
    *(ReverseKL(), ReverseKL(2.5), JensenShannon(), JensenShannon(0.7), TopK(3), TopK(2, SquaredError())),
]
CHANNELS = [
    *SOFT,
    *(Subset(INDICES, channel) for channel in SOFT),
    *(Subset(MASK, channel) for channel in SOFT),
    Subset((2,)),
    Subset(INDICES, Subset((2, 3, 4), SoftLogits(2.0))),
    Subset(MASK, Subset((0, 3, 4), SquaredError(WEIGHTS))),
    TopK(2, Subset(MASK, ReverseKL())),
]
logit_vectors = hnp.arrays(np.float32, N, elements=st.floats(-20, 20, width=32))
some_logits = st.sets(st.integers(0, N - 1), min_size=1).map(sorted)
few_subsets = st.sampled_from([[3], [1, 3], [0, 2, 4], [0, 1, 2, 3, 4]])  # every one is compiled


def same(actual, expected, dtype: str = "float32", scale: float = 1.0) -> None:
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE[dtype], atol=scale * TOLERANCE[dtype])


@jax.jit
def against(channel, student, teacher):
    """Loss and gradient of a student against a teacher, one value per position."""
    targets = channel.targets(None, teacher)

    def total(logits):
        values = channel.loss(logits, targets)
        return jnp.sum(values), values

    gradient, values = jax.grad(total, has_aux=True)(student)
    return values, gradient


def kl(teacher: np.ndarray, student: np.ndarray, temperature: float) -> np.ndarray:
    p = special.softmax(teacher.astype(float) / temperature, axis=-1)
    q = special.softmax(student.astype(float) / temperature, axis=-1)
    return special.rel_entr(p, q).sum(-1)


# --- values


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_soft_logits_is_kl(temperature: float) -> None:
    loss, gradient = against(SoftLogits(temperature), STUDENT, TEACHER)
    same(loss, kl(TEACHER, STUDENT, temperature))
    p, q = (special.softmax(z / temperature, axis=-1) for z in (TEACHER, STUDENT))
    same(gradient, (q - p) / temperature)


@pytest.mark.parametrize("weights", [1.0, 0.25, WEIGHTS, WEIGHTS.tolist(), tuple(WEIGHTS), jnp.asarray(WEIGHTS)])
def test_squared_error_is_weighted_sum(weights) -> None:
    loss, gradient = against(SquaredError(weights), STUDENT, TEACHER)
    same(loss, (np.asarray(weights) * (STUDENT - TEACHER) ** 2).sum(-1))
    same(gradient, 2 * np.asarray(weights) * (STUDENT - TEACHER))


def test_sampled_token_is_cross_entropy() -> None:
    tokens = np.array([4, 0, 2])
    loss = SampledToken().loss(jnp.asarray(STUDENT), jnp.asarray(tokens))
    same(loss, -special.log_softmax(STUDENT.astype(float), axis=-1)[range(3), tokens])


@pytest.mark.slow
@pytest.mark.parametrize("channel", CHANNELS, ids=str)
def test_equality_is_a_minimum(channel) -> None:
    loss, gradient = against(channel, TEACHER, TEACHER)
    assert np.abs(loss).max() < 1e-6
    assert np.abs(gradient).max() < 1e-5
    assert against(channel, STUDENT, TEACHER)[0].min() >= 0


@settings(max_examples=50)
@given(logit_vectors, logit_vectors, st.floats(-50, 50, width=32))
def test_softmax_ignores_shift(student: np.ndarray, teacher: np.ndarray, shift: float) -> None:
    for channel in (SoftLogits(), Subset(INDICES)):
        loss, gradient = against(channel, student, teacher)
        shifted_loss, shifted_gradient = against(channel, student + np.float32(shift), teacher - np.float32(shift))
        np.testing.assert_allclose(shifted_loss, loss, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(shifted_gradient, gradient, atol=1e-4)


def test_large_temperature_is_centred_squared_error(x64) -> None:
    """T^2 KL -> |z - y|^2 / 2n on centered logits."""
    student, teacher = (z.astype(float) - z.mean(-1, keepdims=True) for z in (STUDENT, TEACHER))
    loss = 1e6 * against(SoftLogits(1e3), student, teacher)[0]
    np.testing.assert_allclose(loss, ((student - teacher) ** 2).sum(-1) / (2 * N), rtol=1e-2)


def shifted_mean(teacher: np.ndarray, student: np.ndarray, temperature: float) -> np.ndarray:
    """Jensen-Shannon of the definition."""
    p, q = (special.softmax(z.astype(float) / temperature, axis=-1) for z in (teacher, student))
    return (special.rel_entr(p, (p + q) / 2).sum(-1) + special.rel_entr(q, (p + q) / 2).sum(-1)) / 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_reverse_kl_and_jensen_shannon(temperature: float) -> None:
    same(against(ReverseKL(temperature), STUDENT, TEACHER)[0], kl(STUDENT, TEACHER, temperature))
    loss = against(JensenShannon(temperature), STUDENT, TEACHER)[0]
    same(loss, shifted_mean(TEACHER, STUDENT, temperature))
    same(loss, against(JensenShannon(temperature), TEACHER, STUDENT)[0])
    far = against(JensenShannon(temperature), np.float32([1e4, 0, 0]), np.float32([0, 0, 1e4]))[0]
    same(far, math.log(2))


# --- metric


@pytest.mark.parametrize("channel", CHANNELS, ids=str)
def test_metric_is_the_hessian(x64, channel) -> None:
    logits, tangent = jnp.asarray(TEACHER, float), jnp.asarray(STUDENT, float)
    targets = channel.targets(None, logits)
    hessian = jax.jit(jax.vmap(jax.hessian(channel.loss)))(logits, targets)
    metric = np.asarray(jax.jit(channel.metric)(logits, tangent))
    same(metric, np.einsum("bij,bj->bi", hessian, tangent), "float64")
    invisible = ~np.asarray(channel.visible(N))
    assert not metric[:, invisible].any()


@pytest.mark.parametrize("wrap", [lambda c: c, lambda c: Subset(INDICES, c), lambda c: Subset(MASK, c)])
def test_metric_of_sampled_token_is_the_mean_hessian(x64, wrap) -> None:
    channel = wrap(SampledToken())
    logits, tangent = jnp.asarray(TEACHER[0], float), jnp.asarray(STUDENT[0], float)
    tokens = np.flatnonzero(channel.visible(N))
    probabilities = special.softmax(np.asarray(logits)[tokens])
    hessian = jax.jit(jax.hessian(channel.loss))
    hessians = jnp.stack([hessian(logits, jnp.asarray(token)) for token in tokens])
    same(channel.metric(logits, tangent), np.einsum("t,tij,j->i", probabilities, hessians, tangent), "float64")


def test_metric_of_sampled_token_at_other_temperatures() -> None:
    for channel in (SampledToken(0.5), Subset(INDICES, SampledToken(0.5))):
        with pytest.raises(InputError, match=r"SampledToken\(0\.5\) has no output metric: use temper"):
            channel.metric(jnp.asarray(TEACHER), jnp.asarray(STUDENT))


# --- subsets


@pytest.mark.parametrize("inner", SOFT, ids=str)
def test_subset_of_everything(inner) -> None:
    expected = against(inner, STUDENT, TEACHER)
    for where in (range(N), np.ones(N, bool)):
        for a, b in zip(against(Subset(where, inner), STUDENT, TEACHER), expected, strict=True):
            same(a, b)


@pytest.mark.slow
@settings(max_examples=25)
@given(few_subsets, logit_vectors, logit_vectors)
def test_subset_computes_on_gathered_logits(chosen: list[int], student: np.ndarray, teacher: np.ndarray) -> None:
    mask = np.isin(np.arange(N), chosen)
    for outer, inner in (
        (SoftLogits(2.0), SoftLogits(2.0)),
        (SquaredError(WEIGHTS), SquaredError(WEIGHTS[chosen])),
    ):
        loss, gradient = against(inner, student[chosen], teacher[chosen])
        scattered = np.zeros(N)
        scattered[chosen] = gradient
        for where in (chosen, mask, mask.tolist(), np.asarray(chosen), jnp.asarray(mask)):
            channel = Subset(where, outer)
            actual_loss, actual_gradient = against(channel, student, teacher)
            same(actual_loss, loss)
            same(actual_gradient, scattered)
            seen = mask if isinstance(outer, SoftLogits) else mask & (WEIGHTS > 0)
            np.testing.assert_array_equal(channel.visible(N), seen)


@settings(max_examples=30)
@given(few_subsets, some_logits, logit_vectors, logit_vectors)
def test_nested_subset_is_the_intersection(a: list[int], b: list[int], student: np.ndarray, teacher) -> None:
    both = sorted({*a} & {*b})
    if both:
        nested = Subset(a, Subset(np.isin(np.arange(N), b)))
        np.testing.assert_array_equal(nested.visible(N), np.isin(np.arange(N), both))
        single = Subset(np.isin(np.arange(N), both))
        for x, y in zip(against(nested, student, teacher), against(single, student, teacher), strict=True):
            same(x, y)


@pytest.mark.slow
@pytest.mark.parametrize("huge", [1e30, -3e38, np.inf, np.nan])
@pytest.mark.parametrize(
    "channel", [*SOFT, *(Subset(MASK, c) for c in SOFT), Subset(INDICES, SoftLogits(0.01))], ids=str
)
def test_invisible_logits_of_any_size(channel, huge: float) -> None:
    channel = Subset(INDICES, channel)
    hidden = ~np.asarray(channel.visible(N))
    student, teacher = STUDENT.copy(), TEACHER.copy()
    student[:, hidden], teacher[:, hidden] = huge, -huge
    loss, gradient = against(channel, student, teacher)
    expected_loss, expected_gradient = against(channel, STUDENT, TEACHER)
    np.testing.assert_array_equal(loss, expected_loss)
    np.testing.assert_array_equal(gradient, expected_gradient)
    assert not np.asarray(gradient)[:, hidden].any()
    assert not np.asarray(channel.metric(jnp.asarray(student), jnp.asarray(STUDENT)))[:, hidden].any()


@pytest.mark.parametrize("huge", [1e30, -3e38, np.inf, np.nan])
def test_invisible_logits_of_any_size_sampled(huge: float) -> None:
    student = STUDENT.copy()
    student[:, ~MASK] = huge
    channel = Subset(MASK, SampledToken())
    tokens = jnp.array([0, 2, 3])
    gradient = jax.grad(lambda z: channel.loss(z, tokens).sum())(jnp.asarray(student))
    expected = special.softmax(STUDENT[:, MASK], axis=-1) - np.eye(3)
    same(np.asarray(gradient)[:, MASK], expected)
    assert not np.asarray(gradient)[:, ~MASK].any()


def test_visible_logits_far_below_the_others() -> None:
    logits = np.where(MASK, -1e25, 0).astype(np.float32)
    same(np.exp(Subset(MASK).targets(None, jnp.asarray(logits))), MASK / 3)
    assert MASK[int(Subset(MASK, SampledToken(0)).targets(None, jnp.asarray(logits)))]
    same(against(Subset(MASK), np.tile(logits, (3, 1)), TEACHER)[0], kl(TEACHER[:, MASK], np.zeros((3, 3)), 1.0))


REFERENCES = {
    "soft": (SoftLogits, lambda mask, value: Subset(mask, SoftLogits(value))),
    "squared": (lambda weights: SquaredError(weights), lambda mask, value: Subset(mask, SquaredError(value))),
    "nested": (SoftLogits, lambda mask, value: Subset(mask[0], Subset(mask[1], SoftLogits(value)))),
    "reverse": (ReverseKL, lambda mask, value: Subset(mask, ReverseKL(value))),
    "symmetric": (JensenShannon, lambda mask, value: Subset(mask, JensenShannon(value))),
    "token": (lambda _: SampledToken(), lambda mask, value: Subset(mask, SampledToken())),
}


@jax.jit
def everything_of(channel, student, targets, tangent):
    """Loss, gradient and metric of one position."""
    value, gradient = jax.value_and_grad(channel.loss)(student, targets)
    return value, gradient, channel.metric(student, tangent)


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFERENCES)
def test_subset_against_the_selected_columns(kind: str) -> None:
    """100 random comparisons of a kind, 600 in all, with hidden logits up to 1e16, infinite or not a number."""
    rng, n = np.random.default_rng(5), 6
    reference, narrowed = REFERENCES[kind]
    for case in range(100):
        chosen = rng.random(n) < 0.6
        chosen[rng.integers(n)] = True
        masks = np.stack([chosen | (rng.random(n) < 0.3), chosen]) if kind == "nested" else chosen
        chosen = masks.all(0) if kind == "nested" else chosen
        student, teacher, tangent = (rng.normal(size=(3, n)) * 3).astype(np.float32)
        value = rng.uniform(0.1, 2, n) if kind == "squared" else np.float32(rng.uniform(0.3, 4))
        inner = reference(value[chosen] if kind == "squared" else value)
        channel = narrowed(jnp.asarray(masks), jnp.asarray(value, jnp.float32))
        hidden = np.array([10.0 ** rng.uniform(-2, 16), -1e16, np.inf, -np.inf, np.nan])[case % 5]
        wild = [np.where(chosen, z, np.float32(hidden)) for z in (student, teacher, tangent)]
        if kind == "token":
            target = channel.targets(jax.random.key(case), jnp.asarray(wild[1]))
            assert chosen[int(target)]
            own = jnp.asarray(np.cumsum(chosen)[int(target)] - 1)
        else:
            target, own = (
                channel.targets(None, jnp.asarray(wild[1])),
                inner.targets(None, jnp.asarray(teacher[chosen])),
            )
        found = everything_of(channel, wild[0], target, wild[2])
        expected = everything_of(inner, student[chosen], own, tangent[chosen])
        same(found[0], expected[0])
        for one, other in zip(found[1:], expected[1:], strict=True):
            same(np.asarray(one)[chosen], other, scale=np.abs(other).max())
            assert not np.asarray(one)[~chosen].any()


def test_hidden_logits_cancel_across_dtypes() -> None:
    """A teacher computed in bfloat16 and a student in float32 hide behind the same number."""
    channel, teacher = Subset(MASK, SquaredError()), jnp.asarray(TEACHER, jnp.bfloat16)
    loss = channel.loss(jnp.asarray(STUDENT), channel.targets(None, teacher))
    same(loss, ((STUDENT - np.asarray(teacher, np.float32))[:, MASK] ** 2).sum(-1))


# --- the k largest logits


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2, 4])
def test_top_k_is_the_subset_of_the_largest(k: int) -> None:
    for inner in (SoftLogits(2.0), SquaredError(WEIGHTS + 1), ReverseKL()):
        loss, gradient = against(TopK(k, inner), STUDENT, TEACHER)
        for row in range(3):
            largest = np.sort(np.argsort(-TEACHER[row])[:k])
            expected = against(Subset(np.isin(np.arange(N), largest), inner), STUDENT[row], TEACHER[row])
            same(loss[row], expected[0])
            same(gradient[row], expected[1])


def test_top_k_of_ties_takes_k() -> None:
    mask, _ = TopK(2).targets(None, jnp.zeros((3, N)))
    np.testing.assert_array_equal(mask.sum(-1), [2, 2, 2])


@pytest.mark.parametrize("channel", [Subset(MASK, TopK(2)), TopK(2, Subset(MASK))], ids=["within", "around"])
def test_top_k_never_takes_a_hidden_logit(channel) -> None:
    teacher = np.where(MASK, TEACHER, np.float32(1e20))
    mask, _ = channel.targets(None, jnp.asarray(teacher))
    np.testing.assert_array_equal(mask.sum(-1), [2, 2, 2])
    assert not np.asarray(mask)[:, ~MASK].any()
    # A traced mask cannot be counted: what is hidden stays hidden all the same.
    few = jax.jit(lambda seen: Subset(seen, TopK(3)).targets(None, jnp.asarray(TEACHER))[0])(np.arange(N) < 2)
    np.testing.assert_array_equal(few, np.tile(np.arange(N) < 2, (3, 1)))


def test_top_k_sampling() -> None:
    logits = jnp.tile(jnp.asarray(TEACHER[0]), (5000, 1))
    _, tokens = TopK(2, SampledToken()).targets(jax.random.key(1), logits)
    best = np.sort(np.argsort(-TEACHER[0])[:2])
    assert set(np.asarray(tokens).tolist()) <= set(best.tolist())
    expected = 5000 * special.softmax(TEACHER[0][best].astype(float))
    assert stats.chisquare(np.bincount(tokens, minlength=N)[best], expected).pvalue > 1e-3
    assert not TopK(2, SampledToken()).exact


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(0), "k must be at least 1, got 0"),
        (lambda: TopK(N + 1).visible(N), "k = 6, but only 5 logits are visible: use a smaller k"),
        (lambda: TopK(N + 1).targets(None, jnp.asarray(TEACHER)), "k = 6, but only 5 logits"),
        (lambda: Subset((0, 2), TopK(3)).visible(N), "k = 3, but only 2 logits are visible"),
        (lambda: TopK(4, Subset(MASK)).visible(N), "k = 4, but only 3 logits are visible"),
        (lambda: Subset((0, 2), WeightedSum((TopK(3),), (1.0,))).visible(N), "k = 3, but only 2 logits"),
        (lambda: Subset((0, 2), Subset((1, 2), TopK(2))).visible(N), "k = 2, but only 1 logits"),
    ],
)
def test_top_k_refusals(make, message: str) -> None:
    with pytest.raises(InputError, match=f"^TopK: {message}"):
        make()


@pytest.mark.parametrize(
    ("channel", "exact"),
    [
        *((channel, True) for channel in CHANNELS),
        (SampledToken(), False),
        (Subset(MASK, SampledToken()), False),
        (WeightedSum((SoftLogits(), SquaredError()), (1.0, 1.0)), True),
        (WeightedSum((SoftLogits(), SampledToken()), (1.0, 1.0)), False),
    ],
)
def test_exact_channels(channel, exact: bool) -> None:
    assert channel.exact is exact
    assert isinstance(channel, Channel)


def test_squared_error_of_weight_zero_is_blind() -> None:
    student = np.where(WEIGHTS > 0, STUDENT, 1e30).astype(np.float32)
    channel = SquaredError(WEIGHTS)
    np.testing.assert_array_equal(channel.visible(N), WEIGHTS > 0)
    np.testing.assert_array_equal(against(channel, student, TEACHER)[0], against(channel, STUDENT, TEACHER)[0])


@pytest.mark.parametrize("where", [(1,), np.arange(N) == 1], ids=["index", "mask"])
def test_softmax_over_one_logit_says_nothing(where) -> None:
    for temperature in (0.1, 1.0):
        loss, gradient = against(Subset(where, SoftLogits(temperature)), STUDENT * 1e4, TEACHER)
        assert not np.asarray(loss).any()
        assert not np.asarray(gradient).any()


@pytest.mark.slow
def test_stacked_masks_under_vmap() -> None:
    masks = np.array([[1, 0, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 1]], bool)
    for inner in (SoftLogits(2.0), SquaredError(WEIGHTS)):
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(Subset(mask, inner) for mask in masks))
        for channels, axes in ((stacked, 0), (Subset(masks, inner), Subset(0, None))):
            loss, gradient = jax.vmap(against, (axes, None, None))(channels, STUDENT, TEACHER)
            for i, mask in enumerate(masks):
                expected_loss, expected_gradient = against(Subset(np.flatnonzero(mask), inner), STUDENT, TEACHER)
                same(loss[i], expected_loss)
                same(gradient[i], expected_gradient)


def test_channels_are_pytrees() -> None:
    for channel in CHANNELS:
        copy = jax.tree.unflatten(jax.tree.structure(channel), jax.tree.leaves(channel))
        targets = copy.targets(None, jnp.asarray(TEACHER))
        same(copy.loss(jnp.asarray(STUDENT), targets), against(channel, STUDENT, TEACHER)[0])
    temperatures = jnp.array([0.5, 2.0])
    losses = jax.vmap(lambda t: against(SoftLogits(t), STUDENT, TEACHER)[0])(temperatures)
    same(losses, [kl(TEACHER, STUDENT, 0.5), kl(TEACHER, STUDENT, 2.0)])


# --- sampled tokens


@jax.jit
def token_gradients(channel, student):
    return jax.vmap(jax.grad(channel.loss), (None, 0))(student, jnp.arange(N))


@settings(max_examples=30)
@given(logit_vectors, logit_vectors, some_logits)
def test_mean_gradient_over_tokens(student: np.ndarray, teacher: np.ndarray, chosen: list[int]) -> None:
    mask = jnp.asarray(np.isin(np.arange(N), chosen))
    channel = Subset(mask, SampledToken())
    gradients = token_gradients(channel, student)
    probabilities = np.zeros(N)
    probabilities[chosen] = special.softmax(teacher[chosen].astype(float))
    soft = against(Subset(mask), student, teacher)[1]
    # The gradients for tokens that are never sampled may be anything: they have probability 0.
    np.testing.assert_allclose(probabilities @ np.asarray(gradients, float), soft, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_token_frequencies(temperature: float) -> None:
    count = 20_000
    logits = jnp.tile(jnp.asarray(TEACHER[0]), (count, 1))
    for mask in (np.ones(N, bool), MASK):
        tokens = Subset(mask, SampledToken(temperature)).targets(jax.random.key(3), logits)
        observed = np.bincount(tokens, minlength=N)
        assert observed[~mask].sum() == 0
        expected = count * special.softmax(TEACHER[0][mask].astype(float) / temperature)
        assert stats.chisquare(observed[mask], expected).pvalue > 1e-3


@settings(max_examples=30)
@given(logit_vectors, some_logits, st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.01, 1.0, 100.0]))
def test_only_visible_tokens(teacher: np.ndarray, chosen: list[int], seed: int, temperature: float) -> None:
    mask = np.isin(np.arange(N), chosen)
    teacher = np.where(mask, teacher, np.float32(1e30))
    token = int(Subset(mask, SampledToken(temperature)).targets(jax.random.key(seed), jnp.asarray(teacher)))
    assert token in chosen
    if temperature == 0:
        assert token == chosen[int(np.argmax(teacher[chosen]))]


def test_greedy_needs_no_key() -> None:
    tokens = Subset(MASK, SampledToken(0)).targets(None, jnp.asarray(TEACHER))
    np.testing.assert_array_equal(tokens, np.where(MASK, TEACHER, -np.inf).argmax(-1))
    np.testing.assert_array_equal(SampledToken(0).targets(None, jnp.asarray(TEACHER)), TEACHER.argmax(-1))


def test_sampling_needs_a_key() -> None:
    with pytest.raises(InputError, match=r"^SampledToken samples: give it a key, or temperature 0 for greedy"):
        SampledToken().targets(None, jnp.asarray(TEACHER))


# --- the weighted mean

values = hnp.arrays(np.float32, 6, elements=st.floats(-100, 100, width=32))
weight_vectors = hnp.arrays(np.float32, 6, elements=st.floats(0.125, 8, width=32))


@settings(max_examples=50)
@given(values, weight_vectors, hnp.arrays(bool, 6), st.sampled_from([0.125, 3.0, 64.0]))
def test_weighted_mean(x: np.ndarray, weights: np.ndarray, kept: np.ndarray, scale: float) -> None:
    kept[0] = True
    weights = np.where(kept, weights, np.float32(0))
    expected = np.average(x[kept].astype(float), weights=weights[kept])
    np.testing.assert_allclose(weighted_mean(jnp.asarray(x), jnp.asarray(weights)), expected, rtol=1e-4, atol=1e-4)
    scaled = weighted_mean(jnp.asarray(x), jnp.asarray(weights * np.float32(scale)))
    np.testing.assert_allclose(scaled, expected, rtol=1e-4, atol=1e-4)
    moved = jnp.asarray(np.where(kept, x, np.float32(-77)))
    np.testing.assert_allclose(weighted_mean(moved, jnp.asarray(weights)), expected, rtol=1e-4, atol=1e-4)


def test_parts_with_the_total_weight_add_up() -> None:
    x, weights = RNG.normal(size=(2, 6)).astype(np.float32) ** 2
    cut = [slice(0, 1), slice(1, 4), slice(4, 6)]
    parts = [weighted_mean(jnp.asarray(x[c]), jnp.asarray(weights[c]), jnp.sum(weights)) for c in cut]
    same(sum(parts), np.average(x, weights=weights))
    assert weighted_mean(jnp.asarray(x), jnp.zeros(6), jnp.zeros(())) == 0


def test_imitation_value_and_grad_is_in_the_parameters() -> None:
    """z = x W under squared error: 2 x^T (w (z - y)) / sum w."""
    x, kernel, y = RNG.normal(size=(4, 2)), RNG.normal(size=(2, N)), RNG.normal(size=(4, N))
    weights = np.array([0.5, 0.0, 2.0, 1.0])
    value, gradient = imitation_value_and_grad(
        SquaredError(), lambda w: jnp.asarray(x, jnp.float32) @ w, jnp.asarray(kernel, jnp.float32),
        jnp.asarray(y, jnp.float32), jnp.asarray(weights, jnp.float32),
    )  # fmt: skip
    gap = x @ kernel - y
    same(value, np.average((gap**2).sum(-1), weights=weights))
    same(gradient, 2 * x.T @ (gap * weights[:, None]) / weights.sum(), scale=10)


def test_imitation_loss_is_over_all_positions() -> None:
    """Two texts of three positions: a mean over positions, not over texts of means."""
    teacher, student = RNG.normal(size=(2, 2, 3, N)).astype(np.float32)
    weights = np.array([[0, 1, 1], [0, 0, 1]], np.float32)
    targets = SoftLogits().targets(None, jnp.asarray(teacher))
    loss = imitation_loss(SoftLogits(), jnp.asarray(student), targets, jnp.asarray(weights))
    same(loss, kl(teacher, student, 1.0)[weights > 0].mean())


# --- refusals


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, math.inf, math.nan, np.float32(-1), np.float64(0)])
@pytest.mark.parametrize("channel", [SoftLogits, ReverseKL, JensenShannon])
def test_bad_temperature(channel, temperature: float) -> None:
    name = channel.__name__
    with pytest.raises(InputError, match=rf"^{name}: temperature must be positive and finite, got"):
        channel(temperature)


@pytest.mark.parametrize("temperature", [-0.5, math.inf, math.nan])
def test_sampled_token_bad_temperature(temperature: float) -> None:
    with pytest.raises(InputError, match=r"^SampledToken: temperature must be finite and not negative, got"):
        SampledToken(temperature)


@pytest.mark.parametrize(
    "weights", [-1.0, math.nan, math.inf, [1.0, -1.0], (1.0, math.nan), np.array([1, -2]), np.float32(-1)]
)
def test_squared_error_bad_weights(weights) -> None:
    with pytest.raises(InputError, match=r"^SquaredError: weights must be finite and not negative, got"):
        SquaredError(weights)


BAD_SELECTIONS = [
    ((0, 5), r"logit index 5 is outside 0\.\.4"),
    ((-1,), r"logit index -1 is outside 0\.\.4"),
    ((), "no logit is selected"),
    (np.zeros(N, bool), "no logit is selected"),
    (np.ones(4, bool), r"a mask of shape \(4,\) for 5 logits"),
    (np.ones((1, N), bool), r"a mask of shape \(1, 5\) for 5 logits"),
]


@pytest.mark.parametrize(("where", "message"), BAD_SELECTIONS)
@pytest.mark.parametrize("inner", [SoftLogits(), Subset((0, 1))], ids=["alone", "nested"])
def test_subset_bad_selection(where, message: str, inner) -> None:
    channel = Subset(where, inner)
    logits = jnp.asarray(TEACHER)
    for call in (
        lambda: channel.visible(N),
        lambda: channel.targets(None, logits),
        lambda: channel.loss(logits, logits),
        lambda: channel.metric(logits, logits),
        lambda: jax.eval_shape(lambda z: channel.loss(z, z), logits),
        lambda: Subset((0, 1), channel).visible(N),
    ):
        with pytest.raises(InputError, match=f"^Subset: {message}"):
            call()


def test_bad_index_is_seen_while_tracing() -> None:
    with pytest.raises(InputError, match=r"^Subset: logit index 9 is outside 0\.\.4"):
        jax.jit(lambda channel, z: channel.loss(z, z))(Subset((0, 9)), jnp.asarray(TEACHER))


# --- several channels at once

PARTS = (SoftLogits(2.0), SquaredError(WEIGHTS), Subset(INDICES), Subset(MASK, SquaredError()))
FACTORS = (0.5, 2.0, 3.0, 0.25)


@pytest.mark.parametrize("weights", [FACTORS, list(FACTORS), np.array(FACTORS), jnp.array(FACTORS)])
def test_weighted_sum_of_losses_and_metrics(weights) -> None:
    channel = WeightedSum(PARTS, weights)
    parts = [against(part, STUDENT, TEACHER) for part in PARTS]
    loss, gradient = against(channel, STUDENT, TEACHER)
    same(loss, sum(factor * np.asarray(part[0], float) for factor, part in zip(FACTORS, parts, strict=True)))
    expected = sum(factor * np.asarray(part[1], float) for factor, part in zip(FACTORS, parts, strict=True))
    same(gradient, expected, scale=np.abs(expected).max())
    tangent = jnp.asarray(STUDENT)
    metrics = [np.asarray(part.metric(jnp.asarray(TEACHER), tangent), float) for part in PARTS]
    expected = sum(factor * metric for factor, metric in zip(FACTORS, metrics, strict=True))
    same(channel.metric(jnp.asarray(TEACHER), tangent), expected, scale=np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    "channel",
    [
        WeightedSum(PARTS, FACTORS),
        Subset((0, 3, 4), WeightedSum(PARTS, FACTORS)),
        WeightedSum((WeightedSum(PARTS, FACTORS), SoftLogits()), (0.1, 1.5)),
    ],
    ids=["sum", "subset", "nested"],
)
def test_metric_of_weighted_sum_is_the_hessian(x64, channel) -> None:
    logits, tangent = jnp.asarray(TEACHER, float), jnp.asarray(STUDENT, float)
    targets = channel.targets(None, logits)
    hessian = jax.jit(jax.vmap(jax.hessian(channel.loss)))(logits, targets)
    metric = np.asarray(jax.jit(channel.metric)(logits, tangent))
    same(metric, np.einsum("bij,bj->bi", hessian, tangent), "float64")
    assert np.abs(metric).max() > 0.1
    assert not metric[:, ~np.asarray(channel.visible(N))].any()
    same(against(channel, logits, logits)[0], 0, "float64")


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_one_channel_of_weight_one(part) -> None:
    channel, logits, tangent = WeightedSum((part,), (1.0,)), jnp.asarray(TEACHER), jnp.asarray(STUDENT)
    for a, b in zip(against(channel, STUDENT, TEACHER), against(part, STUDENT, TEACHER), strict=True):
        same(a, b)
    same(channel.metric(logits, tangent), part.metric(logits, tangent))
    np.testing.assert_array_equal(channel.visible(N), part.visible(N))


def test_part_of_weight_zero() -> None:
    channel, rest = WeightedSum(PARTS, (0.5, 0, 3.0, 0.0)), WeightedSum((PARTS[0], PARTS[2]), (0.5, 3.0))
    for a, b in zip(against(channel, STUDENT, TEACHER), against(rest, STUDENT, TEACHER), strict=True):
        same(a, b)
    logits, tangent = jnp.asarray(TEACHER), jnp.asarray(STUDENT)
    same(channel.metric(logits, tangent), rest.metric(logits, tangent))


@pytest.mark.parametrize("where", [(0, 2), MASK], ids=["indices", "mask"])
def test_subset_of_a_sum_is_the_sum_of_subsets(where) -> None:
    channel = Subset(where, WeightedSum(PARTS, FACTORS))
    others = WeightedSum([Subset(where, part) for part in PARTS], FACTORS)
    expected = against(others, STUDENT, TEACHER)
    for a, b in zip(against(channel, STUDENT, TEACHER), expected, strict=True):
        same(a, b)
    hidden = ~np.asarray(channel.visible(N))
    np.testing.assert_array_equal(hidden, ~np.isin(np.arange(N), np.arange(N)[np.asarray(where)]))
    student, teacher = np.where(hidden, np.float32(3e38), STUDENT), np.where(hidden, np.float32(-3e38), TEACHER)
    loss, gradient = against(channel, student, teacher)
    same(loss, expected[0])
    same(gradient, expected[1])
    assert not np.asarray(gradient)[:, hidden].any()


def test_weights_of_a_sum_under_vmap() -> None:
    weights = np.array([[1.0, 0.0, 0.0, 0.0], [0.5, 2.0, 3.0, 0.25], [0.0, 0.1, 0.0, 7.0]], np.float32)
    inside = jax.vmap(lambda row: against(WeightedSum(PARTS, row), STUDENT, TEACHER))(weights)
    mapped = jax.vmap(against, (WeightedSum(None, 0), None, None))(WeightedSum(PARTS, weights), STUDENT, TEACHER)
    for loss, gradient in (inside, mapped):
        for i, row in enumerate(weights):
            expected = against(WeightedSum(PARTS, row.tolist()), STUDENT, TEACHER)
            same(loss[i], expected[0])
            same(gradient[i], expected[1], scale=10)


def test_visible_to_a_sum_is_the_union() -> None:
    for parts, union in (
        ((Subset((0,)), Subset((2, 3))), [0, 2, 3]),
        ((Subset(MASK), SquaredError([0, 1, 0, 0, 0])), [0, 1, 2, 3]),
        ((Subset((1,)), SoftLogits()), range(N)),
    ):
        channel = WeightedSum(parts, (1.0, 1.0))
        np.testing.assert_array_equal(channel.visible(N), np.isin(np.arange(N), union))
        np.testing.assert_array_equal(
            Subset((0, 1), channel).visible(N), np.isin(np.arange(N), sorted({0, 1} & {*union}))
        )


def test_tokens_of_two_parts_are_independent() -> None:
    count, channel = 5000, WeightedSum((SampledToken(), SampledToken()), (1.0, 1.0))
    first, second = channel.targets(jax.random.key(3), jnp.zeros((count, N)))
    assert stats.binomtest(int((first == second).sum()), count, 1 / N).pvalue > 1e-3
    for tokens in (first, second):
        assert stats.chisquare(np.bincount(tokens, minlength=N)).pvalue > 1e-3
    again = channel.targets(jax.random.key(3), jnp.zeros((count, N)))
    np.testing.assert_array_equal(again, (first, second))


def test_sampled_tokens_in_a_sum() -> None:
    """Cross-entropy on the part's own tokens; without a key if nothing is sampled."""
    channel = Subset(MASK, WeightedSum((SampledToken(), SoftLogits()), (2.0, 0.5)))
    targets = channel.targets(jax.random.key(0), jnp.asarray(TEACHER))
    assert MASK[np.asarray(targets[0])].all()
    visible = np.flatnonzero(MASK)
    log_q = special.log_softmax(STUDENT[:, MASK].astype(float), axis=-1)
    cross = -log_q[range(3), np.searchsorted(visible, targets[0])]
    same(
        channel.loss(jnp.asarray(STUDENT), targets), 2 * cross + 0.5 * kl(TEACHER[:, MASK], STUDENT[:, MASK], 1.0)
    )
    with pytest.raises(InputError, match=r"^SampledToken samples: give it a key"):
        channel.targets(None, jnp.asarray(TEACHER))
    greedy = WeightedSum((SampledToken(0), SoftLogits()), (1.0, 1.0)).targets(None, jnp.asarray(TEACHER))
    np.testing.assert_array_equal(greedy[0], TEACHER.argmax(-1))


@pytest.mark.parametrize(
    ("parts", "weights", "message"),
    [
        ((), (), "0 channels and 0 weights"),
        ((), (1.0,), "0 channels and 1 weights"),
        ((SoftLogits(),), (), "1 channels and 0 weights"),
        ((SoftLogits(), SquaredError()), (1.0,), "2 channels and 1 weights"),
        ((SoftLogits(),), [1.0, 2.0], "1 channels and 2 weights"),
        (
            (SoftLogits(), SquaredError()),
            (1.0, -0.5),
            r"weights must be finite and not negative, got \[1.0, -0.5\]",
        ),
        ((SoftLogits(),), (-1,), r"weights must be finite and not negative, got \[-1\]"),
        ((SoftLogits(),), [math.nan], r"weights must be finite and not negative, got \[nan\]"),
        ((SoftLogits(),), (math.inf,), r"weights must be finite and not negative, got \[inf\]"),
        ((SoftLogits(),), (np.float32(-1),), r"weights must be finite and not negative, got \["),
    ],
)
def test_weighted_sum_refusals(parts, weights, message: str) -> None:
    with pytest.raises(InputError, match=f"^WeightedSum: {message}"):
        WeightedSum(parts, weights)


@pytest.mark.parametrize(
    ("parts", "weights"),
    [
        ((SoftLogits(), SquaredError()), [1.0, -1.0]),
        ((SoftLogits(), SquaredError()), [1.0, math.nan]),
        ((SoftLogits(), SquaredError()), [1.0, 1.0, 1.0]),
        ((), []),
    ],
)
def test_weighted_sum_refusals_of_arrays(parts, weights) -> None:
    with pytest.raises(InputError, match=r"^WeightedSum: "):
        WeightedSum(parts, np.array(weights))


def test_weighted_mean_of_nothing() -> None:
    """A batch without a position that weighs (no divergence token in it) teaches nothing."""
    value, gradient = jax.value_and_grad(lambda x: weighted_mean(x, jnp.zeros(3)))(jnp.arange(3.0))
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros(3))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kl", SoftLogits()),
        ("kl:2", SoftLogits(2)),
        ("mse", SquaredError()),
        ("top_k:3", TopK(3)),
        ("top_k", TopK(2)),
    ],
)
def test_channels_by_name(text: str, expected: object) -> None:
    assert channel_named(text) == expected


@pytest.mark.parametrize(
    ("text", "cause"), [("huber", "there are kl"), ("kl:warm", "number"), ("top_k:0", "at least 1")]
)
def test_refuses_names_of_channels(text: str, cause: str) -> None:
    with pytest.raises(InputError, match=cause):
        channel_named(text)
