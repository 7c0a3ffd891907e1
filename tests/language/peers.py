"""Random models of `transformers`, with which parity tests compare."""

from typing import Any

import numpy as np
import pytest


def config_of(stem: str, settings: dict[str, Any]) -> Any:
    """The configuration of the classes whose names begin so."""
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, stem + ("TextConfig" if stem == "Gemma3" else "Config"))(**settings)


def peer_of(config: Any, *, rounded: bool = False, **how: Any) -> Any:
    """A random model, every parameter of which matters; rounded to bfloat16 if so."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    peer = transformers.AutoModelForCausalLM.from_config(config, **how).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) / max(1, parameter.dim()) ** 0.5)
            if rounded:
                parameter.copy_(parameter.bfloat16())
    return peer


def logits_of(peer: Any, tokens: np.ndarray, padding: np.ndarray | None = None) -> np.ndarray:
    """Logits of rows; with padding on the left, which is masked, positions count from behind it."""
    torch, given = pytest.importorskip("torch"), {"input_ids": np.asarray(tokens, int)}
    if padding is not None:
        columns = np.arange(tokens.shape[1])
        given["attention_mask"] = (columns >= padding[:, None]).astype(int)
        given["position_ids"] = np.maximum(columns - padding[:, None], 0)
    with torch.no_grad():
        return peer(**{name: torch.tensor(array) for name, array in given.items()}).logits.numpy()
