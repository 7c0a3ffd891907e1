"""Names on the Hub, against a server on this machine that answers as the Hub does."""

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from subliminal_theory.errors import InputError
from subliminal_theory.language.hub.download import resolve
from tests.experiments.commands import fails

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WHOLE = {
    "config.json": b"{}", "tokenizer.json": b"{} ", "chat_template.jinja": b"hi", "model.safetensors": b"weights",
    "pytorch_model.bin": b"pickle", "onnx/model.json": b"{}", "original/model.safetensors": b"again",
    "consolidated.safetensors": b"once more", "README.md": b"read me",
}  # fmt: skip
INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
SHARDED = {
    "config.json": b"{}", "model.safetensors.index.json": INDEX, "model-1.safetensors": b"one",
    "model-2.safetensors": b"two", "model-3.safetensors": b"no part of it",
}  # fmt: skip
MODELS = {
    "own/whole": WHOLE,
    "own/sharded": SHARDED,
    "own/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
    "own/lost": {name: data for name, data in SHARDED.items() if name != "model-2.safetensors"},
}
# As the Hub answers: names that nobody has look like private ones.
REFUSED = {
    "own/gated": (403, "GatedRepo"), "own/unknown": (401, "RepoNotFound"), "own/private": (401, "RepoNotFound"),
    "own/closed": (401, ""), "own/broken": (500, ""), "own/absent": (404, "RepoNotFound"),
}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """What `huggingface_hub` asks for: about a model, its tree, and its files."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = [part for part in urlsplit(self.path).path.split("/") if part]
        name = "/".join(parts[2:4] if parts[:2] == ["api", "models"] else parts[:2])
        if name in REFUSED:
            self.answer(b"", *REFUSED[name])
            return
        files = MODELS[name]
        if parts[0] != "api":
            path = "/".join(parts[4:])
            self.server.asked.append(path)  # type: ignore[attr-defined]
            self.answer(files[path])
        elif parts[4] == "revision" and parts[5] not in ("main", "v1", COMMIT):
            self.answer(b"", 404, "RevisionNotFound")
        elif parts[4] == "revision":
            siblings = [{"rfilename": path} for path in files]
            self.answer(json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode())
        else:
            tree = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files.items()
            ]
            self.answer(json.dumps(tree).encode())

    def answer(self, data: bytes, status: int = 200, code: str = "") -> None:
        self.send_response(status)
        headers = {"Content-Length": len(data), "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        for header, value in {**headers, "X-Repo-Commit": COMMIT, "X-Error-Code": code}.items():
            self.send_header(header, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *given: Any) -> None:
        pass


def point_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does, which is read when the library is imported."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A Hub of one's own, and the files that it was asked for."""
    constants = pytest.importorskip("huggingface_hub.constants")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    point_at(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    yield server.asked  # type: ignore[attr-defined]
    server.shutdown()
    thread.join()
    server.server_close()


def refused(name: str, **more: Any) -> str:
    with pytest.raises(InputError) as caught:
        resolve(name, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_only_what_is_read_is_downloaded(asked: list[str]) -> None:
    needed = {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"}
    folder = resolve("own/whole")
    assert {path.name for path in folder.iterdir()} == needed == set(asked)
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    asked.clear()
    assert resolve("own/whole@v1") == resolve(f"own/whole@{COMMIT}") == folder
    assert asked == []
    assert {path.name for path in resolve("own/sharded").iterdir()} == {*SHARDED} - {"model-3.safetensors"}


def test_a_plan_needs_no_weights(asked: list[str]) -> None:
    assert {path.name for path in resolve("own/whole", weights=False).iterdir()} == {*asked}
    assert {*asked} == {"chat_template.jinja", "config.json", "tokenizer.json"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "own/unknown",
            "own/unknown is not a folder here, and not a model on the Hub that you may read: check the name; ",
        ),
        (
            "own/absent",
            "own/absent is not a folder here, and not a model on the Hub that you may read: check the name; ",
        ),
        ("own/gated", "own/gated needs a login: accept its terms on its page, then log in (hf auth login, or "),
        ("own/closed", "own/closed needs a login on the Hub: log in (hf auth login, or HF_TOKEN)"),
        ("own/whole@v2", "own/whole has no revision 'v2' on the Hub: give a branch, a tag or a commit of it"),
        (
            "own/pickled",
            "own/pickled has no model.safetensors on the Hub: take a model with safetensors files, or ",
        ),
        ("own/lost", "own/lost has no model-2.safetensors on the Hub: take a model with safetensors files, or "),
        (
            "own/broken",
            "own/broken is not a folder here, the Hub cannot be reached, and its cache does not hold all ",
        ),
        (
            "own/a..b",
            "cannot download own/a..b (Cannot have -- or .. in repo_id: 'own/a..b'.): try again, or give",
        ),
    ],
)
def test_models_that_cannot_be_had(asked: list[str], name: str, message: str) -> None:
    assert refused(name).startswith(message)


def test_without_a_connection(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is whole in the cache is used; the rest is refused."""
    folder = resolve("own/whole")
    resolve("own/sharded", weights=False)
    point_at("http://127.0.0.1:1", monkeypatch)
    assert resolve("own/whole") == folder
    for name in ("own/sharded", "own/other", "own/whole@v1"):
        start = f"{name.partition('@')[0]} is not a folder here, the Hub cannot be reached, "
        assert refused(name).startswith(start)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'subliminal_theory[hub]', or give a folder" in refused("own/whole")
    (tmp_path / "own" / "whole").mkdir(parents=True)
    for there in ("own/whole", "own/whole/", ".", str(tmp_path)):
        assert resolve(there) == Path(there)
    for named in ("own/file.gguf", "file.gguf", "no such folder", "/no/such", "./own/other", "a/b/c", "one", ""):
        assert resolve(named) == Path(named)


def test_at_the_command_line(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for command in (("language", "--checkpoint", "own/gated", "--out", "run"), ("plan", "--base", "own/gated")):
        assert fails(capsys, *command).startswith("own/gated needs a login: accept its terms")
    assert not Path("run").exists()
