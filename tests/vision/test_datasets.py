import gzip
import hashlib
import io
import os
import re
import socket
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rich.console import Console

from subliminal_theory.errors import InputError
from subliminal_theory.vision import datasets, download
from subliminal_theory.vision.datasets import MNIST, ImageDataset, load, parse_idx
from subliminal_theory.vision.download import Remote, fetch

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = MNIST.sha256
REAL_DATA = Path(os.environ.get("SUBLIMINAL_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def small_set(train: int = 40, test: int = 20) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    files = {}
    for images, labels, count in ((TRAIN_IMAGES, TRAIN_LABELS, train), (TEST_IMAGES, TEST_LABELS, test)):
        files[images] = idx(rng.integers(0, 256, (count, 5, 4), np.uint8))
        files[labels] = idx(np.arange(count, dtype=np.uint8) % 10)
    return files


def test_held_out_images_are_the_last_of_those_for_training() -> None:
    digits = load("digits")
    held_out = digits.held_out()
    together = np.concatenate([held_out.train_labels, held_out.test_labels])
    np.testing.assert_array_equal(together, digits.train_labels)
    images = np.concatenate([held_out.train_images, held_out.test_images])
    np.testing.assert_array_equal(images, digits.train_images)
    assert len(held_out.test_labels) == len(digits.train_labels) // 6 == 240
    assert set(held_out.test_labels) == set(range(10))


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for stem, data in files.items():
        (folder / f"{stem}.gz").write_bytes(gzip.compress(data))
    return folder


def remote_of(files: dict[str, bytes], *mirrors: str) -> Remote:
    return Remote(mirrors, {stem: hashlib.sha256(data).hexdigest() for stem, data in files.items()})


def failure(call, *arguments, **keywords) -> str:
    """The message of the InputError that a call must raise, which must be one line."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    return message


def plain_console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def output_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUBLIMINAL_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "*")


class Mirror(ThreadingHTTPServer):
    """A mirror on loopback that misbehaves on request and counts what is asked of it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), MirrorHandler)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.files: dict[str, bytes] = {}
        self.asked = 0
        self.cuts = 0  # how many responses stop half way
        self.says_length = True

    def hold(self, files: dict[str, bytes]) -> None:
        self.files = {f"/{stem}.gz": gzip.compress(data, mtime=0) for stem, data in files.items()}


class MirrorHandler(BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        mirror = self.server
        mirror.asked += 1
        content = mirror.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        self.send_response(200)
        if mirror.says_length:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if mirror.cuts:
            mirror.cuts -= 1
            content = content[: len(content) // 2]
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    with Mirror() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def dead() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return f"http://127.0.0.1:{port}/"


# --- the idx format


@given(hnp.arrays(np.uint8, st.one_of(st.tuples(st.integers(1, 50)), st.tuples(*[st.integers(1, 9)] * 3))))
def test_parse_idx_round_trip(array: np.ndarray) -> None:
    parsed = parse_idx(idx(array), "here")
    assert parsed.dtype == np.uint8
    np.testing.assert_array_equal(parsed, array, strict=True)


@given(st.binary(), st.sampled_from([b"", b"\0\0\x08\x01", b"\0\0\x08\x03", b"\0\0\x08\x03" + b"\0" * 4]))
def test_parse_idx_arbitrary_bytes(tail: bytes, head: bytes) -> None:
    try:
        array = parse_idx(head + tail, "here")
    except InputError as error:
        assert "here" in str(error)  # noqa: PT017 most inputs fail, some may not
    else:
        assert idx(array) == head + tail


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "here starts with 0x instead"),
        (b"\0\0\x09\x01\0\0\0\0", "here starts with 0x00000901 instead of 0x00000801 or 0x00000803"),
        (b"\0\0\x08\x02" + b"\0" * 8, "here starts with 0x00000802 instead"),
        (b"\0\0\x08\x03\0\0\0\1", "here is cut short"),
        (b"\0\0\x08\x01\0\0\0\5abcd", "here is cut short"),
        (b"\0\0\x08\x01\0\0\0\3abcd", "here has extra bytes"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "here is cut short"),
        (b"\0\0\x08\x03" + b"\xff" * 8 + b"\0" * 4, "here has no elements"),
    ],
)
def test_parse_idx_bad_bytes(data: bytes, message: str) -> None:
    assert failure(parse_idx, data, "here").startswith(message)


# --- folders


def test_folder(tmp_path: Path) -> None:
    files = small_set(30, 20)
    data = load(str(write(tmp_path / "clothes", files)))
    assert (data.name, data.classes, data.maximum, data.image_shape) == ("clothes", 10, 255, (5, 4))
    assert data.train_images.shape == (30, 5, 4)
    assert data.test_labels.tolist() == [*range(10), *range(10)]
    np.testing.assert_array_equal(data.train_images, parse_idx(files[TRAIN_IMAGES], ""))
    assert data.sha256 == remote_of(files).sha256
    with pytest.raises(ValueError, match="read-only"):
        data.train_images[0] = 0


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("separator", ["-", "."])
def test_folder_file_names(tmp_path: Path, suffix: str, separator: str) -> None:
    for stem, data in small_set().items():
        path = tmp_path / (stem.replace("-idx", f"{separator}idx") + suffix)
        path.write_bytes(gzip.compress(data) if suffix else data)
    assert load(str(tmp_path)).train_images.shape == (40, 5, 4)


def test_folder_missing_file(tmp_path: Path) -> None:
    (write(tmp_path, small_set()) / f"{TEST_LABELS}.gz").unlink()
    message = failure(load, str(tmp_path))
    assert message.startswith(f"{tmp_path} does not hold {TEST_LABELS} or {TEST_LABELS}.gz: put ")


@pytest.mark.parametrize("kept", [0.0, 0.05, 0.5, 0.99])
def test_folder_truncated_gzip(tmp_path: Path, kept: float) -> None:
    path = write(tmp_path, small_set()) / f"{TRAIN_IMAGES}.gz"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    message = failure(load, str(tmp_path))
    assert message.startswith(f"cannot read {path} (" if kept else f"{path} starts with 0x")


def test_folder_not_gzip(tmp_path: Path) -> None:
    path = write(tmp_path, small_set()) / f"{TRAIN_IMAGES}.gz"
    path.write_bytes(small_set()[TRAIN_IMAGES])
    message = failure(load, str(tmp_path))
    assert message.startswith(f"cannot read {path} (")
    assert "drop .gz from its name" in message


@pytest.mark.parametrize("position", [12, -6])
def test_folder_corrupt_gzip(tmp_path: Path, position: int) -> None:
    path = write(tmp_path, small_set()) / f"{TRAIN_IMAGES}.gz"
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)
    assert str(path) in failure(load, str(tmp_path))


@pytest.mark.parametrize(
    ("stem", "change", "message"),
    [
        (TEST_IMAGES, lambda data: data[:-1], "is cut short"),
        (TEST_IMAGES, lambda data: data + b"\0", "has extra bytes"),
        (TRAIN_LABELS, lambda data: b"\0\0\x0d\1" + data[4:], "starts with 0x00000d01"),
        (TRAIN_LABELS, lambda data: small_set()[TRAIN_IMAGES], "has 3 dimensions: put "),
        (TRAIN_IMAGES, lambda data: idx(np.zeros((39, 5, 4), np.uint8)), "has the shape (39, 5, 4) but "),
        (TEST_IMAGES, lambda data: idx(np.zeros((20, 4, 5), np.uint8)), "has the shape (20, 4, 5) but "),
        (TEST_LABELS, lambda data: data[:-1] + b"\x0a", "has a label 10, beyond the 10 classes of "),
    ],
)
def test_folder_bad_content(tmp_path: Path, stem: str, change, message: str) -> None:
    files = small_set()
    files[stem] = change(files[stem])
    write(tmp_path, files)
    assert failure(load, str(tmp_path)).startswith(f"{tmp_path / stem}.gz {message}")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions bind nobody here")
def test_folder_unreadable_file(tmp_path: Path) -> None:
    path = write(tmp_path, small_set()) / f"{TRAIN_IMAGES}.gz"
    path.chmod(0)
    assert failure(load, str(tmp_path)).startswith(f"cannot read {path} (Permission denied)")


def test_unknown_name(tmp_path: Path) -> None:
    message = failure(load, str(tmp_path / "mist"))
    assert message.startswith(f"no data set or folder is called '{tmp_path / 'mist'}': give mnist, digits, auto")


# --- the digits


def test_digits() -> None:
    data = load("digits")
    assert (data.name, data.classes, data.maximum, data.image_shape) == ("digits", 10, 16, (8, 8))
    assert len(data.train_images) == len(data.train_labels)
    assert len(data.train_images) + len(data.test_images) == 1797
    assert data.train_images.max() == data.test_images.max() == 16
    assert data.train_images.dtype == data.train_labels.dtype == np.uint8
    in_test = np.bincount(data.test_labels)
    assert in_test.tolist() == ((np.bincount(data.train_labels) + in_test) // 5).tolist()
    assert data.sha256["test_labels"] == hashlib.sha256(data.test_labels.tobytes()).hexdigest()
    assert load("digits").sha256 == data.sha256


# --- where MNIST is looked for


def load_small(
    tmp_path: Path, files: dict[str, bytes], *mirrors: str, name: str = "mnist", data_dir: Path | None = None
) -> tuple[ImageDataset, str]:
    console = plain_console()
    data = datasets._load(name, data_dir, tmp_path / "cache", remote_of(files, *mirrors), console)
    return data, output_of(console)


@pytest.mark.parametrize("inner", ["", "mnist"])
def test_mnist_in_given_folder(tmp_path: Path, inner: str, dead: str) -> None:
    files = small_set()
    write(tmp_path / "given" / inner, files)
    data, output = load_small(tmp_path, files, dead, data_dir=tmp_path / "given")
    assert (data.name, data.classes, data.sha256, output) == ("mnist", 10, remote_of(files).sha256, "")


@pytest.mark.parametrize("name", ["mnist", "auto"])
def test_mnist_given_folder_without_it(tmp_path: Path, name: str, mirror: Mirror) -> None:
    files = small_set()
    mirror.hold(files)
    write(tmp_path / "cache", files)
    given = tmp_path / "given"
    message = failure(load_small, tmp_path, files, mirror.url, name=name, data_dir=given)
    assert message.startswith(f"{given} does not hold {TRAIN_IMAGES} or {TRAIN_IMAGES}.gz")
    (write(given / "mnist", files) / f"{TEST_LABELS}.gz").unlink()
    message = failure(load_small, tmp_path, files, mirror.url, name=name, data_dir=given)
    assert message.startswith(f"{given / 'mnist'} does not hold {TEST_LABELS}")
    assert not mirror.asked


def test_mnist_search_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mirror: Mirror) -> None:
    files = small_set()
    mirror.hold(files)
    monkeypatch.setenv("SUBLIMINAL_DATA", str(tmp_path / "data"))
    (write(tmp_path / "data" / "mnist", files) / f"{TEST_LABELS}.gz").unlink()
    write(tmp_path / "cache", {stem: files[stem] for stem in (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES)})
    load_small(tmp_path, files, mirror.url)
    assert mirror.asked == 1  # $SUBLIMINAL_DATA is passed over, the cache completed
    load_small(tmp_path, files, mirror.url)
    assert mirror.asked == 1
    write(tmp_path / "data" / "mnist", files)
    (tmp_path / "cache" / f"{TEST_LABELS}.gz").write_bytes(b"not looked at")
    load_small(tmp_path, files, mirror.url)
    assert mirror.asked == 1


def test_mnist_wrong_checksum(tmp_path: Path) -> None:
    write(tmp_path, small_set())
    message = failure(load, "mnist", tmp_path)
    assert message.startswith(f"{tmp_path / TRAIN_IMAGES}.gz is not the {TRAIN_IMAGES} of mnist (SHA-256 ")
    assert MNIST.sha256[TRAIN_IMAGES] in message


def test_mnist_label_out_of_range(tmp_path: Path) -> None:
    files = small_set()
    files[TRAIN_LABELS] = files[TRAIN_LABELS][:-1] + b"\x0a"
    message = failure(load_small, tmp_path, files, data_dir=write(tmp_path, files))
    assert message.startswith(f"{tmp_path / TRAIN_LABELS}.gz has a label 10, beyond the 10 classes of mnist")


def test_mnist_default_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.platformdirs, "user_cache_path", lambda name: tmp_path / name)
    write(tmp_path / "subliminal_theory" / "mnist", small_set())
    assert f"{tmp_path / 'subliminal_theory' / 'mnist' / TRAIN_IMAGES}.gz is not the" in failure(load, "mnist")


def test_mnist_no_network_and_no_files(tmp_path: Path, dead: str, mirror: Mirror) -> None:
    message = failure(load_small, tmp_path, small_set(), dead, mirror.url)
    assert message.startswith(f"cannot download {TRAIN_IMAGES}.gz to {tmp_path / 'cache'} ({dead}: ")
    assert f"{mirror.url}: 404 " in message
    assert not list((tmp_path / "cache").iterdir())


def test_auto_takes_mnist(tmp_path: Path, mirror: Mirror) -> None:
    files = small_set()
    mirror.hold(files)
    data, output = load_small(tmp_path, files, mirror.url, name="auto")
    assert data.name == "mnist"
    assert "instead" not in output


def test_auto_takes_digits(tmp_path: Path, dead: str) -> None:
    data, output = load_small(tmp_path, small_set(), dead, name="auto")
    assert data.name == "digits"
    assert re.fullmatch(r"using the embedded 8 x 8 digits instead of MNIST: cannot download .*\n", output)


def test_auto_says_so_on_standard_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(datasets.platformdirs, "user_cache_path", lambda name: tmp_path / name)
    write(tmp_path / "subliminal_theory" / "mnist", small_set())  # of the wrong checksum
    assert load("auto").name == "digits"
    output, errors = capsys.readouterr()
    assert not output
    assert errors.startswith("using the embedded 8 x 8 digits instead of MNIST: ")
    assert errors.count("\n") == 1


# --- downloads

STEM = TRAIN_IMAGES
CONTENT = {STEM: np.random.default_rng(1).bytes(200_000)}


def fetch_one(folder: Path, *mirrors: str, console: Console | None = None) -> None:
    path = fetch(remote_of(CONTENT, *mirrors), STEM, folder, console or plain_console())
    assert [*folder.iterdir()] == [path] == [folder / STEM]
    assert path.read_bytes() == CONTENT[STEM]


def test_fetch_whole(tmp_path: Path, mirror: Mirror) -> None:
    mirror.hold(CONTENT)
    for _ in range(2):
        fetch_one(tmp_path / "new" / "folder", mirror.url)
        assert mirror.asked == 1


@pytest.mark.parametrize("says_length", [True, False])
def test_fetch_cut_transfer(tmp_path: Path, mirror: Mirror, says_length: bool) -> None:
    mirror.hold(CONTENT)
    mirror.says_length = says_length
    mirror.cuts = 1
    fetch_one(tmp_path, mirror.url)
    assert mirror.asked == 2
    (tmp_path / STEM).unlink()
    mirror.cuts = 9
    assert f"({mirror.url}: " in failure(fetch, remote_of(CONTENT, mirror.url), STEM, tmp_path, plain_console())
    assert not list(tmp_path.iterdir())


def test_fetch_second_mirror(tmp_path: Path, mirror: Mirror, dead: str) -> None:
    mirror.hold(CONTENT)
    fetch_one(tmp_path, dead, mirror.url)
    (tmp_path / STEM).write_bytes(b"of another file")
    fetch_one(tmp_path, f"{mirror.url}elsewhere/", mirror.url)
    assert mirror.asked == 3


def test_fetch_mirror_that_stalls(tmp_path: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror.hold(CONTENT)
    monkeypatch.setattr(download, "_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        fetch_one(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}/", mirror.url)


@pytest.mark.parametrize(
    "sent",
    [
        gzip.compress(CONTENT[STEM][:-1] + b"?"),
        gzip.compress(CONTENT[STEM])[:1000] + b"?" * 1000,
        b"<html>sign in to this network</html>",
        b"",
    ],
)
def test_fetch_other_content(tmp_path: Path, mirror: Mirror, sent: bytes) -> None:
    mirror.files = {f"/{STEM}.gz": sent}
    assert f"({mirror.url}: " in failure(fetch, remote_of(CONTENT, mirror.url), STEM, tmp_path, plain_console())
    assert not list(tmp_path.iterdir())


def test_fetch_unwritable_folder(tmp_path: Path, mirror: Mirror) -> None:
    mirror.hold(CONTENT)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        message = failure(fetch, remote_of(CONTENT, mirror.url), STEM, folder, plain_console())
        assert message.startswith(f"cannot download {STEM}.gz to {folder} (")
        assert "that the folder can be written" in message
    assert not mirror.asked


@pytest.mark.parametrize("terminal", [False, True])
def test_fetch_progress(tmp_path: Path, mirror: Mirror, terminal: bool) -> None:
    mirror.hold(CONTENT)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    fetch_one(tmp_path, mirror.url, console=console)
    output = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output_of(console))
    assert re.search(rf"{STEM}\.gz .* 200\.1/200\.1 kB", output)


# --- the real files


@pytest.mark.skipif(not (REAL_DATA / "mnist").is_dir(), reason=f"no MNIST in {REAL_DATA}")
def test_real_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBLIMINAL_DATA", str(REAL_DATA))
    data = load("mnist")
    assert data.train_images.shape == (60000, 28, 28)
    assert data.test_images.shape == (10000, 28, 28)
    assert np.bincount(data.test_labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(data.train_labels).sum() == 60000
    assert data.train_images.max() == data.maximum == 255
    assert data.sha256 == MNIST.sha256
    assert hashlib.sha256(idx(data.train_images)).hexdigest() == MNIST.sha256[TRAIN_IMAGES]
