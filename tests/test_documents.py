"""The code of README and of the documentation runs, and gives what they say."""

import contextlib
import io
import re
import runpy
from pathlib import Path

import jax
import numpy as np
import optax

from subliminal_theory import Examples, Model, check, distill
from tests.own_channel import LogCosh

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests" / "quickstart.py"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def in_page(page: str, code: Path) -> bool:
    """Whether a page of the documentation shows a file of code as it is."""
    return f"```python\n{code.read_text()}```" in (ROOT / "docs" / page).read_text(encoding="utf-8")


def test_quickstart() -> None:
    """Digits may vary between machines; answers may not."""
    printed, shown = io.StringIO(), SCRIPT.with_suffix(".txt").read_text()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(SCRIPT))
    number = r"[+-]?\d+\.\d+(?:e[+-]\d+)?"
    assert re.sub(number, "*", printed.getvalue()) == re.sub(number, "*", shown)
    ours, theirs = ([float(found) for found in re.findall(number, text)] for text in (printed.getvalue(), shown))
    np.testing.assert_allclose(ours[:3], theirs[:3], atol=0.05)
    np.testing.assert_allclose(ours[3:], theirs[3:], rtol=0.02)
    assert f"```python\n{SCRIPT.read_text()}```\n\n```\n{shown}```" in README
    assert in_page("quickstart.md", SCRIPT)
    assert f"```\n{shown}```" in (ROOT / "docs" / "quickstart.md").read_text()


def test_own_channel() -> None:
    assert in_page("extend.md", ROOT / "tests" / "own_channel.py")
    inputs = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
    model = Model(lambda params, x: x @ params, jax.random.normal(jax.random.key(0), (4, 3)))
    teacher = model.with_params(model.params + 0.5)
    run = distill(model, teacher, LogCosh(), Examples(inputs, 8), optax.sgd(0.1), 200, key=jax.random.key(1))
    np.testing.assert_allclose(run.model.params, teacher.params, atol=1e-3)
    report = check(
        model.apply, model.params, lambda params: (params**2).sum(), inputs, LogCosh(), teacher_step=0.01,
        student_step=0.01,
    )  # fmt: skip
    np.testing.assert_allclose(report.inner_product, report.predicted_inner_product, rtol=0.05)


def test_links_of_readme_and_pages() -> None:
    """Every link to a file or a heading of the repository leads somewhere."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target, anchor in re.findall(
            r"\]\((?!https?:)([^)#]*)(?:#([\w-]+))?\)", page.read_text(encoding="utf-8")
        ):
            made_by_site = page.parent.name == "docs" and target in ("index.md", "experiments.md")
            file = page.parent / target if target else page
            assert made_by_site or file.exists(), f"{page.name}: {target}"
            if anchor and not made_by_site:
                headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)
                names = [re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings]
                assert anchor in names, f"{page.name}: {target}#{anchor}"
