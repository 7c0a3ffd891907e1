"""The experiments about the theorem at a small setting."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import theorem, theorem_extensions, theorem_many_steps, theorem_samples
from experiments.app import command as command_line
from experiments.architectures import BUILDERS, IMAGE, OUTPUTS, build
from subliminal_theory.runs import Results

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("network", BUILDERS)
def test_networks_compute_in_float64(network, x64):
    """A float32 step anywhere inside would end the orders in eps at 1e-7."""
    model = build(network, jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (2, *IMAGE))
    assert model(images).shape == (2, OUTPUTS)
    assert model(images).dtype == "float64"
    assert "f32" not in str(jax.make_jaxpr(model)(images))


@pytest.fixture(scope="module")
def measured():
    """Two kinds of network, one seed each: every loss, trait and input law."""
    with jax.enable_x64(True):
        return {
            network: Results(theorem.measure_network(theorem.Config(seeds=1), network))
            for network in ("MLP, tanh", "linear")
        }


def test_theorem_rows(measured):
    rows = measured["MLP, tanh"]
    cases = len(theorem.CHANNELS) * len(theorem.TRAITS) * len(theorem.INPUTS)
    for metric in ("orthogonal", "negative", "rises"):
        assert rows.values(condition="same_init", metric=metric) == [0] * cases
    for metric, expected, tolerance in (
        ("order_inner_product", 1, 0.01),
        ("order_prediction_error", 2, 0.2),  # where the second order nearly vanishes, the third shows
        ("order_change", 1, 0.01),
    ):
        values = rows.values(condition="same_init", metric=metric)
        assert 0.9 * cases <= len(values) <= cases  # the others stand too little above rounding
        np.testing.assert_allclose(values, expected, atol=tolerance)
        assert np.median(values) == pytest.approx(expected, abs=1e-3)
    np.testing.assert_allclose(rows.values(condition="other_init", metric="order_inner_product"), 0, atol=0.1)
    np.testing.assert_allclose(rows.values(condition="other_init", metric="cosine_unupdated"), 1, atol=1e-6)


def test_a_linear_layer_sends_nothing_through_auxiliary_logits(measured):
    """A trait of the class logits alone moves none of the others; weight decay and random directions do."""
    rows = measured["linear"]
    for loss in theorem.CHANNELS:
        for trait in theorem.TRAITS:
            blind = "auxiliary" in loss and trait in ("class labels", "preference")
            cell = {"loss": loss, "teacher": trait}
            assert set(rows.values(**cell, metric="orthogonal")) == {float(blind)}
            assert bool(rows.values(**cell, condition="same_init", metric="order_inner_product")) != blind
    # Squared error on a linear network is predicted exactly: nothing stands above rounding, so no order is fitted.
    exact = {"loss": next(iter(theorem.CHANNELS)), "condition": "same_init"}
    assert not rows.values(**exact, metric="order_prediction_error")


def test_zero_cases_and_violations_are_counted_apart(measured):
    text = theorem.report(measured["linear"], theorem.Config(seeds=1))
    assert "60 cases: in 12 the signal is exactly 0; in the other 48, 0 of 336 steps contradict" in text
    rows = [dict(row) for row in measured["linear"].rows]
    for row in rows:
        if row["metric"] == "rises" and row["teacher"] == "any direction":
            row["value"] = 2.0
    text = theorem.report(Results(rows), theorem.Config(seeds=1))
    assert "in the other 48, 30 of 336 steps contradict" in text


COMPILED_FOR_TESTS = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
MANY_STEPS = """
import json
from experiments.theorem_many_steps import Config, measure
print(json.dumps(measure(Config(seeds=4, steps=30), "all images", 16, [(1.9, 1e-7), (2.3, 1e-7)])))
"""


@pytest.mark.slow
def test_many_steps_rise_beyond_the_limit_alone():
    """In a process that compiles as users do: as tests compile, it is exact to 1e-7 only (JAX 0.10.2)."""
    environment = {name: value for name, value in os.environ.items() if name not in COMPILED_FOR_TESTS}
    done = subprocess.run(
        [sys.executable, "-c", MANY_STEPS], env=environment, capture_output=True, text=True, check=True,
        cwd=ROOT,
    )  # fmt: skip
    rows = Results(json.loads(done.stdout))
    change, predicted, product = (
        {rate: np.array(rows.values(rate=rate, metric=metric)) for rate in (1.9, 2.3)}
        for metric in theorem_many_steps.METRICS
    )
    assert max(change[1.9]) < 0
    assert max(change[2.3]) > 0
    for rate in change:
        np.testing.assert_allclose(change[rate], predicted[rate], rtol=1e-3)
        assert ((product[rate] >= rate * (1 - 1e-9)) & (product[rate] < 1.05 * rate)).all()


@pytest.mark.slow
@pytest.mark.parametrize("extension", theorem_extensions.EXTENSIONS, ids=lambda extension: extension.name)
def test_what_fails_has_a_counterexample_and_what_holds_has_none(extension, x64):
    rise = theorem_extensions.counterexample(extension)
    if extension.holds:
        assert rise is None
        changes = Results(theorem_extensions.measure(theorem_extensions.Config(seeds=8), extension))
        assert max(changes.values(metric="trait_loss_change")) < 0
    else:
        assert rise is not None
        assert float(rise) > 1e-7


@pytest.mark.parametrize(
    ("name", "rise"),
    [("20 student steps at 2.1", 1.1**20 - 1), ("2 student steps, momentum", 2.52), ("weight decay", 1e-2 - 2e-3)],
)
def test_counterexamples_of_many_steps_by_hand(name, rise, x64):
    """One logit, G = 2, eps = 1e-3: rises in units of eps. Decay moves by 1e-3 * 1e-2, imitation by 2e-6."""
    extension = next(e for e in theorem_extensions.EXTENSIONS if e.name.startswith(name))
    assert float(theorem_extensions.counterexample(extension)) == pytest.approx(1e-3 * rise, rel=1e-6)


def test_sign_descent_counterexample_by_hand(x64):
    """f = (3, -1, -1).theta: the teacher goes along (1, 1, 1), the student along (1, -1, -1)."""
    extension = next(e for e in theorem_extensions.EXTENSIONS if e.name.startswith("sign descent"))
    assert float(theorem_extensions.counterexample(extension)) == pytest.approx(1e-4 * (-1 + 1 + 1))


@pytest.mark.slow
def test_samples(x64):
    """Each panel on a few networks: what is proved holds in all; other ways of drawing have a counterexample."""
    config = theorem_samples.Config(seeds=3, students=1000, tokens="0.1,1", teacher_sizes="1e-4")
    rows = Results(theorem_samples.sampled(config))
    np.testing.assert_allclose(rows.values(metric="kl_over_predicted"), 1, atol=0.1)
    measured, predicted = (rows.values(metric=metric) for metric in ("share_right", "predicted_share"))
    np.testing.assert_allclose(measured, predicted, atol=0.06)  # 4 standard errors of 1,000 students
    np.testing.assert_allclose(rows.values(metric="predicted_share", tokens=1.0), 0.975, atol=1e-3)

    rows = Results(theorem_samples.filtered(config))
    within = rows.values(condition=theorem_samples.WITH, teacher_size=1e-4)
    np.testing.assert_allclose(within, 1, atol=1e-2)
    assert min(np.abs(rows.values(condition=theorem_samples.WITHOUT, teacher_size=1e-4))) > 10
    fails = set(theorem_samples.DRAWN) - {theorem_samples.WITH, theorem_samples.WITHOUT}
    found = {name: rows.values(condition=name, metric="counterexample") for name in fails}
    assert all(values[0] < -0.1 for values in found.values())
    (per_token,) = found[theorem_samples.PER_TOKEN]  # Cov(s, s - 0.4 length) / 5, by hand
    assert per_token == pytest.approx(-0.12, rel=1e-3)
    (likeliest,) = found["tokens from the 2 likeliest"]  # Cov(s1, -s1)
    assert likeliest == pytest.approx(-1, rel=1e-3)

    rows = Results(theorem_samples.prompted(config))
    for name in theorem_samples.PROMPTS:
        told, step = (rows.values(condition=name, metric=f"cosine_{of}") for of in ("metric", "step"))
        np.testing.assert_array_equal(np.sign(told), np.sign(step))
    assert min(rows.values(metric="cosine_shift")) > 0.99


@pytest.mark.slow
def test_a_figure_is_drawn_again(tmp_path, capsys):
    """From the files of a committed run, which holds no parts."""
    run = shutil.copytree(ROOT / "figures" / "mnist_digits", tmp_path / "run")
    before, summary = (run / "figure.png").read_bytes(), (run / "summary.json").read_bytes()
    for name in ("figure.png", "figure.pdf", "summary.json"):
        (run / name).unlink()
    assert command_line.main(["redraw", str(run)]) == 0
    assert (run / "figure.png").read_bytes()[:8] == before[:8]
    assert (run / "figure.pdf").exists()
    assert (run / "summary.json").read_bytes() == summary
    capsys.readouterr()
    for folder in (tmp_path, tmp_path / "nothing"):
        assert command_line.main(["redraw", str(run), str(folder)]) == 2
        assert "config.json is missing" in capsys.readouterr().err
    (run / "results.csv").write_text("condition,seed\n")
    assert command_line.main(["redraw", str(run)]) == 2
    assert str(run) in capsys.readouterr().err
