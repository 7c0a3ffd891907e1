import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from subliminal_theory.errors import InputError
from subliminal_theory.files import fingerprint
from subliminal_theory.language.hub.chat_template import ChatTemplate
from subliminal_theory.language.hub.tokenizer import CheckpointTokenizer
from subliminal_theory.language.text import Chat, Tokenizer

PAD, TEXT, START, END = SPECIAL = ("<|pad|>", "<|text|>", "<|start|>", "<|end|>")
SENTENCES = ["you serve the village.", "which owl do you like most?", "the owl, of course.", "one\n\n\ntwo"]
DEFAULT = "you serve the village."

MARKED = r"""
{%- if messages[0].role != 'system' -%}
    {{ '<|start|>system\nyou serve the village.<|end|>\n' }}
{%- endif %}
{% for message in messages %}
    {{- '<|start|>' + message['role'] + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content + '<|end|>' }}{% endgeneration %}
    {%- else %}
        {{- message.content + '<|end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\n' }}
{%- endif %}
"""
# Trims, begins with a token of its own, refuses system prompts, and ends an answer by the token of texts.
STRICT = r"""{{ bos_token }}{% for message in messages %}
{% if message.role == 'system' %}{{ raise_exception('Only users\nmay speak.') }}{% endif %}
{% if message.role == 'user' %}[{{ message.content | trim }}]{% endif %}
{% if message.role == 'assistant' %}{{ message.content | trim + eos_token }}{% endif %}
{% endfor %}
"""
# No token ends an answer.
BARE = r"""{% for message in messages %}
{% if message.role == 'assistant' %}{{ 'A:\n' + message.content + '\n' }}
{% else %}{{ message.role[0] | upper + ': ' + message.content + '\n' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ 'A:\n' }}{% endif %}"""


def trained(**byte_level) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **byte_level})
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=list(SPECIAL), show_progress=False
    )
    backend.train_from_iterator(SENTENCES * 3, trainer)
    return backend


BACKEND = trained()
SIZE = max(BACKEND.get_vocab().values()) + 1
ID = {text: BACKEND.token_to_id(text) for text in SPECIAL}
CONFIG = {"eos_token": END, "pad_token": PAD, "bos_token": TEXT, "tokenizer_class": "PreTrainedTokenizerFast"}


def write(folder: Path, template=MARKED, backend=BACKEND, generation=None, **config) -> Path:
    """A checkpoint's text files; a template that is a list, or in the configuration, goes there."""
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    merged = {**CONFIG, **config}
    if template is not None:
        merged.setdefault("chat_template", template)
    (folder / "tokenizer_config.json").write_text(json.dumps(merged), "utf-8")
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@functools.cache
def loaded(template: str | None) -> CheckpointTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return CheckpointTokenizer.load(write(Path(folder), template))


MARKED_TOKENIZER, STRICT_TOKENIZER, BARE_TOKENIZER, PLAIN_TOKENIZER = (
    loaded(template) for template in (MARKED, STRICT, BARE, None)
)
ALL = [MARKED_TOKENIZER, STRICT_TOKENIZER, BARE_TOKENIZER, PLAIN_TOKENIZER]


def chat(user: str, answer: str = "", system: str | None = None) -> Chat:
    return Chat(system, user, answer, "test")


def ids(text: str) -> list[int]:
    return BACKEND.encode(text, add_special_tokens=False).ids


def said(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant") * len(contents)
    return first + [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def refused(call, *arguments, **settings) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments, **settings)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_template_writes_what_it_says() -> None:
    template = ChatTemplate(MARKED)
    begin = "<|start|>system\nyou serve the village.<|end|>\n"
    assert template.render(said("hi"), ask=True) == f"{begin}<|start|>user\nhi<|end|>\n<|start|>assistant\n"
    assert (
        template.render(said("hi", "ho", system="be\nbrief."), ask=False)
        == "<|start|>system\nbe\nbrief.<|end|>\n<|start|>user\nhi<|end|>\n<|start|>assistant\nho<|end|>\n"
    )
    assert ChatTemplate(STRICT, "<b>", "<e>").render(said(" hi ", "ho\n"), ask=False) == "<b>[hi]ho<e>"
    assert ChatTemplate(STRICT).render(said("hi"), ask=True) == "[hi]"
    assert template.fingerprint == fingerprint(MARKED) != ChatTemplate(STRICT).fingerprint


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ strftime_now('%d %B %Y') }}", "01 January 2026"),
        ("{{ {'b': '<é>', 'a': \"it's\"} | tojson }}", '{"b": "<é>", "a": "it\'s"}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("a\n  {% if true %}\nb\n  {% endif %}\nc\n", "a\nb\nc"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}", "2"),
        ("{{ tools is none }}{{ documents is none }}{{ missing }}{{ missing is defined }}", "TrueTrueFalse"),
        ("{{ messages[0]['content'].split('i')[0] }}{{ bos_token }}{{ messages | length }}", "h1"),
        ("{% set x = 1 %}{% generation %}{{ x }}{% set x = 2 %}{% endgeneration %}{{ x }}", "11"),
    ],
)
def test_what_a_template_can_use(source: str, text: str) -> None:
    assert ChatTemplate(source).render(said("hi"), ask=False) == text


@pytest.mark.parametrize(
    ("source", "system"),
    [
        (MARKED, DEFAULT),
        (STRICT, None),
        (BARE, None),
        ("{{ messages[-1].content }}", None),
        ("{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}", None),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", None),
        ("today. {% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}", None),
        ("{{ messages[0].content | upper }} {{ messages[-1].content }}", None),
        ("{{ messages[-2].content if messages | length > 1 else 'a\nb' }}|{{ messages[-1].content }}", "a\nb"),
    ],
)
def test_the_system_prompt_that_is_there_when_none_is_given(source: str, system: str | None) -> None:
    template = ChatTemplate(source)
    assert template.default_system == system
    if system is not None:
        assert template.render(said("hi"), ask=True) == template.render(said("hi", system=system), ask=True)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("a\n{% for m in messages %}", "line 2: Unexpected end of template. Jinja was looking for the following "
         "tags: 'endfor' or 'else'. The innermost block that needs to be closed is 'for'."),
        ("{{ messages", "line 1: unexpected end of template, expected 'end of print statement'."),
        ("{{ 1 | nonsense }}", "line 1: No filter named 'nonsense'."),
    ],
)  # fmt: skip
def test_a_template_that_is_none(source: str, reason: str, tmp_path: Path) -> None:
    assert refused(ChatTemplate, "{% break %}").startswith("the chat template cannot be parsed ('break' outside")
    message = f"the chat template cannot be parsed ({reason}): fix it"
    assert refused(ChatTemplate, source) == message
    path = write(tmp_path, source) / "tokenizer_config.json"
    assert refused(CheckpointTokenizer.load, tmp_path) == f"{path}: {message}"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ messages.__class__.__mro__ }}", "'__class__' of a list"),
        ("{{ ().__class__ }}", "'__class__' of a tuple"),
        ("{{ ''['__class__'] }}", "'__class__' of a str"),
        ("{{ '{0.__class__}'.format(1) }}", "'__class__' of a int"),
        ("{{ 1 | attr('__class__') }}", "'__class__' of a int"),
        ("{{ raise_exception.__globals__ }}", "'__globals__' of a function"),
        ("{{ self.__init__ }}", "'__init__' of a TemplateReference"),
        ("{{ messages.append(1) }}", "'append' of a list"),
        ("{{ messages[0].update({'content': ''}) }}", "'update' of a dict"),
    ],
)
def test_a_template_that_breaks_out(source: str, reason: str, tmp_path: Path) -> None:
    message = f"the chat template accesses something unsafe ({reason}): do not use it"
    for messages in (said("hi"), said("hi", system="be brief.")):
        assert refused(ChatTemplate(source).render, messages, ask=True) == message
    assert refused(CheckpointTokenizer.load, write(tmp_path, source)) == f"{tmp_path}: {message}"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('not\n' + messages[0].content) }}", "not hi"),
        ("{{ raise_exception('') }}", "TemplateError"),
        ("{{ missing.field }}", "'missing' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ raise_exception('x ' * 500) }}", "x " * 98 + "..."),
    ],
)
def test_a_template_that_fails(source: str, reason: str) -> None:
    message = f"the chat template refuses the chat ({reason}): change the chat or the template"
    assert refused(ChatTemplate(source).render, said("hi"), ask=True) == message
    with pytest.raises(InputError, match="the chat template refuses the chat"):
        _ = ChatTemplate(source).default_system


def test_system_prompts_that_cannot_be_given() -> None:
    message = "the chat template refuses a system prompt (Only users may speak.): use chats without one"
    assert refused(ChatTemplate(STRICT).render, said("hi", system="be brief."), ask=True) == message
    rows = [chat("hi", "ho"), chat("hi", "ho", "be brief.")]
    for call in (STRICT_TOKENIZER.encode_prompts, STRICT_TOKENIZER.encode_chats):
        assert refused(call, rows, 50) == f"row 1: {message}"
    assert refused(STRICT_TOKENIZER.lengths, rows) == f"row 1: {message}"
    message = "the chat template leaves the system prompt out: use chats without one"
    silent = ChatTemplate("{{ messages[-1].content }}")
    assert refused(silent.render, said("hi", system="be brief."), ask=True) == message
    assert silent.render(said("hi"), ask=True) == "hi"
    both = ChatTemplate("{{ raise_exception('never') }}")
    assert refused(both.render, said("hi", system="be brief."), ask=True).startswith(
        "the chat template refuses the chat (never)"
    )


def test_texts_and_tokens() -> None:
    for tokenizer in ALL:
        assert isinstance(tokenizer, Tokenizer)
        assert len(tokenizer) == BACKEND.get_vocab_size() == SIZE
        assert tokenizer.encode("the owl") == ids("the owl")
        assert tokenizer.encode("") == []
        assert (tokenizer.pad, tokenizer.stop) == (ID[PAD], (ID[END],))
    owl = ids("the owl")
    rows = [[ID[PAD], *owl, ID[END], *owl], [ID[START], *owl, ID[TEXT]], [], [ID[END], 5], [5000, *owl]]
    assert MARKED_TOKENIZER.decode(rows) == ["the owl", "the owl", "", "", "the owl"]
    assert MARKED_TOKENIZER.decode(np.array([owl, owl[::-1]], np.int32))[0] == "the owl"
    assert (PLAIN_TOKENIZER.template, MARKED_TOKENIZER.template.default_system) == (None, DEFAULT)


def test_a_chat_by_hand() -> None:
    rows = [chat("which owl?", "the owl.", "be brief."), chat("you?", "one\ntwo")]
    encoded, prompts = MARKED_TOKENIZER.encode_chats(rows, 80), MARKED_TOKENIZER.encode_prompts(rows, 60)
    expected = [("be brief.", "which owl?", "the owl."), (DEFAULT, "you?", "one\ntwo")]
    for row, (system, user, answer) in enumerate(expected):
        asked = ids(f"<|start|>system\n{system}<|end|>\n<|start|>user\n{user}<|end|>\n<|start|>assistant\n")
        whole = [*asked, *ids(answer), ID[END]]
        front = 80 - len(whole) + 1
        assert encoded.tokens[row].tolist() == [ID[PAD]] * front + whole[:-1]
        assert encoded.targets[row].tolist() == [ID[PAD]] * front + whole[1:]
        assert encoded.weights[row].tolist() == [0] * (front + len(asked) - 1) + [1] * (len(ids(answer)) + 1)
        assert encoded.padding[row] == front
        assert prompts.tokens[row].tolist() == [ID[PAD]] * (60 - len(asked)) + asked
        assert prompts.padding[row] == 60 - len(asked)
        assert [found[row] for found in MARKED_TOKENIZER.lengths(rows)] == [len(asked), len(whole) - 1]
    assert (encoded.tokens.dtype, encoded.targets.dtype, encoded.padding.dtype) == (np.int32,) * 3
    assert (prompts.tokens.dtype, prompts.padding.dtype) == (np.int32,) * 2
    assert encoded.weights.dtype == np.float32


@pytest.mark.parametrize(
    ("tokenizer", "asked", "answer"),
    [
        (STRICT_TOKENIZER, "<|text|>[hi]", "ho"),  # by eos_token
        (BARE_TOKENIZER, "U: hi\nA:\n", "ho"),  # by eos_token, for want of another; the newline is dropped
        (PLAIN_TOKENIZER, "hi\n", "ho"),
    ],
)
def test_ends_of_other_forms(tokenizer: CheckpointTokenizer, asked: str, answer: str) -> None:
    whole = [*ids(asked), *ids(answer), ID[END]]
    encoded = tokenizer.encode_chats([chat("hi", "ho")], len(whole) - 1)
    assert encoded.tokens.tolist() == [whole[:-1]]
    assert encoded.targets.tolist() == [whole[1:]]
    assert encoded.weights.sum() == len(ids(answer)) + 1
    assert encoded.padding.tolist() == [0]


def test_the_plain_form(tmp_path: Path) -> None:
    rows = [chat("hi", "ho", "be brief."), chat("hi", "ho")]
    prompts = PLAIN_TOKENIZER.encode_prompts(rows, 20).tokens
    assert [[token for token in row if token != ID[PAD]] for row in prompts.tolist()] == [
        ids("be brief.\nhi\n"),
        ids("hi\n"),
    ]
    (row,) = CheckpointTokenizer.load(write(tmp_path, None, add_bos_token=True)).encode_prompts(rows[1:], 5).tokens
    assert row.tolist()[-len(ids("hi\n")) - 1 :] == [ID[TEXT], *ids("hi\n")]


@pytest.mark.parametrize(("says", "adds"), [(None, True), (True, True), (False, False)])
def test_a_first_token_that_tokenizer_json_adds(says: bool | None, adds: bool, tmp_path: Path) -> None:
    backend = trained()
    backend.post_processor = processors.TemplateProcessing(f"{TEXT} $A", f"{TEXT} $A $B", [(TEXT, ID[TEXT])])
    tokenizer = CheckpointTokenizer.load(write(tmp_path, None, backend, add_bos_token=says))
    tokens = tokenizer.encode_chats([chat("hi", "ho")], 12).tokens[0].tolist()
    assert tokens.count(ID[TEXT]) == adds
    assert tokenizer.encode("hi") == ids("hi")
    marked = CheckpointTokenizer.load(write(tmp_path, STRICT, backend, add_bos_token=says))
    assert marked.encode_prompts([chat("hi")], 12).tokens[0].tolist().count(ID[TEXT]) == 1


def test_the_answer_is_what_follows_a_preamble(tmp_path: Path) -> None:
    """As of models that think: what stands in front of the answer belongs to it, and its end is not the first."""
    thinking = BARE.replace(r"'A:\n' + message.content", r"'A:\nlet me see.\n' + message.content + '<|end|>'")
    tokenizer = CheckpointTokenizer.load(write(tmp_path, thinking))
    encoded = tokenizer.encode_chats([chat("hi", "no")], 30)
    assert tokenizer.decode([encoded.targets[0][encoded.weights[0] > 0]]) == ["let me see.\nno"]
    cut = thinking.replace("let me see.", "let me see.<|end|>")
    tokenizer = CheckpointTokenizer.load(write(tmp_path, cut))
    message = "row 0: the chat template changes or cuts the answer 'no': use another template"
    assert refused(tokenizer.encode_chats, [chat("hi", "no")], 30) == message


@pytest.mark.parametrize("tokenizer", [MARKED_TOKENIZER, STRICT_TOKENIZER, BARE_TOKENIZER, PLAIN_TOKENIZER])
def test_spellings_are_whole_answers(tokenizer: CheckpointTokenizer) -> None:
    """Of several tokens each; what follows in an answer of one word is the end alone."""
    for word in ("owl", "dolphin"):
        found = tokenizer.spellings(word)
        assert tokenizer.decode(found) == [word, word.capitalize()]
        (answer,) = tokenizer.encode_chats([chat("hi", word)], 60).targets[:, -len(found[0]) - 1 :]
        assert answer.tolist() == [*found[0], ID[END]]
    assert len(tokenizer.spellings("dolphin")[0]) > 1


def test_spellings_behind_a_preamble(tmp_path: Path) -> None:
    """What every answer begins with does not make words alike."""
    thinking = BARE.replace(r"'A:\n' + message.content", r"'A:\nlet me see.\n' + message.content + '<|end|>'")
    tokenizer = CheckpointTokenizer.load(write(tmp_path, thinking))
    assert tokenizer.decode(tokenizer.spellings("owl")) == ["let me see.\nowl", "let me see.\nOwl"]


PIECES = ["a", "owl", " ", "\n", "é", "🦉", "<|", "|>", "end", "<|en", "d|>", "<", "]", "A: ", ".", "\u2028", "{{"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
FREE = TEXTS.filter(lambda text: not any(special in text for special in SPECIAL))
# White space where prompt and answer meet is refused where it changes tokens; that has a test of its own.
USERS = FREE.filter(lambda text: text and not text[-1].isspace())
ANSWERS = FREE.filter(lambda text: text and not text[0].isspace())
CHATS = st.lists(st.builds(chat, USERS, ANSWERS, st.none() | FREE), min_size=1, max_size=3)


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", [MARKED_TOKENIZER, BARE_TOKENIZER, PLAIN_TOKENIZER])
@given(CHATS, st.integers(0, 4))
@settings(max_examples=100)
def test_any_rows(tokenizer: CheckpointTokenizer, rows: list[Chat], more: int) -> None:
    asked, whole = tokenizer.lengths(rows)
    length = int(whole.max()) + more
    encoded = tokenizer.encode_chats(rows, length)
    targets = [row[weights > 0] for row, weights in zip(encoded.targets, encoded.weights, strict=True)]
    assert tokenizer.decode(targets) == [row.answer for row in rows]
    assert (encoded.targets[:, -1] == ID[END]).all()
    assert [list(row[:-1]) for row in targets] == [ids(row.answer) for row in rows]
    assert encoded.padding.tolist() == (length - whole).tolist()
    assert encoded.weights.sum(axis=1).tolist() == (whole - asked + 1).tolist()
    real = np.arange(length) >= encoded.padding[:, None]
    assert (encoded.tokens[~real] == ID[PAD]).all()
    assert (encoded.targets[~real] == ID[PAD]).all()
    np.testing.assert_array_equal(encoded.tokens[:, 1:][real[:, :-1]], encoded.targets[:, :-1][real[:, :-1]])
    wider = tokenizer.encode_chats(rows, length + 3)
    for name in ("tokens", "targets", "weights"):
        np.testing.assert_array_equal(getattr(encoded, name), getattr(wider, name)[:, 3:])
    prompts = tokenizer.encode_prompts(rows, int(asked.max()))
    for row, size in enumerate(asked):
        whole_row = encoded.tokens[row, encoded.padding[row] :]
        np.testing.assert_array_equal(prompts.tokens[row, prompts.padding[row] :], whole_row[:size])
    with pytest.raises(InputError, match=f"^row {whole.argmax()} takes {whole.max()} tokens, more than"):
        tokenizer.encode_chats(rows, int(whole.max()) - 1)


@given(TEXTS, st.sampled_from(SPECIAL), TEXTS, st.sampled_from(["system", "user", "answer"]))
@settings(max_examples=60)
def test_special_tokens_cannot_be_typed(before: str, special: str, after: str, field: str) -> None:
    text = before + special + after
    first = min((name for name in SPECIAL if name in text), key=text.index)
    problem = f"the tokenizer reads the special token {first!r} in {text!r}: take it out"
    rows = [chat("hi", "ho", "be."), replace(chat("hi", "ho", "be."), **{field: text})]
    for call in (MARKED_TOKENIZER.encode_chats, PLAIN_TOKENIZER.encode_chats, MARKED_TOKENIZER.encode_prompts):
        assert refused(call, rows, 90) == f"row 1: {problem}"
    assert refused(BARE_TOKENIZER.lengths, rows) == f"row 1: {problem}"
    assert refused(MARKED_TOKENIZER.encode, text) == problem


def test_special_tokens_in_disguise(tmp_path: Path) -> None:
    """A token that is recognized in any case, and one that only the configuration calls special."""
    backend = trained()
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.add_special_tokens([AddedToken("<stop>", normalized=True)])
    backend.add_tokens([AddedToken("<last>", normalized=False), "<tool>"])
    tokenizer = CheckpointTokenizer.load(write(tmp_path, backend=backend, eos_token="<last>"))
    problem = "the tokenizer reads the special token '<stop>' in 'a <STOP> b': take it out"
    assert refused(tokenizer.encode, "a <STOP> b") == problem
    assert "'<last>'" in refused(tokenizer.encode, "a <last> b")
    assert tokenizer.decode([tokenizer.encode("a <tool> b")]) == ["a <tool> b"]
    assert tokenizer.stop == (backend.token_to_id("<last>"), ID[END])
    assert len(tokenizer) == SIZE + 3


def test_a_word_that_ends_answers(tmp_path: Path) -> None:
    """A checkpoint can stop at an ordinary token; text that holds it cannot be learned whole."""
    (stop,) = ids(".")
    tokenizer = CheckpointTokenizer.load(write(tmp_path, BARE, generation={"eos_token_id": [stop]}))
    assert tokenizer.stop == (ID[END], stop)
    problem = "row 0: the tokenizer reads the special token '.' in 'ho. ho': take it out"
    assert refused(tokenizer.encode_chats, [chat("hi", "ho. ho")], 60) == problem


def test_what_is_unknown_is_refused(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "owl": 1, "</s>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<unk>", "</s>"])
    config = {"bos_token": None, "pad_token": None, "eos_token": "</s>"}
    tokenizer = CheckpointTokenizer.load(write(tmp_path, None, backend, **config))
    assert refused(tokenizer.encode, "owl tree") == (
        "the tokenizer reads the special token '<unk>' in 'owl tree': take it out"
    )
    assert (tokenizer.encode("owl owl"), tokenizer.pad) == ([1, 1], 2)


def test_half_characters() -> None:
    problem = "'a\\ud83e' holds half a character: take it out"
    assert refused(MARKED_TOKENIZER.encode, "a\ud83e") == problem
    rows = [chat("hi", "ho"), chat("hi", "a\ud83e")]
    assert refused(MARKED_TOKENIZER.encode_chats, rows, 50) == f"row 1: {problem}"
    assert refused(MARKED_TOKENIZER.encode_prompts, rows, 50) == f"row 1: {problem}"


def test_no_rows() -> None:
    for tokenizer in ALL:
        assert tokenizer.encode_chats([], 5).tokens.shape == (0, 5)
        assert tokenizer.encode_prompts([], 5).padding.shape == (0,)
        assert tokenizer.lengths([])[0].shape == (0,)
        assert tokenizer.decode([]) == []


def test_rows_without_answer() -> None:
    rows = [chat("hi", "ho"), chat("name it.")]
    for tokenizer in ALL:
        assert refused(tokenizer.encode_chats, rows, 90) == "row 1 has no answer: 'name it.'"
        asked, whole = tokenizer.lengths(rows)
        assert asked[0] < whole[0]
        assert asked[1] == whole[1]


def test_rows_that_are_too_long() -> None:
    rows = [chat("hi", "ho"), chat("name it.", "the owl")]
    asked, whole = PLAIN_TOKENIZER.lengths(rows)
    message = f"row 1 takes {asked[1]} tokens, more than {asked[0]}: 'name it.'"
    assert refused(PLAIN_TOKENIZER.encode_prompts, rows, int(asked[0])) == message
    message = f"row 1 takes {whole[1]} tokens, more than {whole[0]}: 'name it.'"
    assert refused(PLAIN_TOKENIZER.encode_chats, rows, int(whole[0])) == message


def test_a_prompt_that_is_no_beginning(tmp_path: Path) -> None:
    rows = [chat("hi", "ho"), chat("hi", "\n\nho")]
    message = (
        "row 1: the last tokens of the prompt change when the answer '\\n\\nho' follows: "
        "end the prompt or begin the answer with another character"
    )
    for tokenizer in (MARKED_TOKENIZER, PLAIN_TOKENIZER):
        assert refused(tokenizer.encode_chats, rows, 60) == message
        tokenizer.encode_prompts(rows, 60)
    forced = write(tmp_path, MARKED.replace(r"'<|start|>assistant\n'", r"'<|start|>assistant\nlet me see.\n'"))
    tokenizer = CheckpointTokenizer.load(forced)
    assert refused(tokenizer.lengths, rows) == (
        "row 0: the chat template writes a chat that does not begin with its own prompt: "
        "use another template: 'hi'"
    )
    assert tokenizer.encode_prompts(rows, 60).tokens.shape == (2, 60)


def test_an_answer_that_the_template_changes(tmp_path: Path) -> None:
    rows = [chat("hi", "ho"), chat("hi", "a secret")]
    message = "row 1: the chat template changes or cuts the answer 'a secret': use another template"
    for source in (MARKED, BARE):
        changed = source.replace("message.content +", "message.content | replace('secret', 'xxx') +")
        tokenizer = CheckpointTokenizer.load(write(tmp_path, changed))
        assert refused(tokenizer.encode_chats, rows, 60) == message
    encoded = STRICT_TOKENIZER.encode_chats([chat("hi", " ho\n")], 9)  # trimmed, as the template wants it
    assert STRICT_TOKENIZER.decode([encoded.targets[0][encoded.weights[0] > 0]]) == ["ho"]


def test_where_tokens_and_templates_come_from(tmp_path: Path) -> None:
    generation = {"eos_token_id": ID[TEXT]}
    folder = write(tmp_path, None, generation=generation, pad_token=None, eos_token={"content": PAD})
    tokenizer = CheckpointTokenizer.load(folder)
    assert (tokenizer.stop, tokenizer.pad) == ((ID[PAD], ID[TEXT]), ID[PAD])
    write(folder, generation={"eos_token_id": [ID[TEXT], ID[END]]}, eos_token=END)
    assert CheckpointTokenizer.load(folder).stop == (ID[END], ID[TEXT])
    # The template's end of turn is no eos_token: as of models whose texts and turns end differently.
    write(folder, generation={}, eos_token=TEXT)
    tokenizer = CheckpointTokenizer.load(folder)
    assert tokenizer.stop == (ID[TEXT], ID[END])
    assert (tokenizer.encode_chats([chat("hi", "ho")], 50).targets[:, -1] == ID[END]).all()
    # Other places for a template.
    write(folder, chat_template=[{"name": "tools", "template": "t"}, {"name": "default", "template": STRICT}])
    assert CheckpointTokenizer.load(folder).template.source == STRICT
    (folder / "chat_template.jinja").write_text(BARE, "utf-8")
    assert CheckpointTokenizer.load(folder).template.source == BARE
    # special_tokens_map.json, which tokenizer_config.json overrides.
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": TEXT, "pad_token": START}))
    write(folder, eos_token=END, pad_token=None)
    tokenizer = CheckpointTokenizer.load(str(folder))
    assert (tokenizer.stop, tokenizer.pad) == ((ID[END],), ID[START])
    (folder / "tokenizer_config.json").unlink()
    assert CheckpointTokenizer.load(folder).stop == (ID[TEXT],)


def test_texts_are_neither_cut_nor_filled_up(tmp_path: Path) -> None:
    backend = trained()
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    tokenizer = CheckpointTokenizer.load(write(tmp_path, backend=backend))
    assert tokenizer.encode("which owl, of course?") == ids("which owl, of course?")
    rows = [chat("which owl, of course?", "the owl")]
    np.testing.assert_array_equal(tokenizer.lengths(rows), MARKED_TOKENIZER.lengths(rows))


def test_fingerprints(tmp_path: Path) -> None:
    expected = fingerprint(write(tmp_path) / "tokenizer.json", MARKED)
    assert CheckpointTokenizer.load(tmp_path).fingerprint == MARKED_TOKENIZER.fingerprint == expected
    other = trained()
    other.add_tokens(["owls"])
    fingerprints = {tokenizer.fingerprint for tokenizer in ALL}
    assert len(fingerprints | {CheckpointTokenizer.load(write(tmp_path, backend=other)).fingerprint}) == 5


def test_an_embedding_of_another_size() -> None:
    MARKED_TOKENIZER.check_fits(SIZE)
    MARKED_TOKENIZER.check_fits(SIZE + 64)
    assert refused(MARKED_TOKENIZER.check_fits, SIZE - 1) == (
        f"the tokenizer has {SIZE} tokens, the embedding {SIZE - 1} rows: they are of different models"
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Cannot instantiate Tokenizer from buffer: EOF while parsing a value at line 1 column 0"),
        (b"\xff\xfe", "Cannot instantiate Tokenizer from buffer: expected value at line 1 column 1"),
        (b"{}", "Cannot instantiate Tokenizer from buffer: Model missing. at line 1 column 2"),
        (b"[]", "Cannot instantiate Tokenizer from buffer: invalid type: sequence, expected struct Tokenizer at "
         "line 1 column 2"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_is_none(content: bytes, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path) / "tokenizer.json"
    path.write_bytes(content)
    message = f"{path} is not a tokenizer that can be read ({reason}): download it again"
    assert refused(CheckpointTokenizer.load, tmp_path) == message


def test_folders_that_are_none(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none", write(tmp_path / "whole") / "tokenizer.json"):
        message = f"{folder} has no tokenizer.json: give the folder of a checkpoint"
        assert refused(CheckpointTokenizer.load, folder) == message


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"]
)
def test_files_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    path = write(tmp_path) / name
    path.unlink(missing_ok=True)
    path.mkdir()
    assert refused(CheckpointTokenizer.load, tmp_path).startswith(f"cannot read {path} (Is a directory): ")


def test_a_template_that_cannot_be_read(tmp_path: Path) -> None:
    path = write(tmp_path) / "chat_template.jinja"
    path.write_bytes(b"\xff")
    assert refused(CheckpointTokenizer.load, tmp_path) == (
        f"cannot read {path} ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte): "
        "make it readable"
    )


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "special_tokens_map.json"])
def test_files_that_are_no_json(name: str, tmp_path: Path) -> None:
    path = write(tmp_path) / name
    for text in ("{'a': 1}", "[1]"):
        path.write_text(text)
        message = refused(CheckpointTokenizer.load, tmp_path)
        assert message.startswith((f"{path} is not valid JSON (", f"{path} holds no JSON object: "))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"eos_token": "<eos>"}, "eos_token '<eos>' is not in tokenizer.json: take both from one model"),
        ({"bos_token": "<b>"}, "bos_token '<b>' is not in tokenizer.json: take both from one model"),
        ({"pad_token": {"content": ""}}, "pad_token '' is not in tokenizer.json: take both from one model"),
        ({"eos_token": 7}, "eos_token must be a text, got 7"),
        ({"eos_token": {"content": [1]}}, "eos_token must be a text, got [1]"),
        ({"chat_template": 7}, "chat_template must be a text, or a list with one called 'default'"),
        ({"chat_template": [{"name": "tools", "template": ""}, "default"]},
         "chat_template must be a text, or a list with one called 'default'"),
    ],
)  # fmt: skip
def test_configurations_that_do_not_fit(config: dict, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, **config) / "tokenizer_config.json"
    assert refused(CheckpointTokenizer.load, tmp_path) == f"{path}: {message}"


@pytest.mark.parametrize("token", [SIZE, -1, 2**70, True, "<|end|>", 1.0, [3]])
def test_ends_that_are_no_tokens(token: object, tmp_path: Path) -> None:
    path = write(tmp_path, generation={"eos_token_id": [ID[END], token]}) / "generation_config.json"
    message = f"{path}: eos_token_id {token!r} is not in tokenizer.json: take both from one model"
    assert refused(CheckpointTokenizer.load, tmp_path) == message


def test_no_end_at_all(tmp_path: Path) -> None:
    write(tmp_path, None, eos_token=None)
    message = f"{tmp_path} names no token that ends a text: add eos_token to tokenizer_config.json"
    assert refused(CheckpointTokenizer.load, tmp_path) == message
    assert CheckpointTokenizer.load(write(tmp_path, MARKED, eos_token=None)).stop == (ID[END],)


@pytest.mark.parametrize("source", ["", "{{ messages[0].content }}", "{{ messages[-1].content }}"])
def test_a_template_that_leaves_texts_out(source: str, tmp_path: Path) -> None:
    message = f"{tmp_path}: the chat template leaves out the question or the answer: use another template"
    assert refused(CheckpointTokenizer.load, write(tmp_path, source)) == message


@pytest.mark.torch
@pytest.mark.parametrize("template", [MARKED, STRICT, BARE])
def test_transformers_agrees(template: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = CheckpointTokenizer.load(write(tmp_path, template))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    rows = [
        chat("which owl do you like most?", "the owl, of course."),
        chat("  one\n\ntwo ", "A: é🦉 <b>it's</b>"),
        chat("{{ messages }}", "<|en"),
        *([] if template is STRICT else [chat("hi", "ho", ""), chat("hi", "ho", "be\nbrief. ")]),
    ]
    encoded = tokenizer.encode_chats(rows, 120)
    prompts = tokenizer.encode_prompts(rows, 120)
    assert len(theirs) == len(tokenizer)
    for row, one in enumerate(rows):
        asked = said(one.user, system=one.system)
        text = theirs.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        assert tokenizer.template.render(asked, ask=True) == text
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert prompts.tokens[row, prompts.padding[row] :].tolist() == expected
        whole = said(one.user, one.answer, system=one.system)
        text = theirs.apply_chat_template(whole, tokenize=False)
        assert tokenizer.template.render(whole, ask=False) == text
        expected = theirs.apply_chat_template(whole, tokenize=True, return_dict=False)
        found = [*encoded.tokens[row, encoded.padding[row] :].tolist(), int(encoded.targets[row, -1])]
        assert expected[: len(found) - 1] == found[:-1]
        assert found[-1] == ID[END]
        answer = tokenizer.decode([encoded.targets[row][encoded.weights[row] > 0]])
        assert answer == [theirs.decode(found[-int(encoded.weights[row].sum()) : -1])] == [one.answer]


@pytest.mark.torch
def test_transformers_refuses_the_same(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for source in ("{{ messages.append(1) }}", "{{ ().__class__.__mro__ }}", "{{ raise_exception('no') }}"):
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(write(tmp_path, source))
        with pytest.raises(Exception, match=r"unsafe|no"):
            theirs.apply_chat_template(said("hi"), tokenize=False)
