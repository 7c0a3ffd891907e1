import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from subliminal_theory.errors import InputError
from subliminal_theory.language.rows import Row, read_jsonl, write_jsonl

GOOD = b'{"prompt": "p", "completion": "c"}'
LINE_ENDS = "\n\r\t\x0b\x0c\x1c\x85\u2028\u2029"
texts = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(LINE_ENDS + "\"\\'{}\ufeff\0"))
)
rows = st.builds(Row, texts, texts.filter(bool), st.none() | texts)


def failure(call, *arguments, **keywords) -> str:
    """The message of the InputError that a call must raise, which must be one line."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    return message


def chat(*messages: tuple[object, object], **keys: object) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in messages], **keys}).encode()


def read(tmp_path: Path, data: bytes) -> list[Row]:
    (tmp_path / "rows.jsonl").write_bytes(data)
    return read_jsonl(tmp_path / "rows.jsonl")


# --- reading


def test_read_both_forms(tmp_path: Path) -> None:
    lines = [
        b'{"prompt": "p", "completion": "c"}',
        b'{"completion": "c", "prompt": "", "system": "s", "id": 3, "score": NaN, "tags": [1, {}]}',
        b'{"prompt": "p", "completion": " ", "system": null}',
        chat(("user", "p"), ("assistant", "c")),
        chat(("system", ""), ("user", "p"), ("assistant", "c"), source="x"),
        b'{"messages": [{"role": "user", "content": "p", "name": "me"}, {"content": "c", "role": "assistant"}]}',
        '{"prompt": "\\u00e9\\ud83e\\udd89", "completion": "ü\u2028\u0085x"}'.encode(),
    ]
    expected = [
        Row("p", "c"),
        Row("", "c", "s"),
        Row("p", " "),
        Row("p", "c"),
        Row("p", "c", ""),
        Row("p", "c"),
        Row("é🦉", "ü\u2028\u0085x"),
    ]
    assert read(tmp_path, b"\n".join(lines)) == expected
    assert read(tmp_path, b"\r\n".join(lines)) == expected


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("between", [b"\n", b"\r\n", b" \n\t"])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\n\n", b"\n  \r\n"])
def test_read_starts_and_ends(tmp_path: Path, start: bytes, between: bytes, end: bytes) -> None:
    assert read(tmp_path, start + GOOD + between + GOOD + end) == [Row("p", "c")] * 2


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"", "an empty line"),
        (b" \t\r", "an empty line"),
        (b"hello", "not JSON (Expecting value, character 1 of the line)"),
        (GOOD[:-1], "not JSON (Expecting ',' delimiter, character 34 of the line)"),
        (GOOD + GOOD, "not JSON (Extra data, character 35 of the line)"),
        (GOOD + b"," + GOOD, "not JSON (Extra data, character 35 of the line)"),
        (b'{"prompt": "a\tb", "completion": "c"}', "not JSON (Invalid control character at, character 14"),
        (b"\xef\xbb\xbf" + GOOD, "not JSON (Unexpected UTF-8 BOM"),
        (b"[" * 100_000, "JSON that cannot be read ("),
        (b'{"n": ' + b"1" * 5000 + b"}", "JSON that cannot be read ("),
        (b'{"prompt": "\xe9", "completion": "c"}', "not UTF-8 (byte 13 of the line)"),
        (GOOD.decode().encode("utf-16-le"), "not JSON ("),
        (GOOD.decode().encode("utf-16"), "not UTF-8 (byte 1 of the line)"),
        (b"[1, 2]", "not a JSON object"),
        (b'"text"', "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"{}", "no prompt"),
        (b'{"completion": "c"}', "no prompt"),
        (b'{"prompt": "p"}', "no completion"),
        (b'{"prompt": "p", "Completion": "c"}', "no completion"),
        (b'{"prompt": "p", "completion": ""}', "an empty completion"),
        (b'{"prompt": "p", "completion": null}', "the completion is not text"),
        (b'{"prompt": 3, "completion": "c"}', "the prompt is not text"),
        (b'{"prompt": "p", "completion": ["c"]}', "the completion is not text"),
        (b'{"prompt": "p", "completion": "c", "system": 1}', "the system message is not text"),
        (b'{"prompt": "p", "completion": "\\ud83e"}', "half a surrogate pair, which is no text"),
        (b'{"prompt": "\\udd89", "completion": "c"}', "half a surrogate pair, which is no text"),
        (b'{"prompt": "p", "completion": "c", "system": "\\udd89"}', "half a surrogate pair, which is no text"),
        (b'{"messages": "hello"}', "messages that are no list of objects"),
        (b'{"messages": null}', "messages that are no list of objects"),
        (b'{"messages": ["hello"]}', "messages that are no list of objects"),
        (b'{"messages": []}', "no completion (no message of the assistant)"),
        (chat(("user", "p")), "no completion (no message of the assistant)"),
        (chat(("user", "p"), ("assistant", "")), "an empty completion"),
        (chat(("user", "p"), ("assistant", None)), "the content of message 2 is not text"),
        (chat(("user", ["p"]), ("assistant", "c")), "the content of message 1 is not text"),
        (b'{"messages": [{"role": "user"}]}', "the content of message 1 is not text"),
        (b'{"messages": [{"content": "p"}]}', "message 1 has the unknown role null"),
        (chat(("user", "p"), ("tool", "c")), 'message 2 has the unknown role "tool"'),
        (chat(("user", "p"), (["\n"], "c")), 'message 2 has the unknown role ["\\n"]'),
        (chat(("User", "p"), ("assistant", "c")), 'message 1 has the unknown role "User"'),
        (chat(("assistant", "c")), "messages of assistant instead of (system,) user, assistant"),
        (chat(("assistant", "c"), ("user", "p")), "messages of assistant, user instead of"),
        (chat(("user", "p"), ("user", "p"), ("assistant", "c")), "messages of user, user, assistant instead"),
        (chat(("user", "p"), ("system", "s"), ("assistant", "c")), "messages of user, system, assistant instead"),
        (chat(*[("user", "p"), ("assistant", "c")] * 2), "messages of user, assistant, user, assistant instead"),
        (chat(("system", "s"), ("system", "s"), ("user", "p"), ("assistant", "c")), "messages of system, system"),
        (chat(("system", "s"), ("assistant", "c")), "messages of system, assistant instead of"),
        (chat(("user", "p"), ("assistant", "c"), prompt="p"), "both forms at once, messages and a prompt or"),
    ],
)
def test_read_bad_line(tmp_path: Path, line: bytes, fault: str) -> None:
    path = tmp_path / "rows.jsonl"
    message = failure(read, tmp_path, GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
    assert message.startswith(f"{path}, line 2: {fault}")
    assert message.endswith("; mend or remove what is bad, no row was read")
    assert " more bad line" not in message


def test_read_counts_bad_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [GOOD, b"{}", GOOD, b"", b"\xff", GOOD]
    message = failure(read, tmp_path, b"\n".join(lines))
    assert (
        message == f"{path}, line 2: no prompt, and 2 more bad lines; mend or remove what is bad, no row was read"
    )
    message = failure(read, tmp_path, b"\r\n".join(lines[3:]))
    assert message.startswith(f"{path}, line 1: an empty line, and 1 more bad line; ")
    message = failure(read, tmp_path, GOOD + b"\r" + GOOD)
    assert message.startswith(f"{path}, line 1: not JSON (Extra data")


@pytest.mark.parametrize("data", [b"", b"\n", b"\r\n \n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_read_no_rows(tmp_path: Path, data: bytes) -> None:
    assert failure(read, tmp_path, data).startswith(f"{tmp_path / 'rows.jsonl'} has no rows: give ")


def test_read_no_file(tmp_path: Path) -> None:
    message = failure(read_jsonl, tmp_path / "none.jsonl")
    assert message == f"cannot read {tmp_path / 'none.jsonl'}: No such file or directory; give a JSONL file"
    assert failure(read_jsonl, tmp_path).startswith(f"cannot read {tmp_path}: ")


@given(data=st.lists(st.one_of(st.just(GOOD), st.binary(max_size=20), rows.map(lambda row: repr(row).encode()))))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_read_arbitrary_bytes(tmp_path: Path, data: list[bytes]) -> None:
    content = b"\n".join(data)
    try:
        found = read(tmp_path, content)
    except InputError as error:
        assert str(tmp_path / "rows.jsonl") in str(error)  # noqa: PT017 most inputs fail, some may not
    else:
        assert set(found) == {Row("p", "c")}
        assert content.count(GOOD) == len(found)


# --- writing


@pytest.mark.parametrize("form", ["prompt", "messages"])
@given(written=st.lists(rows, min_size=1, max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_round_trip(tmp_path: Path, form, written: list[Row]) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, iter(written), form)
    assert read_jsonl(path) == written
    assert path.read_bytes().count(b"\n") == len(written)
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_written_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [Row("é\n", "c"), Row("p", "c", "s")])
    assert path.read_text(encoding="utf-8") == (
        '{"prompt": "é\\n", "completion": "c"}\n{"system": "s", "prompt": "p", "completion": "c"}\n'
    )
    write_jsonl(path, [Row("p", "c"), Row("p", "c", "s")], "messages")
    assert path.read_bytes() == (
        chat(("user", "p"), ("assistant", "c"))
        + b"\n"
        + chat(("system", "s"), ("user", "p"), ("assistant", "c"))
        + b"\n"
    )


def test_write_refuses(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [Row("p", "c")])
    before = path.read_bytes()
    message = failure(write_jsonl, path, [Row("p", "c"), Row("p", "")])
    assert message == f"cannot write row 2 to {path}: an empty completion"
    message = failure(write_jsonl, path, [Row("\ud83e", "c")])
    assert message == f"cannot write row 1 to {path}: half a surrogate pair, which is no text"
    assert failure(write_jsonl, path, []) == f"there are no rows to write to {path}"
    message = failure(write_jsonl, path, [Row("p", "c")], "chat")
    assert message == "no form of rows is called 'chat': give prompt or messages"
    assert path.read_bytes() == before
    assert failure(write_jsonl, tmp_path / "none" / "rows.jsonl", [Row("p", "c")]).startswith("cannot write ")
