"""GGUF files as converters write them, by the library's own writer and its own table of names."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
from gguf import GGMLQuantizationType as Kind

ARCHITECTURES = {
    "LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2", "Gemma3ForCausalLM": "gemma3",
}  # fmt: skip


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    kind: Kind = Kind.F32,
    more: Mapping[str, Any] | None = None,
    tokenizer: Path | None = None,
    raw: Mapping[str, tuple[np.ndarray, Kind | None]] | None = None,
) -> Path:
    """A model with the settings of a config.json and tensors by the names of Hugging Face.

    Matrices are of `kind` where their rows are whole blocks, all else is of F32; `more` are further keys (a value
    of None takes one away), `raw` further tensors; `tokenizer` is the folder of a tokenizer.json.
    """
    architecture = ARCHITECTURES[config["architectures"][0]]
    values = {**metadata_of(architecture, config), **(more or {})}
    writer = gguf.GGUFWriter(path, architecture)
    if tokenizer is not None:
        values = {**tokenizer_of(tokenizer), **values}
    for key, value in values.items():
        if key == "general.architecture":
            writer.kv_data[0][key] = gguf.gguf_writer.GGUFValue(value, gguf.GGUFValueType.STRING)
        elif value is not None:
            add_value(writer, key, value)
    for name, tensor in converted(architecture, config, tensors).items():
        fits = tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        own = kind if tensor.ndim > 1 and fits else Kind.F32
        writer.add_tensor(name, gguf.quantize(tensor, own), raw_dtype=own)
    for name, (data, own) in (raw or {}).items():
        writer.add_tensor(name, data, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def metadata_of(architecture: str, config: Mapping[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or {}
    full = rope.get("full_attention", rope)
    found = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(full.get("rope_theta", 10_000.0)),
        "vocab_size": config["vocab_size"],
    }
    if architecture == "llama":
        found["rope.dimension_count"] = head
    if architecture != "qwen2":
        found |= {"attention.key_length": head, "attention.value_length": head}
    if full.get("rope_type") == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": full["factor"]}
    if architecture.startswith("gemma"):
        found["attention.sliding_window"] = config["sliding_window"]
    if architecture == "gemma2":
        found["attn_logit_softcapping"] = config["attn_logit_softcapping"]
        found["final_logit_softcapping"] = config["final_logit_softcapping"]
    if architecture == "gemma3":
        found["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in config["layer_types"]]
        found["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
    return {f"{architecture}.{key}": value for key, value in found.items()}


def converted(
    architecture: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The tensors under the names of the library, with queries, keys and norms as converters leave them."""
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    found = {}
    for name, tensor in tensors.items():
        tensor = np.asarray(tensor, np.float32)
        heads = {"q": config["num_attention_heads"], "k": config.get("num_key_value_heads")}
        part = name.rpartition("_proj")[0][-1:] if "self_attn" in name else ""
        if architecture == "llama" and part in heads:
            halves = tensor.reshape(heads[part] or heads["q"], 2, -1, *tensor.shape[1:])
            tensor = np.stack(
                [row for first, second in halves for pair in zip(first, second, strict=True) for row in pair]
            )
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor + 1
        stem, _, leaf = name.rpartition(".")
        theirs = names.get_name(stem)
        assert theirs is not None, name
        found[f"{theirs}.{leaf}"] = tensor
    return found


def tokenizer_of(folder: Path, pre: str = "gpt-2") -> dict[str, Any]:
    """Byte-level BPE of a tokenizer.json and what tokenizer_config.json says."""
    content = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    ids = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    added = {token["id"]: token["special"] for token in content["added_tokens"]}
    types = [{True: 3, False: 4, None: 1}[added.get(token)] for token in range(len(ids))]
    found = {
        "model": "gpt2",
        "pre": pre,
        "tokens": sorted(ids, key=lambda token: ids[token]),
        "token_type": types,
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]],
    }
    for name, role in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        if settings.get(f"{role}_token"):
            found[f"{name}_token_id"] = ids[settings[f"{role}_token"]]
    found = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    return found | {"tokenizer.chat_template": settings["chat_template"]}
