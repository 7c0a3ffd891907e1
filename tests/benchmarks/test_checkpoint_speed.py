"""The benchmark beside transformers: both sides compute the same, and what is missing is told in one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import checkpoint_speed
from tests.language.checkpoints import write_checkpoint


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["checkpoint_speed", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        checkpoint_speed.main()
    assert ended.value.code == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    return errors


@pytest.mark.torch
def test_both_sides_compute_the_same(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = write_checkpoint(tmp_path / "tiny", heads=4, groups=2)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "llama"}))
    command = [sys.executable, "-m", "benchmarks.checkpoint_speed", "--checkpoint", str(folder)]
    done = subprocess.run([*command, "--rounds", "2", "--steps", "1"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    measured = {name: one for name, one in found.items() if isinstance(one, dict)}
    assert len(measured) == 7
    for name, one in measured.items():
        low, high = one["range"]
        assert 0 < low <= one["ratio"] <= high, name
        assert one.get("difference", 0) < 1e-4, name
        assert ("difference" in one) == (name != "sampling")
        assert ("share_of_products" in one) == name.startswith(("training", "rank"))


def test_weights_that_were_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "fetch them with" in refused(monkeypatch, capsys)


def test_without_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "benchmarks.checkpoint_torch", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    folder = write_checkpoint(tmp_path / "tiny")
    told = refused(monkeypatch, capsys, "--checkpoint", folder)
    assert "torch is not installed" in told
    assert "[parity]" in told
