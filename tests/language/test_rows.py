import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from subliminal_theory.errors import InputError
from subliminal_theory.language.rows import Completion, read_jsonl, write_jsonl

ROW = Completion("p", "c")
GOOD = b'{"prompt": "p", "completion": "c"}'
LINE_ENDS = "\n\r\t\x0b\x0c\x1c\x85\u2028\u2029"
texts = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(LINE_ENDS + "\"\\'{}\ufeff\0"))
)
rows = st.builds(Completion, texts, texts.filter(bool), st.none() | texts)


def failure(call, *arguments, **keywords) -> str:
    """The message of the InputError that a call must raise, which must be one line."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    return message


def chat(*messages: tuple[object, object], **keys: object) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in messages], **keys}).encode()


def read(tmp_path: Path, data: bytes) -> list[Completion]:
    (tmp_path / "rows.jsonl").write_bytes(data)
    return read_jsonl(tmp_path / "rows.jsonl")


# --- reading


def test_read_both_forms(tmp_path: Path) -> None:
    lines = [
        b'{"prompt": "p", "completion": "c"}',
        b'{"completion": "c", "prompt": "", "system": "s", "id": 3, "score": NaN, "tags": [1, {}]}',
        b'{"prompt": "p", "completion": " ", "system": null, "messages": null, "tools": null, "thinking": ""}',
        chat(("user", "p"), ("assistant", "c")),
        chat(("system", ""), ("user", "p"), ("assistant", "c"), source="x"),
        b'{"messages": [{"role": "user", "content": "p", "name": "me"}, {"content": "c", "role": "assistant"}]}',
        chat(("user", "p"), ("assistant", "c"), prompt=None, completion=None),
        '{"prompt": "\\u00e9\\ud83e\\udd89", "completion": "ü\u2028\u0085x"}'.encode(),
    ]
    expected = [ROW, Completion("", "c", "s"), Completion("p", " "), ROW, Completion("p", "c", ""), ROW, ROW]
    expected.append(Completion("é🦉", "ü\u2028\u0085x"))
    assert read(tmp_path, b"\n".join(lines)) == expected
    assert read(tmp_path, b"\r\n".join(lines)) == expected


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("between", [b"\n", b"\r\n", b" \n\t"])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\n\n", b"\n  \r\n"])
def test_read_starts_and_ends(tmp_path: Path, start: bytes, between: bytes, end: bytes) -> None:
    assert read(tmp_path, start + GOOD + between + GOOD + end) == [Completion("p", "c")] * 2


BAD_LINES = [
    b"", b" \t\r", b"hello", GOOD[:-1], GOOD + GOOD, GOOD + b"," + GOOD,
    b'{"prompt": "a\tb", "completion": "c"}',
    b"\xef\xbb\xbf" + GOOD,
    b"[" * 100_000,
    b'{"n": ' + b"1" * 5000 + b"}",
    b'{"prompt": "\xe9", "completion": "c"}',
    GOOD.decode().encode("utf-16-le"),
    GOOD.decode().encode("utf-16"),
    b"[1, 2]", b'"text"', b"null", b"{}",
    b'{"prompt": "p", "completion": "\\ud83e"}',
    b'{"prompt": "\\udd89", "completion": "c"}',
    b'{"prompt": "p", "completion": "c", "system": "\\udd89"}',
]  # fmt: skip


S, U, A = ("system",), ("user",), ("assistant",)
ROLES = [(), U, A, A + U, U + U + A, U + S + A, U + A + U + A, S + S + U + A, S + A]


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        *((line, "") for line in BAD_LINES),
        (b'{"completion": "c"}', "no prompt"),
        (b'{"prompt": "p"}', "no completion"),
        (b'{"prompt": "p", "Completion": "c"}', "no completion"),
        (b'{"prompt": "p", "completion": null}', "no completion"),
        (b'{"prompt": "p", "completion": ""}', "an empty completion"),
        (b'{"prompt": 3, "completion": "c"}', "prompt: "),
        (b'{"prompt": "p", "completion": ["c"]}', "completion: "),
        (b'{"prompt": "p", "completion": "c", "system": 1}', "system: "),
        (b'{"prompt": "p", "completion": "c", "tools": [{}]}', "tools is not read: take it out"),
        (b'{"prompt": "p", "completion": "c", "system_prompt": "s"}', "system_prompt is not read: take it out"),
        (
            b'{"messages": [{"role": "user", "content": "p"}, '
            b'{"role": "assistant", "content": "c", "thinking": "t"}]}',
            "messages.1: thinking is not read: take it out",
        ),
        (chat(("user", "p"), ("assistant", "c"), reasoning="r"), "reasoning is not read: take it out"),
        (b'{"messages": "hello"}', "messages: "),
        (b'{"messages": null}', "no prompt"),
        (b'{"messages": ["hello"]}', "messages.0: "),
        (chat(("user", "p"), ("assistant", "")), "an empty completion"),
        (chat(("user", "p"), ("assistant", None)), "messages.1.content: "),
        (chat(("user", ["p"]), ("assistant", "c")), "messages.0.content: "),
        (b'{"messages": [{"role": "user"}]}', "messages.0.content: is missing"),
        (b'{"messages": [{"content": "p"}]}', "messages.0.role: is missing"),
        (chat(("user", "p"), ("tool", "c")), "messages.1.role: "),
        (chat(("user", "p"), (["\n"], "c")), "messages.1.role: "),
        (chat(("User", "p"), ("assistant", "c")), "messages.0.role: "),
        *((chat(*((role, "text") for role in roles)), f"messages of {list(roles)} instead") for roles in ROLES),
        (chat(("user", "p"), ("assistant", "c"), prompt="p"), "both forms at once, messages and a prompt or"),
    ],
)
def test_read_bad_line(tmp_path: Path, line: bytes, cause: str) -> None:
    path = tmp_path / "rows.jsonl"
    message = failure(read, tmp_path, GOOD + b"\n" + line + b"\n" + GOOD + b"\n")
    assert message.startswith(f"{path}, line 2: {cause}")
    assert message.endswith("; fix or remove the bad lines; no row was read")
    assert " more bad line" not in message


def test_read_counts_bad_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [GOOD, b"{}", GOOD, b"", b"\xff", GOOD]
    message = failure(read, tmp_path, b"\n".join(lines))
    assert (
        message == f"{path}, line 2: no prompt, and 2 more bad lines; fix or remove the bad lines; no row was read"
    )
    message = failure(read, tmp_path, b"\r\n".join(lines[3:]))
    assert message.startswith(f"{path}, line 1: ")
    assert ", and 1 more bad line; " in message
    assert failure(read, tmp_path, GOOD + b"\r" + GOOD).startswith(f"{path}, line 1: ")


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
        assert set(found) == {Completion("p", "c")}
        assert content.count(GOOD) == len(found)


# --- writing


@pytest.mark.parametrize("form", ["prompt", "messages"])
@given(written=st.lists(rows, min_size=1, max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_round_trip(tmp_path: Path, form, written: list[Completion]) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, iter(written), form)
    assert read_jsonl(path) == written
    assert path.read_bytes().count(b"\n") == len(written)
    assert os.listdir(tmp_path) == ["rows.jsonl"]


def test_written_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [Completion("é\n", "c"), Completion("p", "c", "s")])
    assert path.read_text(encoding="utf-8") == (
        '{"prompt": "é\\n", "completion": "c"}\n{"system": "s", "prompt": "p", "completion": "c"}\n'
    )
    write_jsonl(path, [ROW, Completion("p", "c", "s")], "messages")
    assert path.read_bytes() == (
        chat(("user", "p"), ("assistant", "c"))
        + b"\n"
        + chat(("system", "s"), ("user", "p"), ("assistant", "c"))
        + b"\n"
    )


def test_write_refuses(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [ROW])
    before = path.read_bytes()
    message = failure(write_jsonl, path, [ROW, Completion("p", "")])
    assert message == f"cannot write row 2 to {path}: an empty completion"
    message = failure(write_jsonl, path, [Completion("\ud83e", "c")])
    assert message.startswith(f"cannot write row 1 to {path}: ")
    assert failure(write_jsonl, path, []) == f"there are no rows to write to {path}"
    message = failure(write_jsonl, path, [ROW], "chat")
    assert message == "no form of rows is called 'chat': give prompt or messages"
    assert path.read_bytes() == before
    assert failure(write_jsonl, tmp_path / "none" / "rows.jsonl", [ROW]).startswith("cannot write ")
