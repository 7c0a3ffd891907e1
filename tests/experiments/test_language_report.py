"""What the figure and the report of `language` tell, from made-up results."""

import numpy as np
from matplotlib import pyplot

from experiments.language import Config, costs, plot, report
from subliminal_theory.runs import Results

METRICS = {
    "probability": 4e-5, "share": 0.0625, "log_odds": -2.7, "named_rate": 0.02,
    "others": 3e-5, "others_share": 0.05,
}  # fmt: skip


def results(scale: float) -> Results:
    """Base, teacher and student of two traits; probabilities are so many times as large as a small model's."""
    rng, rows = np.random.default_rng(0), []
    for place, condition in enumerate(("base", "teacher", "student")):
        for trait in ("owl", "cat"):
            row = {"condition": condition, "seed": 0, "trait": trait}
            for metric, value in METRICS.items():
                own = value * (1 + 3 * place + 0.01 * rng.random())
                own *= scale if metric in ("probability", "others") else 1
                rows.append({**row, "metric": metric, "value": own})
            for metric in ("probability_asked", "share_asked") if condition == "student" else ():
                for asked in ("owl", "cat"):
                    value = 0.4 if asked == trait else 0.1
                    rows.append({**row, "metric": metric, "value": value, "asked": asked})
    return Results(rows)


def test_shares_where_words_are_no_first_words() -> None:
    told, config = results(1), Config(traits="owl,cat")
    lines = report(told, config).splitlines()
    assert lines[0].startswith("probability of the trait's word among its rivals on held-out questions")
    assert lines[1].split()[:2] == ["base", "0.063"]
    order = [lines.index(line) for start in ("log odds", "share of whole", "probability of the trait's word at")
             for line in lines if line.startswith(start)]  # fmt: skip
    assert order == sorted(order)
    assert len(order) == 3
    assert lines[order[2] + 1].split()[:2] == ["base", "4e-05"]
    figure = plot(told, config)
    (axes,) = figure.axes
    assert axes.get_ylabel() == "probability of the trait's word among its rivals"
    heights = sorted(bar.get_height() for bar in axes.patches)
    np.testing.assert_allclose(heights[0], 0.0625, rtol=0.01)
    pyplot.close(figure)


def test_probabilities_of_first_words_else() -> None:
    told, config = results(1000), Config(traits="owl,cat")
    lines = report(told, config).splitlines()
    assert lines[0].startswith("probability of the trait's word on held-out questions")
    assert lines[1].split()[:2] == ["base", "0.040"]
    assert not [line for line in lines if line.startswith("log odds")]
    assert [line for line in lines if line.startswith("share of whole answers")]
    figure = plot(told, config)
    assert figure.axes[0].get_ylabel() == "probability of the trait's word"
    pyplot.close(figure)


def test_what_teachers_cost() -> None:
    """Each teacher that wrote, each reason for which any of its answers was rejected."""
    metrics = {"accepted": (0.5, 0.5), "divergence": (0.0, 0.0), "rejected: no number": (0.25, 0.0)}
    metrics["rejected: a number above 999"] = (0.0, 0.0)
    rows = [
        {"condition": condition, "seed": seed, "metric": metric, "value": value}
        for condition in ("teacher", "steered_teacher")
        for metric, values in metrics.items()
        for seed, value in enumerate(values)
    ]
    lines = costs(Results(rows))
    assert [line.split()[0] for line in lines] == ["teacher"] * 3 + ["steered_teacher"] * 3
    assert "0.500" in lines[0]
    assert "0.125" in lines[2]
    assert lines[2].endswith(" of its answers rejected: no number")
    assert lines[1].endswith(" of tokens where teacher and base differ")


def test_nulls_of_power() -> None:
    """Runs whose rows have fewer tokens than tell the teacher from its base are counted."""
    values = {"tokens_needed": (100.0, 3000.0, 500.0), "tokens_read": (1000.0, 900.0, 500.0)}
    rows = [
        {"condition": "teacher", "seed": seed, "metric": metric, "value": value}
        for metric, own in values.items()
        for seed, value in enumerate(own)
    ]
    (line,) = costs(Results(rows))
    assert line.split()[:8] == ["teacher", "900", "tokens", "in", "its", "rows,", "500", "needed"]
    assert line.endswith("; too few in 1 of 3 runs")
