"""One tiny model of every family, as `transformers` configures it."""

from typing import Any

SMALL: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]
PLAIN_GEMMA = {"query_pre_attn_scalar": 20, "sliding_window": 4, "num_hidden_layers": 3, "layer_types": WINDOWS}

WITHOUT_HEAD = {name: value for name, value in SMALL.items() if name != "head_dim"}
NEOX = {**WITHOUT_HEAD, "hidden_size": 64}
del NEOX["num_key_value_heads"]


def rope(kind: str = "default", base: float = 1e4, **more: float) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": base, **more}


# name: (first part of the class names, settings)
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**SMALL, "rope_parameters": rope()}),
    "llama-mqa-bias": ("Llama", {**SMALL, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("Llama", {**SMALL, "rope_parameters": LLAMA3}),
    "llama-linear-rope": ("Llama", {**SMALL, "rope_parameters": rope("linear", factor=2.5)}),
    "smollm": (
        "Llama",
        {
            **SMALL, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 10, "hidden_size": 30,
            "tie_word_embeddings": True,
        },
    ),
    "mistral": ("Mistral", {**SMALL, "sliding_window": None}),
    "mistral-window": ("Mistral", {**SMALL, "sliding_window": 3}),
    "qwen2": ("Qwen2", {**WITHOUT_HEAD, "tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2", {**WITHOUT_HEAD, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
    ),
    "qwen3": ("Qwen3", {**SMALL, "head_dim": 12, "tie_word_embeddings": True}),
    "olmo2": ("Olmo2", WITHOUT_HEAD),
    "gemma2": (
        "Gemma2", {**SMALL, **PLAIN_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.0}
    ),
    "gemma3": (
        "Gemma3",
        {
            **SMALL, **PLAIN_GEMMA,
            "rope_parameters": {
                "sliding_attention": rope(base=100.0), "full_attention": rope("linear", 1000.0, factor=2.0)
            },
        },
    ),
    "gpt2": ("GPT2", {"vocab_size": 50, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "neox": ("GPTNeoX", {**NEOX, "rope_parameters": rope(base=100.0, partial_rotary_factor=0.25)}),
    "neox-serial": ("GPTNeoX", {**NEOX, "use_parallel_residual": False, "tie_word_embeddings": True}),
}  # fmt: skip
