"""Gemma 3 (its text model): Gemma 2 with norms of query and key, and other rotary positions in windows."""

from subliminal_theory.errors import InputError
from subliminal_theory.language.hub.families import llama
from subliminal_theory.language.hub.families.gemma2 import read_gemma
from subliminal_theory.language.hub.settings import Settings
from subliminal_theory.language.model.config import TransformerConfig

ARCHITECTURE = "Gemma3ForCausalLM"
tensors = llama.tensors


def read(settings: Settings) -> TransformerConfig:
    """The shape."""
    pattern = settings.take("sliding_window_pattern", settings.take("_sliding_window_pattern", 6))
    settings.take("_sliding_window_pattern")
    windows = settings.windows(lambda layer: (layer + 1) % pattern != 0)
    local = settings.take("rope_local_base_freq", 10_000.0)
    both = settings.take("rope_parameters")
    if both is not None:
        in_windows = settings.rotary_of(both.get("sliding_attention", {}), local)
        if "rope_factor" in in_windows:
            raise InputError(f"{settings.where}: scaled rotary positions in windows are not supported")
        local = in_windows["rope_base"]
        settings.given["rope_parameters"] = both.get("full_attention", {})
    settings.given.setdefault("rope_theta", 1_000_000.0)
    base = float(local) if windows else None
    return read_gemma(settings, head_norm="head", window_rope_base=base, **windows)
