import csv
import dataclasses
import errno
import functools
import gzip
import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure

from experiments.app import command as command_line
from experiments.app.contract import Part, configure, option
from subliminal_theory.audit import audit
from subliminal_theory.channel import SoftLogits, Subset
from subliminal_theory.distill import distill
from subliminal_theory.errors import InputError
from subliminal_theory.model import Model
from subliminal_theory.runs import Results, Row
from subliminal_theory.source import Batch, Examples
from tests.language.checkpoints import write_checkpoint

EXPERIMENTS = {name: importlib.import_module(f"experiments.{name}") for name in command_line.discover()}
ROOT = Path(__file__).parents[2]
NO_SIGKILL = pytest.mark.skipif(os.name != "posix", reason="SIGKILL")


@pytest.fixture(autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    # One compilation cache for all tests of a worker; in this process, being set keeps the user's away.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "compiled"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("SUBLIMINAL_DATA", raising=False)
    monkeypatch.setenv("COLUMNS", "1000")


# --- an experiment without training, whose parts can be made to fail


@dataclass(frozen=True)
class Config:
    seeds: int = option(3, "independent runs", minimum=1)
    rate: float = option(0.25, "step size: 100% of it", positive=True)
    kind: str = option("plain", "what is done", choices=("plain", "fancy"))
    limit: int | None = option(None, "most steps", minimum=0)


def rows_of(seed: int) -> list[Row]:
    return [{"condition": "only", "seed": seed, "metric": "root", "value": float(np.sqrt(seed)), "law": "sqrt"}]


class Toy(ModuleType):
    """An experiment.

    Its text has a second paragraph.
    """

    Config = Config
    PRESETS = {"default": Config(), "large": Config(seeds=5)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__("toy", type(self).__doc__)
        self.computed: list[int] = []
        self.before: Callable[[int], object] = lambda seed: None

    def compute(self, seed: int) -> Sequence[Row]:
        self.before(seed)
        self.computed.append(seed)
        return rows_of(seed)

    def plan(self, config: Config) -> list[Part]:
        return [Part(f"seed-{seed}", 1, functools.partial(self.compute, seed)) for seed in range(config.seeds)]

    def report(self, results: Results, config: Config) -> str:
        return f"{len(results.rows)} rows, {config.kind}"

    def plot(self, results: Results, config: Config) -> Figure:
        figure = Figure(figsize=(1, 1))
        figure.subplots().plot(results.values(metric="root"))
        return figure


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    module = Toy()
    monkeypatch.setattr(command_line, "discover", lambda: {"toy": "A toy."})
    monkeypatch.setitem(sys.modules, "experiments.toy", module)
    return module


def content(path: Path) -> dict[str, bytes | None]:
    """Every file below a path but locks with its bytes, every folder with None."""
    found = [p for p in sorted(path.rglob("*")) if not p.name.endswith(".lock")]
    return {str(p.relative_to(path)): p.read_bytes() if p.is_file() else None for p in found}


Capture = pytest.CaptureFixture[str]


def refusal(capsys: Capture, *arguments: object, lines: int = 1) -> str:
    """The message of a command that must fail; progress may be printed before it."""
    assert command_line.main([str(argument) for argument in arguments]) == 2
    output, errors = capsys.readouterr()
    assert not output
    assert errors.endswith("\n")
    *progress, message = errors.splitlines()
    assert len(progress) < lines
    assert not any("error" in line.lower() for line in progress)
    assert message.startswith("error: ")
    assert "Traceback" not in errors
    return message.removeprefix("error: ")


def succeed(*arguments: object) -> None:
    assert command_line.main([str(argument) for argument in arguments]) == 0


# --- what there is


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_lists_experiments(arguments: list[str], capsys: Capture) -> None:
    assert command_line.main(arguments) == 0
    output, errors = capsys.readouterr()
    assert not errors
    assert output.startswith("usage: python -m experiments NAME ")
    listed = re.findall(r"^  (\S+) +(.+)$", output, re.M)
    assert [name for name, _ in listed] == sorted(EXPERIMENTS)
    assert {"mnist", "theorem"} <= {name for name, _ in listed}
    for name, line in listed:
        assert (EXPERIMENTS[name].__doc__ or "").splitlines()[0] == line


def test_names_of_experiments(capsys: Capture) -> None:
    assert command_line.main(["--names"]) == 0
    output, errors = capsys.readouterr()
    assert not errors
    assert output.split() == [name for name, module in EXPERIMENTS.items() if hasattr(module, "plan")]
    others = {name for name in EXPERIMENTS if name not in output.split()}
    assert others == {
        "ask", "distil", "filter", "language_rows", "plan", "redraw", "summary", "teach", "weights", "write",
    }  # fmt: skip


def test_figures_have_their_commands(capsys: Capture) -> None:
    assert command_line.main(["--figures"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    committed = sorted(path.parent.name for path in (ROOT / "figures").glob("*/figure.png"))
    assert sorted(folder for folder, *_ in lines) == committed
    for folder, name, *_ in lines:
        assert json.loads((ROOT / "figures" / folder / "config.json").read_bytes())["experiment"] == name


@pytest.mark.parametrize("name", [name for name, module in EXPERIMENTS.items() if hasattr(module, "plan")])
def test_every_experiment_has_a_smoke_preset(name: str, tmp_path: Path) -> None:
    weights = {"checkpoint": str(write_checkpoint(tmp_path / "tiny"))} if name == "chat_model" else {}
    assert configure(EXPERIMENTS[name], "smoke", weights).seeds <= 5


def test_table_of_numbers_has_every_experiment() -> None:
    table = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)", table, re.M)) == set(command_line.discover("plan"))


def shown_defaults(output: str) -> dict[str, str]:
    return dict(re.findall(r"^  --([^\s,]+)(?: \w+)?(?:, --\S+(?: \w+)?)?\s+.*\(default (.+)\)$", output, re.M))


@pytest.mark.parametrize("name", [name for name, module in EXPERIMENTS.items() if not hasattr(module, "main")])
def test_help_shows_every_setting(name: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.main([name, "--help"])
    assert caught.value.code == 0
    output, errors = capsys.readouterr()
    assert not errors
    assert "\n  --resume " in output
    assert "\n  --devices int " in output
    shown = shown_defaults(output)
    assert shown["out"] == f"runs/{name}"
    default, *others = EXPERIMENTS[name].PRESETS.values()
    assert ("--preset" in output) == bool(others)
    for field in dataclasses.fields(default):
        value = getattr(default, field.name)
        if field.metadata.get("derived"):
            assert f"--{field.name.replace('_', '-')}" not in output
            continue
        if field.metadata.get("positional"):
            assert f"[{field.name.upper()} ...]" in output
            continue
        expected = "automatic" if value is None else json.dumps(value)
        assert shown[field.name.replace("_", "-")] == expected


def test_help_of_mnist_shows_the_paper(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        command_line.main(["mnist", "--help"])
    output = capsys.readouterr().out
    paper = {
        "data": '"mnist"', "aux": "3", "width": "256", "depth": "2", "epochs": "5", "batch-size": "1024",
        "optimizer": '"adam"', "learning-rate": "0.0003", "channel-loss": '"kl"', "inputs": '"uniform"',
    }  # fmt: skip
    assert paper.items() <= shown_defaults(output).items()
    assert "released | nature | digits" in output
    assert "adam | sgd | momentum" in output


def python(*arguments: object, **keywords: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "experiments", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **keywords)


@pytest.mark.slow
def test_in_a_process_of_its_own() -> None:
    wrong = python("mnits")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "error: unknown experiment 'mnits'; did you mean mnist?\n"


# --- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("mnits", "unknown experiment 'mnits'; did you mean mnist?"),
        ("theorm --seeds 2", "unknown experiment 'theorm'; did you mean theorem?"),
        ("--seeds", "unknown experiment '--seeds'; there are "),
        ("mnist --preset relased", "unknown preset 'relased'; there are released, nature, digits"),
        ("mnist --data digits --preset relased", "unknown preset 'relased'; there are released, nature, digits"),
        ("mnist --sedes 2", "unrecognized arguments: --sedes 2; see python -m experiments mnist --help"),
        ("mnist --see 2", "unrecognized arguments: --see 2; see python -m experiments mnist --help"),
        ("mnist digits", "unrecognized arguments: digits; see "),
        ("mnist --seeds", "argument --seeds: expected one argument; see "),
        ("mnist --data digits --seeds 2.5", "argument --seeds: invalid int value: '2.5'; see "),
        ("mnist --data digits --learning-rate x", "argument --learning-rate: invalid float value: 'x'; see "),
        ("mnist --data digitz", "no data set or folder is called 'digitz': give mnist, digits, auto"),
        ("mnist --data digits --seeds 0", "--seeds must be at least 1, got 0"),
        ("mnist --data digits --seeds -3", "--seeds must be at least 1, got -3"),
        ("mnist --data digits --aux 0", "--aux must be at least 1, got 0"),
        ("mnist --data digits --epochs 0", "--epochs must be at least 1, got 0"),
        ("mnist --data digits --student-epochs 0", "--student-epochs must be at least 1, got 0"),
        ("mnist --data digits --chunk 0", "--chunk must be at least 1, got 0"),
        ("mnist --data digits --depth -1", "--depth must be at least 0, got -1"),
        ("mnist --data digits --batch-size 0", "--batch-size must be at least 1, got 0"),
        ("mnist --data digits --noise-images -1", "--noise-images must be at least 0, got -1"),
        ("mnist --data digits --learning-rate -1", "--learning-rate must be above 0, got -1.0"),
        ("mnist --data digits --learning-rate 0", "--learning-rate must be above 0, got 0.0"),
        ("mnist --data digits --learning-rate nan", "--learning-rate must be finite, got nan"),
        ("mnist --data digits --learning-rate inf", "--learning-rate must be finite, got inf"),
        ("mnist --data digits --optimizer foo", "--optimizer 'foo' is unknown; there are adam, sgd, momentum"),
        (
            "mnist --data digits --channel-loss foo",
            "channel 'foo' is unknown; there are kl, reverse_kl, js, mse, ",
        ),
        ("theorem --seeds 0", "--seeds must be at least 1, got 0"),
        ("theorem --steps 1", "--steps must be at least 2, got 1"),
        ("theorem --smallest 1e-3", "--smallest 0.001 must be below --largest 0.001"),
        ("mnist --data digits --inputs foo", "--inputs 'foo' is unknown; there are uniform, "),
        ("mnist --data digits --data-dir x", "--data-dir is a folder of idx files, but the digits are embedded"),
        ("theorem --smallest nan", "--smallest must be finite, got nan"),
        ("theorem --preset nature", "unknown preset 'nature'; there are default, smoke"),
    ],
)
def test_refuses(arguments: str, message: str, tmp_path: Path, capsys: Capture) -> None:
    given = arguments.split()
    out = ["--out", tmp_path / "run"] if given[0] in EXPERIMENTS and arguments != "mnist --seeds" else []
    assert refusal(capsys, *given[:1], *out, *given[1:]).startswith(message)
    assert content(tmp_path) == {}


def test_refuses_data_folders(tmp_path: Path, capsys: Capture) -> None:
    out, none, corrupt = tmp_path / "run", tmp_path / "none", tmp_path / "corrupt"
    message = refusal(capsys, "mnist", "--data-dir", none, "--out", out)
    assert message.startswith(f"{none} does not hold train-images-idx3-ubyte")
    corrupt.mkdir()
    for stem in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        packed = gzip.compress(b"\0\0\x08\x01\0\0\0\x02\0\x01")
        (corrupt / f"{stem}-ubyte.gz").write_bytes(packed[:-9])
    file = corrupt / "train-images-idx3-ubyte.gz"
    for arguments in (["--data", corrupt], ["--data-dir", corrupt]):
        message = refusal(capsys, "mnist", *arguments, "--out", out)
        assert str(file) in message
        assert "download it again" in message
    assert not out.exists()


def test_refuses_unwritable_out(tmp_path: Path, toy: Toy, capsys: Capture) -> None:
    file = tmp_path / "file"
    file.write_text("of years")
    for out in (file, file / "below"):
        assert refusal(capsys, "toy", "--out", out).startswith(f"cannot use output folder {out}: ")
    assert content(tmp_path) == {"file": b"of years"}
    assert not toy.computed


def test_refuses_used_out(tmp_path: Path, toy: Toy, capsys: Capture) -> None:
    succeed("toy", "--seeds", 1, "--out", tmp_path)
    capsys.readouterr()
    before = content(tmp_path)
    assert "add --resume to go on" in refusal(capsys, "toy", "--seeds", 1, "--out", tmp_path)
    message = refusal(capsys, "toy", "--seeds", 2, "--rate", 0.5, "--out", tmp_path, "--resume")
    assert "(seeds=1, rate=0.25)" in message
    assert content(tmp_path) == before


def test_configure(toy: Toy) -> None:
    assert configure(toy, None, {}) == Config(3, 0.25, "plain", None)
    assert configure(toy, "large", {"limit": 0}) == Config(5, 0.25, "plain", 0)
    for changes in ({"limit": -1}, {"kind": "other"}, {"rate": 0.0}):
        with pytest.raises(InputError, match="--" + next(iter(changes))):
            configure(toy, "large", changes)


# --- a whole run


def test_run(tmp_path: Path, toy: Toy, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    succeed("toy", "--preset", "large", "--kind", "fancy")
    output, errors = capsys.readouterr()
    out = Path("runs", "toy")
    assert output == (
        "5 rows, fancy\n"
        f"written to {out}{os.sep}: figure.png, figure.pdf, results.csv, summary.json, provenance.json\n"
    )
    assert re.search(r"^toy: 5/5 runs, .*, 0 s left$", errors, re.M)
    assert toy.computed == [0, 1, 2, 3, 4]
    stored = json.loads((out / "config.json").read_text())
    assert stored["config"] == {"seeds": 5, "rate": 0.25, "kind": "fancy", "limit": None}
    (call,) = json.loads((out / "provenance.json").read_text())["invocations"]
    assert call["command"] == "python -m experiments toy --preset large --kind fancy"
    table = list(csv.reader(io.StringIO((out / "results.csv").read_text())))
    assert table[0] == ["condition", "seed", "metric", "value", "law"]
    assert [[row[1], float(row[3])] for row in table[1:]] == [[str(n), n**0.5] for n in range(5)]
    assert (out / "figure.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (out / "figure.pdf").read_bytes()[:5] == b"%PDF-"


def test_progress_on_a_terminal(tmp_path: Path, toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    succeed("toy", "--out", tmp_path)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", sys.stderr.getvalue())  # type: ignore[attr-defined]
    assert re.search(r"toy .* 3/3 .*runs/s 0:00:00", shown)


# --- what goes wrong during a run


def zeros(outputs: int) -> Model:
    return Model(matrix_product, jnp.zeros((2, outputs)))


def matrix_product(params: Any, inputs: Any) -> Any:
    return inputs @ params


def imitate(student: Model, teacher: Model, channel: Any = SoftLogits(), labels: Any = None) -> None:  # noqa: B008
    source = Examples(jnp.ones((4, 2)), 2, labels)
    distill(student, teacher, channel, source, optax.sgd(0.1), 1, key=jax.random.key(0))


def examine(**changes: Any) -> None:
    batch = Batch(jnp.ones((4, 2)), jnp.ones(4))
    init = jnp.arange(6.0).reshape(1, 2, 3)
    usual = {"student_init": init, "teacher_init": init, "teacher": init + 1, "channel": SoftLogits()}
    audit(**{**usual, "logits": 3, "batch": batch, **changes})


FAULTS: dict[str, Callable[[], None]] = {
    "student logits (2, 3) and teacher logits (2, 4) differ in shape": lambda: imitate(zeros(3), zeros(4)),
    "logit index 3 is outside 0..2": lambda: imitate(zeros(3), zeros(3), Subset((1, 3))),
    "a mask of shape (4,) for 3 logits": lambda: imitate(zeros(3), zeros(3), Subset(jnp.ones(4, bool))),
    "must not see labels": lambda: imitate(zeros(3), zeros(3), labels=jnp.arange(4)),
    "the channel shows logit 1, in which the trait itself is read": lambda: examine(private=(1,)),
    "cross-init control": lambda: examine(cross_init=True),
    "TRAINED teacher": lambda: examine(student_init=jnp.arange(1.0, 7.0).reshape(1, 2, 3)),
    "labels": lambda: examine(batch=Batch(jnp.ones((4, 2)), jnp.ones(4), labels=jnp.arange(4))),
}


@pytest.mark.parametrize("message", FAULTS)
def test_refusal_inside_a_part(message: str, tmp_path: Path, toy: Toy, capsys: Capture) -> None:
    toy.before = lambda seed: FAULTS[message]() if seed == 1 else None
    assert message in refusal(capsys, "toy", "--out", tmp_path, lines=3)
    assert [*(tmp_path / "parts").glob("*.json")] == [tmp_path / "parts" / "seed-0.json"]
    assert not (tmp_path / "results.csv").exists()


@pytest.fixture
def whole(tmp_path: Path, toy: Toy, capsys: Capture) -> bytes:
    """The results.csv of a run that nothing disturbs."""
    succeed("toy", "--out", tmp_path / "whole")
    toy.computed.clear()
    capsys.readouterr()
    return (tmp_path / "whole" / "results.csv").read_bytes()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk(
    call: str, tmp_path: Path, toy: Toy, whole: bytes, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    out = tmp_path / "run"

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        toy.before = lambda seed: patch.setattr(os, call, full) if seed == 1 else None
        message = refusal(capsys, "toy", "--out", out, lines=3)
    assert message.startswith(f"the disk is full: could not write {out / 'parts' / 'seed-1.json'}; ")
    assert [*(out / "parts").glob("*.json")] == [out / "parts" / "seed-0.json"]
    assert not [path for path in out.rglob("*") if "tmp" in path.name]
    toy.before, toy.computed = lambda seed: None, []
    succeed("toy", "--out", out, "--resume")
    assert toy.computed == [1, 2]
    assert "1 of 3 parts are finished already\n" in capsys.readouterr().err
    assert (out / "results.csv").read_bytes() == whole


def test_interrupt(tmp_path: Path, toy: Toy, whole: bytes, capsys: Capture) -> None:
    def interrupt(seed: int) -> None:
        if seed == 2:
            raise KeyboardInterrupt

    toy.before = interrupt
    out = tmp_path / "run"
    assert command_line.main(["toy", "--out", str(out)]) == 130
    output, errors = capsys.readouterr()
    assert not output
    assert errors.splitlines()[-1] == "interrupted: finished parts are kept, add --resume to go on"
    assert toy.computed == [0, 1]
    toy.before, toy.computed = lambda seed: None, []
    succeed("toy", "--out", out, "--resume")
    assert toy.computed == [2]
    assert (out / "results.csv").read_bytes() == whole
    calls = json.loads((out / "provenance.json").read_text())["invocations"]
    assert [call["command"].endswith("--resume") for call in calls] == [False, True]


def test_resume_after_truncated_part(tmp_path: Path, toy: Toy, whole: bytes, capsys: Capture) -> None:
    out = tmp_path / "whole"
    part = out / "parts" / "seed-1.json"
    part.write_bytes(part.read_bytes()[:-20])
    (out / "results.csv").unlink()
    before = content(out)
    assert refusal(capsys, "toy", "--out", out, "--resume").startswith(f"{part} is damaged")
    assert content(out) == before
    part.unlink()
    succeed("toy", "--out", out, "--resume")
    assert toy.computed == [1]
    assert (out / "results.csv").read_bytes() == whole


# --- kill -9, in the experiment that trains

TRAINING = ["mnist", "--data", "digits", "--seeds", 4, "--epochs", 1, "--student-epochs", 2]


def killed(wait_for: Callable[[], bool], *arguments: object) -> None:
    """Start a run and kill it as soon as a condition holds."""
    command = [sys.executable, "-m", "experiments", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not wait_for() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL  # it had not ended by itself


@pytest.mark.slow
@NO_SIGKILL
def test_killed_runs_resume(tmp_path: Path) -> None:
    out, parts = tmp_path / "killed", tmp_path / "killed" / "parts"
    killed((out / "provenance.json").is_file, *TRAINING, "--out", out)
    assert not list(parts.glob("*.json"))
    whole = python(*TRAINING, "--out", tmp_path / "whole")
    assert (whole.returncode, whole.stderr.count("error")) == (0, 0)
    killed(lambda: any(parts.glob("*.json")), *TRAINING, "--out", out, "--resume")
    stored = content(parts)
    assert stored
    assert not (out / "results.csv").exists()
    resumed = python(*TRAINING, "--out", out, "--resume")
    assert resumed.returncode == 0
    finished = sum(name.endswith(".json") and not name.startswith(".") for name in stored)
    assert f"{finished} of 4 parts are finished already\n" in resumed.stderr
    assert resumed.stdout.replace(str(out), "OUT") == whole.stdout.replace(str(tmp_path / "whole"), "OUT")
    for name in ("results.csv", "summary.json", "config.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    after = content(parts)
    assert sorted(after) == [f"seeds-{seed:05d}.json" for seed in range(4)]
    assert all(after[name] == data for name, data in stored.items() if name in after)
    assert len(json.loads((out / "provenance.json").read_text())["invocations"]) == 3


def test_training_that_diverges(tmp_path: Path, capsys: Capture) -> None:
    arguments = ["--optimizer", "sgd", "--learning-rate", 1e30, "--seeds", 1, "--epochs", 1, "--batch-size", 128]
    message = refusal(capsys, "mnist", "--data", "digits", *arguments, "--out", tmp_path)
    # The first loss is that of the untouched network; an epoch has ceil(1442 / 128) = 12 steps.
    assert message.startswith("the loss of the teacher of seed 0 is not finite at step 2 of 12: ")
    assert not list((tmp_path / "parts").glob("*.json"))
