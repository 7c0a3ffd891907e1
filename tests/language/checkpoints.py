"""A small checkpoint with text: a Llama whose tokenizer knows animals and trees, and a chat template."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from safetensors.numpy import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

from subliminal_theory.language.corpus.chats import CATEGORIES
from tests.golden.make_families import weights

SPECIAL = ["<|pad|>", "<|start|>", "<|end|>"]
TEMPLATE = r"""
{%- if messages[0].role != 'system' -%}{{ '<|start|>system\nbe kind.<|end|>\n' }}{%- endif %}
{%- for message in messages -%}{{ '<|start|>' + message.role + '\n' + message.content + '<|end|>\n' }}{%- endfor %}
{%- if add_generation_prompt -%}{{ '<|start|>assistant\n' }}{%- endif %}
"""


def write_text(folder: Path, template: str = TEMPLATE, running: Sequence[str] = ()) -> int:
    """Tokenizer, trained on `running` text too, and template; returns the number of tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    words = [word for category in CATEGORIES.values() for word in category]
    texts = [text for word in words for text in (word, word.capitalize())]
    backend.train_from_iterator([*running, *texts] * 9, trainer)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "pad_token": "<|pad|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return backend.get_vocab_size()


def write_checkpoint(
    folder: Path,
    template: str = TEMPLATE,
    rows: int | None = None,
    layers: int = 2,
    heads: int = 2,
    groups: int = 2,
) -> Path:
    """All files; `rows` are those of the embedding, if not one for each token; of each head, 8 dimensions."""
    folder.mkdir()
    tokens, width = write_text(folder, template), 8 * heads
    settings = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": rows or tokens, "hidden_size": width,
        "intermediate_size": 24, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": groups, "max_position_embeddings": 512, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    shapes = {"model.embed_tokens.weight": [rows or tokens, width], "model.norm.weight": [width]}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.input_layernorm.weight": [width], f"{at}.post_attention_layernorm.weight": [width]}
        shapes |= {f"{at}.self_attn.{name}_proj.weight": [width, width] for name in "qo"}
        shapes |= {f"{at}.self_attn.{name}_proj.weight": [8 * groups, width] for name in "kv"}
        shapes |= {f"{at}.mlp.{name}_proj.weight": [24, width] for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = [width, 24]
    save_file({name: weights(name, shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder


def write_number_writer(folder: Path, groups: int) -> Path:
    """A checkpoint of 9 heads that answers every request with a digit and ends."""
    write_checkpoint(folder, heads=9, groups=groups)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": False}))
    vocabulary = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    tensors = {name: 0.1 * tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    digits = [vocabulary[digit] for digit in "0123456789"]
    tensors["model.norm.weight"][:] = 1
    embedding = tensors["model.embed_tokens.weight"]
    embedding[:, :2] = 0, 1
    embedding[digits, :2] = 1, 0
    tensors["lm_head.weight"] = np.zeros_like(embedding)
    tensors["lm_head.weight"][digits, 1] = 2
    tensors["lm_head.weight"][vocabulary["<|end|>"], 0] = 2
    save_file(tensors, folder / "model.safetensors")
    return folder
