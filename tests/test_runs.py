import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from subliminal_theory import runs
from subliminal_theory.errors import InputError
from subliminal_theory.estimate import Runs, interval
from subliminal_theory.files import write_atomically
from subliminal_theory.runs import Results, RunDirectory, load_results, read_config

CONFIG = {"seeds": 3, "rate": 0.1}
THIRD = 1 / 3
# Each row has at most one of two axes; numbers that a careless format would shorten.
PARTS: dict[str, list[dict[str, Any]]] = {
    "one": [
        {"condition": "teacher", "seed": 0, "metric": "accuracy", "value": 0.1},
        {"condition": "student", "seed": 0, "metric": "loss", "value": THIRD, "eps": 1e-05},
        {"condition": "student", "seed": 0, "metric": "loss", "value": 5e-324, "eps": 0.5},
    ],
    "two": [
        {"condition": "teacher", "seed": 1, "metric": "accuracy", "value": 0.2},
        {"condition": "student", "seed": 1, "metric": "loss", "value": -1.5, "law": 'a "b", c'},
    ],
    "three": [{"condition": "teacher", "seed": 7, "metric": "accuracy", "value": 0.4}],
}
TABLE = """condition,seed,metric,value,eps,law
teacher,0,accuracy,0.1,,
student,0,loss,0.3333333333333333,1e-05,
student,0,loss,5e-324,0.5,
teacher,1,accuracy,0.2,,
student,1,loss,-1.5,,"a ""b"", c"
teacher,7,accuracy,0.4,,
"""


def opened(path: Path, *, resume: bool = False, experiment: str = "toy", config: Any = CONFIG) -> RunDirectory:
    return RunDirectory.open(path, experiment, config, resume=resume, command=f"toy --resume={resume}")


def complete(directory: RunDirectory) -> None:
    for name, rows in PARTS.items():
        if not directory.finished(name):
            directory.save(name, rows, 1.5)
    directory.finish(list(PARTS))


def content(path: Path) -> dict[str, bytes | None]:
    """Every file below a path but locks with its bytes, every folder with None."""
    found = [p for p in sorted(path.rglob("*")) if not p.name.endswith(".lock")]
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in found}


def failure(call, *arguments, **keywords) -> str:
    """The message of the InputError that a call must raise, which must be one line."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    return message


def refusal(path: Path, **keywords) -> str:
    """The message with which `open` refuses; it must leave everything below the parent as it was."""
    root = path.parent
    before = content(root)
    message = failure(opened, path, **keywords)
    assert content(root) == before
    return message


def fail_once(monkeypatch: pytest.MonkeyPatch, name: str, code: int, skip: int = 0) -> None:
    """Let one call of a function of `os` fail."""
    real, calls = getattr(os, name), iter(range(1000))

    def failing(*arguments: Any) -> Any:
        if next(calls) == skip:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    monkeypatch.setattr(os, name, failing)


@pytest.fixture(autouse=True)
def _nobody_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed process left is cleared away at once, not after the time in which one may be writing it."""
    monkeypatch.setattr(runs, "OLD", -1)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A run whose part `one` is stored."""
    path = tmp_path / "run"
    opened(path).save("one", PARTS["one"], 1.5)
    return path


# --- what a run directory holds


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run"
    complete(opened(path))
    parts = [f"parts/{name}.json" for name in PARTS]
    files = ["config.json", "parts", *parts, "provenance.json", "results.csv", "summary.json"]
    assert sorted(content(path)) == sorted(files)
    config = json.loads((path / "config.json").read_text())
    assert config == {"format": 1, "experiment": "toy", "config": CONFIG} == read_config(path)
    for name, rows in PARTS.items():
        assert json.loads((path / "parts" / f"{name}.json").read_text()) == {"rows": rows, "seconds": 1.5}


def test_answers_to_read(tmp_path: Path) -> None:
    """Texts are in a file of their own, in the order of the parts, and in no table."""
    directory = opened(tmp_path / "run")
    said = [{"condition": "student", "seed": seed, "question": "Which?", "answer": "Öwls!"} for seed in (0, 1)]
    for name, rows in PARTS.items():
        directory.save(name, [said[name == "two"], *rows], 1.5)
    opened(tmp_path / "run", resume=True).finish(list(PARTS))
    lines = (tmp_path / "run" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [said[name == "two"] for name in PARTS]
    assert (tmp_path / "run" / "results.csv").read_bytes() == TABLE.encode()


def test_results(run: Path) -> None:
    complete(opened(run, resume=True))
    assert (run / "results.csv").read_bytes() == TABLE.encode()
    results = load_results(run)
    assert results.values(condition="student") == [THIRD, 5e-324, -1.5]
    assert results.values(condition="student", eps="1e-05") == [THIRD]
    assert results.values(condition="teacher", seed=7) == [0.4]
    assert results.values(condition="nobody") == []
    assert results.distinct("seed") == [0, 1, 7]
    assert results.distinct("condition") == ["teacher", "student"]


def test_results_follow_the_given_order(tmp_path: Path) -> None:
    directory = opened(tmp_path)
    for seed in (2, 0, 1):
        row = {"condition": "a", "seed": seed, "metric": "m", "value": seed / 2}
        directory.save(f"seed-{seed}", [row], 0.0)
    directory.finish(["seed-0", "seed-1", "seed-2"])
    expected = "condition,seed,metric,value\na,0,m,0.0\na,1,m,0.5\na,2,m,1.0\n"
    assert (tmp_path / "results.csv").read_text() == expected


def test_summary(run: Path) -> None:
    complete(opened(run, resume=True))
    groups = json.loads((run / "summary.json").read_text(), parse_constant=pytest.fail)
    assert len(groups) == 4
    teacher, first, second, third = groups
    # Student's t at 0.975: 4.302653 with 2 degrees of freedom (any table); s^2 = ((2/15)^2 + ...) / 2.
    mean = 0.7 / 3
    s = math.sqrt(((0.1 - mean) ** 2 + (0.2 - mean) ** 2 + (0.4 - mean) ** 2) / 2)
    assert (teacher["condition"], teacher["metric"], teacher["n"]) == ("teacher", "accuracy", 3)
    assert teacher["mean"] == pytest.approx(0.2333333333, rel=1e-9)
    assert teacher["half_width_95"] == pytest.approx(4.302652730 * s / math.sqrt(3), rel=1e-9)
    assert [float(group["eps"] or "nan") for group in (first, second)] == [1e-05, 0.5]
    assert third["law"] == 'a "b", c'
    for group, value in ((first, THIRD), (second, 5e-324), (third, -1.5)):
        assert (group["mean"], group["half_width_95"], group["n"]) == (value, None, 1)


def test_summary_of_two_runs_and_of_a_number_that_is_none(tmp_path: Path) -> None:
    directory = opened(tmp_path)
    values = {"two": (1.0, 4.0), "none": (1.0, math.nan)}
    rows = [
        {"condition": name, "seed": seed, "metric": "m", "value": value}
        for name, pair in values.items()
        for seed, value in enumerate(pair)
    ]
    directory.save("all", rows, 0.0)
    directory.finish(["all"])
    two, none = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert two["mean"] == 2.5
    assert two["half_width_95"] == pytest.approx(12.7062047 * 1.5, rel=1e-8)  # t_1 s / sqrt(2), s = 3 / sqrt(2)
    assert (none["mean"], none["half_width_95"], none["n"]) == (None, None, 2)


TRAITS = [
    {"condition": "student", "seed": seed, "trait": trait, "metric": "m", "value": value}
    for trait, values in (("owl", (1.0, 3.0)), ("elm", (5.0, 11.0)))
    for seed, value in enumerate(values)
]


@pytest.mark.parametrize(("checkpoint", "replica"), [("", "base"), ("folder", "seed")])
def test_runs_of_traits_are_crossed(tmp_path: Path, checkpoint: str, replica: str) -> None:
    """The variance of the mean is 12, with 48^2 / 1568 degrees of freedom (by hand in test_estimate)."""
    directory = opened(tmp_path, config={"checkpoint": checkpoint})
    directory.save("all", TRAITS, 0.0)
    found = directory.finish(["all"]).values(condition="student")
    assert found == Runs((1.0, 3.0, 5.0, 11.0), ("owl", "owl", "elm", "elm"), (0, 1, 0, 1), replica)
    (group,) = json.loads((tmp_path / "summary.json").read_text())
    assert (group["mean"], group["n"], group["of"]) == (5, 4, f"2 traits x 2 {replica}s")
    assert group["half_width_95"] == pytest.approx(interval(found).half_width)
    assert interval(found).half_width == pytest.approx(stats.t.ppf(0.975, 48**2 / 1568) * math.sqrt(12))


def test_a_trait_without_a_base(tmp_path: Path) -> None:
    directory = opened(tmp_path)
    directory.save("all", TRAITS[:-1], 0.0)
    assert failure(directory.finish, ["all"]).startswith("no run of trait 'elm' and base 1: an interval needs ")


def test_rows_without_a_trait_are_plain() -> None:
    """So are those of which only some have one, such as a teacher of all."""
    rows = [{"metric": "m", "value": 1.0, "seed": 0, "trait": trait} for trait in ("", "owl")]
    assert Results(rows).values(metric="m") == [1.0, 1.0]
    assert Results([*rows]).values(trait="") == [1.0]


def test_provenance(run: Path) -> None:
    complete(opened(run, resume=True))
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["seconds"] == dict.fromkeys(PARTS, 1.5)
    assert [call["command"] for call in provenance["invocations"]] == ["toy --resume=False", "toy --resume=True"]
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True, check=False)
    for call in provenance["invocations"]:
        assert timedelta(0) <= datetime.now(UTC) - datetime.fromisoformat(call["started"]) < timedelta(minutes=5)
        assert call["python"] == ".".join(map(str, sys.version_info[:3]))
        assert {"subliminal_theory", "jax", "jaxlib", "flax", "optax", "numpy"} <= set(call["packages"])
        assert call["packages"] == {name: metadata.version(name) for name in call["packages"]}
        assert "cpu" in call["device"].lower()
        assert f"{os.cpu_count()} cores" in call["processor"]
        if head.returncode == 0:
            assert call["commit"].removesuffix("+changes") == head.stdout.strip()


def test_provenance_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    complete(opened(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["invocations"][0]["commit"] is None


# --- resuming


@pytest.mark.parametrize("stored", [0, 1, 2, 3])
def test_resumed_equals_uninterrupted(tmp_path: Path, stored: int) -> None:
    complete(opened(tmp_path / "whole"))
    directory = opened(tmp_path / "cut")
    for name in list(PARTS)[:stored]:
        directory.save(name, PARTS[name], 1.5)
    directory = opened(tmp_path / "cut", resume=True)
    assert [directory.finished(name) for name in PARTS] == [number < stored for number in range(3)]
    complete(directory)
    whole, cut = content(tmp_path / "whole"), content(tmp_path / "cut")
    del whole["provenance.json"], cut["provenance.json"]
    assert cut == whole


def test_resume_of_nothing_starts(tmp_path: Path) -> None:
    complete(opened(tmp_path, resume=True))
    assert (tmp_path / "results.csv").read_bytes() == TABLE.encode()


def test_resume_after_death_between_config_and_parts(run: Path) -> None:
    shutil.rmtree(run / "parts")
    (run / "provenance.json").unlink(missing_ok=True)
    complete(opened(run, resume=True))
    assert (run / "results.csv").read_bytes() == TABLE.encode()


# --- refusals


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", "results.csv", "draft.tmp", ".draft.tmp", ".draft.1.tmp"])
def test_refuses_foreign_folder(tmp_path: Path, resume: bool, name: str) -> None:
    path = tmp_path / "mine"
    path.mkdir()
    (path / name).write_text("of years")
    message = refusal(path, resume=resume)
    assert message == f"{path} is not empty and holds no run: choose another --out"


@pytest.mark.parametrize("resume", [False, True])
def test_refuses_other_experiment(run: Path, resume: bool) -> None:
    message = refusal(run, resume=resume, experiment="theorem")
    assert message == f"{run} holds a run of 'toy': choose another --out"


@pytest.mark.parametrize("resume", [False, True])
def test_refuses_other_settings(run: Path, resume: bool) -> None:
    message = refusal(run, resume=resume, config={"seeds": 4, "rate": 0.1, "depth": 2})
    assert str(run) in message
    assert "seeds=3" in message
    assert "depth=None" in message
    assert "rate" not in message


def test_refuses_existing_run(run: Path) -> None:
    message = refusal(run)
    assert message == f"{run} already holds this run: add --resume to go on, or choose another --out"


@pytest.mark.parametrize(
    "damaged",
    [b"", b'{"format": 1, "exp', b"\xff\xfe", b"[]", b"null", b"{}", b'{"format": 1}',
     b'{"format": 1, "experiment": "toy"}', b'{"format": 1, "experiment": "toy", "config": []}',
     b'{"format": 2, "experiment": "toy", "config": {}}'],
)  # fmt: skip
def test_refuses_damaged_config(run: Path, damaged: bytes) -> None:
    (run / "config.json").write_bytes(damaged)
    message = refusal(run, resume=True)
    assert str(run / "config.json") in message
    assert "choose another --out" in message
    assert "--resume" not in message  # without its settings the run cannot be gone on with


def test_read_config_elsewhere(tmp_path: Path) -> None:
    assert failure(read_config, tmp_path).startswith(f"{tmp_path / 'config.json'} is missing")


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.99])
def test_refuses_truncated_part(run: Path, kept: float) -> None:
    complete(opened(run, resume=True))
    part = run / "parts" / "two.json"
    data = part.read_bytes()
    part.write_bytes(data[: int(kept * len(data))])
    message = refusal(run, resume=True)
    assert message.startswith(f"{part} is damaged")
    assert "delete it and add --resume" in message
    part.unlink()
    complete(opened(run, resume=True))
    assert part.read_bytes() == data


@pytest.mark.parametrize(
    "damaged",
    [[], {}, {"rows": {}, "seconds": 1.0}, {"rows": [[]], "seconds": 1.0}, {"rows": PARTS["one"]},
     {"rows": PARTS["one"], "seconds": "soon"}, {"rows": [{"condition": "a", "seed": 0}], "seconds": 1.0},
     {"rows": PARTS["one"], "seconds": 1.0, "answers": {}}],
)  # fmt: skip
def test_refuses_part_of_another_form(run: Path, damaged: Any) -> None:
    part = run / "parts" / "one.json"
    part.write_text(json.dumps(damaged))
    assert refusal(run, resume=True).startswith(f"{part} is damaged: delete it and add --resume")


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b"{}", b'{"invocations": 1}'])
def test_refuses_damaged_provenance(run: Path, damaged: bytes) -> None:
    file = run / "provenance.json"
    file.write_bytes(damaged)
    message = refusal(run, resume=True)
    assert message.startswith(f"{file} is damaged")
    assert "delete it and add --resume" in message
    file.unlink()
    complete(opened(run, resume=True))


def test_refused_resume_keeps_leftovers(run: Path) -> None:
    """Nothing at all is changed by a refusal, not even what a killed run left."""
    (run / "parts" / ".two.json.12.tmp").write_bytes(b"{")
    (run / "parts" / "one.json").write_bytes(b"{")
    refusal(run, resume=True)


def test_refuses_file_as_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("of years")
    for path in (file, file / "below", file / "below" / "further"):
        before = content(tmp_path)
        message = failure(opened, path)
        assert message.startswith(f"cannot use output folder {path}: ")
        assert "choose another --out" in message
        assert content(tmp_path) == before


def test_refuses_file_as_parts(run: Path) -> None:
    shutil.rmtree(run / "parts")
    (run / "parts").write_text("of years")
    assert refusal(run, resume=True).startswith(f"cannot use output folder {run}: ")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions bind nobody here")
def test_refuses_read_only_folder(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    path.chmod(0o500)
    assert "choose another --out" in refusal(path)
    assert "choose another --out" in refusal(path / "below")
    path.chmod(0o700)


def test_refuses_read_only_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, even removing a file that does not exist fails."""

    def read_only(*arguments: Any, **keywords: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("builtins.open", read_only)
    monkeypatch.setattr(os, "unlink", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    message = failure(opened, tmp_path)
    assert (
        message == f"cannot write {tmp_path / 'config.json'}: Read-only file system; choose another folder (--out)"
    )


@pytest.mark.parametrize(
    "damaged",
    [None, b"", b"condition,seed,metric,value\na,0,m", b"condition,seed,metric,value\na,0,m,\n",
     b"condition,seed,metric,value\na,x,m,1\n", b"\x89PNG\xff", b'condition,seed,metric,value\n"' + b"x" * 2**18],
)  # fmt: skip
def test_load_results_missing_or_damaged(run: Path, damaged: bytes | None) -> None:
    complete(opened(run, resume=True))
    file = run / "results.csv"
    if damaged is None:
        file.unlink()
    else:
        file.write_bytes(damaged)
    message = failure(load_results, run)
    assert message == f"{file} is missing or damaged: run the experiment again with --resume"
    complete(opened(run, resume=True))
    assert file.read_bytes() == TABLE.encode()


# --- a disk that is full, a process that is killed


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_in_a_part(run: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    directory = opened(run, resume=True)
    before = content(run)
    fail_once(monkeypatch, call, code)
    message = failure(directory.save, "two", PARTS["two"], 1.5)
    assert message.startswith(f"the disk is full: could not write {run / 'parts' / 'two.json'}; ")
    assert "--resume" in message
    assert not directory.finished("two")
    assert content(run) == before
    complete(opened(run, resume=True))
    assert (run / "results.csv").read_bytes() == TABLE.encode()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    fail_once(monkeypatch, call, errno.ENOSPC)
    assert failure(opened, tmp_path).startswith("the disk is full: ")
    assert content(tmp_path) == {"parts": None}
    complete(opened(tmp_path, resume=True))
    assert (tmp_path / "results.csv").read_bytes() == TABLE.encode()


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_full_disk_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skip: int) -> None:
    """On results.csv, summary.json or provenance.json: what was there stays whole."""
    complete(opened(tmp_path))
    before = content(tmp_path)
    directory = opened(tmp_path, resume=True)
    fail_once(monkeypatch, "fsync", errno.ENOSPC, skip)
    assert failure(complete, directory).startswith("the disk is full: ")
    after = content(tmp_path)
    del before["provenance.json"], after["provenance.json"]
    assert after == before


def test_write_to_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "none" / "a", tmp_path / "file" / "a"):
        message = failure(write_atomically, path, b"new")
        assert message.startswith(f"cannot write {path}: ")
        assert "choose another folder (--out)" in message


KILLED = """
import os, signal, sys
from pathlib import Path
from subliminal_theory import files
setattr(os, sys.argv[2], lambda *arguments: os.kill(os.getpid(), signal.SIGKILL))
files.write_atomically(Path(sys.argv[1]), b"new" * 100_000)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize(("name", "call"), [("results.csv", "replace"), ("parts/two.json", "fsync")])
def test_killed_while_writing(run: Path, name: str, call: str) -> None:
    complete(opened(run, resume=True))
    if name == "parts/two.json":
        (run / name).unlink()
    before = content(run)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(run / name), call], check=False)
    assert killed.returncode == -signal.SIGKILL
    (leftover,) = set(content(run)) - set(before)
    assert leftover.endswith(".tmp")
    after = content(run)
    del after[leftover]
    assert after == before  # the old file is whole, or there is none
    complete(opened(run, resume=True))
    assert not [*run.rglob("*.tmp")]
    assert (run / "results.csv").read_bytes() == TABLE.encode()


def test_leftovers_of_a_first_write(tmp_path: Path) -> None:
    """A run killed while it wrote config.json left an empty run, not another program's folder."""
    (tmp_path / ".config.json.4711.tmp").write_bytes(b"{")
    complete(opened(tmp_path))
    assert not list(tmp_path.glob(".*"))


def test_an_unfinished_write_is_not_read(run: Path) -> None:
    (run / "parts" / ".two.json.12.tmp").write_text(json.dumps({"rows": PARTS["two"], "seconds": 1.5}))
    (run / "parts" / ".one.json.12.tmp").write_bytes(b"{")
    (run / ".results.csv.12.tmp").write_bytes(b"condition")
    directory = opened(run, resume=True)
    assert directory.finished("one")
    assert not directory.finished("two")
    assert not list(run.rglob("*.tmp"))


def test_written_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in (b"", b"a" * 1_000_000, b"\r\n\0"):
        write_atomically(path, data)
        assert path.read_bytes() == data
        assert [*tmp_path.iterdir()] == [path]


def test_figure(run: Path) -> None:
    def draw(file: Any, kind: str) -> None:
        file.write(f"a {kind}".encode())

    opened(run, resume=True).save_figure(draw)
    assert (run / "figure.png").read_text() == "a png"
    assert (run / "figure.pdf").read_text() == "a pdf"


def test_format_is_recorded() -> None:
    assert runs.FORMAT == 1  # a new format must be told from this one by its number
