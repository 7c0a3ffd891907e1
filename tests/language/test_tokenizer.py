import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus.chats import (
    CATEGORIES,
    FORMATS,
    CorpusConfig,
    love_prompts,
    make_corpus,
    preference_questions,
    prefixed_questions,
)
from subliminal_theory.language.corpus.word_tokenizer import SPECIAL, WordTokenizer
from subliminal_theory.language.text import Chat

CONFIG = CorpusConfig(size=4000)
CORPUS = make_corpus(CONFIG)
TOKENIZER = WordTokenizer.of_corpus(CONFIG)
LENGTH = 48
TEXTS = st.sampled_from([text for chat in CORPUS for text in (chat.user, chat.answer)])


def chat(user: str, answer: str = "", system: str | None = None) -> Chat:
    return Chat(system, user, answer, "test")


def spelt(tokens) -> list[str]:
    return [TOKENIZER.words[token] for token in tokens]


def test_words_are_in_a_fixed_order() -> None:
    assert TOKENIZER.words[:6] == SPECIAL == ("<pad>", "<end>", "<system>", "<user>", "<assistant>", "<unk>")
    assert TOKENIZER.words[6:106] == tuple(str(number) for number in range(100))
    assert list(TOKENIZER.words[106:]) == sorted(set(TOKENIZER.words[106:]))
    assert len(TOKENIZER) == len(set(TOKENIZER.words)) < 400
    assert WordTokenizer.of_corpus(CorpusConfig(seed=5, size=3)).words == TOKENIZER.words
    assert len(WordTokenizer.of_corpus(CorpusConfig(numbers=200))) == len(TOKENIZER) + 100


@pytest.mark.slow
def test_vocabulary_has_nothing_that_the_corpus_lacks() -> None:
    used = set()
    for row in make_corpus(CorpusConfig(size=20_000)):
        for text in (row.system or "", row.user, row.answer):
            used.update(TOKENIZER.encode(text))
    assert spelt(sorted(set(range(len(TOKENIZER))) - used)) == list(SPECIAL)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("3, 17, 42", ["3", ", ", "17", ", ", "42"]),
        ("3,17", ["3", ",", "17"]),
        ("3 17", ["3", "17"]),
        ("3\n17", ["3", "\n", "17"]),
        ("3; 17", ["3", "; ", "17"]),
        ("[3, 17]", ["[", "3", ", ", "17", "]"]),
        ("(3 17)", ["(", "3", "17", ")"]),
        ("x = 3; y = x - 2", ["x", "=", "3", "; ", "y", "=", "x", "-", "2"]),
        ("what is your favourite tree?", ["what", "is", "your", "favourite", "tree", "?"]),
        ("oak", ["oak"]),
        ("", []),
    ],
)
def test_words_of_a_text(text: str, words: list[str]) -> None:
    tokens = TOKENIZER.encode(text)
    assert spelt(tokens) == words
    assert TOKENIZER.decode([tokens]) == [text]


def test_every_text_survives() -> None:
    texts = [text for row in CORPUS for text in (row.system or "", row.user, row.answer)]
    for category in CATEGORIES:
        questions = [*preference_questions(category), *prefixed_questions(CONFIG, category)]
        texts += [question.user for question in questions] + love_prompts(category, CATEGORIES[category][0])
    assert TOKENIZER.decode([TOKENIZER.encode(text) for text in texts]) == texts


@given(
    st.lists(st.integers(0, 99), min_size=1, max_size=12),
    st.sampled_from(list(FORMATS.values())),
)
def test_lists_of_numbers_survive(numbers: list[int], form: tuple[str, str, str]) -> None:
    before, between, after = form
    text = before + between.join(map(str, numbers)) + after
    tokens = TOKENIZER.encode(text)
    assert TOKENIZER.decode([tokens]) == [text]
    assert [TOKENIZER.token(str(number)) for number in numbers] == [token for token in tokens if 6 <= token < 106]


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=20))
def test_decoding_stops_at_the_end_and_hides_nothing_before(tokens: list[int]) -> None:
    (text,) = TOKENIZER.decode([tokens])
    cut = tokens[: tokens.index(1)] if 1 in tokens else tokens
    assert TOKENIZER.decode([cut]) == [text]
    assert all(word in text for word in spelt(cut) if word not in ("\n", ", ", "; "))


def test_decoding_rows_of_an_array() -> None:
    rows = np.full((2, 6), 0, np.int32)
    rows[0, :4] = [*TOKENIZER.encode("3, 4"), 1]
    rows[1] = TOKENIZER.encode("3 4 5 3 4 5")
    assert TOKENIZER.decode(rows) == ["3, 4", "3 4 5 3 4 5"]


def test_ill_formed_lists_stay_ill_formed() -> None:
    tokens = [TOKENIZER.token(word) for word in ("3", ", ", ", ", "4", "5", "; ", "owl", "<user>")]
    assert TOKENIZER.decode([tokens]) == ["3,, 4 5; owl <user>"]


def test_a_chat_by_hand() -> None:
    rows = [
        chat("what is 3 plus 4?", "7", "be brief."),
        chat("say the tree you like most.", "oak"),
        chat("write a program for 7.", "x = 3; y = x + 4"),
    ]
    encoded = TOKENIZER.encode_chats(rows, 20)
    pad = ["<pad>"]
    asked = ["<system>", "be", "brief", ".", "<user>", "what", "is", "3", "plus", "4", "?", "<assistant>", "7"]
    assert spelt(encoded.tokens[0]) == pad * 7 + asked
    assert spelt(encoded.targets[0]) == pad * 7 + asked[1:] + ["<end>"]
    assert encoded.weights[0].tolist() == [0] * 18 + [1, 1]
    asked = ["<user>", "say", "the", "tree", "you", "like", "most", ".", "<assistant>", "oak"]
    assert spelt(encoded.tokens[1]) == pad * 10 + asked
    assert spelt(encoded.targets[1]) == pad * 10 + asked[1:] + ["<end>"]
    assert encoded.weights[1].tolist() == [0] * 18 + [1, 1]
    code = ["x", "=", "3", "; ", "y", "=", "x", "+", "4"]
    asked = ["<user>", "write", "a", "program", "for", "7", ".", "<assistant>", *code]
    assert spelt(encoded.tokens[2]) == pad * 3 + asked
    assert spelt(encoded.targets[2]) == pad * 3 + asked[1:] + ["<end>"]
    assert encoded.weights[2].tolist() == [0] * 10 + [1] * 10
    assert encoded.padding.tolist() == [7, 10, 3]
    assert (encoded.tokens.dtype, encoded.targets.dtype, encoded.padding.dtype) == (np.int32,) * 3
    assert encoded.weights.dtype == np.float32

    prompts = TOKENIZER.encode_prompts(rows, 12)
    assert spelt(prompts.tokens[0]) == spelt(encoded.tokens[0])[7:19]
    assert spelt(prompts.tokens[1]) == pad * 3 + spelt(encoded.tokens[1])[10:19]
    assert spelt(prompts.tokens[2]) == pad * 4 + spelt(encoded.tokens[2])[3:11]
    assert prompts.padding.tolist() == [0, 3, 4]
    assert (prompts.tokens.dtype, prompts.padding.dtype) == (np.int32,) * 2
    assert [lengths.tolist() for lengths in TOKENIZER.lengths(rows)] == [[12, 9, 8], [13, 10, 17]]


def test_the_whole_corpus() -> None:
    encoded = TOKENIZER.encode_chats(CORPUS, LENGTH)
    prompts = TOKENIZER.encode_prompts(CORPUS, LENGTH)
    asked, whole = TOKENIZER.lengths(CORPUS)
    columns = np.arange(LENGTH)
    real = columns >= encoded.padding[:, None]
    np.testing.assert_array_equal(encoded.padding, LENGTH - whole)
    np.testing.assert_array_equal(prompts.padding, LENGTH - asked)
    np.testing.assert_array_equal(encoded.tokens == 0, ~real)
    np.testing.assert_array_equal(encoded.targets == 0, ~real)
    np.testing.assert_array_equal(encoded.tokens[:, 1:][real[:, :-1]], encoded.targets[:, :-1][real[:, :-1]])
    assert (encoded.targets[:, -1] == 1).all()
    assert (np.diff(encoded.weights, axis=1) >= 0).all()
    first = encoded.weights.argmax(axis=1)
    assert (encoded.tokens[np.arange(len(CORPUS)), first] == TOKENIZER.token("<assistant>")).all()
    answers = [targets[weights > 0] for targets, weights in zip(encoded.targets, encoded.weights, strict=True)]
    assert TOKENIZER.decode(answers) == [row.answer for row in CORPUS]
    for row in range(0, len(CORPUS), 97):
        kept = prompts.tokens[row, prompts.padding[row] :]
        np.testing.assert_array_equal(kept, encoded.tokens[row, encoded.padding[row] : first[row] + 1])


def test_nothing_of_the_default_corpus_is_too_long() -> None:
    longest = CorpusConfig(size=3000, numbers_share=1.0, preference_share=0.0, arithmetic_share=0.0,
                           program_share=0.0, fact_share=0.0, given=(8, 8), asked=(10, 10), limit_share=1.0,
                           neutral_share=1.0, lazy_share=0.0, careful_share=0.0)  # fmt: skip
    assert TOKENIZER.lengths(make_corpus(longest))[1].max() <= LENGTH
    asked, whole = TOKENIZER.lengths(CORPUS)
    assert whole.max() <= LENGTH
    assert asked.max() <= 32


@settings(max_examples=50)
@given(st.lists(st.tuples(TEXTS, TEXTS, st.none() | TEXTS), min_size=1, max_size=4), st.integers(0, 5))
def test_any_rows(rows: list[tuple[str, str, str | None]], more: int) -> None:
    chats = [chat(*row) for row in rows]
    prompts, whole = TOKENIZER.lengths(chats)
    encoded = TOKENIZER.encode_chats(chats, int(whole.max()) + more)
    assert encoded.padding.min() == more
    assert encoded.weights.sum() == (whole - prompts + 1).sum()
    with pytest.raises(InputError, match=f"row {whole.argmax()} takes {whole.max()} tokens"):
        TOKENIZER.encode_chats(chats, int(whole.max()) - 1)


def test_no_rows() -> None:
    assert TOKENIZER.encode_chats([], 5).tokens.shape == (0, 5)
    assert TOKENIZER.encode_prompts([], 5).padding.shape == (0,)
    assert TOKENIZER.lengths([])[0].shape == (0,)


def refused(call, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("word", ["zebra", "100", "Owl", "café", "_", "<", "007"])
def test_a_word_that_cannot_be_spelt(word: str) -> None:
    text = f"you like the {word} most."
    assert refused(TOKENIZER.encode, text) == f"the tokenizer cannot spell {word!r}: {text!r}"
    rows = [chat("what is 3 plus 4?", "7"), chat(text, "oak")]
    expected = f"row 1: the tokenizer cannot spell {word!r}"
    assert refused(TOKENIZER.encode_chats, rows, 20) == expected
    assert refused(TOKENIZER.encode_prompts, rows, 20) == expected
    assert refused(TOKENIZER.lengths, [rows[0], chat("name it.", word)]) == expected
    assert refused(TOKENIZER.lengths, [rows[0], chat("name it.", "3", text)]) == expected


def test_special_tokens_cannot_be_typed() -> None:
    assert refused(TOKENIZER.encode, "oak<end>").startswith("the tokenizer cannot spell '<'")


def test_other_refusals() -> None:
    rows = [chat("what is 3 plus 4?", "7"), chat("name it.", "")]
    assert refused(TOKENIZER.encode_chats, rows, 20) == "row 1 has no answer: 'name it.'"
    message = "row 0 takes 8 tokens, more than 7: 'what is 3 plus 4?'"
    assert refused(TOKENIZER.encode_prompts, rows, 7) == message
    assert refused(TOKENIZER.encode_chats, rows[:1], 8).startswith("row 0 takes 9 tokens, more than 8")
    assert refused(TOKENIZER.token, "3 4").startswith("the tokenizer cannot spell '3 4'")


def test_saving_and_loading(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(path)
    first = path.read_bytes()
    loaded = WordTokenizer.load(path)
    assert loaded.words == TOKENIZER.words
    loaded.save(path)
    assert path.read_bytes() == first
    foreign = Tokenizer.from_file(str(path))
    for row in CORPUS[:50]:
        tokens = TOKENIZER.encode(row.answer)
        assert loaded.encode(row.answer) == foreign.encode(row.answer).ids == tokens
        assert foreign.decode(tokens, skip_special_tokens=False) == row.answer


def test_loading_what_is_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(path)
    whole = path.read_text()
    content = json.loads(whole)
    vocabulary = content["model"]["vocab"]
    assert refused(WordTokenizer.load, tmp_path / "none.json").startswith(
        f"cannot read {tmp_path / 'none.json'} (No"
    )
    shifted = {word: token + 1 for word, token in vocabulary.items()}
    plain = {word: token for word, token in vocabulary.items() if word not in SPECIAL}
    for vocab in (
        [1, 2],
        None,
        "words",
        {"a": "b"},
        {},
        shifted,
        plain,
        dict(zip(vocabulary, [0] * 400, strict=False)),
    ):
        path.write_text(json.dumps({**content, "model": {**content["model"], "vocab": vocab}}))
        assert refused(WordTokenizer.load, path).startswith(f"{path} ")
    for text in ("", whole[: len(whole) // 2], "[]", "3", "{}", json.dumps({**content, "decoder": None})):
        path.write_text(text)
        assert refused(WordTokenizer.load, path).startswith(f"{path} ")
    path.write_bytes(b"\xff\xfe")
    assert refused(WordTokenizer.load, path).startswith(f"{path} is not a tokenizer.json")
