"""What is told of students beforehand, against closed forms of a linear network; and the experiment's report."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import theorem_outcome
from experiments.flags.digits import SMOKE
from experiments.predictors import IMAGES, Case, predict
from experiments.theorem_outcome import OUTCOMES, PREDICTORS, Config, Told, optimizers, plan, report, verdict
from experiments.theorem_outcome import run as students
from subliminal_theory.channel import SquaredError, Subset
from subliminal_theory.distill import distill
from subliminal_theory.errors import InputError
from subliminal_theory.keys import named
from subliminal_theory.model import Model
from subliminal_theory.runs import Results
from subliminal_theory.study import Optimizer
from subliminal_theory.theorem.krylov import lanczos, spectrum
from subliminal_theory.vision.noise import NoiseImages
from tests.experiments.commands import fails, run

CLASSES, AUX, HIDDEN, SIDE, STEPS, RATE = 2, 3, 3, 2, 40, 0.05
MIXED = np.random.default_rng(5).normal(size=(HIDDEN, CLASSES + AUX))
SHOWN = np.arange(CLASSES + AUX) >= CLASSES
KEY = jax.random.key(4)


def linear(params, images):
    """Logits that are linear in the parameters, and share them between classes and auxiliary logits."""
    return images.reshape(len(images), -1) @ params["w"] @ jnp.asarray(MIXED)


@pytest.fixture
def case(x64):
    rng = np.random.default_rng(6)
    base, noise, learned = (jnp.asarray(rng.normal(size=(SIDE**2, HIDDEN))) for _ in range(3))
    images, labels = rng.normal(size=(9, SIDE, SIDE)), rng.integers(0, CLASSES, 9)
    return Case(
        {"w": base}, Model(linear, {"w": base + 0.2 * noise}), Model(linear, {"w": base + 0.5 * learned}),
        (jnp.asarray(images), jnp.asarray(labels)), Subset(jnp.asarray(SHOWN), SquaredError()),
        NoiseImages((SIDE, SIDE), 8), Optimizer(RATE, optax.sgd), CLASSES,
    )  # fmt: skip


@pytest.fixture
def by_hand(case):
    """What NumPy needs: inputs, logits, the descent direction, D_T, and G by its Jacobian."""
    inputs = np.asarray(case.source.batch(named(KEY, "source"), (jnp.arange(IMAGES), jnp.ones(IMAGES))).inputs)
    flat, taught = inputs.reshape(IMAGES, -1), np.asarray(case.taught[0]).reshape(9, -1)
    base, start, teacher = (np.asarray(p["w"]) for p in (case.base, case.start.params, case.teacher.params))
    scores = (taught @ start @ MIXED)[:, :CLASSES]
    wrong = np.exp(scores) / np.exp(scores).sum(1, keepdims=True) - np.eye(CLASSES)[np.asarray(case.taught[1])]
    downhill = -taught.T @ wrong @ MIXED[:, :CLASSES].T / 9
    seen = MIXED[:, SHOWN]
    gauss_newton = 2 * np.kron(flat.T @ flat / IMAGES, seen @ seen.T)
    return {"flat": flat, "downhill": downhill, "moved": teacher - base, "gap": teacher - start, "base": base,
            "teacher": teacher, "seen": seen, "G": gauss_newton}  # fmt: skip


def told(case, rate=RATE):
    return {name: float(value) for name, value in predict(case, STEPS, rate, KEY).items()}


def test_one_step(case, by_hand):
    """The student's gradient of squared error is -G (theta_T - theta_S), exactly."""
    g, gap, matrix = by_hand["downhill"].reshape(-1), by_hand["gap"].reshape(-1), by_hand["G"]
    found = told(case)
    assert found["signal"] == pytest.approx(g @ matrix @ g)
    assert found["first_step"] == pytest.approx(g @ matrix @ gap)
    cosine = g @ matrix @ gap / np.sqrt((g @ matrix @ g) * (gap @ matrix @ gap))
    assert found["cos_metric"] == pytest.approx(cosine)


def test_divergence(case, by_hand):
    own, other = (by_hand["flat"] @ by_hand[who] @ by_hand["seen"] for who in ("teacher", "base"))
    own, other = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (own, other))
    assert told(case)["kl"] == pytest.approx((own * np.log(own / other)).sum(1).mean())


def test_coverage(case, by_hand):
    """The first update of plain descent is along G (theta_T - theta_S) of the first batch; Adam's its signs."""
    first = by_hand["flat"][:8]
    update = first.T @ first @ by_hand["gap"] @ by_hand["seen"] @ by_hand["seen"].T
    for rule, step in ((optax.sgd, update), (optax.adam, np.sign(update))):
        cosine = (step * by_hand["moved"]).sum() / np.linalg.norm(step) / np.linalg.norm(by_hand["moved"])
        changed = Case(**{**vars(case), "optimizer": Optimizer(RATE, rule)})
        assert told(changed)["coverage"] == pytest.approx(cosine, rel=1e-5)


def test_contraction_is_the_student_itself(case, by_hand):
    student = distill(case.start, case.teacher, case.channel, case.source, optax.sgd(RATE), STEPS, key=KEY)
    walked = np.asarray(student.model.params["w"]) - np.asarray(case.start.params["w"])
    assert np.linalg.norm(walked) > 0.1 * np.linalg.norm(by_hand["gap"])
    assert told(case)["contraction"] == pytest.approx((by_hand["downhill"] * walked).sum())


def test_other_optimizers_are_told_at_the_steepest_safe_rate(case, by_hand):
    steepest = 1 / np.linalg.eigvalsh(by_hand["G"])[-1]
    assert steepest > RATE
    capped = told(case, np.inf)
    assert capped == pytest.approx(told(case, steepest), rel=1e-6)
    assert capped == pytest.approx(told(case, 10 * steepest))
    assert capped["contraction"] != pytest.approx(told(case)["contraction"], rel=0.01)


def test_share_of_learnable_eigenvectors(case, by_hand):
    values, vectors = np.linalg.eigh(by_hand["G"])
    shares = (vectors.T @ by_hand["moved"].reshape(-1)) ** 2
    shares /= shares.sum()
    for rate in (RATE, RATE / 10):
        learnable = values >= 1 / (rate * STEPS)
        assert told(case, rate)["top"] == pytest.approx(shares[learnable].sum())
    assert 0 < shares[learnable].sum() < 0.9


@pytest.mark.parametrize("steps", [3, 6])
def test_spectrum_is_gauss_quadrature(steps, x64):
    """Exact for polynomials up to degree 2 steps - 1, and for any function once the Krylov space is exhausted."""
    values, start = np.array([0.0, 0.5, 1.0, 2.0, 5.0]), np.array([1.0, 2.0, -1.0, 0.5, 1.5])
    nodes, weights = spectrum(*lanczos(lambda v: jnp.asarray(values) * v, jnp.asarray(start), steps))
    share = start**2 / (start**2).sum()
    for degree in range(2 * steps):
        assert float(weights @ nodes**degree) == pytest.approx(share @ values**degree)
    if steps > len(values):
        assert float(weights @ jnp.exp(nodes)) == pytest.approx(share @ np.exp(values))
    else:
        assert float(weights @ nodes ** (2 * steps)) < (1 - 1e-6) * (share @ values ** (2 * steps))


@pytest.mark.slow
def test_tangent_student_of_a_linear_network_is_the_student():
    """Without hidden layers, and shown all logits so that it learns something."""
    config = Config(**{**SMOKE, "seeds": 2, "epochs": 30, "student_epochs": 30})
    settings = [config.setting(depth=0, start="perturbed", amount=0.3, sees="all", aux=4, student_optimizer="adam",
                               student_rate=0.003)]  # fmt: skip
    rows = Results(students(config, settings, [0, 1]))
    assert rows.values(metric="tangent") == pytest.approx(rows.values(metric="accuracy"), abs=2 / 355)
    assert min(rows.values(metric="accuracy")) > 0.4
    assert min(rows.values(metric="fall")) > 0.5


@functools.cache
def runs(noise=0.0):
    """Results of two axes in which the tangent student knows all and the others nothing."""
    rng, rows = np.random.default_rng(0), []
    for amount in ("0.0", "0.3"):
        for aux in ("5", "50"):
            for seed in range(10):
                luck = rng.normal()
                accuracy = 0.5 - float(amount) + 0.1 * luck
                for metric in (*PREDICTORS, *OUTCOMES):
                    known = metric in ("tangent", "accuracy", "fall")
                    value = accuracy if known else rng.normal()
                    value += noise * rng.normal() * (metric == "tangent")
                    rows.append({"condition": "student", "width": "64", "aux": aux, "amount": amount,
                                 "optimizer": "sgd", "seed": seed, "metric": metric, "value": value})  # fmt: skip
    return Results(rows)


def test_verdict():
    knows, guesses = (Told.of(runs(noise)) for noise in (0.0, 10.0))
    assert knows.axes() == ["amount", "aux"]
    run, level = verdict(knows)
    assert "predicts single runs better" in run
    assert knows.over_cells("accuracy", "tangent").low > 0.2
    assert guesses.over_cells("accuracy", "tangent").value < 0.1
    assert level.endswith("the other levels: better for noise on the start, m")
    run, level = verdict(guesses)
    assert "is not shown to predict single runs better" in run
    assert "worse for m" in level or "worse for noise on the start, m" in level
    text = report(runs(), Config(data="digits"))
    assert text.startswith("40 runs on digits: 4 cells x 10 seeds")
    assert text.count("\n") == len(verdict(knows)) + 2 * (2 + len(PREDICTORS)) + 1 + len(PREDICTORS) + 2


@pytest.mark.slow
def test_smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    rows = run(tmp_path / "run", "theorem_outcome", "--preset", "smoke")
    assert {row["metric"] for row in rows} == {*PREDICTORS, *OUTCOMES}
    assert len(rows) == 4 * 2 * (len(PREDICTORS) + len(OUTCOMES))
    assert all(np.isfinite(float(row["value"])) for row in rows)
    assert (tmp_path / "run" / "figure.png").exists()


def test_optimizers():
    assert optimizers("sgd:1, adam:6e-4") == {"sgd": 1.0, "adam": 6e-4}
    for text in ("sgd", "sgd:1,sgd:2", "sgd:x"):
        with pytest.raises(InputError, match="--rates"):
            optimizers(text)


def test_full_preset_is_one_family():
    config = theorem_outcome.configure(None, {"data": "digits"})
    assert len(plan(config)) == 2 * config.seeds
    assert config.seeds * 3 * 4 * 2 * 2 == 576


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--seeds", 1], "--seeds must be at least 2, got 1"),
        (["--rates", "sgd"], "--rates takes every optimizer once, with its rate, as in sgd:1, got 'sgd'"),
        (["--rates", "newton:1"], "optimizer 'newton' is unknown"),
        (["--rates", "sgd:-1"], "must be above 0, got -1.0"),
        (["--counts", "60"], "shown must be between 1 and aux = 50, got 60"),
        (["--amounts", ""], "--amounts is empty"),
    ],
)
def test_refused(arguments, told, tmp_path, capsys):
    assert told in fails(capsys, "theorem_outcome", *arguments, "--out", tmp_path / "run")
