"""The summary page: what it shows of a run, and that no folder keeps it from being written."""

import csv
import importlib
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from experiments.app import command as command_line
from experiments.app.command import discover
from experiments.app.headline import answer, compared
from experiments.app.page import dots, exchanges, results_table
from subliminal_theory.estimate import Estimate
from subliminal_theory.runs import Results

FIGURES = Path(__file__).parents[2] / "figures"
EMPTY = {"meta", "img", "br", "line"}


class Page(HTMLParser):
    """A page whose tags nest correctly: its anchors, links, images and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.images: list[str] = []
        self.problems: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag not in EMPTY:
            self.open.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if "href" in given else []
        self.images += [given["src"]] if "src" in given else []
        if given.get("class") == "problem":
            self.problems.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in EMPTY

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words += data
        if self.problems and not self.problems[-1]:
            self.problems[-1] = data


def summary(folder: Path) -> Page:
    assert command_line.main(["summary", str(folder)]) == 0
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert "http:" not in text
    assert "https:" not in text
    return Page(text)


@pytest.fixture
def runs(tmp_path: Path) -> Callable[..., Path]:
    def copied(*names: str) -> Path:
        for name in names:
            shutil.copytree(FIGURES / name, tmp_path / name)
        return tmp_path

    return copied


def test_page(runs: Callable[..., Path]) -> None:
    folder = runs("chat_model", "mnist_digits", "theorem_many_steps")
    page = summary(folder)
    assert page.ids == ["theorem_many_steps", "mnist_digits", "chat_model"]
    assert [link for link in page.links if link.startswith("#")] == [f"#{name}" for name in page.ids]
    for link in page.links:
        assert link.startswith("#") or (folder / unquote(link)).is_file()
    assert all(image.startswith("data:image/png;base64,") for image in page.images)
    assert len(page.images) == 3
    assert page.problems == []
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    made = json.loads((folder / "mnist_digits" / "provenance.json").read_bytes())["invocations"][-1]
    for told in (made["command"], made["commit"], made["processor"], made["packages"]["jax"]):
        assert told in page.words
    assert "Does the trait pass through noise and logits that were never trained? Yes: " in page.words
    assert "That is ordinary distillation" in page.words
    assert "m, the number of auxiliary logits" in page.words
    assert "The trait loss rises in 0 of 300 runs up to rate x sharpness = 2" in page.words
    first = json.loads((folder / "chat_model" / "answers.jsonl").read_text().splitlines()[0])
    assert first["question"] in page.words
    assert first["answer"] in page.words


@pytest.mark.slow
def test_committed_runs(tmp_path: Path) -> None:
    """Every committed run has its headline, report and tables."""
    shutil.copytree(FIGURES, tmp_path / "figures")
    page = summary(tmp_path / "figures")
    assert len(page.ids) == len(list(FIGURES.iterdir()))
    assert page.problems == []


def test_every_experiment_tells_what_it_shows() -> None:
    for name in discover("plan"):
        module = importlib.import_module(f"experiments.{name}")
        assert callable(module.headline)
        told = " ".join((module.__doc__ or "").split())
        assert any(
            words in told for words in ("In the figure", "Each bar", "Each pair of bars", "Each group of bars")
        )


def test_values_beside_the_results(runs: Callable[..., Path]) -> None:
    """Published numbers of the same setting, and the committed figure if only the number of runs differs."""
    folder = runs("mnist")
    config = json.loads((folder / "mnist" / "config.json").read_bytes())
    config["config"]["seeds"] = 5
    (folder / "mnist" / "config.json").write_text(json.dumps(config))
    page = summary(folder)
    assert "0.537 (independent re-run of the paper's released script, N = 100)" in page.words
    assert "figures/mnist" in page.words
    config["config"]["width"] = 128
    (folder / "mnist" / "config.json").write_text(json.dumps(config))
    page = summary(folder)
    assert "0.537" not in page.words
    assert "figures/mnist" not in page.words.replace("--out figures/mnist", "")


def change(file: Path, column: str, new: Callable[[dict[str, str]], object]) -> None:
    with open(file, newline="") as lines:
        rows = list(csv.DictReader(lines))
    for row in rows:
        row[column] = str(new(row))
    with open(file, "w", newline="") as lines:
        writer = csv.DictWriter(lines, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def test_headline_follows_the_data(runs: Callable[..., Path]) -> None:
    folder = runs("mnist_digits")
    results = folder / "mnist_digits" / "results.csv"
    change(results, "value", lambda row: 1 - float(row["value"]))
    assert "never trained? No, the opposite: " in summary(folder).words
    change(results, "value", lambda row: float(row["seed"]) / 100)
    assert "never trained? These runs cannot tell: " in summary(folder).words


@pytest.mark.parametrize(
    ("difference", "expected"),
    [
        (Estimate(0.3, 0.2, 5), "yes"),
        (Estimate(-0.3, 0.2, 5), "no, the opposite"),
        (Estimate(0.1, 0.2, 5), "these runs cannot tell"),
        (Estimate(0.3, float("nan"), 1), "one run cannot tell"),
    ],
)
def test_answers(difference: Estimate, expected: str) -> None:
    assert answer(difference) == expected


def test_question_and_answer() -> None:
    told = compared("Does it pass?", "own less other", [2.0, 3.0, 4.0], [1.0, 2.0, 3.0])
    assert told == "Does it pass? Yes: own less other, 1.000 ± 0.000 (n=3)"


def older(run: Path) -> None:
    config = json.loads((run / "config.json").read_bytes())
    config["config"]["noise"] = 32
    (run / "config.json").write_text(json.dumps(config))
    change(run / "results.csv", "condition", lambda row: "old_" + row["condition"])


def other_files(run: Path) -> None:
    provenance = json.loads((run / "provenance.json").read_bytes())
    (run / "provenance.json").write_text(json.dumps({**provenance, "seconds": [1, 2]}))


def unfinished(run: Path) -> None:
    for name in ("results.csv", "summary.json", "figure.png", "figure.pdf"):
        (run / name).unlink()
    (run / "parts").mkdir()
    (run / "parts" / "seeds-00000.json").write_text("{}")


def unknown(run: Path) -> None:
    config = json.loads((run / "config.json").read_bytes())
    (run / "config.json").write_text(json.dumps({**config, "experiment": "../tomorrow"}))


def damaged(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_text("{ no <b>JSON</b>\n")


@pytest.mark.parametrize(
    ("happened", "said"),
    [
        (older, "The headline cannot be shown: "),
        (other_files, "The machine cannot be shown. The files may be of another version of the program (Attr"),
        (unfinished, "This run is not finished (stored parts: 1). Give its command again, with --resume."),
        (unknown, "this version has no experiment '../tomorrow'"),
        (damaged("config.json"), "config.json is damaged"),
        (damaged("results.csv"), "results.csv is missing or damaged"),
        (damaged("provenance.json"), "provenance.json is damaged"),
        (damaged("answers.jsonl"), "The answers cannot be shown."),
    ],
)
def test_a_run_that_cannot_be_read(runs: Callable[..., Path], happened: Callable[[Path], None], said: str) -> None:
    """It has a line that says so, and the other runs are shown as always."""
    folder = runs("mnist_digits", "mnist_nature")
    happened(folder / "mnist_digits")
    page = summary(folder)
    assert page.ids == ["mnist_digits", "mnist_nature"]
    assert any(said in problem for problem in page.problems)
    assert "another initialization, 0.822 ± 0.017" in page.words


def test_what_others_wrote_is_escaped(runs: Callable[..., Path]) -> None:
    folder = runs("mnist_digits")
    bad = "<script>alert('x')</script>&\"<img src=x onerror=alert(1)>"
    run = folder / "mnist_digits"
    provenance = json.loads((run / "provenance.json").read_bytes())
    provenance["invocations"][-1]["command"] = bad
    (run / "provenance.json").write_text(json.dumps(provenance))
    config = json.loads((run / "config.json").read_bytes())
    (run / "config.json").write_text(json.dumps({**config, "config": {**config["config"], bad: bad}}))
    row = {"condition": bad, "trait": bad, "seed": 0, "question": bad, "answer": bad}
    (run / "answers.jsonl").write_text(json.dumps(row) + "\n")
    change(
        run / "results.csv", "condition", lambda row: bad if row["condition"] == "teacher" else row["condition"]
    )
    run.rename(folder / 'mnist "<i>')
    page = summary(folder)
    text = (folder / "index.html").read_text()
    assert text.count("<script>") == 1
    assert "<img src=x" not in text
    assert "<i>" not in text
    assert page.words.count(bad) >= 6


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text.md").write_text("nothing")
    for folder in (tmp_path, tmp_path / "nothing"):
        assert command_line.main(["summary", str(folder)]) == 2
        assert capsys.readouterr().err.startswith(f"error: no run below {folder}: ")
        assert not (folder / "index.html").exists()
    assert command_line.main(["summary"]) == 2


ROWS = [
    {"condition": name, "seed": seed, "metric": "accuracy", "value": value, "width": width, "trait": "owl"}
    for name, seed, value, width in [
        ("a", 0, 0.1, "10"),
        ("a", 1, 0.3, "10"),
        ("b", 0, 0.5, "9"),
        ("b", 1, 0.9, "9"),
    ]
]


def test_table_and_dots() -> None:
    results = Results(ROWS)
    table = results_table(results, {"a": "the\nfirst"})
    assert [column.name for column in table.columns] == [
        "condition",
        "width",
        "metric",
        "mean",
        "95% interval",
        "runs",
    ]
    assert [[cell.text for cell in row][:4] for row in table.rows] == [
        ["the first", "10", "accuracy", "0.2"],
        ["b", "9", "accuracy", "0.7"],
    ]
    assert [row[1].key for row in table.rows] == [10.0, 9.0]
    drawn = dots(results, {"a": "the\nfirst"})
    assert drawn is not None
    assert [row.label for row in drawn.rows] == ["the first, width 10", "b, width 9"]
    first, second = drawn.rows[0].dots
    assert (first.run, first.text) == ("owl, seed 0", "the first, width 10; owl, seed 0: 0.1")
    assert drawn.left <= first.x < drawn.rows[0].mean < second.x < drawn.width
    assert drawn.rows[0].mean == pytest.approx((first.x + second.x) / 2, abs=0.1)
    assert dots(Results(ROWS[:2]), {}) is None
    assert dots(Results([]), {}) is None
    nothing = dots(Results([{**row, "value": 1.0} for row in ROWS]), {})
    assert nothing is not None
    assert all(0 < row.mean < nothing.width for row in nothing.rows)


def test_answers_side_by_side() -> None:
    said = [
        {
            "condition": name,
            "trait": trait,
            "seed": seed,
            "question": f"question {number}",
            "answer": f"{name} {number}",
        }
        for seed in range(2)
        for trait in "vwxyz"
        for name in ("base", "student")
        for number in range(5)
    ]
    found = exchanges(said, {"base": "model\nitself"})
    assert [(one.labels, one.question) for one in found] == [
        (trait, f"question {number}") for trait in "vwxy" for number in range(3)
    ]
    assert [(one.who, one.text) for one in found[1].answers] == [
        ("model itself", "base 1"),
        ("student", "student 1"),
    ]


def test_one_file_without_scripts_of_others() -> None:
    text = (Path(command_line.__file__).with_name("page.html")).read_text()
    assert not re.search(r"(src|href)=\"(?!#|{{)", text)
