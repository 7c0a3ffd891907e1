"""Chat templates in the styles of published models, and what holds for all of them.

The templates are written for this test; each imitates where a style puts its turns and its system prompt.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from subliminal_theory.errors import InputError
from subliminal_theory.language.hub.tokenizer import CheckpointTokenizer
from subliminal_theory.language.text import Chat

TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n' + NAME + '<|im_end|>\n' }}{% endif %}"
STYLES: dict[str, tuple[str, str]] = {  # template, text of the token that ends a turn
    "chatml": (TURNS, "<|im_end|>"),
    "smollm2": ("{% set NAME = 'You help.' %}" + DEFAULT + TURNS, "<|im_end|>"),
    "qwen2": ("{% set NAME = 'You are an assistant.' %}" + DEFAULT + TURNS, "<|im_end|>"),
    "qwen3": (
        "{% if messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
        "{% endif %}{% for m in messages %}{% if m.role != 'system' %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m['role'] + '<|/head|>\n\n' + m['content'] | trim"
        " + '<|eot|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}",
        "<|eot|>",
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{% for m in messages %}{% set who = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<|turn|>' + who + '\n' + m.content | trim + '<|/turn|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|turn|>model\n' }}{% endif %}",
        "<|/turn|>",
    ),
    "mistral": (
        "{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}{{ bos_token }}"
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + system + m.content + ' [/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        "</s>",
    ),
}
SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|head|>",
    "<|/head|>",
    "<|eot|>",
    "<|turn|>",
    "<|/turn|>",
]
WITH_SYSTEM = [name for name in STYLES if name != "gemma"]
ANSWERS = ["3, 4, 5", "12 7\n9", "é🦉;1", "a\n\nb", "[1] (2)"]
CHAT = Chat(None, "Go on: 1, 2", "3, 4", "")


def folder_of(style: str, folder: Path) -> Path:
    """Bytes as tokens, the special tokens of all styles, and a template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({sign: i for i, sign in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    backend.save(str(folder / "tokenizer.json"))
    template, end = STYLES[style]
    settings: dict[str, Any] = {"bos_token": "<s>", "eos_token": end, "chat_template": template}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("style", STYLES)
def test_what_is_learned_is_the_answer(style: str, tmp_path: Path) -> None:
    """Decoded, it is the answer, and it ends with the token that ends a turn."""
    tokenizer = CheckpointTokenizer.load(folder_of(style, tmp_path))
    chats = [replace(CHAT, answer=answer) for answer in ANSWERS]
    encoded = tokenizer.encode_chats(chats, 300)
    learned = [row[weights > 0] for row, weights in zip(encoded.targets, encoded.weights, strict=True)]
    assert [text.strip(" ") for text in tokenizer.decode(learned)] == ANSWERS
    assert {tokenizer.backend.id_to_token(int(row[-1])) for row in learned} == {STYLES[style][1]}
    assert tokenizer.decode([tokenizer.encode(answer) for answer in ANSWERS]) == ANSWERS


@pytest.mark.parametrize("style", WITH_SYSTEM)
def test_a_system_turn_stands_where_the_template_puts_it(style: str, tmp_path: Path) -> None:
    """Once, in front of the question, in the place of a default."""
    tokenizer = CheckpointTokenizer.load(folder_of(style, tmp_path))
    text = tokenizer.writer.prompt(replace(CHAT, system="Count for me."))
    before, system, after = text.partition("Count for me.")
    assert (system, after.count("Count for me."), CHAT.user in after) == ("Count for me.", 0, True)
    assert "You help." not in text
    assert "You are an assistant." not in text
    if style != "mistral":
        assert before.endswith("system\n" if style != "llama3" else "system<|/head|>\n\n")


def test_a_template_without_room_for_a_system_turn(tmp_path: Path) -> None:
    tokenizer = CheckpointTokenizer.load(folder_of("gemma", tmp_path))
    for call in (tokenizer.encode_prompts, tokenizer.encode_chats):
        with pytest.raises(InputError) as caught:
            call([CHAT, replace(CHAT, system="Count for me.")], 300)
        said = (
            "row 1: the chat template refuses a system prompt (System role not supported): use chats without one"
        )
        assert str(caught.value) == said


@pytest.mark.torch
@pytest.mark.parametrize("style", STYLES)
def test_transformers_writes_the_same(style: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = CheckpointTokenizer.load(folder_of(style, tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for system in (None, "Count for me.") if style in WITH_SYSTEM else (None,):
        chat = replace(CHAT, system=system)
        said = [{"role": "system", "content": system}] * (system is not None)
        said += [{"role": "user", "content": chat.user}]
        asked = theirs.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        assert ours.writer.prompt(chat) == asked
        ids = ours.encode_prompts([chat], 300)
        expected = theirs(asked, add_special_tokens=False)["input_ids"]
        assert ids.tokens[0, ids.padding[0] :].tolist() == expected
        said += [{"role": "assistant", "content": chat.answer}]
        whole = theirs.apply_chat_template(said, tokenize=False)
        assert whole.startswith(ours.writer.whole(chat, asked))
