"""Gemma 3 (its text model): Gemma 2 with norms of query and key, and other rotary positions in windows."""

from typing import Any

from subliminal_theory.errors import InputError
from subliminal_theory.language.hub.families import llama
from subliminal_theory.language.hub.families.gemma2 import read_gemma
from subliminal_theory.language.hub.settings import Settings
from subliminal_theory.language.model.config import TransformerConfig

ARCHITECTURE, MODEL_TYPE = "Gemma3ForCausalLM", "gemma3_text"
tensors = llama.tensors
_CONTEXT = 131_072


def read(settings: Settings) -> TransformerConfig:
    """The configuration of the transformer."""
    settings.take("attn_logit_softcapping")  # has no effect in this family
    windows = _windows(settings)
    local = _rotary(settings)
    return read_gemma(
        settings,
        context=_CONTEXT,
        head_norm="head",
        logit_cap=settings.take("final_logit_softcapping"),
        window_rope_base=local if windows else None,
        **windows,
    )


def _windows(settings: Settings) -> dict[str, Any]:
    pattern = settings.take("sliding_window_pattern", 6)
    if settings.given.get("layer_types") is None:
        settings.require_agreement("_sliding_window_pattern", pattern, "sliding_window_pattern")
    settings.take("_sliding_window_pattern")
    window = settings.take_or_none("sliding_window", 4096)
    return settings.windows(lambda layer: (layer + 1) % pattern != 0, window)


def _rotary(settings: Settings) -> float:
    """The rotary base in windowed layers. Leaves the parameters of the other layers in the old format."""
    base, local = settings.take("rope_theta", 1_000_000.0), settings.take("rope_local_base_freq", 10_000.0)
    both = settings.take("rope_parameters", {})
    full = {**both.get("full_attention", {}), **settings.take("rope_scaling", {})}
    settings.given["rope_scaling"] = {"rope_theta": base, **full}
    in_windows = settings.rotary_of(both.get("sliding_attention", {}), local, _CONTEXT)
    if "rope_factor" in in_windows:
        raise InputError(f"{settings.where}: scaled rotary positions in windows are not supported")
    return float(in_windows["rope_base"])
