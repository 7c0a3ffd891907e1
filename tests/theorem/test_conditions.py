"""The conditions on a loss, against losses of which they are known to hold or to fail."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subliminal_theory.channel import SampledToken, SoftLogits, SquaredError, Subset, TopK, WeightedSum
from subliminal_theory.divergence import JensenShannon, ReverseKL
from subliminal_theory.errors import InputError
from subliminal_theory.theorem import check, covers
from tests.test_audit import Maximum

N = 7


@dataclass(frozen=True)
class Bregman(SquaredError):
    """Of the potential sum_i exp(z_i)."""

    def loss(self, student_logits, targets):
        difference = student_logits - targets
        return jnp.sum(jnp.exp(student_logits) - jnp.exp(targets) * (1 + difference), -1)

    def metric(self, logits, tangent):
        return jnp.exp(logits) * tangent


@dataclass(frozen=True)
class Quartic(SquaredError):
    """sum_i d_i^4 + quadratic d_0^2, d = z - y: its metric sees the first logit at most, its gradient all."""

    quadratic: float = 0.0

    def loss(self, student_logits, targets):
        difference = student_logits - targets
        return jnp.sum(difference**4, -1) + self.quadratic * difference[..., 0] ** 2

    def metric(self, logits, tangent):
        return jnp.zeros_like(tangent).at[..., 0].set(2 * self.quadratic * tangent[..., 0])


@dataclass(frozen=True)
class Saddle(SquaredError):
    """Bounded below and stationary at equality, where it curves down along the first logit."""

    def loss(self, student_logits, targets):
        difference = student_logits - targets
        return jnp.sum(difference**2, -1) - 1.5 * jnp.sin(difference[..., 0]) ** 2 * jnp.exp(-targets[..., 1])

    def metric(self, logits, tangent):
        down = 3 * jnp.exp(-logits[..., 1]) * tangent[..., 0]
        return 2 * tangent - jnp.zeros_like(tangent).at[..., 0].set(down)


@dataclass(frozen=True)
class Rounded(SquaredError):
    """Squared error against logits of one decimal: its targets do not follow the teacher."""

    def targets(self, key, teacher_logits):
        return jnp.round(teacher_logits, 1)


@dataclass(frozen=True)
class NoisyTeacher(SquaredError):
    """Squared error against logits with noise: random, and a minimum on average."""

    exact = False
    doubled: bool = False

    def targets(self, key, teacher_logits):
        return teacher_logits + 0.1 * jax.random.normal(key, teacher_logits.shape, teacher_logits.dtype)

    def metric(self, logits, tangent):
        return (1 + self.doubled) * super().metric(logits, tangent)


@pytest.mark.slow
@pytest.mark.parametrize(
    "channel",
    [
        *(SoftLogits(), SoftLogits(0.05), ReverseKL(2.5), JensenShannon(0.7)),
        *(SquaredError(), SquaredError([0, 1, 2, 1e-6, 3, 1, 1]), Bregman()),
        *(Subset((4, 5, 6)), WeightedSum((ReverseKL(), SquaredError()), (1, 0.1))),
    ],
    ids=str,
)
def test_covered(channel):
    found = covers(channel, N)
    assert found, found
    assert (found.exact, found.null_space) == (True, "constant")
    assert found.gradient < 1e-12
    assert -1e-12 < found.curvature <= 1
    assert "stationary and a minimum, and the null space of M is constant" in str(found)


@pytest.mark.slow
@pytest.mark.parametrize("channel", [TopK(3), Subset((0, 2, 5, 6), TopK(2, SquaredError()))], ids=str)
def test_covered_for_teachers_that_choose_the_same_logits(channel):
    """At A = 0 the step moves none of the k logits: D_S . D_T is 0 until another one enters."""
    found = covers(channel, N)
    assert found
    assert found.null_space == "locally constant"


@pytest.mark.slow
def test_at_the_change_of_the_largest_logits_a_hidden_step_shows(x64):
    """f = theta, the teacher raises the third logit, which is not among the two largest at first: A = 0."""
    for eps, product in ((0.5, 0.0), (1.5, 2 * 1.5)):
        report = check(
            lambda p, x: p[None] * x, jnp.array([3.0, 2.0, 1.0]), None, jnp.ones((1, 1)), TopK(2, SquaredError()),
            teacher_step=eps, direction=jnp.array([0.0, 0.0, 1.0]),
        )  # fmt: skip
        assert float(report.predicted_inner_product) == 0
        assert float(report.inner_product) == pytest.approx(product)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channel", "reason"),
    [
        (Maximum(), "the student's loss is smaller away from the teacher's logits than at them"),
        (Saddle(), r"\(a\) fails: equality is not a minimum, the smallest curvature is -"),
        (Quartic(), r"\(c\) fails: a shift of the logits that M does not see changes the loss elsewhere \(1 of"),
        (Quartic(quadratic=1.0), r"\(c\) fails"),
        (Rounded(), r"the student's loss has gradient 0\.\d+ where it already equals the teacher"),
    ],
)
def test_not_covered(channel, reason):
    found = covers(channel, N)
    assert not found
    assert found.exact
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found.reason)
    assert str(found).startswith("not covered: ")


@pytest.mark.slow
def test_what_condition_c_forbids_happens(x64):
    """Quartic: A = 0 for every step, but D_S . D_T = 4 eps^3 sum u^4."""
    report = check(
        lambda p, x: p[None] * x, jnp.ones(2), None, jnp.ones((1, 1)), Quartic(),
        teacher_step=0.1, direction=jnp.array([1.0, 2.0]),
    )  # fmt: skip
    assert float(report.predicted_inner_product) == 0
    assert float(report.inner_product) == pytest.approx(4 * 0.1**3 * 17)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channel", "null_space"),
    [
        (SampledToken(), "constant"),
        (Subset((0, 4, 5, 6), TopK(3, SampledToken())), "locally constant"),
        (WeightedSum((SampledToken(), SoftLogits()), (1.0, 0.5)), "constant"),
        (NoisyTeacher(), "constant"),
    ],
    ids=str,
)
def test_covered_on_average(channel, null_space):
    found = covers(channel, N, key=jax.random.key(1))
    assert found, found
    assert (found.exact, found.null_space) == (False, null_space)
    assert "on average (Monte Carlo over 4096 draws" in found.reason


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_tokens_at_another_temperature(temperature):
    """The mean gradient at equality is softmax(z) - softmax(z / T), which the reason gives within its error."""
    found = covers(SampledToken(temperature), N)
    assert not found
    assert not found.exact
    assert "(a) fails on average" in found.reason
    with jax.enable_x64(True):
        logits = 2 * np.sin(1 + np.arange(8.0 * N)).reshape(8, N)
        gap = np.abs(jax.nn.softmax(logits) - jax.nn.softmax(logits / temperature)).max()
    told = float(found.reason.split("gradient ")[1].split(" ")[0])
    assert abs(told) == pytest.approx(gap, abs=0.03)


@pytest.mark.slow
def test_more_that_fails_on_average():
    assert "(a) fails on average" in covers(SampledToken(0.0), N).reason
    assert "has no output metric" in covers(SampledToken(1.01), N).reason  # too near to 1 for 4096 draws
    assert "`metric` differs by 1 of its size" in covers(NoisyTeacher(doubled=True), N).reason


@pytest.mark.slow
def test_blind_and_bad_input():
    blind = covers(Subset((4,)), N)
    assert blind
    assert blind.reason == "the loss is constant: nothing is transmitted"
    with pytest.raises(InputError, match=r"outside 0\.\.6"):
        covers(Subset((9,)), N)
    with pytest.raises(InputError, match="draws must be at least 256, got 10"):
        covers(SampledToken(), N, draws=10)


@pytest.mark.slow
def test_many_logits():
    assert covers(Subset(tuple(range(0, 3000, 3))), 3000)
