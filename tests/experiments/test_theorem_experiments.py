"""The experiments about the theorem at a small setting, and the summary page over their runs."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import theorem, theorem_extensions
from experiments.app import command as command_line
from experiments.architectures import BUILDERS, IMAGE, OUTPUTS, build
from subliminal_theory.runs import Results

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("network", BUILDERS)
def test_networks_compute_in_float64(network, x64):
    """A float32 step anywhere inside would end the orders in eps at 1e-7."""
    model = build(network, jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (2, *IMAGE))
    assert model(images).shape == (2, OUTPUTS)
    assert model(images).dtype == "float64"
    assert "f32" not in str(jax.make_jaxpr(model)(images))


def test_theorem_rows(x64):
    rows = Results(theorem.measure_network(theorem.Config(seeds=2), "MLP, tanh"))
    cases = 2 * len(theorem.CHANNELS) * len(theorem.INPUTS)
    for metric, expected, tolerance in (
        ("share_not_negative", 1, 0),
        ("share_theorem_holds", 1, 0),
        ("order_inner_product", 1, 0.01),
        ("order_prediction_error", 2, 0.05),
        ("order_change", 1, 0.01),
    ):
        values = rows.values(condition="same_init", metric=metric)
        assert len(values) == cases
        np.testing.assert_allclose(values, expected, atol=tolerance)
    np.testing.assert_allclose(rows.values(condition="other_init", metric="order_inner_product"), 0, atol=0.1)
    np.testing.assert_allclose(rows.values(condition="other_init", metric="cosine_unupdated"), 1, atol=1e-6)


def test_a_linear_layer_sends_nothing_through_auxiliary_logits(x64):
    rows = Results(theorem.measure_network(theorem.Config(seeds=2), "linear"))
    auxiliary = list(theorem.CHANNELS)[-1]
    assert set(rows.values(loss=auxiliary, metric="share_orthogonal")) == {1.0}
    assert not rows.values(loss=auxiliary, metric="order_inner_product")


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


def test_sign_descent_counterexample_by_hand(x64):
    """f = (3, -1, -1).theta: the teacher goes along (1, 1, 1), the student along (1, -1, -1)."""
    extension = next(e for e in theorem_extensions.EXTENSIONS if e.name.startswith("sign descent"))
    assert float(theorem_extensions.counterexample(extension)) == pytest.approx(1e-4 * (-1 + 1 + 1))


def test_summary_page(tmp_path, capsys):
    out = tmp_path / "small"
    settings = ["--data", "digits", "--seeds", "1", "--epochs", "1", "--student-epochs", "1", "--width", "8"]
    assert command_line.main(["mnist", *settings, "--out", str(out)]) == 0
    assert command_line.main(["summary", str(tmp_path)]) == 0
    page = (tmp_path / "index.html").read_text()
    assert 'src="small/figure.png"' in page
    assert "python -m experiments mnist --data digits --seeds 1" in page
    assert json.loads((out / "provenance.json").read_text())["invocations"][0]["packages"]["jax"] in page
    capsys.readouterr()
    assert command_line.main(["summary", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("error: no finished run below")
    assert command_line.main(["summary"]) == 2


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
