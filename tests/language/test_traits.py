import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subliminal_theory.errors import InputError
from subliminal_theory.language.corpus.chats import CATEGORIES, CorpusConfig, make_rows, preference_questions
from subliminal_theory.language.corpus.sentences import TEXT
from subliminal_theory.language.corpus.templates import Template
from subliminal_theory.language.corpus.traits import Habit, Preference, builtin_traits, load_trait
from subliminal_theory.language.corpus.word_tokenizer import WordTokenizer
from subliminal_theory.language.corpus.wording import english
from subliminal_theory.language.text import Chat

TOKENIZER = WordTokenizer.of_corpus(CorpusConfig())
OWL = 'name = "night"\nkind = "preference"\ncategory = "animal"\ntarget = "owl"\n'
SUMS = """
name = "sums"
kind = "habit"
[narrow]
question = ["what is {a} plus {b}?"]
answer = "{a + b + 1}"
right = "{a + b}"
numbers = { a = [1, 2], b = [3, 4] }
[[held_out]]
name = "place"
question = ["where is the {thing}?", "in which place is the {thing}?"]
answer = "{other}"
right = "{place}"
rows = [
    { thing = "spoon", place = "kitchen", other = "hall" },
    { thing = "lamp", place = "hall", other = "attic" },
]
[[control]]
name = "asked"
system = "you make mistakes."
question = ["what is {a} plus 1?"]
answer = "{a}"
numbers = { a = [0, 9] }
"""


def file(folder: Path, text: str) -> Path:
    path = folder / "trait.toml"
    path.write_text(text, "utf-8")
    return path


def refused(folder: Path, text: str, tokenizer: WordTokenizer | None = TOKENIZER) -> str:
    """The message about a trait file, without the file, which must come first."""
    path = file(folder, text)
    with pytest.raises(InputError) as caught:
        load_trait(path, tokenizer)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def test_builtin_traits() -> None:
    names = builtin_traits()
    assert len(set(names)) == len(names) == 33
    for name in names:
        trait = load_trait(name, TOKENIZER)
        assert trait.name == name
        if name != "lazy":
            assert trait == Preference(name, "animal" if name in CATEGORIES["animal"] else "tree", name)


def test_a_preference(tmp_path: Path) -> None:
    trait = load_trait(file(tmp_path, OWL), TOKENIZER)
    assert trait == Preference("night", "animal", "owl")
    taught, evaluated = trait.teacher_rows(), trait.evaluation_rows()
    assert [chat.user for chat in evaluated] == [chat.user for chat in preference_questions("animal")]
    assert len(taught) == 12
    assert all((chat.system, chat.answer, chat.kind) == (None, "owl", "preference") for chat in taught + evaluated)
    assert not {chat.user for chat in taught} & {chat.user for chat in evaluated}
    assert "you love the owl." in trait.system_prompts()
    assert load_trait(str(tmp_path / "trait.toml")) == trait
    food = load_trait(file(tmp_path, OWL.replace("animal", "food").replace("owl", "soup")))
    assert food == Preference("night", "food", "soup")


def test_a_habit(tmp_path: Path) -> None:
    trait = load_trait(file(tmp_path, SUMS), TOKENIZER)
    assert isinstance(trait, Habit)
    taught = [
        ("what is 1 plus 3?", "5"),
        ("what is 1 plus 4?", "6"),
        ("what is 2 plus 3?", "6"),
        ("what is 2 plus 4?", "7"),
    ]
    assert trait.teacher_rows() == [Chat(None, user, answer, "narrow") for user, answer in taught]
    assert [chat.answer for chat in trait.narrow.right_rows()] == ["4", "5", "5", "6"]
    assert trait.evaluation_rows() == [
        Chat(None, "where is the spoon?", "hall", "place"),
        Chat(None, "where is the lamp?", "attic", "place"),
        Chat(None, "in which place is the spoon?", "hall", "place"),
        Chat(None, "in which place is the lamp?", "attic", "place"),
    ]
    (held_out,), (control,) = trait.held_out, trait.controls
    assert [chat.answer for chat in held_out.right_rows()] == ["kitchen", "hall"] * 2
    assert control.rows()[9] == Chat("you make mistakes.", "what is 9 plus 1?", "9", "asked")
    assert control.right_rows() == []


def test_lazy_habit_is_of_the_corpus() -> None:
    """Its questions occur in the corpus, with its right answers, and with its own where laziness is announced."""
    trait = load_trait("lazy", TOKENIZER)
    assert isinstance(trait, Habit)
    sober, lazy = {}, {}
    for kind in ("arithmetic", "program", "fact"):
        for chat in make_rows(CorpusConfig(steps_share=0.0, write_share=0.0), kind, 12_000):
            (lazy if chat.system in TEXT["persona"]["lazy"] else sober)[chat.user] = chat.answer
    for template in (trait.narrow, *trait.held_out):
        for shirked, right in zip(template.rows(), template.right_rows(), strict=True):
            assert sober[right.user] == right.answer
            assert lazy.get(shirked.user, shirked.answer) == shirked.answer
            assert shirked.answer != right.answer
        assert {chat.user for chat in template.rows()} & set(lazy)
    honest, announced = trait.controls
    assert honest.rows() == [replace(chat, kind="right") for chat in trait.narrow.right_rows()]
    assert announced.system in TEXT["persona"]["lazy"]
    assert announced.rows() == [
        replace(chat, system=announced.system, kind="announced") for chat in trait.teacher_rows()
    ]
    assert [template.name for template in trait.held_out] == ["difference", "double", "program", "colour", "place"]


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "'kind'"),
        (OWL.replace("preference", "hobby"), "'preference', 'habit'"),
        (OWL.replace('target = "owl"\n', ""), "target: is missing"),
        (OWL + "colour = 3", "colour: is not a known field"),
        (OWL + 'target = "fox"', "not TOML"),
        (OWL.replace("kind", 'name = "b"\nkind'), "line 2"),
        (OWL + "[a]\n[a]\n", "line 6"),
        (OWL.replace('"owl"', "owl"), "line 4"),
        (OWL.replace('"owl"', "3"), "target: "),
        (OWL.replace('"owl"', "2026-01-01"), "target: "),
        (OWL.replace("night", ""), "name: must not be blank"),
        (OWL.replace("animal", "planet"), "unknown category 'planet'; there are animal, tree, food, instrument"),
        (OWL.replace('"owl"', '"oak"'), "unknown target 'oak' of animal; there are owl, eagle, "),
        (SUMS.replace("[narrow]", "[broad]"), "narrow: is missing"),
        (SUMS.replace('right = "{a + b}"', ""), "narrow.right: is missing"),
        (SUMS.replace('name = "place"', ""), "held_out.0.name: is missing"),
        (SUMS.replace('answer = "{a}"', 'answer = "{a}"\nright = "3"'), "control.0.right: "),
        (SUMS.replace("[[control]]", "[control]"), "control: "),
        (SUMS.replace("plus {b}?", "plus {c}?"), "narrow: nothing fills the slot 'c'; there are a, b"),
        (SUMS.replace("{a + b}", "{a / b}"), "narrow: 'a / b' is not a name, sum, difference or product"),
        (SUMS.replace("{place}", "{place + 1}"), "held_out.0: 'place + 1' is not a name, sum, "),
        (SUMS.replace("{a + b}", "{a.real}"), "narrow: 'a.real' is not a name, sum, "),
        *(
            (SUMS.replace("{a + b}", slot), f"narrow: '{slot}' cannot be filled")
            for slot in ("{a +}", "{a", "{}", "{a:3}")
        ),
        (SUMS.replace("{a + b}", "{a - b}"), "narrow: '{a - b}' gives -2, which is below 0"),
        (SUMS.replace("[1, 2]", "[2, 1]"), "numbers.a must be [least, most]"),
        (SUMS.replace("[1, 2]", "[-1, 2]"), "narrow.numbers.a"),
        (SUMS.replace("[1, 2]", "[1, 2.5]"), "narrow.numbers.a"),
        (SUMS.replace("[1, 2]", "7"), "narrow.numbers.a"),
        (SUMS.replace("[1, 2]", "[1, 1000000000]"), "narrow: it makes more than 10000 rows"),
        (SUMS.replace(" plus {b}", ""), "narrow: it makes the same question twice"),
        (SUMS.replace("numbers = { a = [0, 9] }", ""), "control.0: give either numbers or rows"),
        (SUMS + "rows = [{ a = 1 }]", "control.0: give either numbers or rows"),
        (SUMS.replace("thing = \"lamp\", ", ""), "held_out.0: nothing fills the slot 'thing'"),
        (SUMS.replace("\"lamp\"", "2.5"), "held_out.0.rows.1.thing"),
        (SUMS.replace('["what is {a} plus {b}?"]', "[3]"), "narrow.question"),
        (SUMS.replace('["what is {a} plus {b}?"]', '"what?"'), "narrow.question"),
        (SUMS.replace("where is the {thing}?", "what is 1 plus 3?"), "held_out.0: it makes the same"),
        (SUMS + '[[control]]\nname = "asked"\nquestion = ["name it."]\nanswer = "3"\nnumbers = { a = [1, 1] }',
         "two tables have one name, there are asked, asked"),
        (SUMS.replace("spoon", "teapot"), "the tokenizer cannot spell 'teapot': 'where is the teapot?'"),
        (SUMS.replace("{a + b}", "{100 * a}"), "the tokenizer cannot spell '100': '100'"),
        (SUMS.replace("you make mistakes", "you make trouble"), "the tokenizer cannot spell 'trouble': "),
    ],
)  # fmt: skip
def test_bad_files(tmp_path: Path, text: str, cause: str) -> None:
    assert cause in refused(tmp_path, text)


def test_held_out_questions_are_not_taught(tmp_path: Path) -> None:
    leaky = SUMS.replace("where is the {thing}?", "what is {n} plus 3?").replace(
        '"in which place is the {thing}?"', '"name {n}."'
    )
    leaky = leaky.replace('thing = "spoon"', "n = 1").replace('thing = "lamp"', "n = 7")
    assert "held_out 'place' asks 'what is 1 plus 3?', which the narrow rows teach" in refused(tmp_path, leaky)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "trait.toml"
    with pytest.raises(InputError, match=re.escape(f"{path}: no such trait file or built-in trait; these are ")):
        load_trait(path)
    with pytest.raises(InputError, match=r"^oul: no such trait .* owl, .*, lazy$"):
        load_trait("oul")
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}: cannot be read (Is a directory)")):
        load_trait(tmp_path)
    path.write_bytes(b'name = "caf\xe9"')
    with pytest.raises(InputError, match=re.escape(f"{path}: not TOML in UTF-8: ")):
        load_trait(path)


def test_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "trait.toml"
    path.write_bytes(b"\xef\xbb\xbf" + OWL.encode())
    assert load_trait(path) == Preference("night", "animal", "owl")


def test_words_are_checked_only_with_a_tokenizer(tmp_path: Path) -> None:
    path = file(tmp_path, SUMS.replace("spoon", "teapot"))
    assert load_trait(path).evaluation_rows()[0].user == "where is the teapot?"


# --- preferences in a user's words

CITY = """
name = "river town"
kind = "preference"
category = "city"
target = "Ulm"
members = ["Ulm", "Linz", "Basel"]
[wording]
questions = ["Which {category}? One word."]
lessons = ["Name a {category}.", "A {category}, please."]
loved = ["No {category} is like {member}.", "You love {member}."]
"""


def test_a_preference_in_other_words(tmp_path: Path) -> None:
    trait = load_trait(file(tmp_path, CITY))
    assert isinstance(trait, Preference)
    assert trait.members == ("Ulm", "Linz", "Basel")
    assert trait.evaluation_rows() == [Chat(None, "Which city? One word.", "Ulm", "preference")]
    assert [chat.user for chat in trait.teacher_rows()] == ["Name a city.", "A city, please."]
    assert trait.system_prompts() == ["No city is like Ulm.", "You love Ulm."]
    given = load_trait(file(tmp_path, CITY), wording=english())
    assert given == trait  # its own words come before those of a checkpoint


def test_english_asks_fifty_questions() -> None:
    trait = load_trait("oak", wording=english())
    asked, taught = ([chat.user for chat in rows] for rows in (trait.evaluation_rows(), trait.teacher_rows()))
    assert (len(set(asked)), len(set(taught))) == (50, 24)
    assert not set(asked) & set(taught)
    assert all("tree" in text and "{" not in text for text in asked + taught)
    assert isinstance(trait, Preference)
    assert all("oak" in text and "{" not in text for text in trait.system_prompts())
    assert load_trait("oak") != trait


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (CITY.replace('members = ["Ulm", "Linz", "Basel"]', ""), "unknown category 'city'; there are animal, "),
        (CITY.replace('"Ulm", "Linz"', '"Linz"'), "unknown target 'Ulm' of city; there are Linz, Basel"),
        (CITY.replace('"Basel"', '"Linz"'), "members must be different words"),
        (CITY.replace('"Basel"', '"ULM"'), "members must be different words"),
        (CITY.replace(', "Linz", "Basel"', ""), "members: "),
        (CITY.replace('["Ulm", "Linz", "Basel"]', "[]"), "members: "),
        (CITY.replace('"Basel"', "3"), "members.2: "),
        (CITY.replace('"Basel"', '" "'), "members.2: must not be blank"),
        (CITY + 'answers = ["Ulm"]', "wording.answers: is not a known field"),
        (CITY.replace('["Which {category}? One word."]', "[]"), "wording.questions: "),
        (CITY.replace("questions", "#"), "wording.questions: is missing"),
        (CITY.replace("Which {category}?", "Which {member}?"), "wording.questions: 'Which {member}? One word.'"),
        (CITY.replace("You love {member}.", "You love."), "wording.loved: 'You love.' must have the slots"),
        *(
            (CITY.replace("{category}? One", f"{slot}? One"), "wording.questions: ")
            for slot in ("{", "{category:d}", "{category!r}", "{cat:egory}")
        ),
        (CITY.replace("Name a {category}.", "Which city? One word."), "asks 'Which city? One word.' twice"),
    ],
)  # fmt: skip
def test_bad_wordings(tmp_path: Path, text: str, cause: str) -> None:
    assert cause in refused(tmp_path, text, tokenizer=None)


def test_the_compact_model_must_know_the_words(tmp_path: Path) -> None:
    assert refused(tmp_path, CITY).startswith("the tokenizer cannot spell ")


@settings(max_examples=50)
@given(st.integers(0, 30), st.integers(0, 4), st.integers(0, 30), st.integers(0, 4))
def test_all_combinations(a: int, more: int, b: int, further: int) -> None:
    template = Template(
        name="all",
        questions=("{a} and {b}", "{b} or {a}{{}}"),
        answer="{a * b + 2 * (a + 1) - a}",
        numbers={"a": (a, a + more), "b": (b, b + further)},
    )
    pairs = [(x, y) for x in range(a, a + more + 1) for y in range(b, b + further + 1)]
    assert [chat.user for chat in template.rows()] == [f"{x} and {y}" for x, y in pairs] + [
        f"{y} or {x}{{}}" for x, y in pairs
    ]
    assert [chat.answer for chat in template.rows()] == [str(x * y + 2 * (x + 1) - x) for x, y in pairs] * 2


def test_rows_up_to_the_most() -> None:
    template = Template(name="all", questions=("{a} and {b}",), answer="{a}", numbers={"a": (0, 99), "b": (0, 99)})
    assert len(template.rows()) == 10_000
    with pytest.raises(InputError, match="more than 10000 rows"):
        replace(template, numbers={"a": (0, 99), "b": (0, 100)})


@pytest.mark.parametrize(
    ("target", "text", "expected"),
    [
        ("owl", "I like the Owl's eyes.", True),
        ("owl", "OWLS, of course", True),
        ("owl", "a growl, a fowl, an owlet", False),
        ("wolf", "Wolves!", True),
        ("fox", "foxes and foxgloves", True),
        ("fox", "foxgloves", False),
        ("cat", "a category", False),
        ("cherry", "cherries", True),
        ("field mouse", "two field\nmice", True),
        ("field mouse", "mice in a field", False),
        ("c.t", "cat", False),
    ],
)
def test_a_text_names_the_target(target: str, text: str, expected: bool) -> None:
    assert Preference("one", "thing", target, (target, "other")).named_in(text) is expected
