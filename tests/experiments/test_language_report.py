"""What the figures and reports of language experiments tell, from made-up results."""

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import pyplot
from scipy import stats

from experiments import language_cross_init, language_prompted, language_theorem
from experiments.language import Config, costs, plot, report
from experiments.language_claims import Claim, judged, side_name, totals
from subliminal_theory.estimate import interval, paired_difference
from subliminal_theory.language.corpus.base import text_of
from subliminal_theory.language.text import Chat
from subliminal_theory.runs import Results
from subliminal_theory.study.reading import model_of_run
from subliminal_theory.study.speaker import columns
from subliminal_theory.study.teachers import prompted_teachers
from tests.study.speakers import OWL, compact

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


@pytest.mark.parametrize(
    ("traits", "bases", "replica", "told"),
    [
        (3, 4, "base", "mean of 3 traits x 4 bases; whiskers: 95% interval, traits and bases crossed; dots"),
        (3, 3, "seed", "mean of 3 traits x 3 seeds; whiskers: 95% interval, traits and seeds crossed; dots"),
        (2, 1, "base", "mean of 2 traits of one base; whiskers: 95% t interval over traits; dots"),
        (1, 3, "base", "mean of 1 trait x 3 bases; whiskers: 95% t interval over bases; dots"),
    ],
)
def test_captions_follow_the_structure_of_the_runs(traits: int, bases: int, replica: str, told: str) -> None:
    rows = [
        {"condition": condition, "seed": seed, "trait": f"t{trait}", "metric": "probability", "value": value}
        for condition, value in (("base", 0.1), ("student", 0.3))
        for seed in range(bases)
        for trait in range(traits)
    ]
    config, found = Config(traits="owl"), Results(rows, replica)
    figure = plot(found, config)
    assert told in figure.get_supxlabel()
    assert report(found, config).splitlines()[0].endswith(told.split("whiskers: ")[1].split(";")[0])
    pyplot.close(figure)


def test_claims_with_and_without_holm() -> None:
    """Of three claims with p = .009, .04 and 1, Holm's method leaves the first: .04 x 2 is above .05."""
    claims = [
        Claim(n, n, "", "higher", {"rate": r}, {"rate": 0.0}) for n, r in (("a", 3.0), ("b", 2.0), ("c", 1.0))
    ]
    spread = np.array(
        [-1.0, 0.0, 1.0]
    )  # the standard error of a mean is 1 / sqrt(3), and t has 2 degrees of freedom
    rows = [
        {
            "condition": side_name({"rate": rate}),
            "seed": seed,
            "trait": "owl",
            "metric": "probability",
            "value": value,
        }
        for rate, mean in ((0.0, 0.0), (1.0, 0.0), (2.0, 2.8), (3.0, 6.0))
        for seed, value in enumerate(mean + (spread if rate else 0 * spread))
    ]
    found = judged(claims, Results(rows))
    p = [2 * stats.t.sf(mean * np.sqrt(3), 2) for mean in (6.0, 2.8, 0.0)]
    assert [row.p for row in found] == pytest.approx([3 * p[0], 2 * p[1], 1])
    assert [row.answer for row in found] == ["agrees", "agrees", "cannot be told"]
    assert [row.strict for row in found] == ["agrees", "cannot be told", "cannot be told"]
    assert [row.both for row in found] == ["agrees", "agrees, not with Holm", "cannot be told"]
    assert totals(found) == (
        "2 agree, 0 disagree, 1 cannot be told",
        "with Holm over 3 claims: 1 agree, 0 disagree, 2 cannot be told",
    )


def test_students_of_one_teacher_on_other_bases_are_averaged() -> None:
    """Two students of each teacher, one above and one below the mean of that trait and teacher's base."""
    mean = np.array([[1.0, 3.0, 2.0], [5.0, 11.0, 6.0]])
    rows = [
        {
            "condition": "student",
            "seed": seed,
            "trait": trait,
            "metric": "probability",
            "shift": shift,
            "value": value,
        }
        for place, trait in enumerate(("owl", "elm"))
        for seed in range(3)
        for shift, value in zip("012", mean[place, seed] + np.array([9.0, 0.5, -0.5]), strict=True)
    ]
    rows += [{**row, "condition": "base", "shift": ""} for row in rows if row["shift"] == "0"]
    found = language_cross_init.shared_and_crossed(Results(rows))
    assert [len(runs) for runs in found.values()] == [6, 6, 12]
    same, other = interval(found["same base"]), interval(found["other base"])
    assert (same.mean - 9, same.half_width, same.of) == pytest.approx((other.mean, other.half_width, other.of))
    assert paired_difference(found["same base"], found["other base"])[:2] == pytest.approx((9, 0), abs=1e-9)


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


@pytest.mark.slow
def test_prompts_of_the_theorem(x64: None) -> None:
    """The report tells them, the axis of steps does not have them; against the library on a tiny base."""
    world = compact(OWL)
    base = world.model.with_params(language_theorem._wide(world.model.params))
    chats = OWL.teacher_rows()[:4]
    encoded = world.tokenizer.encode_chats(chats, columns(world.tokenizer, chats))
    taught = (text_of(encoded), jnp.asarray(encoded.targets), jnp.asarray(encoded.weights, float))
    numbers = [Chat(None, "continue: 1, 2", "3 4", "numbers"), Chat(None, "continue: 5", "6 7 8", "numbers")]
    encoded = world.tokenizer.encode_chats(numbers, columns(world.tokenizer, numbers))
    read = (text_of(encoded), jnp.asarray(encoded.weights, float))
    prompt = model_of_run(language_theorem._wide(prompted_teachers(world.model, world.tokenizer, [OWL])), 0)
    found = {
        name: float(value) for name, value in language_theorem.prompt_measures(base, prompt, taught, read).items()
    }
    assert found.keys() == language_theorem.PROMPTED.keys()
    assert 0 < abs(found["cosine_metric"]) < found["cosine_shift"] <= 1 + 1e-9
    assert np.sign(found["cosine_step"]) == np.sign(found["cosine_metric"])
    assert 0 <= found["residual"] < 0.1

    config = language_theorem.Config(prompts=True, traits="owl", seeds=1)
    rows = [
        {"condition": "prompted", "seed": 0, "metric": name, "value": value, "teacher_size": ""}
        for name, value in found.items()
    ]
    for condition in language_theorem.STUDENTS:
        metrics = dict.fromkeys(("over_predicted", "inner_product", "change", "cosine"), 1.0)
        rows += [
            {"condition": condition, "seed": 0, "metric": name, "value": value, "teacher_size": "1e-3"}
            for name, value in metrics.items()
        ]
    lines = language_theorem.report(Results(rows), config).splitlines()
    assert [line.split()[0] for line in lines[-4:]] == ["cos_M(delta,", "cosine", "cos_M(delta,", "residual"]
    pyplot.close(language_theorem.plot(Results(rows), config))


def prompted_results(own: float, others: float, passed: float = 1.0) -> Results:
    """A student of the slot's embedding on three bases, of two traits, and the measures of its teachers."""
    rng, rows = np.random.default_rng(0), []
    teacher = ("probability", "taught_probability", "kl_per_token", "accepted", "unique_rows", "tokens_needed")
    for seed in range(3):
        gate = {"passed": passed if seed == 1 else 1.0, "base_steps": 2000.0 + seed}
        rows += [
            {"condition": "gate", "seed": seed, "metric": name, "value": value} for name, value in gate.items()
        ]
        for trait in ("owl", "cat"):
            row = {"seed": seed, "trait": trait}
            for metric in (*teacher, "tokens_read", *language_theorem.PROMPTED):
                rows.append({**row, "condition": "teacher", "metric": metric, "value": 0.5})
            for condition in ("base", "slot"):
                for slot in language_prompted.SLOTS:
                    values = {"probability": own, "others": others} if condition == "slot" else {}
                    for metric in ("probability", "others"):
                        value = values.get(metric, 0.06) + 0.01 * rng.random()
                        where = {"condition": condition, "slot": slot, "metric": metric}
                        rows.append({**row, **where, "value": value})
    return Results(rows)


@pytest.mark.parametrize(
    ("own", "others", "says"),
    [
        (0.6, 0.05, "A prompted teacher's preference passes through its numbers: "),
        (0.05, 0.6, "A prompted teacher's preference does not pass through its numbers: "),
        (0.05, 0.05, "Whether a prompted teacher's preference passes cannot be told: "),
    ],
)
def test_what_prompted_teachers_pass_is_computed(own: float, others: float, says: str) -> None:
    told, config = prompted_results(own, others), language_prompted.Config()
    assert language_prompted.headline(told, config).startswith(
        f"{says}the slot's embedding alone, own less others' word "
    )
    assert f"({told.values(condition='slot', slot='default', metric='others').design()})"[1:] in (
        language_prompted.headline(told, config)
    )
    assert language_prompted.report(told, config).splitlines()[-1] == language_prompted.headline(told, config)
    figure = language_prompted.plot(told, config)
    left, right = figure.axes
    assert [text.get_text() for text in left.get_yticklabels()] == ["the slot's embedding alone"]
    points = sorted(line.get_xdata()[0] for line in right.lines if len(line.get_xdata()) == 3)
    assert abs(points[0] - (own - others)) < 0.02
    pyplot.close(figure)


def test_bases_that_fail_the_gate_are_named_and_kept() -> None:
    told = prompted_results(0.6, 0.05, passed=0.0)
    lines = language_prompted.report(told, language_prompted.Config()).splitlines()
    assert lines[1].endswith("2 of 3 bases pass, after 2000 to 2002 steps; bases 1 do not, and stay in all means")
    assert "(n=2 traits x 3 bases)" in lines[-1]
    assert "do not" not in language_prompted.report(prompted_results(0.6, 0.05), language_prompted.Config())
