"""What is installed: one package and one command, with everything that a clone can do."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import subliminal_theory
from experiments.app.command import discover

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree as an archive holds it."""
    folder = tmp_path_factory.mktemp("unpacked") / "tree"
    for name in ("subliminal_theory", "experiments"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def dependencies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of this environment, without this project and what tells of it."""
    folder = tmp_path_factory.mktemp("dependencies")
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if not package.name.startswith(("subliminal_theory", "__editable__")):
            (folder / package.name).symlink_to(package)
    return folder


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(tree, folder / "source")
    pip("wheel", "--no-deps", "--wheel-dir", folder, source)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


def python(
    path: list[Path], folder: Path, *arguments: object, status: int = 0
) -> "subprocess.CompletedProcess[str]":
    """Run Python in a folder with nothing but this path: without `site` no environment adds its packages."""
    environment = {name: value for name, value in os.environ.items() if name != "SUBLIMINAL_DATA"}
    environment |= {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "XDG_CACHE_HOME": str(path[-1].parent / "cache"),
    }
    command = [sys.executable, "-S", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == status, done.stderr
    return done


def test_wheel_holds_one_package(wheel: Path, tree: Path) -> None:
    assert wheel.name == f"subliminal_theory-{subliminal_theory.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        held = {Path(name) for name in archive.namelist()}
    information = f"subliminal_theory-{subliminal_theory.__version__}.dist-info"
    assert {path.parts[0] for path in held} == {"subliminal_theory", information}
    library = {path.relative_to(tree) for path in (tree / "subliminal_theory").rglob("*") if path.is_file()}
    ours = {path.relative_to(tree) for path in (tree / "experiments").rglob("*") if path.is_file()}
    expected = library | {Path("subliminal_theory") / path for path in ours}
    assert {path for path in held if path.parts[0] != information} == expected


def test_installed_command(installed: Path, dependencies: Path, tmp_path: Path) -> None:
    path = [installed, dependencies]
    command = installed / "bin" / "subliminal-theory"
    listed = python(path, tmp_path, command).stdout
    assert listed.startswith("usage: subliminal-theory NAME ")
    assert re.findall(r"^  (\S+) ", listed, re.M) == list(discover())
    for name in ("reproduce", "language_claims"):
        assert python(path, tmp_path, command, name, "--help").stdout.startswith(
            f"usage: subliminal-theory {name} "
        )
    refused = python(path, tmp_path, command, "theorm", status=2)
    assert (refused.stdout, refused.stderr) == ("", "error: unknown experiment 'theorm'; did you mean theorem?\n")
    assert not list(tmp_path.iterdir())
    unknown = python(path, tmp_path, command, "reproduce", "no-such", status=2).stderr
    assert unknown.startswith("error: unknown published number 'no-such'; there are released-reference, ")
    python(path, tmp_path, command, "theorem", "--preset", "smoke")
    python(path, tmp_path, command, "mnist", "--data", "digits", "--preset", "smoke")
    made = json.loads((tmp_path / "runs" / "mnist" / "provenance.json").read_bytes())["invocations"][0]
    assert made["command"] == "subliminal-theory mnist --data digits --preset smoke"
    assert made["packages"]["subliminal_theory"] == subliminal_theory.__version__
    python(path, tmp_path, command, "summary", "runs")
    assert (tmp_path / "runs" / "index.html").exists()


def test_tree_without_metadata(tree: Path, dependencies: Path) -> None:
    python([dependencies], tree, "-m", "experiments", "theorem", "--seeds", 2)
    made = json.loads((tree / "runs" / "theorem" / "provenance.json").read_bytes())["invocations"][0]
    assert made["command"] == "python -m experiments theorem --seeds 2"
    assert made["packages"]["subliminal_theory"] == subliminal_theory.__version__
