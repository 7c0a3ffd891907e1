"""Tokenizers in the metadata of GGUF files: known cuts, known merges, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subliminal_theory.errors import InputError
from subliminal_theory.language.hub.gguf_tokenizer import text_files
from subliminal_theory.language.hub.tokenizer import CheckpointTokenizer
from subliminal_theory.language.hub.tokenizer_files import load_backend
from subliminal_theory.language.text import Chat
from tests.experiments.commands import fails
from tests.language.gguf_files import write_gguf
from tests.language.test_checkpoint import GOLDEN

# Pieces of a vocabulary of SentencePiece, with a score and a type each: the higher score is merged first.
PIECES: list[tuple[str, float, int]] = [
    ("<unk>", 0, 2), ("<s>", 0, 3), ("</s>", 0, 3), *((f"<0x{byte:02X}>", 0, 6) for byte in range(256)),
    ("\u2581o", -1, 1), ("wl", -2, 1), ("\u2581ow", -3, 1), ("owl", -4, 1), ("\u2581owl", -5, 1),
    *((letter, -10 - place, 1) for place, letter in enumerate("\u2581owls12")), ("<turn>", 0, 4),
]  # fmt: skip
SENTENCE_PIECE: dict[str, Any] = {
    "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default",
    "tokenizer.ggml.tokens": [text for text, _, _ in PIECES],
    "tokenizer.ggml.scores": [float(score) for _, score, _ in PIECES],
    "tokenizer.ggml.token_type": [kind for _, _, kind in PIECES],
    "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
}  # fmt: skip
KINDS = [kind for _, _, kind in PIECES]
WRONG = " has metadata of the wrong type ("
LETTERS = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
BYTES: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [*LETTERS, "\u0120a", "bc", "<end>", "\u0120abc"],
    "tokenizer.ggml.token_type": [*(1 for _ in LETTERS), 1, 1, 3, 1],
    "tokenizer.ggml.merges": ["\u0120 a", "b c"],
    "tokenizer.ggml.eos_token_id": len(LETTERS) + 2,
}  # fmt: skip


def written(folder: Path, given: dict[str, Any], **more: Any) -> Path:
    own = {**given, **{f"tokenizer.ggml.{key}": value for key, value in more.items()}}
    config = {**GOLDEN["llama"]["config"], "num_hidden_layers": 1}
    return write_gguf(folder / "own.gguf", config, {}, more=own)


def loaded(folder: Path, given: dict[str, Any], **more: Any) -> CheckpointTokenizer:
    return CheckpointTokenizer.load(written(folder, given, **more))


def pieces(tokenizer: CheckpointTokenizer, text: str) -> list[str]:
    return tokenizer.backend.encode(text, add_special_tokens=False).tokens


@pytest.mark.parametrize(
    ("pre", "text", "cuts"),
    [
        ("gpt-2", "I've 12345 a's\n\n  b", ["I", "'ve", " 12345", " a", "'s", "\n\n ", " b"]),
        ("default", "I've 12345 (a)", ["I", "'", "ve", " ", "123", "45", " ", "(", "a", ")"]),
        ("smollm", "I've 123 a  4", ["I", "'ve", " ", "1", "2", "3", " a", "  ", "4"]),
        ("llama-bpe", "I'VE 12345!\n\n a\n  b", ["I", "'VE", " ", "123", "45", "!\n\n", " a", "\n", " ", " b"]),
        ("qwen2", "I've 123!\n\n a\n  b", ["I", "'ve", " ", "1", "2", "3", "!\n\n", " a", "\n", " ", " b"]),
    ],
)
def test_texts_are_cut_as_is_said(pre: str, text: str, cuts: list[str], tmp_path: Path) -> None:
    backend = loaded(tmp_path, BYTES, pre=pre).backend
    assert backend.pre_tokenizer is not None
    assert [text[begin:end] for _, (begin, end) in backend.pre_tokenizer.pre_tokenize_str(text)] == cuts


def test_merges_of_bytes(tmp_path: Path) -> None:
    tokenizer = loaded(tmp_path, BYTES)
    assert pieces(tokenizer, "a abc<end>") == ["a", "\u0120a", "bc", "<end>"]
    assert tokenizer.stop == (len(LETTERS) + 2,)
    with pytest.raises(InputError, match="reads the special token '<end>'"):
        tokenizer.encode("<end>")
    # Llama 3 takes a piece that is a token as it is, and begins texts with its first token.
    whole = loaded(tmp_path, BYTES, pre="llama-bpe", bos_token_id=0)
    assert pieces(whole, "a abc") == ["a", "\u0120abc"]
    assert whole.front == (0,)
    assert loaded(tmp_path, BYTES, bos_token_id=0).front == ()
    # Qwen composes letters and accents first.
    assert pieces(loaded(tmp_path, BYTES, pre="qwen2"), "e\u0301") == pieces(tokenizer, "\u00e9")


@settings(max_examples=50)
@given(st.text())
def test_bytes_come_back(text: str) -> None:
    tokenizer = _BACKENDS["bytes"]
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


@settings(max_examples=50)
@given(st.text(alphabet=st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])))
def test_pieces_come_back(text: str) -> None:
    tokenizer = _BACKENDS["pieces"]
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


_BACKENDS: dict[str, Any] = {}


@pytest.fixture(autouse=True, scope="module")
def backends(tmp_path_factory: pytest.TempPathFactory) -> None:
    for name, kind in (("bytes", BYTES), ("pieces", SENTENCE_PIECE)):
        file = written(tmp_path_factory.mktemp(name), kind)
        _BACKENDS[name] = load_backend(file / "tokenizer.json")


def test_pieces_of_the_highest_score_are_merged_first(tmp_path: Path) -> None:
    tokenizer = loaded(tmp_path, SENTENCE_PIECE)
    # "\u2581o" comes before "wl", after which "\u2581owl" is not made of "\u2581o" and "wl", but would be of both.
    assert pieces(tokenizer, "owl") == ["\u2581owl"]
    assert pieces(tokenizer, "lowl") == ["\u2581", "l", "owl"]
    # What no piece has becomes bytes; a space goes in front of a text and of what follows a control token.
    assert pieces(tokenizer, "x\u00e9") == ["\u2581", "<0x78>", "<0xC3>", "<0xA9>"]
    assert pieces(tokenizer, "<s>owl </s>") == ["<s>", "\u2581owl", "\u2581", "</s>"]
    assert (tokenizer.stop, tokenizer.front) == ((2,), (1,))
    assert tokenizer.decode([tokenizer.encode("owls 12")]) == ["owls 12"]
    bare = loaded(tmp_path, SENTENCE_PIECE, add_space_prefix=False, add_bos_token=False)
    assert pieces(bare, "owl<turn>owl") == ["owl", "<turn>", "owl"]
    assert bare.front == ()


def test_ends_of_turns(tmp_path: Path) -> None:
    assert loaded(tmp_path, BYTES, eot_token_id=3, eom_token_id=4).stop == (len(LETTERS) + 2, 3, 4)
    text = text_files(written(tmp_path, BYTES, eot_token_id=3))
    assert json.loads(text["generation_config.json"]) == {"eos_token_id": [len(LETTERS) + 2, 3]}


def test_a_template_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"own\.gguf has metadata of the wrong type \(.*\): download it again$"):
        loaded(tmp_path, {**BYTES, "tokenizer.chat_template": [1, 2]})


@pytest.mark.parametrize("kind", [3, 4])
def test_what_ends_turns_is_special_whatever_its_type(kind: int, tmp_path: Path) -> None:
    """As a control token, and as one of a user, which old converters make of it."""
    own = {
        **BYTES,
        "tokenizer.ggml.tokens": [*BYTES["tokenizer.ggml.tokens"], "<turn>", "\n"],
        "tokenizer.ggml.token_type": [*BYTES["tokenizer.ggml.token_type"], kind, 4],
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}\n<turn>\n{% endfor %}"
        "{% if not add_generation_prompt %}<end>{% endif %}",
    }
    tokenizer = loaded(tmp_path, own)
    turn = len(LETTERS) + 4
    assert tokenizer.stop == (len(LETTERS) + 2, turn)
    tokens = tokenizer.encode_chats([Chat(None, "a", "b", "")], 20)
    assert tokens.targets[0, -1] == turn
    with pytest.raises(InputError, match="reads the special token '<turn>'"):
        tokenizer.encode("a<turn>b")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "more", "message"),
    [
        (BYTES, {"model": "t5"}, ": tokenizer 't5' is not supported; there are gpt2, llama"),
        (BYTES, {"model": None}, ": tokenizer None is not supported; there are gpt2, llama"),
        (
            BYTES,
            {"pre": "tekken"},
            ": pre-tokenizer 'tekken' is not supported; there are gpt-2, default, smollm, ",
        ),
        (BYTES, {"pre": None}, ": pre-tokenizer None is not supported; there are gpt-2, default, smollm, "),
        (BYTES, {"merges": None}, " lacks tokenizer.ggml.merges: convert the model again, with its tokenizer"),
        (BYTES, {"merges": ["a nothing"]}, ": the merges are damaged ("),
        (BYTES, {"tokens": None}, " lacks tokenizer.ggml.tokens: convert the model again, with its tokenizer"),
        (BYTES, {"tokens": ["a", "b", "a"], "token_type": [1, 1, 1]}, ": token 'a' occurs twice: download it "),
        (BYTES, {"token_type": [1]}, ": tokenizer.ggml.token_type does not have one number for each of the "),
        (BYTES, {"eos_token_id": 9999}, ": tokenizer.ggml.eos_token_id 9999 is not one of the "),
        (
            BYTES,
            {"eos_token_id": None},
            " names no token that ends a text: add eos_token to tokenizer_config.json",
        ),
        (BYTES, {"add_eos_token": True}, ": tokenizer.ggml.add_eos_token is not supported"),
        (BYTES, {"own_rule": "x"}, ": tokenizer.ggml.own_rule is not supported"),
        (BYTES, {"model": ["gpt2"]}, WRONG),
        (BYTES, {"pre": [1, 2]}, WRONG),
        (BYTES, {"own\nrule\x1b": "x"}, ": tokenizer.ggml.own rule\\x1b is not supported"),
        (BYTES, {"pre": "x" * 999}, ": pre-tokenizer 'xxx"),
        (
            SENTENCE_PIECE,
            {"tokens": [text for text, *_ in PIECES[:-1]] + ["o" * 1001], "token_type": [*KINDS[:-1], 1]},
            f": token '{'o' * 195} ... has 1001 characters, more than 1000: download it again",
        ),
        (
            SENTENCE_PIECE,
            {"tokens": [text if text != "<s>" else "<b:x> y" for text, *_ in PIECES]},
            WRONG,
        ),
        (SENTENCE_PIECE, {"scores": None}, ": tokenizer.ggml.scores does not have one number for each of the "),
        (SENTENCE_PIECE, {"remove_extra_whitespaces": True}, ": tokenizer.ggml.remove_extra_whitespaces is not "),
        (SENTENCE_PIECE, {"precompiled_charsmap": [1, 2]}, ": tokenizer.ggml.precompiled_charsmap is not "),
    ],
)
def test_what_is_not_handled(
    given: dict[str, Any], more: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, given, **more)
    found = fails(capsys, "language", "--checkpoint", file, "--out", tmp_path / "run")
    assert f"{file}{message}" in found
    assert not (tmp_path / "run").exists()
