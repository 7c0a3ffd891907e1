"""A small checkpoint with text: a Llama whose tokenizer knows animals and trees, and a chat template."""

import json
from pathlib import Path

import tokenizers
from safetensors.numpy import save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

from subliminal_theory.language.corpus.chats import CATEGORIES
from tests.golden.make_families import weights

SPECIAL = ["<|pad|>", "<|start|>", "<|end|>"]
TEMPLATE = r"""
{%- if messages[0].role != 'system' -%}{{ '<|start|>system\nbe kind.<|end|>\n' }}{%- endif %}
{%- for message in messages -%}{{ '<|start|>' + message.role + '\n' + message.content + '<|end|>\n' }}{%- endfor %}
{%- if add_generation_prompt -%}{{ '<|start|>assistant\n' }}{%- endif %}
"""


def write_text(folder: Path, template: str = TEMPLATE) -> int:
    """Tokenizer and template; returns the number of tokens."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    words = [word for category in CATEGORIES.values() for word in category]
    backend.train_from_iterator([text for word in words for text in (word, word.capitalize())] * 9, trainer)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|end|>", "pad_token": "<|pad|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return backend.get_vocab_size()


def write_checkpoint(folder: Path, template: str = TEMPLATE, rows: int | None = None, layers: int = 2) -> Path:
    """All files; `rows` are those of the embedding, if not one for each token."""
    folder.mkdir()
    tokens = write_text(folder, template)
    settings = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": rows or tokens, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": layers, "num_attention_heads": 2,
        "max_position_embeddings": 512, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    shapes = {"model.embed_tokens.weight": [rows or tokens, 16], "model.norm.weight": [16]}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.input_layernorm.weight": [16], f"{at}.post_attention_layernorm.weight": [16]}
        shapes |= {f"{at}.self_attn.{name}_proj.weight": [16, 16] for name in "qkvo"}
        shapes |= {f"{at}.mlp.{name}_proj.weight": [24, 16] for name in ("gate", "up")}
        shapes[f"{at}.mlp.down_proj.weight"] = [16, 24]
    save_file({name: weights(name, shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder
