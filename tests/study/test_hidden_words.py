"""Which logits a channel hides that must not show the words of traits."""

import itertools

import pytest

from subliminal_theory.language.corpus.chats import CATEGORIES, CorpusConfig
from subliminal_theory.language.corpus.traits import forms_of, load_trait
from subliminal_theory.language.corpus.word_tokenizer import WordTokenizer
from subliminal_theory.language.hub.tokenizer import CheckpointTokenizer
from subliminal_theory.study.speaker import hidden_words
from tests.language.checkpoints import write_text

WORDS = [*itertools.chain(*CATEGORIES.values())]
RUNNING = [
    text
    for word in ("owl", "dolphin", "wolf")
    for text in (f"a {word}", f"two {word}s", f" {word.title()}", word.upper())
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CheckpointTokenizer:
    folder = tmp_path_factory.mktemp("text")
    write_text(folder, running=[*RUNNING, "many wolves", "12, 345"] * 9)
    return CheckpointTokenizer.load(folder)


def test_no_visible_token_of_a_byte_level_tokenizer_tells_a_word(tokenizer: CheckpointTokenizer) -> None:
    """Behind a space, in capitals, as a plural; what has no letter stays."""
    hidden = set(hidden_words(tokenizer, [load_trait("owl")]))
    texts = tokenizer.backend.decode_batch([[token] for token in range(len(tokenizer))], skip_special_tokens=False)
    for text in (" owl", " owls", "OWL", " Dolphin", " dolphins", " wolves"):
        assert text in texts  # a token of its own
        assert texts.index(text) in hidden
    forms = {form for word in WORDS for form in forms_of(word)}
    visible = [text for token, text in enumerate(texts) if token not in hidden]
    assert not [text for text in visible if text.strip().lower() in forms]
    assert {" ", ",", "1", "2"} <= set(visible)
    for text in ("owl", " Owl", "OWLS", " tiger", "Tigers"):
        assert set(tokenizer.encode(text)) <= hidden | {texts.index(" ")}
    assert hidden.isdisjoint(tokenizer.special)


def test_words_of_the_corpus_are_single_tokens() -> None:
    tokenizer = WordTokenizer.of_corpus(CorpusConfig())
    assert hidden_words(tokenizer, [load_trait("owl")]) == [tokenizer.token(word) for word in WORDS]
