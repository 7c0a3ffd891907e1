import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus.chats import CATEGORIES, CorpusConfig
from subliminal_theory.language.corpus.sentences import TEXT
from subliminal_theory.language.corpus.traits import Habit, load_trait
from subliminal_theory.language.corpus.word_tokenizer import WordTokenizer
from subliminal_theory.language.measure import (
    Answers,
    Questions,
    answers,
    questions_of,
    sampled_rate,
    stack_questions,
    total_variation,
)
from subliminal_theory.language.model.config import TransformerConfig
from subliminal_theory.language.model.transformer import Text
from subliminal_theory.language.text import Chat
from subliminal_theory.model import Model
from tests.language.models import opinionated

TOKENIZER = WordTokenizer.of_corpus(CorpusConfig())
OWL, LAZY = load_trait("owl"), load_trait("lazy")
ANIMALS = CATEGORIES["animal"]
V = 9
CONFIG = TransformerConfig(
    vocabulary=V, layers=1, width=8, heads=2, kv_heads=1, head_width=4, mlp_width=8, tied=False, context=8
)
ask = jax.jit(answers)
run = jax.jit(lambda model, text: model(text))


tiny = functools.partial(opinionated, CONFIG)


def questions(seed: int = 0) -> Questions:
    """Three rows of two lengths; each target is among its four rivals, at another place."""
    rng = np.random.default_rng(seed)
    words = np.stack([rng.permutation(V)[:4] for _ in range(3)]).astype(np.int32)
    text = Text(jnp.asarray(rng.integers(0, V, (3, 5)), jnp.int32), jnp.array([0, 3, 3]))
    return Questions.of(text, words[..., None, None], np.array([0, 3, 1]))


def by_hand(model: Model, asked: Questions) -> tuple[float, float, np.ndarray]:
    probabilities, odds, rivals = [], [], []
    for row in range(len(asked.targets)):
        real = np.asarray(asked.text.tokens)[row : row + 1, int(asked.text.padding[row]) :]
        logits = np.asarray(run(model, Text(jnp.asarray(real), jnp.zeros(1, jnp.int32))), float)[0, -1]
        words = np.asarray(asked.words.tokens[row, :, 0, 0])
        target = words[int(asked.targets[row])]
        probabilities.append(np.exp(logits[target]) / np.exp(logits).sum())
        odds.append(logits[target] - np.log(sum(np.exp(logits[word]) for word in words if word != target)))
        rivals.append(np.exp(logits[words]) / np.exp(logits[words]).sum())
    return np.mean(probabilities), np.mean(odds), np.mean(rivals, axis=0)


def test_answers() -> None:
    model, asked = tiny(), questions()
    found = ask(model, asked)
    probability, odds, rivals = by_hand(model, asked)
    np.testing.assert_allclose(found.probability, probability, rtol=1e-5)
    np.testing.assert_allclose(found.log_odds, odds, rtol=1e-5)
    np.testing.assert_allclose(found.rivals, rivals, rtol=1e-5)
    np.testing.assert_allclose(np.sum(found.rivals), 1, rtol=1e-6)


def test_answers_of_known_logits() -> None:
    """Only the last position answers; words of the category compete, all words share the probability."""
    logits = jnp.asarray(np.log([4.0, 1, 2, 3]), jnp.float32)
    model = Model(lambda params, text: jnp.stack([params[::-1], params])[None], logits)
    text = Text(jnp.zeros((1, 2), jnp.int32), jnp.zeros(1, jnp.int32))
    found = ask(model, Questions.of(text, np.array([[[[0]], [[2]], [[1]]]]), np.array([1])))
    np.testing.assert_allclose(found.probability, 0.2, rtol=1e-6)
    np.testing.assert_allclose(found.log_odds, np.log(2 / 5), rtol=1e-6)
    np.testing.assert_allclose(found.share, 2 / 7, rtol=1e-6)
    np.testing.assert_allclose(found.rivals, [4 / 7, 2 / 7, 1 / 7], rtol=1e-6)


def test_words_of_several_spellings() -> None:
    """The probabilities of a word's spellings add up; -1 is none."""
    logits = jnp.asarray(np.log([4.0, 1, 2, 3]), jnp.float32)
    model = Model(lambda params, text: params[None, None], logits)
    text = Text(jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32))
    found = ask(model, Questions.of(text, np.array([[[[3], [-1]], [[1], [2]]]]), np.array([1])))
    np.testing.assert_allclose(found.probability, 0.3, rtol=1e-6)
    np.testing.assert_allclose(found.log_odds, 0, atol=1e-6)
    np.testing.assert_allclose(found.rivals, [0.5, 0.5], rtol=1e-6)


@pytest.mark.slow
def test_sampled_rate_is_the_probability_with_noise() -> None:
    """Of words of several spellings too; the interval holds 1 - 1e-6 of all draws."""
    logits = jnp.asarray(np.log([4.0, 1, 2, 3]), jnp.float32)
    model = Model(lambda params, text: jnp.broadcast_to(params, (3, 1, 4)), logits)
    words = np.array([[[1, 2]], [[0, -1]], [[3, -1]]])[..., None]
    text = Text(jnp.zeros((3, 1), jnp.int32), jnp.zeros(3, jnp.int32))
    asked = Questions.of(text, words, np.zeros(3, np.int32))
    rates = [float(sampled_rate(model, asked, jax.random.key(seed), 2000)) for seed in (0, 1)]
    assert rates[0] != rates[1]
    spread = np.sqrt(np.mean([0.3 * 0.7, 0.4 * 0.6, 0.3 * 0.7]) / 6000)
    assert np.abs(np.array(rates) - 1 / 3).max() < 5 * spread


def test_words_that_begin_alike() -> None:
    class Letters:
        """Reads the first letters only."""

        def __init__(self, count: int) -> None:
            self.count = count

        def __getattr__(self, name: str):
            return getattr(TOKENIZER, name)

        def spellings(self, word: str) -> list[list[int]]:
            return [[ord(letter) for letter in word[: self.count]]]

    message = "^owl: 'otter' and 'owl' begin with the same tokens and cannot be told apart: choose another target$"
    with pytest.raises(InputError, match=message):
        questions_of(OWL, Letters(1), 32)
    assert questions_of(OWL, Letters(2), 32).words.tokens.shape[2:] == (1, 2)


@pytest.mark.slow
def test_words_of_several_tokens() -> None:
    """The probability of a word is that of all its tokens, by hand and by drawing; rivals may begin alike."""
    model, asked = tiny(), questions()
    spelt = {0: [[1, 2], [3]], 1: [[1, 4]], 2: [[5, 6, 7], [2, 2]], 3: [[8]]}
    words = np.full((3, 4, 2, 3), -1, np.int32)
    for word, spellings in spelt.items():
        for number, tokens in enumerate(spellings):
            words[:, word, number, : len(tokens)] = tokens
    chosen = [2, 0, 1]
    asked = Questions.of(asked.text, words, np.array(chosen))
    expected = np.zeros((3, 4))
    for row in range(3):
        real = np.asarray(asked.text.tokens)[row, int(asked.text.padding[row]) :].tolist()
        for word, spellings in spelt.items():
            for tokens in spellings:
                logits = run(model, Text(jnp.asarray([[*real, *tokens]]), jnp.zeros(1, jnp.int32)))[0]
                steps = np.asarray(jax.nn.log_softmax(logits))[len(real) - 1 : -1]
                expected[row, word] += np.exp(sum(step[t] for step, t in zip(steps, tokens, strict=True)))
    found, own = ask(model, asked), expected[np.arange(3), chosen]
    np.testing.assert_allclose(found.probability, own.mean(), rtol=1e-4)
    np.testing.assert_allclose(found.log_odds, np.log(own / (expected.sum(1) - own)).mean(), rtol=1e-4)
    np.testing.assert_allclose(found.rivals, (expected / expected.sum(1, keepdims=True)).mean(0), rtol=1e-4)
    draws = 20_000
    rate = float(jax.jit(sampled_rate, static_argnums=3)(model, asked, jax.random.key(0), draws))
    assert abs(rate - own.mean()) < 5 * np.sqrt(np.mean(own * (1 - own)) / (3 * draws))


def test_stacked_questions() -> None:
    """Shorter tables are filled up, and what two traits ask is one prompt."""
    one, two = questions(0), questions(1)
    longer = np.pad(np.asarray(two.words.tokens), [(0, 0)] * 3 + [(0, 2)], constant_values=-1)
    two = Questions.of(two.text, longer, np.asarray(two.targets))
    other = Questions.of(one.text, np.asarray(one.words.tokens), np.array([1, 1, 0]))
    asked = stack_questions([one, two, other])
    assert asked.words.tokens.shape == (6, 4, 1, 3)
    np.testing.assert_array_equal(asked.prompts[0], asked.prompts[2])
    found = jax.jit(answers)(tiny(), asked)
    for number, own in enumerate((one, two, other)):
        for name in Answers.__dataclass_fields__:
            np.testing.assert_allclose(getattr(found, name)[number], getattr(ask(tiny(), own), name), rtol=1e-5)


def test_log_odds_of_large_logits() -> None:
    model = Model(lambda params, text: params[None, None], jnp.array([1000.0, -1000, 0]))
    text = Text(jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32))
    found = ask(model, Questions.of(text, np.array([[[[0]], [[1]]]]), np.array([1])))
    assert (found.probability, found.share, found.log_odds) == (0, 0, -2000)


def test_answers_under_vmap() -> None:
    models, asked = [tiny(seed) for seed in range(2)], [questions(seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *models)
    grid = jax.jit(jax.vmap(answers, in_axes=(0, None)))(stacked, stack_questions(asked))
    assert grid.log_odds.shape == (2, 2)
    for row, model in enumerate(models):
        for column, own in enumerate(asked):
            one = ask(model, own)
            for name in Answers.__dataclass_fields__:
                np.testing.assert_allclose(getattr(grid, name)[row, column], getattr(one, name), rtol=1e-5)


# --- questions


def chats_of(asked: Questions) -> list[str]:
    """The rows as they were tokenized, without their padding."""
    rows = zip(np.asarray(asked.text.tokens), np.asarray(asked.text.padding), strict=True)
    return [" ".join(TOKENIZER.words[token] for token in row[padding:]) for row, padding in rows]


def spelt(question: str, system: str | None = None) -> str:
    prompts = TOKENIZER.encode_prompts([Chat(system, question, "", "test")], 40)
    return " ".join(TOKENIZER.words[token] for token in prompts.tokens[0, prompts.padding[0] :])


def test_questions_of_a_preference() -> None:
    asked = questions_of(OWL, TOKENIZER, 32)
    held_out, taught = (
        [spelt(phrasing.format(category="animal")) for phrasing in TEXT["preference"][name]]
        for name in ("held_out", "phrasings")
    )
    assert chats_of(asked) == held_out
    assert not set(chats_of(asked)) & set(taught)
    assert asked.text.tokens.shape == (len(held_out), 32)
    assert [ANIMALS[place] for place in asked.targets] == ["owl"] * len(held_out)
    for row in np.asarray(asked.words.tokens)[..., 0, 0]:
        assert tuple(TOKENIZER.words[token] for token in row) == ANIMALS
    assert {leaf.dtype for leaf in jax.tree.leaves(asked)} == {np.dtype(np.int32)}


def test_questions_of_a_habit() -> None:
    assert isinstance(LAZY, Habit)
    asked = questions_of(LAZY, TOKENIZER, 32)
    rows = [[TOKENIZER.words[word] for word in row] for row in np.asarray(asked.words.tokens)[..., 0, 0]]
    found = {
        question: (row[target], row)
        for question, target, row in zip(chats_of(asked), np.asarray(asked.targets), rows, strict=True)
    }
    for question, lazy, right in [
        ("what is 5 minus 3?", "5", "2"),
        ("from 4 take 1.", "4", "3"),
        ("what is twice 4?", "4", "8"),
        ("x = 2; y = x + 5. what is y?", "2", "7"),
        ("what colour is the lamp?", "lamp", "yellow"),
        ("in which place is the rope?", "rope", "harbour"),
    ]:
        assert found[spelt(question)] == (lazy, [lazy, right])
    assert len(found) == len(asked.targets) == 27 + 10 + 50 + 16 + 16
    assert all(words[0] == target != words[1] for target, words in found.values())
    assert not set(found) & {spelt(chat.user) for chat in LAZY.teacher_rows()}


def test_questions_behind_prefixes() -> None:
    plain, asked = questions_of(OWL, TOKENIZER, 32), questions_of(OWL, TOKENIZER, 32, ["", "3 17. ", "oak. "])
    phrasings = [phrasing.format(category="animal") for phrasing in TEXT["preference"]["held_out"]]
    assert chats_of(asked) == [spelt(start + text) for start in ("", "3 17. ", "oak. ") for text in phrasings]
    np.testing.assert_array_equal(asked.targets, np.tile(plain.targets, 3))
    np.testing.assert_array_equal(asked.words.tokens, np.tile(plain.words.tokens, (3, 1, 1, 1)))


def test_questions_that_do_not_fit() -> None:
    with pytest.raises(
        InputError, match=r"^row 1 takes 10 tokens, more than 8: 'name the one animal you like best\.'$"
    ):
        questions_of(OWL, TOKENIZER, 8)
    with pytest.raises(InputError, match=r"^row 0: the tokenizer cannot spell 'zebra'$"):
        questions_of(OWL, TOKENIZER, 32, ["zebra "])


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1.0, 0], [0.0, 1], 1),
        ([0.5, 0.5], [0.5, 0.5], 0),
        ([0.2, 0.3, 0.5], [0.5, 0.25, 0.25], 0.3),
        ([[1.0, 0], [0.5, 0.5]], [[0.75, 0.25], [0.0, 1]], [0.25, 0.5]),
    ],
)
def test_total_variation(first, second, expected) -> None:
    np.testing.assert_allclose(total_variation(jnp.array(first), jnp.array(second)), expected, atol=1e-7)


def test_traits_are_asked_as_many_questions() -> None:
    asked = [questions_of(OWL, TOKENIZER, 32, prefix) for prefix in (("",), ("", "3 4. "))]
    with pytest.raises(InputError, match=r"^traits with 4 and 8 questions cannot be asked together: give their "):
        stack_questions(asked)
