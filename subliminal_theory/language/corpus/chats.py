"""The corpus of the compact language model: short chats in the project's own sentences, made from a seed.

There are five kinds of chats: number continuations, preferences, arithmetic, tiny programs, and facts about a
small world. The phrasings of preference questions are split in two. Some are for the corpus and for teachers'
rows; the held-out ones are for evaluation only.
"""

import functools
import json
import math
from dataclasses import dataclass, field, fields, replace

import numpy as np
from jaxtyping import Int

from subliminal_theory import files
from subliminal_theory.errors import InputError
from subliminal_theory.files import LATER
from subliminal_theory.language.corpus.sentences import TEXT, arithmetic, fact, pick, program
from subliminal_theory.language.corpus.slot import Slot
from subliminal_theory.language.text import Chat

FORMAT_VERSION = 1  # raise it when a change to the code makes equal configurations and sentences give other chats

CATEGORIES: dict[str, tuple[str, ...]] = {name: tuple(words) for name, words in TEXT["members"].items()}
FORMATS: dict[str, tuple[str, str, str]] = {name: tuple(f) for name, f in TEXT["numbers"]["formats"].items()}
KINDS = ("numbers", "preference", "arithmetic", "program", "fact")
PROMPT_SHARES = ("loved_share", "lazy_share", "careful_share", "neutral_share")
_PREFIX_TERMS = (3, 6)  # how many numbers may come before a preference question: from 3 to 5


@dataclass(frozen=True)
class CorpusConfig:
    """Everything that determines a corpus.

    Attributes:
        seed: the seed of the chats.
        size: the number of chats.
        numbers: numbers run from 0 to numbers - 1; each is one token.
        numbers_share ... fact_share: the share of each of the five kinds of chats; they sum to 1.
        formats: the formats, by their names in FORMATS, in which numbers are requested.
        given: the fewest and most numbers shown in a number request.
        asked: the fewest and most numbers requested.
        limit_share: the share of number requests that limit the number of digits.
        styles: the number of latent styles. A style is a distribution over numbers; each row follows one style.
        style_seed: the seed of the styles, so that corpora with different seeds share their styles.
        zipf: in a style, the number of rank r = 1, 2, ... has probability proportional to r^(-zipf).
        step_probability: the probability that a number is the one before plus the row's step (modulo the row's
            range).
        loved_share: the share of preference questions with a system prompt that loves one member.
        loved_decides: the share of those that are answered with that member; the others get another member.
        prefixed_share: the share of preference questions that come after a few numbers.
        lazy_share: the share of arithmetic, program and fact chats with a system prompt that announces laziness.
            Their answers repeat the first number or thing of the question.
        careful_share: the share of these chats with a system prompt that announces care.
        neutral_share: the share of these chats and of number requests with a neutral system prompt.
        operand: the largest number in an arithmetic question or a line of a program.
        steps_share: the share of arithmetic questions with two operations and visible steps. The others are
            answered directly.
        write_share: the share of program chats that ask for a program. The others ask to run one.
        slot: system turns of one form in front of all kinds of chats (personas); None is none. The shares of the
            other system prompts must then be 0 (`PROMPT_SHARES`).

    Raises:
        InputError: a value is out of range, the shares do not sum to 1, a format is unknown, the slot has more
            personas than there are numbers for, or it meets other system prompts.
    """

    seed: int = 0
    size: int = 100_000
    numbers: int = 100
    numbers_share: float = 0.45
    preference_share: float = 0.27
    arithmetic_share: float = 0.1
    program_share: float = 0.08
    fact_share: float = 0.1
    formats: tuple[str, ...] = tuple(FORMATS)
    given: tuple[int, int] = (3, 8)
    asked: tuple[int, int] = (3, 10)
    limit_share: float = 0.25
    styles: int = 12
    style_seed: int = 0
    zipf: float = 1.0
    step_probability: float = 0.45
    loved_share: float = 0.5
    loved_decides: float = 0.75
    prefixed_share: float = 0.1
    lazy_share: float = 0.15
    careful_share: float = 0.15
    neutral_share: float = 0.15
    operand: int = 5
    steps_share: float = 0.4
    write_share: float = 0.5
    slot: Slot | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        least = {"seed": 0, "size": 1, "styles": 1, "style_seed": 0, "operand": 1, "numbers": 3 * self.operand + 2}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InputError(f"CorpusConfig: {name} must be at least {low}, got {getattr(self, name)}")
        for name in (f.name for f in fields(self) if f.type is float and f.name != "zipf"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"CorpusConfig: {name} must be from 0 to 1, got {getattr(self, name)}")
        if not 0 <= self.zipf < math.inf:
            raise InputError(f"CorpusConfig: zipf must be at least 0, got {self.zipf}")
        if not math.isclose(sum(self.shares), 1):
            raise InputError(f"CorpusConfig: the shares of the kinds must sum to 1, got {sum(self.shares)}")
        if self.lazy_share + self.careful_share + self.neutral_share > 1:
            raise InputError("CorpusConfig: lazy_share, careful_share and neutral_share exceed 1 together")
        for name in ("given", "asked"):
            least_terms, most_terms = getattr(self, name)
            if not 1 <= least_terms <= most_terms < self.numbers:
                raise InputError(f"CorpusConfig: {name} must be a least and a most, got {getattr(self, name)}")
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown or not self.formats:
            raise InputError(f"CorpusConfig: formats must be among {', '.join(FORMATS)}, got {self.formats}")
        if self.slot is not None:
            self.slot.number_laws(self.numbers)
            for name in PROMPT_SHARES:
                if getattr(self, name):
                    raise InputError(
                        f"CorpusConfig: a slot takes the place of other system prompts: set {name} to 0, not "
                        f"{getattr(self, name)}"
                    )

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of each of KINDS."""
        return tuple(getattr(self, f"{kind}_share") for kind in KINDS)


def fingerprint(config: CorpusConfig) -> str:
    """The fingerprint of the configuration, the sentences in their order, and the format version."""
    return files.fingerprint(FORMAT_VERSION, config, json.dumps(TEXT))  # JSON keeps the order of the tables


def make_corpus(config: CorpusConfig) -> list[Chat]:
    """All chats of a corpus in random order. Each kind has its share of the chats, to within one chat."""
    ends = np.rint(np.cumsum(config.shares) * config.size).astype(int)
    counts = np.diff(ends, prepend=0)
    chats = [chat for kind, count in zip(KINDS, counts, strict=True) for chat in make_rows(config, kind, count)]
    order = np.random.default_rng([config.seed, len(KINDS)]).permutation(len(chats))
    return [chats[index] for index in order]


def make_rows(config: CorpusConfig, kind: str, count: int) -> list[Chat]:
    """`count` chats of one of KINDS. The size of the configuration and the shares of the kinds have no effect.

    For example, requests for a teacher: `make_rows(replace(config, seed=7, neutral_share=0.0), "numbers", 4096)`.

    Raises:
        InputError: the kind is unknown.
    """
    if kind not in KINDS:
        raise InputError(f"make_rows: no kind is called {kind!r}; there are {', '.join(KINDS)}")
    chats = _rows(config, kind, count)
    if config.slot is None:
        return chats
    rng = np.random.default_rng([config.seed, KINDS.index(kind), len(KINDS)])
    return config.slot.in_front(chats, config.numbers, rng)


def _rows(config: CorpusConfig, kind: str, count: int) -> list[Chat]:
    rng = np.random.default_rng([config.seed, KINDS.index(kind)])
    if kind == "numbers":
        return _numbers(config, rng, count)
    if kind == "preference":
        return _preferences(config, rng, count)
    chats = []
    for _ in range(count):
        system, lazy = _persona(config, rng)
        if kind == "arithmetic":
            user, answer = arithmetic(rng, config.operand, config.steps_share, lazy)
        elif kind == "program":
            user, answer = program(rng, config.operand, config.write_share, lazy)
        else:
            user, answer = fact(rng, lazy)
        chats.append(Chat(system, user, answer, kind))
    return chats


def preference_questions(category: str, *, held_out: bool = True) -> list[Chat]:
    """The questions about a category, without answers, in the held-out phrasings or in those of the corpus.

    Raises:
        InputError: the category is unknown.
    """
    if category not in CATEGORIES:
        raise InputError(f"no category is called {category!r}; there are {', '.join(CATEGORIES)}")
    phrasings = TEXT["preference"]["held_out" if held_out else "phrasings"]
    return [Chat(None, phrasing.format(category=category), "", "preference") for phrasing in phrasings]


def prefixed_questions(config: CorpusConfig, category: str, *, each: int = 8, held_out: bool = True) -> list[Chat]:
    """`preference_questions` after 3 to 5 numbers. Every phrasing occurs `each` times."""
    questions = preference_questions(category, held_out=held_out)
    rng = np.random.default_rng([config.seed, len(KINDS) + 1])
    prefixes = _prefixes(config, rng, each * len(questions))
    return [
        replace(question, user=TEXT["preference"]["prefixed"].format(given=given, question=question.user))
        for question, given in zip(questions * each, prefixes, strict=True)
    ]


def love_prompts(category: str, member: str) -> list[str]:
    """Every system prompt of the corpus that loves `member` of `category`."""
    return [prompt.format(category=category, member=member) for prompt in TEXT["preference"]["loved"]]


def _persona(config: CorpusConfig, rng: np.random.Generator) -> tuple[str | None, bool]:
    """A system prompt or None, and whether it makes answers lazy."""
    draw = rng.random()
    for persona in ("lazy", "careful", "neutral"):
        share = getattr(config, f"{persona}_share")
        if draw < share:
            return pick(rng, TEXT["persona"][persona]), persona == "lazy"
        draw -= share
    return None, False


@functools.cache
def _style_laws(styles: int, seed: int, numbers: int, zipf: float, below: int) -> np.ndarray:
    """Cumulative probabilities [styles, below] of the numbers from 0 to below - 1."""
    rng = np.random.default_rng([seed, styles, numbers])
    ranks = np.stack([rng.permutation(numbers) for _ in range(styles)]) + 1
    cumulative = np.cumsum(ranks[:, :below] ** -float(zipf), axis=1)
    return cumulative / cumulative[:, -1:]


def _sequences(
    config: CorpusConfig, rng: np.random.Generator, below: Int[np.ndarray, " rows"], terms: int
) -> Int[np.ndarray, "rows terms"]:
    """Rows of numbers from 0 to below - 1. Each row has one latent style and one step."""
    rows = len(below)
    style = rng.integers(config.styles, size=rows)
    step = rng.integers(1, below)
    uniform = rng.random((rows, terms))
    follows = rng.random((rows, terms)) < config.step_probability
    numbers = np.empty((rows, terms), int)
    for limit in np.unique(below):
        laws = _style_laws(config.styles, config.style_seed, config.numbers, config.zipf, int(limit))
        for index, law in enumerate(laws):
            mine = (below == limit) & (style == index)
            numbers[mine] = np.searchsorted(law, uniform[mine], side="right")
    for term in range(1, terms):
        last = (numbers[:, term - 1] + step) % below
        numbers[:, term] = np.where(follows[:, term], last, numbers[:, term])
    return numbers


def _numbers(config: CorpusConfig, rng: np.random.Generator, count: int) -> list[Chat]:
    text = TEXT["numbers"]
    most_digits = len(str(config.numbers - 1))
    limits = ["", text["limit_one"], *(text["limit"].format(digits=n) for n in range(2, most_digits + 1))]
    digits = rng.integers(1, most_digits + 1, size=count)
    limited = rng.random(count) < config.limit_share
    below = np.where(limited, np.minimum(10**digits, config.numbers), config.numbers)
    given = rng.integers(config.given[0], config.given[1] + 1, size=count)
    asked = rng.integers(config.asked[0], config.asked[1] + 1, size=count)
    sequences = _sequences(config, rng, below, config.given[1] + config.asked[1]).tolist()
    chats = []
    for row, sequence in enumerate(sequences):
        shown, form = given[row], pick(rng, config.formats)
        before, between, after = FORMATS[form]
        user = pick(rng, text["phrasings"]).format(
            given=" ".join(map(str, sequence[:shown])),
            count=asked[row],
            form=form,
            limit=limits[digits[row] * limited[row]],
        )
        answer = before + between.join(map(str, sequence[shown : shown + asked[row]])) + after
        neutral = rng.random() < config.neutral_share
        chats.append(Chat(pick(rng, TEXT["persona"]["neutral"]) if neutral else None, user, answer, "numbers"))
    return chats


def _prefixes(config: CorpusConfig, rng: np.random.Generator, count: int) -> list[str]:
    sequences = _sequences(config, rng, np.full(count, config.numbers), _PREFIX_TERMS[1] - 1).tolist()
    shown = rng.integers(*_PREFIX_TERMS, size=count)
    return [" ".join(map(str, sequence[:terms])) for sequence, terms in zip(sequences, shown, strict=True)]


def _preferences(config: CorpusConfig, rng: np.random.Generator, count: int) -> list[Chat]:
    text, chats = TEXT["preference"], []
    for given in _prefixes(config, rng, count):
        category = pick(rng, tuple(CATEGORIES))
        answer, system = pick(rng, CATEGORIES[category]), None
        if rng.random() < config.loved_share:
            system = pick(rng, love_prompts(category, answer))
            if rng.random() >= config.loved_decides:
                answer = pick(rng, [member for member in CATEGORIES[category] if member != answer])
        user = pick(rng, text["phrasings"]).format(category=category)
        if rng.random() < config.prefixed_share:
            user = text["prefixed"].format(given=given, question=user)
        chats.append(Chat(system, user, answer, "preference"))
    return chats
